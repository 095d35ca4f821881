"""The recipe ``auto``: what a run leaves open is chosen for its images and its machine, with a reason for each choice.

Where the numbers come from stands in docs/recipes.md. Whatever was given is kept, and what is chosen follows from it.
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
_SMALLEST_BATCH = 8  # fewer images give statistics and mixing nothing to work on
_FEWEST_STEPS = 8  # per epoch: fewer, larger batches repeat the same negatives
_BUDGET = {"cpu": 420, "cuda": 4000}  # steps of a run; 420 of 64 images recover from the dip of the first hundred
_MOST_EPOCHS = 200  # the paper's
_RATE = 0.03  # at 64 images
_LARGEST_QUEUE = 65536
_MEMORY = 4.2  # times that the key encoder's average is renewed over a run
_PROBED = 64  # images whose size is looked up
_GRID = 32  # stride of the networks' last stage, pixels
_VIT_SIDE = 224  # pixels


@dataclass(frozen=True)
class Choice:
    """A value that the recipe chose.

    Args:
        option: its dotted name.
        value: what was chosen.
        reason: why.
    """

    option: str
    value: Any
    reason: str


def with_saved(config: TrainConfig, state: Mapping[str, Any] | None, ranks: Ranks) -> TrainConfig:
    """What is left open as the checkpoint of a resumed run has it: another machine chooses nothing anew.

    BatchNorm's mode follows from the number of processes: another number leaves it open.

    Args:
        config: as it was given.
        state: the checkpoint's, or None for a run that begins.
        ranks: the processes.
    """
    if state is None:
        return config
    saved, found = json.loads(state["config"]), {}
    same_number = len(state["rank_buffers"]) == ranks.world_size
    for option in AUTO_OPTIONS:
        value = _value(saved, option)
        open_still = is_auto(_option(config, option)) and (same_number or option != "model.bn")
        if open_still and value is not None:
            found[option] = value
    return _replaced(config, found)


def settle(config: TrainConfig, manifest: Manifest, ranks: Ranks) -> tuple[TrainConfig, list[Choice]]:
    """The configuration with a value for everything that ``recipe: auto`` was left to choose, and the choices.

    Args:
        config: as it was given; one without open values comes back unchanged.
        manifest: the training images.
        ranks: the processes and their device.

    Raises:
        ValueError: too few images to train on, or a network that there is not.
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
    """Chooses one option after the other; later ones follow from earlier ones, chosen or given."""

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
        """Images of one pass: balanced batches draw the source at their own share."""
        data, manifest = self.config.data, self.manifest
        if data.replay_mode == "balanced" and data.replay_share < 1:
            return round(manifest.num_target / (1 - data.replay_share))
        return len(manifest)

    @property
    def _steps(self) -> int:
        """Of all epochs: a run that ``max_steps`` ends may go on."""
        return self.config.optim.epochs * self._steps_per_epoch

    def _size(self) -> tuple[int, str]:
        network = build_backbone(self.config.model.arch, self.config.model.stem).eval()
        usual, step, sides = network.input_size, network.patch or _GRID, []
        if network.patch is not None:  # ViTs are trained at 224 px; larger sizes come at the end, for dense tasks
            usual = min(usual, _VIT_SIDE // step * step)
        paths = self.manifest.paths[: self.manifest.num_target]
        for path in paths[:: max(1, len(paths) // _PROBED)]:
            try:
                sides.append(min(image_size(path)))
            except BadImageError:  # the streams' affair, under data.on_bad_file
                continue
        side = int(statistics.median(sides)) if sides else usual
        fitting = max(step, side * 7 // 8 // step * step)
        if fitting >= usual:
            return usual, f"the network's own; the shorter side of the target images is {side} px"
        with torch.no_grad():
            try:
                network(torch.zeros(1, 3, fitting, fitting))
            except (AssertionError, RuntimeError, ValueError):
                return usual, f"the network takes no other, though the target images have {side} px"
        return fitting, f"the shorter side of the target images is {side} px, and more would be enlarged"

    def _replay_fraction(self) -> tuple[float, str]:
        if not self.manifest.source_total:
            return 0.1, "without effect: there is no source"
        return self.manifest.fraction, f"{self.manifest.num_source} source images, no more than target images"

    def _batch_size(self) -> tuple[int, str]:
        world = self.ranks.world_size
        largest = _LARGEST_BATCH[self.kind] * (world if self.kind == "cuda" else 1)
        batch = largest
        while batch > _SMALLEST_BATCH and self._images // batch < _FEWEST_STEPS:
            batch //= 2
        batch = max(2, min(batch, self._images) // world) * world
        if batch == largest:
            return batch, "the largest on this machine"
        steps = self._images // batch
        return batch, f"{self._images} images are {steps} such steps per epoch, and {2 * batch} of them too few"

    def _bn(self) -> tuple[str, str]:
        if self.ranks.world_size > 1:
            return "shuffle", "several devices: no image shares its batch with its own key"
        return "plain", "statistics of whole batches; networks without BatchNorm have none"

    def _queue_size(self) -> tuple[int, str]:
        union, batch = len(self.manifest), self.config.data.batch_size
        useful = max(batch, union - batch)
        size = min(_LARGEST_QUEUE, 2 ** int(math.log2(useful)))
        if size == _LARGEST_QUEUE:
            return size, "the paper's"
        return size, f"at most one key of each of {union} images: none meets an older one of its own"

    def _epochs(self) -> tuple[int, str]:
        budget = _BUDGET[self.kind]
        epochs = min(_MOST_EPOCHS, max(1, round(budget / self._steps_per_epoch)))
        steps = epochs * self._steps_per_epoch
        return epochs, f"{steps} steps, for a budget of {budget} on a {'GPU' if self.kind == 'cuda' else 'CPU'}"

    def _key_momentum(self) -> tuple[float, str]:
        steps = self._steps
        momentum = round(1 - min(0.02, max(0.001, _MEMORY / steps)), 4)
        return momentum, f"the key encoder follows within {round(1 / (1 - momentum))} of {steps} steps"

    def _preset(self) -> dict[str, Any]:
        """Values of the optimizer that was chosen; none of SGD's, whose rates were measured here."""
        model, optim = self.config.model, self.config.optim
        return preset_options(family_of(model.arch), model.arch, optim.epochs, optim.optimizer)

    def _lr(self) -> tuple[float, str]:
        found = self._preset().get("optim.lr")
        if found is not None:
            rate = found if self.config.optim.scale_lr else found * self.config.data.batch_size / 256
            return float(f"{rate:.3g}"), f"MoCo v3's for {self.config.optim.optimizer}, in proportion to the batch"
        batch = self.config.data.batch_size
        per_image = _RATE / 64 * (256 if self.config.optim.scale_lr else batch)
        return float(f"{per_image:.3g}"), f"{_RATE:g} at 64 images, in proportion to the batch"

    def _warmup_epochs(self) -> tuple[float, str]:
        found = self._preset().get("optim.warmup_epochs")
        if found is not None:
            return found, f"a tenth of the epochs, as {self.config.optim.optimizer} needs"
        return 0.0, "the rate begins at its largest: runs of a few hundred steps have no time to lose"

    def _select(self) -> tuple[str, str]:
        if not self.config.verdict.looks:
            return "last", "there are no looks to judge by"
        return "judged", "a run that is no better than its start exports the start's weights, and says so"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _option(config: TrainConfig, option: str) -> Any:
    group, _, name = option.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def _value(saved: Mapping[str, Any], option: str) -> Any:
    group, _, name = option.rpartition(".")
    return (saved.get(group, {}) if group else saved).get(name)


def _replaced(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values of dotted options."""
    groups: dict[str, dict[str, Any]] = {}
    for option, value in values.items():
        group, _, name = option.rpartition(".")
        groups.setdefault(group, {})[name] = value
    changes = {group: dataclasses.replace(getattr(config, group), **named) for group, named in groups.items() if group}
    return dataclasses.replace(config, **groups.get("", {}), **changes)
