"""Writing a run's checkpoints and its exported backbone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastuft.config import RuntimeConfig
from fastuft.model import export_backbone
from fastuft.runfolder import CheckpointError, FolderLostError, Progress, RunFolder, RunLock
from fastuft.trainer.averaging import StartAverage
from fastuft.trainer.distributed import LostRankError
from fastuft.trainer.finite import check_weights
from fastuft.trainer.learner import Learner
from fastuft.trainer.learner_state import backbone_of, queues_agree, state_of
from fastuft.trainer.recipe import Choice


class Saver:
    """Writes the checkpoints from which the run can resume.

    Args:
        folder: the run folder.
        lock: the lock on the folder; None except on the main rank.
        learner: the run's learner.
        runtime: how many checkpoints to keep.
        average: average of the weights, which is exported.
        config: the configuration as nested mappings; part of each checkpoint.
        given: the configuration as it was given; part of each checkpoint.
        choices: what the recipe chose at the first start; part of each checkpoint.
        content_hash: digest of the training images; part of each checkpoint.
        init_report: the report on the tensors of ``init``; part of each checkpoint.
        backbone_file: the file to export the backbone to at each save.
    """

    def __init__(
        self,
        folder: RunFolder,
        lock: RunLock | None,
        learner: Learner,
        runtime: RuntimeConfig,
        *,
        average: StartAverage,
        config: dict[str, Any],
        given: dict[str, Any],
        choices: list[Choice],
        content_hash: str,
        init_report: dict[str, Any] | None,
        backbone_file: Path,
    ) -> None:
        self.average, self.backbone_file = average, backbone_file
        self.folder, self.lock, self.learner, self.runtime = folder, lock, learner, runtime
        self.constant = {
            "init_report": init_report,
            "content_hash": content_hash,
            "model_config": config["model"],
            "config": json.dumps(config),
            "given_config": json.dumps(given),
            "choices": json.dumps([asdict(choice) for choice in choices]),
        }

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and the exported backbone, after checking that weights are finite and queues agree.

        Raises:
            NonFiniteLossError: the weights are not finite.
            LostRankError: the ranks have different queues.
            CheckpointError: a file could not be written.
            FolderLostError: the run folder is gone.
        """
        ranks = self.learner.ranks
        check_weights(self.learner, progress.global_step, self.folder.checkpoints)
        if not queues_agree(self.learner):
            raise LostRankError(f"the key queues of the processes differ {where(progress, self.folder)}")
        state = {**state_of(self.learner), **progress.as_dict(), **self.constant}
        failure: CheckpointError | FolderLostError | None = None
        if self.lock is not None:
            try:
                self.lock.check()
                self._write(state, progress.global_step)
            except (CheckpointError, FolderLostError) as error:
                failure = error
        reasons = ranks.gather_objects(None if failure is None else str(failure))
        if reasons[0] is not None:
            raise failure or CheckpointError(reasons[0])

    def _write(self, state: dict[str, Any], step: int) -> None:
        runtime, checkpoints = self.runtime, self.folder.checkpoints
        checkpoints.save(step, state, keep_last=runtime.keep_last, keep_every=runtime.keep_every)
        path = self.backbone_file
        try:
            export_backbone(self.average.of(backbone_of(self.learner, state)), path)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written ({error.strerror}); the last good checkpoint is "
                f"{checkpoints.last_good()}. Free some disk space and continue with resume=auto."
            ) from error


def where(progress: Progress, folder: RunFolder) -> str:
    """How far a run was and how to continue, for a message."""
    return (
        f"at step {progress.global_step}; the last good checkpoint is {folder.checkpoints.last_good()}. Continue with "
        "resume=auto, on any number of processes"
    )
