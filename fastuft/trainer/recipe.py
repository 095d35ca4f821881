"""The recipe ``auto``: chooses the options that are left open for the images and the machine, and gives a reason for each.

Given options are kept, and the choices follow from them. docs/recipes.md says where the numbers come from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastuft.config import AUTO_OPTIONS, TrainConfig, family_of, is_auto, preset_options
from fastuft.data import BadImageError, Manifest, image_size
from fastuft.model import build_backbone
from fastuft.trainer.distributed import Ranks

_LARGEST_BATCH = {"cpu": 64, "cuda": 256}
_SMALLEST_BATCH = 8  # too few images make batch statistics and mixing meaningless
_FEWEST_STEPS = 8  # per epoch; with fewer, larger batches the negatives repeat
_BUDGET = {"cpu": 840, "cuda": 4000}  # steps of a run; on photographs 420 of 64 images recover from the dip, 840 gain
_MOST_EPOCHS = 200  # as in the paper
_RATE = 0.03  # learning rate at batch size 64
_START_SHARE = 0.2  # measured on photographs: docs/recipes.md
_LARGEST_QUEUE = 65536
_MEMORY = 4.2  # time constants of the key encoder per run
_PROBED = 64  # number of images whose size is read
_GRID = 32  # stride of the networks' last stage, pixels
_VIT_SIDE = 224  # pixels


@dataclass(frozen=True)
class Choice:
    """A value that the recipe chose.

    Args:
        option: dotted name of the option.
        value: the value.
        reason: the reason for it.
    """

    option: str
    value: Any
    reason: str


def with_saved(config: TrainConfig, state: Mapping[str, Any] | None, ranks: Ranks) -> tuple[TrainConfig, list[Choice]]:
    """Fill open options with the values saved in a checkpoint, so that a resumed run keeps its choices on any machine.

    The BatchNorm mode depends on the number of processes and stays open if that number has changed.

    Args:
        config: the configuration as given.
        state: state of the checkpoint, or None for a new run.
        ranks: the processes.

    Returns:
        (the configuration, the choices that were restored).
    """
    if state is None:
        return config, []
    saved, found = json.loads(state["config"]), {}
    same_number = len(state["rank_buffers"]) == ranks.world_size
    for option in AUTO_OPTIONS:
        value = _value(saved, option)
        open_still = is_auto(_option(config, option)) and (same_number or option != "model.bn")
        if open_still and value is not None:
            found[option] = value
    reasons = {choice["option"]: choice["reason"] for choice in json.loads(state.get("choices", "[]"))}
    kept = [Choice(option, value, reasons.get(option, "as in the checkpoint")) for option, value in found.items()]
    return _replaced(config, found), kept


def settle(config: TrainConfig, manifest: Manifest, ranks: Ranks) -> tuple[TrainConfig, list[Choice]]:
    """Choose a value for every open option of ``recipe: auto``.

    Args:
        config: the configuration as given; without open options it is returned unchanged.
        manifest: the training images.
        ranks: the processes and their device.

    Returns:
        (the complete configuration, the choices).

    Raises:
        ValueError: the network is unknown.
    """
    if config.recipe != "auto":
        return config, []
    chooser = _Chooser(config, manifest, ranks)
    for option in AUTO_OPTIONS:
        if is_auto(_option(config, option)):
            value, reason = chooser.choose(option)
            chooser.config = _replaced(chooser.config, {option: value})
            chooser.choices.append(Choice(option, value, reason))
    return chooser.config, chooser.choices


def choices_text(choices: list[Choice], manifest: Manifest, ranks: Ranks) -> str:
    """The choices as one block for the terminal."""
    where = "GPU" if ranks.device.type == "cuda" else "CPU"
    images = f"{manifest.num_target} target and {manifest.num_source} source images on a {where}"
    lines = [f"Chosen for {images} (recipe auto; every option can be set):"]
    shown = [(f"{choice.option} {_shown(choice.value)}", choice.reason) for choice in choices]
    width = max(len(setting) for setting, _ in shown)
    return "\n".join([*lines, *(f"  {setting:<{width}}  {reason}" for setting, reason in shown)])


class _Chooser:
    """Chooses one option after the other; later choices depend on earlier values, chosen or given."""

    def __init__(self, config: TrainConfig, manifest: Manifest, ranks: Ranks) -> None:
        self.config, self.manifest, self.ranks = config, manifest, ranks
        self.kind = "cuda" if ranks.device.type == "cuda" else "cpu"
        self.choices: list[Choice] = []

    def choose(self, option: str) -> tuple[Any, str]:
        """(value, reason) of an option."""
        found: tuple[Any, str] = getattr(self, "_" + option.rpartition(".")[2])()
        return found

    @property
    def _steps_per_epoch(self) -> int:
        return max(1, self._images // self.config.data.batch_size)

    @property
    def _images(self) -> int:
        """Images per epoch; in balanced mode the share of source images is fixed by ``data.replay_share``."""
        data, manifest = self.config.data, self.manifest
        if data.replay_mode == "balanced" and data.replay_share < 1:
            return round(manifest.num_target / (1 - data.replay_share))
        return len(manifest)

    @property
    def _steps(self) -> int:
        """Steps of all epochs; ``max_steps`` is ignored, because a run that it ends can be resumed."""
        return self.config.optim.epochs * self._steps_per_epoch

    def _size(self) -> tuple[int, str]:
        network = build_backbone(self.config.model.arch, self.config.model.stem).eval()
        usual, step, sides = network.input_size, network.patch or _GRID, []
        if network.patch is not None:  # ViTs are trained at 224 px; larger sizes come at the end, for dense tasks
            usual = min(usual, _VIT_SIDE // step * step)
        paths = self.manifest.paths[: self.manifest.num_target]
        for path in paths[:: max(1, len(paths) // _PROBED)]:
            try:
                sides.append(min(image_size(path, self.config.data.max_megapixels)))
            except BadImageError:  # handled by the streams, as data.on_bad_file says
                continue
        if not sides:
            return usual, "the network's own size; no target image could be read"
        side = int(statistics.median(sides))
        fitting = max(step, side * 7 // 8 // step * step)
        if fitting >= usual:
            return usual, f"the network's own size; the shorter side of the target images is {side} px"
        with torch.no_grad():
            try:
                network(torch.zeros(1, 3, fitting, fitting))
            except (AssertionError, RuntimeError, ValueError):
                return usual, f"the network takes no other size, although the target images have {side} px"
        return fitting, f"the shorter side of the target images is {side} px; a larger size would enlarge them"

    def _replay_fraction(self) -> tuple[float, str]:
        if not self.manifest.source_total:
            return 0.1, "no effect: there is no source"
        return self.manifest.fraction, f"{self.manifest.num_source} source images, no more than target images"

    def _batch_size(self) -> tuple[int, str]:
        world = self.ranks.world_size
        largest = _LARGEST_BATCH[self.kind] * (world if self.kind == "cuda" else 1)
        batch = largest
        while batch > _SMALLEST_BATCH and self._images // batch < _FEWEST_STEPS:
            batch //= 2
        batch = max(2, min(batch, self._images) // world) * world
        if batch == largest:
            return batch, "the largest batch for this kind of machine"
        steps = self._images // batch
        return batch, f"{steps} steps per epoch of {self._images} images; a batch of {2 * batch} would leave too few"

    def _bn(self) -> tuple[str, str]:
        if self.ranks.world_size > 1:
            return "shuffle", "several devices: keys are normalized in other batches than their queries"
        return "plain", "statistics of whole batches, if the network has BatchNorm"

    def _queue_size(self) -> tuple[int, str]:
        union, batch = len(self.manifest), self.config.data.batch_size
        useful = max(batch, union - batch)
        size = min(_LARGEST_QUEUE, 2 ** int(math.log2(useful)))
        if size == _LARGEST_QUEUE:
            return size, "as in the paper"
        return size, f"at most one key per image of {union}, so no image meets an older key of itself"

    def _epochs(self) -> tuple[int, str]:
        budget = _BUDGET[self.kind]
        epochs = min(_MOST_EPOCHS, max(1, round(budget / self._steps_per_epoch)))
        steps = epochs * self._steps_per_epoch
        return epochs, f"{steps} steps; the budget on a {'GPU' if self.kind == 'cuda' else 'CPU'} is {budget}"

    def _key_momentum(self) -> tuple[float, str]:
        steps = self._steps
        momentum = round(1 - min(0.02, max(0.001, _MEMORY / steps)), 4)
        return momentum, f"the key encoder averages over {round(1 / (1 - momentum))} of {steps} steps"

    def _preset(self) -> dict[str, Any]:
        """Values for the chosen optimizer; empty for SGD, whose rates were measured here."""
        model, optim = self.config.model, self.config.optim
        return preset_options(family_of(model.arch), model.arch, optim.epochs, optim.optimizer)

    def _lr(self) -> tuple[float, str]:
        found = self._preset().get("optim.lr")
        if found is not None:
            rate = found if self.config.optim.scale_lr else found * self.config.data.batch_size / 256
            return float(
                f"{rate:.3g}"
            ), f"as in MoCo v3 for {self.config.optim.optimizer}, in proportion to the batch size"
        batch = self.config.data.batch_size
        per_image = _RATE / 64 * (256 if self.config.optim.scale_lr else batch)
        return float(f"{per_image:.3g}"), f"{_RATE:g} at batch size 64, in proportion to the batch size"

    def _warmup_epochs(self) -> tuple[float, str]:
        found = self._preset().get("optim.warmup_epochs")
        if found is not None:
            return found, f"a tenth of the epochs, which {self.config.optim.optimizer} needs"
        return 0.0, "no warm-up: a run of a few hundred steps needs the full rate from the start"

    def _start_share(self) -> tuple[float, str]:
        if self.config.init is None:
            return 0.0, "there is no initialization to average with"
        return _START_SHARE, "the exported weights include a fifth of the start, which keeps more of what it knew"

    def _select(self) -> tuple[str, str]:
        if not self.config.verdict.looks:
            return "last", "there are no looks, so there is no verdict"
        return "judged", "a run that is no better than its start exports the weights of the start"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _option(config: TrainConfig, option: str) -> Any:
    group, _, name = option.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def _value(saved: Mapping[str, Any], option: str) -> Any:
    group, _, name = option.rpartition(".")
    return (saved.get(group, {}) if group else saved).get(name)


def _replaced(config: TrainConfig, values: Mapping[str, object]) -> TrainConfig:
    """The configuration with new values for dotted options."""
    groups: dict[str, dict[str, Any]] = {}
    for option, value in values.items():
        group, _, name = option.rpartition(".")
        groups.setdefault(group, {})[name] = value
    changes = {group: dataclasses.replace(getattr(config, group), **named) for group, named in groups.items() if group}
    return dataclasses.replace(config, **groups.get("", {}), **changes)
