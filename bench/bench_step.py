"""The whole training step beside other MoCo steps and beside its encoders alone; loader and end-to-end rates.

Claim: a step costs little more than its encoders, and on a CPU no more than the best of the peers' steps. The work outside
the encoders (loss, its gradient, optimizer, moving average, queue) takes at most half the processor time that it takes in
facebookresearch/moco's step. BatchNorm over groups of the batch is one operator per layer and direction: a ResNet-50 step
with mixing and 8 groups issues 1,330 operators, where plain BatchNorm issues 1,918, moco's step without mixing 2,588, and the
groups one after the other by PyTorch's own operators 16,113. On a GPU, the target is 3% of the step outside the encoders, and
an end-to-end rate within 5% of that on synthetic images. The peers run with the same precision, layout and BatchNorm mode
(plain), from the same weights, and their first losses must agree with ours.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import measure, peer

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("safetensors")

from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastuft import fused
from fastuft.config import AugmentConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from fastuft.data import Batch, Loading, Manifest, TrainStream
from fastuft.device import DTYPES
from fastuft.kernels.problem import BatchNormGradient
from fastuft.loss import LossOptions, info_nce_with_terms
from fastuft.model.grouped_batchnorm import BatchNorm, portable_backward, portable_forward
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.learner import Learner
from fastuft.trainer.learner_setup import build_learner
from fastuft.trainer.recorder import PartTimes
from fastuft.trainer.step import train_step

TAU, MOMENTUM, LR = 0.2, 0.999, 0.015
# Processor time of the best peer's step over ours, and of moco's work outside the encoders over ours, less what shared
# machines vary by.
LEAST_RATIO, LEAST_RATIO_OUTSIDE = 0.9, 1.8
MOST_CALLS, GROUPS = 2000, 8  # operators of a step; groups of a batch of 256 with 32 images each


@dataclass(frozen=True)
class Size:
    """What is trained."""

    arch: str
    stem: str
    side: int
    batch: int
    queue: int
    dim: int

    def __str__(self) -> str:
        return f"{self.arch}, {self.side} px, batch {self.batch}, K {self.queue}"


SIZES = {
    "smoke": [Size("resnet_tiny", "small", 32, 8, 256, 32)],
    "cpu": [Size(arch, "imagenet", 96, 32, 65536, 128) for arch in ("resnet18", "resnet50")],
    "cuda": [Size("resnet50", "imagenet", 224, 256, 65536, 128)],
}


PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}


def slow(value: Any) -> Any:
    """A parameter whose rows `make bench` leaves out; all of them take half an hour on a CPU."""
    return pytest.param(value, marks=pytest.mark.slow)


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = option("--device")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if "size" in metafunc.fixturenames:
        sizes = SIZES["smoke" if option("--smoke") else device]
        metafunc.parametrize("size", [sizes[0], *map(slow, sizes[1:])], ids=lambda size: size.arch)
    if "precision" in metafunc.fixturenames:
        first, *others = PRECISIONS[device]
        metafunc.parametrize("precision", [first, *map(slow, others)])


def config_of(
    size: Size, mix: str = "none", bn: str = "plain", precision: str = "auto", compiled: bool = False
) -> TrainConfig:
    return TrainConfig(
        target="unused",
        out="unused",
        model=ModelConfig(arch=size.arch, stem=size.stem, head_dim=size.dim, bn=bn, bn_group=min(32, size.batch)),  # type: ignore[arg-type]
        method=MethodConfig(queue_size=size.queue, mix=mix, temperature=TAU, key_momentum=MOMENTUM),  # type: ignore[arg-type]
        augment=AugmentConfig(size=size.side),
        data=DataConfig(batch_size=size.batch),
        optim=OptimConfig(lr=LR),
        runtime=RuntimeConfig(precision=precision, compile=compiled),  # type: ignore[arg-type]
    )


def learner_of(size: Size, device: torch.device, **changes: Any) -> Learner:
    return build_learner(config_of(size, **changes), Ranks(0, 1, device))[0]


def images_of(size: Size, device: torch.device, dtype: torch.dtype) -> Callable[[], tuple[Tensor, Tensor]]:
    def draw() -> Tensor:
        images = torch.randn(size.batch, 3, size.side, size.side, device=device, dtype=dtype)
        return images.contiguous(memory_format=torch.channels_last)

    return lambda: (draw(), draw())


def ours(learner: Learner) -> Callable[[Tensor, Tensor], Tensor]:
    steps = itertools.count()

    def step(query: Tensor, key: Tensor) -> Tensor:
        rows = torch.arange(len(query))
        return train_step(learner, Batch(query, key, rows, rows > 0, 0, next(steps)), lambda part: None)[0]

    return step


class MoCoStep:
    """The step of facebookresearch/moco's builder and main file, on the same encoders and the same first queue.

    Logits of the positive and of all negatives are stored side by side for a cross-entropy; parameters are averaged one by
    one; the queue is [D, K], copied for the product, and written by slices at a pointer that the host reads.
    """

    def __init__(self, learner: Learner) -> None:
        self.query = copy.deepcopy(learner.moco.query_encoder)
        self.key = copy.deepcopy(learner.moco.key_encoder)
        self.queue = learner.queue.keys.float().T.contiguous()
        self.pointer = torch.zeros(1, dtype=torch.long)
        self.autocast = learner.autocast
        self.optimizer = torch.optim.SGD(self.query.parameters(), LR, momentum=0.9, weight_decay=1e-4)

    @torch.no_grad()
    def average(self) -> None:
        for own, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
            own.data = own.data * MOMENTUM + other.data * (1.0 - MOMENTUM)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        first = int(self.pointer)
        self.queue[:, first : first + len(keys)] = keys.T
        self.pointer[0] = (first + len(keys)) % self.queue.shape[1]

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / TAU
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        with self.autocast():
            q = F.normalize(self.query(query), dim=1)
            with torch.no_grad():
                self.average()
                k = F.normalize(self.key(key), dim=1)
            loss = self.loss(q, k)
        self.enqueue(k)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class LightlyStep(MoCoStep):
    """The step of lightly's MoCo example: its loss with a memory bank, its moving average."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        ntx = peer("lightly.loss.ntx_ent_loss", "lightly")
        self.update = peer("lightly.models.utils", "lightly").update_momentum
        dim, size = self.queue.shape
        self.criterion = ntx.NTXentLoss(temperature=TAU, memory_bank_size=(size, dim)).to(self.queue.device)
        # The bank hands out its transpose: the rows have to lie there as it keeps them.
        bank = self.criterion.memory_bank
        bank.bank = self.queue if bank.bank.shape == self.queue.shape else self.queue.T.contiguous()

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        self.update(self.query, self.key, m=MOMENTUM)
        with self.autocast():
            q = self.query(query)
            with torch.no_grad():
                k = self.key(key)
            loss = self.criterion(q, k)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def encoders_alone(learner: Learner, passes: int = 1) -> Callable[[Tensor, Tensor], None]:
    """Key forward, query forward and backward: what no step can do without. A mixed query doubles the query's part."""

    def run(query: Tensor, key: Tensor) -> None:
        with torch.no_grad(), learner.autocast():
            learner.key(key)
        for _ in range(passes):
            with learner.autocast():
                q = learner.query(query)
            q.backward(torch.ones_like(q))
        learner.optimizer.zero_grad()

    return run


def processor_seconds(steps: dict[str, Callable], inputs: Callable[[], tuple], rounds: int) -> dict[str, Any]:
    """Median processor time of each step, in alternating rounds on the same inputs; the first round warms up.

    Each round begins with another step: the first of a round finds the caches cold.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        batch = inputs()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = time.process_time()
            steps[name](*batch)
            times[name].append(time.process_time() - begin)
    return {"seconds": {name: statistics.median(own[1:]) for name, own in times.items()}}


def parts(learner: Learner, inputs: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Seconds of each part of one of our steps, as a run logs them."""
    times = PartTimes(learner.ranks.device)
    for number in range(2):
        query, key = inputs()
        rows = torch.arange(len(query))
        times.start()
        train_step(learner, Batch(query, key, rows, rows > 0, 1, number), times.mark)
        harness.synchronize(learner.ranks.device)
        seconds = times.read()  # of the second, the first warms up
    return seconds


STEPS: dict[str, Callable[[Learner], Callable[[Tensor, Tensor], Any]]] = {
    "fastuft": ours,
    "fastuft_compiled": ours,
    "moco": MoCoStep,
    "lightly": LightlyStep,
    "encoders_alone": encoders_alone,
}


def processor_seconds_beside_peers(learner: Learner, inputs: Callable[[], tuple]) -> dict[str, Any]:
    """Our step's processor time beside moco's and, where it is installed, lightly's."""
    steps = {"fastuft": ours(learner), "moco": MoCoStep(learner)}
    if importlib.util.find_spec("lightly") is not None:
        steps["lightly"] = LightlyStep(learner)
    return processor_seconds(steps, inputs, 1 if harness.SMOKE else 5)


@pytest.mark.parametrize("step", [slow(step) if step == "fastuft_compiled" else step for step in STEPS])
def test_step(benchmark, device, size, precision, step):
    compiled = step == "fastuft_compiled"
    if compiled and harness.SMOKE:
        pytest.skip("compiling takes minutes; tests/trainer holds compiled steps")
    learner = learner_of(size, device, precision=precision, compiled=compiled)
    inputs = images_of(size, device, DTYPES[learner.precision])
    function = STEPS[step](learner)
    if step in ("moco", "lightly"):
        batch = inputs()
        theirs = function(*batch)
        torch.testing.assert_close(
            ours(learner)(*batch), theirs.float(), rtol=1e-4 if precision == "fp32" else 1e-2, atol=0
        )
    info: dict[str, Any] = {}
    if step == "fastuft" and device.type == "cpu":
        info = processor_seconds_beside_peers(learner, inputs)
    if step == "fastuft":
        info["parts"] = parts(learner, inputs)
    measure(
        benchmark,
        function,
        inputs,
        group=f"step, {size}, {learner.precision}, plain MoCo",
        baseline=step == "moco",
        graph=False,  # a step draws random numbers on the host
        items=size.batch,
        device=device,
        info=info,
    )
    if "seconds" in info and not harness.SMOKE:
        seconds = dict(info["seconds"])
        own = seconds.pop("fastuft")
        assert min(seconds.values()) >= LEAST_RATIO * own


@pytest.mark.slow
@pytest.mark.parametrize("step", ["plain_bn", "split_bn", "split_bn_portable", "encoders_alone"])
def test_step_with_mixing(benchmark, device, size, step):
    if step == "split_bn_portable" and device.type == "cpu":
        pytest.skip("a row of --device cuda: a CPU has no other path")
    learner = learner_of(size, device, mix="cutmix", bn="split" if step.startswith("split_bn") else "plain")
    with fused.without(fused.BATCHNORM) if step == "split_bn_portable" else contextlib.nullcontext():
        measure(
            benchmark,
            encoders_alone(learner, passes=2) if step == "encoders_alone" else ours(learner),
            images_of(size, device, DTYPES[learner.precision]),
            group=f"step, {size}, {learner.precision}, with mixing",
            baseline=step == "plain_bn",
            graph=False,
            items=size.batch,
            device=device,
        )


class OperatorCalls(TorchDispatchMode):
    """Counts the operators that the host issues; with ``inside``, those of BatchNorm over groups by its portable path."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.calls, self.inside = 0, inside

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.inside and function is torch.ops.fastuft.grouped_batch_norm.default:
            with self:
                return portable_forward(BatchNorm(*args))
        if self.inside and function is torch.ops.fastuft.grouped_batch_norm_backward.default:
            with self:
                return portable_backward(BatchNormGradient(*args))
        self.calls += function.namespace != "prim"  # those are questions about a tensor
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", ["moco", "plain_bn", "split_bn", "split_bn_portable"])
def test_operator_calls(benchmark, device, smoke, step):
    """Counted, not timed, in one step with 8 groups; their number does not depend on the images' size or number.

    The time beside it is that of small images, where a GPU waits for the host. moco: plain BatchNorm, no mixing.
    """
    size = Size("resnet_tiny" if smoke else "resnet50", "imagenet", 32, 2 * GROUPS, 1024, 128)
    split = step.startswith("split_bn")
    config = config_of(size, mix="none" if step == "moco" else "cutmix", bn="split" if split else "plain")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, bn_group=size.batch // GROUPS))
    learner, _ = build_learner(config, Ranks(0, 1, device))
    function = MoCoStep(learner) if step == "moco" else ours(learner)
    inputs = images_of(size, device, DTYPES[learner.precision])
    function(*inputs())  # the first step has no gradients' memory yet
    with fused.without(fused.BATCHNORM) if step == "split_bn_portable" else contextlib.nullcontext():
        with OperatorCalls(inside=step == "split_bn_portable") as counted:
            function(*inputs())
        benchmark.name += f": {counted.calls:,} calls"
        measure(
            benchmark,
            function,
            inputs,
            group=f"operator calls of a step, {size.arch}, {GROUPS} groups",
            baseline=step == "moco",
            graph=False,
            memory=False,
            device=device,
            info={"operator_calls": counted.calls},
        )
    assert smoke or step not in ("plain_bn", "split_bn") or counted.calls <= MOST_CALLS


def outside(learner: Learner) -> Callable[[Tensor, Tensor], None]:
    """Our step without its encoders: loss and its gradient from given embeddings, optimizer, average, queue."""

    def run(q: Tensor, k: Tensor) -> None:
        loss, _, _ = info_nce_with_terms(q, k, learner.queue.keys, LossOptions(TAU, unit_queue=True))
        loss.backward()
        learner.optimizer.step()
        learner.moco.momentum_update_(MOMENTUM)
        learner.queue.enqueue_(k)

    return run


def outside_moco(step: MoCoStep) -> Callable[[Tensor, Tensor], None]:
    def run(q: Tensor, k: Tensor) -> None:
        with step.autocast():
            loss = step.loss(F.normalize(q, dim=1), F.normalize(k, dim=1))
        loss.backward()
        step.optimizer.step()
        step.average()
        step.enqueue(F.normalize(k, dim=1))

    return run


@pytest.mark.parametrize("step", ["fastuft", "moco"])
def test_outside_the_encoders(benchmark, device, size, precision, step):
    learner = learner_of(size, device, precision=precision)
    theirs = MoCoStep(learner)
    for parameter in (*learner.moco.query_encoder.parameters(), *theirs.query.parameters()):
        parameter.grad = torch.randn_like(parameter) * 1e-3

    def embeddings() -> tuple[Tensor, Tensor]:
        dtype = DTYPES[learner.precision]  # as the encoders give them
        q, k = (torch.randn(size.batch, size.dim, device=device, dtype=dtype) for _ in range(2))
        return q.requires_grad_(), k

    functions = {"fastuft": outside(learner), "moco": outside_moco(theirs)}
    info: dict[str, Any] = {}
    if step == "fastuft" and device.type == "cpu":
        info = processor_seconds(functions, embeddings, 1 if harness.SMOKE else 7)
    measure(
        benchmark,
        functions[step],
        embeddings,
        group=f"outside the encoders, {size}, {learner.precision}",
        baseline=step == "moco",
        graph=False,
        device=device,
        info=info,
    )
    if "seconds" in info and not harness.SMOKE:
        assert info["seconds"]["moco"] >= LEAST_RATIO_OUTSIDE * info["seconds"]["fastuft"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, scale) -> str:
    """A folder of JPEGs, some batches of them, larger than the views; beyond 256 they come again."""
    size = SIZES[scale][0]
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(size.batch * {"smoke": 2, "cpu": 3}.get(scale, 8)):
        path = folder / f"{index:05d}.jpg"
        if index >= 256:
            os.link(folder / f"{index % 256:05d}.jpg", path)
            continue
        coarse = generator.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((size.side * 2, size.side * 3 // 2), Image.Resampling.BICUBIC)
        image.save(path, quality=90)
    return str(folder)


@pytest.mark.parametrize("part", ["encoders_alone", "synthetic", "loader", "end_to_end"])
def test_images_a_second(benchmark, device, scale, photos, part):
    """One epoch: of the step on images that lie ready, of the loader alone, of both together."""
    size = SIZES[scale][0]
    learner = learner_of(size, device, mix="cutmix", bn="split")
    config = config_of(size)
    manifest = Manifest.build(photos, None, fraction=0.0, seed=0)
    backbone: Any = learner.moco.query_encoder.backbone
    dtype = DTYPES[learner.precision]
    # On a CPU loader and encoders share the cores: threads as in training. Beside a GPU the loader takes them all.
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    data = dataclasses.replace(config.data, threads=threads)
    loading = Loading.of(data, mean=backbone.mean, std=backbone.std, device=device, dtype=dtype)
    stream = TrainStream(manifest, data, config.augment, loading=loading, seed=0)
    step, alone = ours(learner), encoders_alone(learner, passes=2)
    ready = images_of(size, device, dtype)()
    epochs = itertools.count()

    def one_epoch() -> None:
        if part in ("synthetic", "encoders_alone"):
            for _ in range(stream.steps_per_epoch):
                (step if part == "synthetic" else alone)(*ready)
            return
        for batch in stream.epoch(next(epochs)):
            if part == "end_to_end":
                step(batch.query, batch.key)
        harness.synchronize(device)

    try:
        measure(
            benchmark,
            one_epoch,
            group=f"images per second, {size}, {learner.precision}, with mixing, split BatchNorm",
            baseline=part == "encoders_alone",
            graph=False,
            memory=False,
            rounds=1 if harness.SMOKE else 2 if device.type == "cpu" else 3,
            items=size.batch * stream.steps_per_epoch,
            device=device,
        )
    finally:
        stream.close()
