"""Compares the fused kernels with their portable paths on the current chip, once before their first use.

Each probe runs one operation twice on small inputs, fused and portable. A kernel that raises an error or differs by more
than rounding is not used by this process. The check takes milliseconds once the kernels are compiled.

``python -m fastuft.trainer.kernel_check`` prints its findings as JSON, for a caller that must survive a crash.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from fastuft import fused
from fastuft.device import DTYPES
from fastuft.loss import KeyQueue, mixed_info_nce
from fastuft.mix import cutmix_, mixup_, sample_boxes
from fastuft.model import BatchNorm, grouped_batch_norm, grouped_channels
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.learner import Learner

# Largest difference divided by the largest magnitude: a few units in the last place, plus the reordering of sums.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_GROUP = 4


FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Uses:
    """The kinds of inputs that a run gives its kernels.

    Args:
        dtype: dtype of activations and embeddings.
        width: width D of the embeddings.
        queue: dtype of the queue.
        channels: numbers of channels of the layers with grouped BatchNorm.
    """

    dtype: torch.dtype
    width: int
    queue: torch.dtype
    channels: Sequence[int] = ()

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, fp8 queue" if self.queue == FP8 else name


def uses_of(learner: Learner) -> Uses:
    """The inputs that the learner's steps give the kernels."""
    queue = learner.queue
    kind = queue.keys.dtype if queue.scales is None else FP8
    return Uses(DTYPES[learner.precision], queue.keys.shape[1], kind, grouped_channels(learner.moco))


@dataclass(frozen=True)
class Probe:
    """An operation whose kernel is checked.

    Args:
        kernel: name of the kernel in :mod:`fastuft.fused`.
        run: runs the operation on inputs that are the same at each call, and returns its results.
    """

    kernel: str
    run: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    Args:
        kernel: name of the kernel.
        chip: name of the device.
        reason: why the kernel may not be used, or None.
    """

    kernel: str
    chip: str
    reason: str | None

    def line(self) -> str:
        return f"{self.kernel} on {self.chip}: {self.reason}; the slower portable path is used instead"


def probes(device: torch.device, uses: Uses) -> list[Probe]:
    """A probe of each kernel of a step at the dtypes and widths of the run; for grouped BatchNorm, one per width."""
    dtype, width = uses.dtype, uses.width

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    generator = torch.Generator()

    def loss(gradient: bool) -> Sequence[Tensor]:
        generator.manual_seed(0)
        q, k_a, k_b = (draw(48, width).to(dtype) for _ in range(3))
        queue = KeyQueue(1000, width, generator=generator, dtype=uses.queue).to(device)
        lam = torch.rand(48, generator=generator).to(device)
        q.requires_grad_(gradient)
        value = mixed_info_nce(q, k_a, k_b, lam, queue, reduction="none")
        return torch.autograd.grad(value.sum(), q) if gradient else [value]

    def enqueue() -> Sequence[Tensor]:
        generator.manual_seed(0)
        queue = KeyQueue(20, width, generator=generator, dtype=uses.queue).to(device)
        for _ in range(2):  # the second wraps
            queue.enqueue_(draw(12, width).to(dtype))
        return queue.rows(), queue.pointer

    def mixing() -> Sequence[Tensor]:
        generator.manual_seed(0)
        images = draw(8, 3, 33, 40).to(dtype=dtype, memory_format=torch.channels_last)
        boxes, lam = sample_boxes(4, 33, 40, generator=generator)
        return cutmix_(images.clone(), boxes.to(device), _GROUP), mixup_(images, lam.to(device), _GROUP)

    def batchnorm(channels: int) -> Sequence[Tensor]:
        generator.manual_seed(0)
        x, residual, upstream = (
            draw(8, channels, 9, 7).to(dtype=dtype, memory_format=torch.channels_last) for _ in range(3)
        )
        leaves = [tensor.requires_grad_() for tensor in (x + 1, draw(channels), draw(channels), residual)]
        x, weight, bias, residual = leaves
        out, *statistics = grouped_batch_norm(BatchNorm(x, weight, bias, residual, _GROUP, 1e-5, relu=True))
        return out.detach(), *statistics, *torch.autograd.grad(out, leaves, upstream)

    return [
        Probe(fused.LOSS, lambda: loss(False)),
        Probe(fused.GRADIENT, lambda: loss(True)),
        Probe(fused.ENQUEUE, enqueue),
        Probe(fused.MIXING, mixing),
        *(Probe(fused.BATCHNORM, partial(batchnorm, channels)) for channels in uses.channels),
    ]


def compare(probe: Probe, tolerance: float) -> str | None:
    """Why the kernel of a probe may not be used, or None."""
    try:
        found = probe.run()
    except Exception as error:  # whatever a compiler, a launch or a driver raises: the run continues without the kernel
        return f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    with fused.without(probe.kernel):
        expected = probe.run()
    worst = max(_difference(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    if worst <= tolerance:
        return None
    return f"it differs from the portable path by {worst:.2g} of the largest value, more than {tolerance:.2g}"


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest deviation divided by the largest magnitude; infinite if a value is not finite."""
    found, expected = found.double(), expected.double()
    deviation = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return deviation if deviation == deviation else float("inf")


def check_kernels(
    candidates: Sequence[Probe], dtype: torch.dtype, chip: str, gather: Callable[[dict[str, str]], list[dict[str, str]]]
) -> list[Verdict]:
    """Check every candidate and refuse those that fail on any process.

    Args:
        candidates: the probes to run.
        dtype: dtype of the inputs.
        chip: name of the device, for the message.
        gather: returns the findings of all processes, given those of this one.

    Returns:
        The verdicts on refused kernels, the same on every process.
    """
    own = {probe.kernel: reason for probe in candidates if (reason := compare(probe, TOLERANCE[dtype]))}
    common: dict[str, str] = {}
    for found in gather(own):
        common = found | common
    for kernel, reason in common.items():
        fused.refuse(kernel, reason)
    return [Verdict(kernel, chip, reason) for kernel, reason in common.items()]


def check_before_training(ranks: Ranks, uses: Uses, say: Callable[[str], None]) -> None:
    """Compare the kernels of a run on a GPU, before its first step; one line says which are not used, and why."""
    if ranks.device.type != "cuda":
        return
    chip = torch.cuda.get_device_name(ranks.device)
    for verdict in check_kernels(probes(ranks.device, uses), uses.dtype, chip, ranks.gather_objects):
        say(verdict.line())


def main(device: torch.device, chip: str) -> None:
    """Print the verdict on every kernel at the dtypes of training, as JSON."""
    verdicts = []
    kinds = [Uses(dtype, 128, dtype, (96,)) for dtype in TOLERANCE] + [Uses(torch.bfloat16, 128, FP8)]
    for uses in kinds:
        for probe in probes(device, uses):
            reason = compare(probe, TOLERANCE[uses.dtype])
            verdicts.append(asdict(Verdict(f"{probe.kernel} ({uses})", chip, reason)))
    json.dump(verdicts, sys.stdout)


if __name__ == "__main__":
    main(torch.device("cuda", 0), torch.cuda.get_device_name(0))
