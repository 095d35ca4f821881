"""Which checkpoint a run resumes from, and whether it is the same run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from fastuft.nested import flattened
from fastuft.runfolder import CheckpointError, RunFolder, load_checkpoint
from fastuft.trainer.distributed import Ranks, restart_count

# Settings that must be unchanged, because a checkpoint's state would otherwise mean something else.
_FIXED = {
    "model.arch",
    "model.stem",
    "model.head_dim",
    "model.pool",
    "model.freeze_patch",
    "optim.optimizer",
    "optim.layer_decay",
    "optim.decay_norms",
    "method.queue_size",
    "data.batch_size",
    "data.replay_mode",
    "data.replay_share",
    "data.drop_last",
    "seed",
    "content_hash",
}
# Settings that may change without a warning, because they do not affect what is learned.
_FREE = (
    "out",
    "resume",
    "max_steps",
    "init",
    "target",
    "source",
    "allow_missing",
    "start_share",
    "runtime.",
    "watch.",
    "verdict.",
    "data.",
)


def find_checkpoint(resume: str, folder: RunFolder, ranks: Ranks) -> dict[str, Any] | None:
    """The state to resume from, or None for a folder without a run.

    Args:
        resume: no, auto (the newest whole checkpoint in ``folder``), or a checkpoint's path.
        folder: the run folder.
        ranks: the processes, which must all find the same checkpoint.

    Processes that torchrun restarted after a failure resume from the folder, whatever ``resume`` says.

    Raises:
        ValueError: ``resume`` is no or another run's checkpoint and the folder has a run; it is auto and the folder has
            weights but no checkpoint; or it is older than a checkpoint in the folder.
        CheckpointError: no checkpoint is whole, or the processes see different ones.
    """
    out, state = str(folder.path), None
    if restart_count() and (resume == "no" or folder.checkpoints.all()):
        resume = "auto"
    if resume == "auto":
        newest = folder.checkpoints.newest(load_checkpoint)
        state = newest.content
        for reason in newest.reasons if ranks.is_main and state is not None else ():
            warnings.warn(f"{reason}; the one before it is used", stacklevel=2)
        if newest.reasons and state is None:
            raise CheckpointError(
                f"resume='auto': no checkpoint in {folder.checkpoints.folder} is whole: {newest.reasons[0]}; move the run "
                "away to start a new one"
            )
        if state is None and folder.has_weights:
            raise ValueError(
                f"resume='auto': out={out!r} has an exported backbone but no checkpoint to continue from, and a new run would "
                "overwrite it; restore the checkpoints, choose another out with init set to the backbone, or move it away"
            )
    elif resume != "no":
        state = load_checkpoint(Path(resume))
        if folder.has_weights and Path(resume).resolve().parent != folder.checkpoints.folder.resolve():
            raise ValueError(
                f"resume={resume!r} is none of the checkpoints in out={out!r}, which holds a run already; choose another "
                "out, or one of its own checkpoints"
            )
        later = [path for step, path in folder.checkpoints.all() if step > state["global_step"]]
        if later:
            raise ValueError(
                f"resume={resume!r} is older than {later[0]} in out={out!r}; choose another out, or move the newer "
                "checkpoints away"
            )
    elif folder.has_weights:
        raise ValueError(f"out={out!r} already has a run; continue it with resume=auto, or choose another folder")
    steps = ranks.gather_objects(None if state is None else state["global_step"])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes see checkpoints of different steps in {out} ({steps}); out must be on a file system that "
            "all of them share"
        )
    return state


def check_same_run(
    state: dict[str, Any], config: dict[str, Any], given: dict[str, Any], content_hash: str, *, main: bool
) -> None:
    """Compare a checkpoint's configuration with the current one.

    What the program chooses may differ between machines, and stating its choice explicitly changes nothing. So a setting that
    may change causes a warning only if both the given value and the value in use differ.

    Args:
        state: the checkpoint's state.
        config: the current configuration as it is used, as nested mappings.
        given: the current configuration as it was given.
        content_hash: digest of the training images.
        main: whether to warn about changed settings that affect what is learned.

    Raises:
        ValueError: images or settings have changed, so the state would mean something else.
    """
    before = {**dict(flattened(json.loads(state["config"]))), "content_hash": state["content_hash"]}
    now = {**dict(flattened(config)), "content_hash": content_hash}
    # An older program had fewer options, and did what their defaults say.
    changed = {name: (before[name], value) for name, value in now.items() if name in before and before[name] != value}
    for name, (old, new) in changed.items():
        if name in _FIXED:
            raise ValueError(
                f"resume={config['resume']!r}: {name} was {old!r} in the checkpoint and is {new!r} now; resume with the "
                "same images and settings, or start in another folder"
            )
    given_before, given_now = dict(flattened(json.loads(state["given_config"]))), dict(flattened(given))
    said = [
        f"{name} {old!r} -> {new!r}"
        for name, (old, new) in changed.items()
        if not name.startswith(_FREE) and given_before.get(name) != given_now.get(name)
    ]
    if said and main:
        warnings.warn(f"the run continues with settings that have changed: {', '.join(said)}", stacklevel=2)
