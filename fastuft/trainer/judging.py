"""Looks at the features during finetuning, the verdict that they lead to, and the choice of exported weights."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastuft.atomic import write_whole
from fastuft.config import TrainConfig
from fastuft.data import Manifest
from fastuft.evaluate import Look, Sample, Verdict, best_look, judge, look_at, should_stop
from fastuft.model import Backbone
from fastuft.runfolder import UNSEALED, Progress, RunFolder, damage, seal
from fastuft.trainer.recorder import Recorder

Exported = Literal["judged", "start", "last"]


@dataclass(frozen=True)
class Judgment:
    """The verdict of a run and its consequences.

    Args:
        verdict: the verdict on the looks.
        exported: which weights ``backbone.safetensors`` has: start, judged or last.
        start_share: share of the start's weights in the others, and in those that were looked at.
        looks: all looks, of which the first is the start.
        seconds: time spent on looks since the run was started or resumed.
    """

    verdict: Verdict
    exported: Exported
    start_share: float
    looks: list[Look]
    seconds: float

    def line(self) -> str:
        """One plain line for the terminal."""
        step = self.verdict.step
        which = {"last": "of the last step", "start": "of the start (unchanged)", "judged": f"of step {step}"}
        averaged = self.start_share and self.exported != "start"
        kept = f", averaged with {100 * self.start_share:g} % of the start's" if averaged else ""
        return f"{self.verdict.line()}. Exported: the weights {which[self.exported]}{kept}."

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the run's summary."""
        return {
            "outcome": self.verdict.outcome,
            "line": self.line(),
            "step": self.verdict.step,
            "exported": self.exported,
            "start_share": self.start_share,
            "start": asdict(self.looks[0]),
            "end": asdict(self.looks[-1]),
            "seconds": self.seconds,
        }


class Judge:
    """The looks of one run; exists only on the main rank.

    With ``select: last``, the exported backbone is that of the last step, as without a verdict. With ``select: judged``, it
    follows the verdict, and the last step's is saved too.

    Args:
        config: the run.
        folder: its folder.
        manifest: its images.
        recorder: writes a row per look; its rows from before a resume are used too.
        device: device of the backbone.
        last_step: the step at which the run ends.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        manifest: Manifest,
        recorder: Recorder,
        *,
        device: torch.device,
        last_step: int,
    ) -> None:
        self.config, self.folder, self.recorder, self.device, self.last_step = (
            config,
            folder,
            recorder,
            device,
            last_step,
        )
        self.selects = config.select == "judged"
        self.looks = [Look.of(row) for row in recorder.earlier if row["kind"] == "look"]
        self.seconds = 0.0
        paths = manifest.paths
        self._target, self._source = paths[: manifest.num_target], paths[manifest.num_target :]
        self._sample: Sample | None = None
        self._start: dict[str, Tensor] | None = _read_features(folder.start_features_file) if self.looks else None

    def missed(self, step: int) -> bool:
        """Whether the look that is due at this step was not taken, as at the start or after a kill."""
        known = {look.step for look in self.looks}
        return due(self.config, step, self.last_step) and step not in known and (step == 0 or 0 in known)

    @property
    def enough(self) -> bool:
        """Whether the rule says to stop and is allowed to."""
        return self.config.stop == "judged" and should_stop(self.looks)

    def look(self, backbone: Backbone, progress: Progress) -> bool:
        """Look at the features of the current weights; returns whether the rule says to stop.

        Raises:
            OSError: a file could not be written.
        """
        if progress.global_step and not self.looks:  # resumed from a run without looks, so there is no start
            return False
        began = time.perf_counter()
        features = self._images().features(backbone, self.device)
        if progress.global_step == 0:
            self._start = features
            write_whole(self.folder.start_features_file, seal(save(features, metadata=UNSEALED)))
        look = look_at(features, self._start, progress.global_step)
        self.looks.append(look)
        self.recorder.write({"kind": "look", "epoch": progress.epoch, "time": time.time(), **asdict(look)})
        if self.selects and progress.global_step:
            self._keep(look)
            self._export()
        self.seconds += time.perf_counter() - began
        return self.enough

    def _images(self) -> Sample:
        if self._sample is None:
            augment = self.config.augment
            self._sample = Sample.take(
                self._target,
                self._source,
                images=self.config.verdict.images,
                size=augment.size,
                flip_p=augment.flip_p,
                seed=self.config.seed,
                batch_size=self.config.data.batch_size,
            )
        return self._sample

    def _keep(self, look: Look) -> None:
        """Keep the weights of this look if it is the best so far."""
        if best_look(self.looks) is not look:
            return
        _copy(self.folder.last_file, self.folder.judged_file(look.step))
        for older in self.folder.judged_files():
            if older != self.folder.judged_file(look.step):
                older.unlink(missing_ok=True)

    def _export(self) -> Exported:
        """Export the weights that the verdict so far selects."""
        verdict = judge(self.looks)
        choices: dict[str, tuple[Exported, Path]] = {
            "better": ("judged", self.folder.judged_file(verdict.step)),
            "no better": ("start", self.folder.start_file),
            "collapsed": ("start", self.folder.start_file),
        }
        exported, file = choices.get(verdict.outcome, ("last", self.folder.last_file))
        if not file.exists():  # removed, or from a step after the one that the run resumed from
            exported, file = "last", self.folder.last_file
        _copy(file, self.folder.backbone_file)
        return exported

    def finish(self) -> Judgment | None:
        """The run's judgment, or None without a look at its start."""
        if not self.looks:
            return None
        # Stopped before its first step, a run has saved nothing that could be exported.
        exported = self._export() if self.selects and self.folder.last_file.exists() else "last"
        return Judgment(judge(self.looks), exported, self.config.start_share, self.looks, self.seconds)


def due(config: TrainConfig, step: int, last_step: int) -> bool:
    """Whether a look is taken after this step: at even intervals, and at the end."""
    looks = config.verdict.looks
    if config.init is None or not looks:
        return False
    return step in {math.ceil(number * last_step / looks) for number in range(looks + 1)}


def _copy(source: Path, target: Path) -> None:
    write_whole(target, source.read_bytes())


def _read_features(file: Path) -> dict[str, Tensor] | None:
    with suppress(OSError, SafetensorError, ValueError):
        if damage(file) is None:
            return dict(load(file.read_bytes()))
    return None
