"""One step: compared with the paper's formulas, and without reading values from the device."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import textwrap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("safetensors")

from fastuft.data import Batch
from fastuft.device import DTYPES, autocast
from fastuft.loss import KeyQueue
from fastuft.mix import sample_boxes, sample_lambda
from fastuft.model import MoCo, batchnorm, grouped_batchnorm
from fastuft.randomness import keyed_seed
from fastuft.trainer import distributed, learner, schedule, step
from fastuft.trainer.distributed import KeyShuffle, Ranks
from fastuft.trainer.learner_setup import build_learner
from fastuft.trainer.optimizer import build_optimizer
from fastuft.trainer.parameter_groups import parameter_groups
from fastuft.trainer.recorder import PartTimes
from fastuft.trainer.step import RECORD, train_step

ALONE = Ranks(0, 1, torch.device("cpu"))


def a_batch(images=16, device="cpu", dtype=torch.float32, epoch=2, step=3):
    generator = torch.Generator().manual_seed(5)
    views = [torch.randn(images, 3, 32, 32, generator=generator) for _ in range(2)]
    query, key = (v.to(device, dtype).contiguous(memory_format=torch.channels_last) for v in views)
    return Batch(query, key, torch.arange(images), torch.zeros(images, dtype=torch.bool), epoch, step)


def run_step(config, batch, ranks=ALONE):
    made, _ = build_learner(config, ranks)
    before = copy.deepcopy(made.moco), copy.deepcopy(made.queue)
    return made, before, train_step(made, batch, lambda part: None)


def cross_entropy(q, k, negatives, tau):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")


MIXES = [("none", "batch", False), *itertools.product(("cutmix", "mixup"), ("batch", "pair"), (False, True))]


@pytest.mark.parametrize("bn", ["plain", "split"])
@pytest.mark.parametrize(("mix", "per", "mix_only"), MIXES)
def test_a_step_equals_the_papers_equations(tiny, mix, per, bn, mix_only):
    method = {"mix": mix, "mix_per": per, "mix_only": mix_only, "mix_weight": 0.5, "temperature": 0.1}
    config = tiny(method=method, model={"bn": bn}, optim={"lr": 0.1})
    batch = a_batch()
    x_q, x_k = batch.query.clone(), batch.key.clone()
    made, (moco, queue), record = run_step(config, batch)

    if bn == "split":  # the key encoder sees the images in another order
        order = torch.from_numpy(KeyShuffle(ALONE, config.seed).permutation(2, 3, 16))
        k = torch.empty(16, 16)
        k[order] = moco.key_encoder(x_k[order])
    else:
        k = moco.key_encoder(x_k)
    k = F.normalize(k.detach())
    tau, negatives = 0.1, queue.keys
    total = l_q = l_m = torch.zeros(())
    if not mix_only:
        l_q = cross_entropy(F.normalize(moco.query_encoder(x_q)), k, negatives, tau).mean()  # Eq. 4
        total = total + l_q
    if mix != "none":
        group = 8 if bn == "split" else 16
        mixed, lam, partner = x_q.clone(), torch.empty(16), torch.empty(16, dtype=torch.long)
        for g in range(16 // group):
            key = (2, 3, g) if per == "pair" else (2, 3)
            generator = torch.Generator().manual_seed(keyed_seed(config.seed, "mix", *key))
            count = group // 2 if per == "pair" else 1
            boxes, share = sample_boxes(count, 32, 32, 1.0, generator) if mix == "cutmix" else (None, None)
            share = sample_lambda(count, 1.0, generator=generator) if share is None else share
            for i in range(group):
                own, other = g * group + i, g * group + group - 1 - i
                draw = min(i, group - 1 - i) if per == "pair" else 0
                partner[own], lam[own] = other, share[draw]
                if mix == "mixup":
                    mixed[own] = share[draw] * x_q[own] + (1 - share[draw]) * x_q[other]
                else:
                    top, left, bottom, right = boxes[draw].tolist()
                    mixed[own, :, top:bottom, left:right] = x_q[other, :, top:bottom, left:right]
        torch.testing.assert_close(batch.query, mixed)
        q_m = F.normalize(moco.query_encoder(mixed))
        both = [cross_entropy(q_m, key, negatives, tau) for key in (k, k[partner])]
        l_m = (lam * both[0] + (1 - lam) * both[1]).mean()  # Eq. 6
        total = total + 0.5 * l_m
    total.backward()

    figures = dict(zip(RECORD, record.tolist(), strict=True))
    assert figures["loss"] == pytest.approx(total.item(), rel=1e-5, abs=1e-5)
    assert figures["loss_q"] == pytest.approx(l_q.item(), rel=1e-5, abs=1e-5)
    assert figures["loss_m"] == pytest.approx(l_m.item(), rel=1e-5, abs=1e-5)
    of = l_m if mix_only else l_q
    assert figures["loss_alignment"] + figures["loss_distribution"] == pytest.approx(of.item(), rel=1e-5, abs=1e-5)
    old = dict(moco.query_encoder.named_parameters())
    for name, parameter in made.moco.query_encoder.named_parameters():  # momentum's first step is plain SGD
        moved = old[name] - 0.1 * (old[name].grad + 1e-4 * old[name])
        torch.testing.assert_close(parameter, moved, rtol=1e-4, atol=1e-5)
        average = made.moco.key_encoder.get_parameter(name)
        torch.testing.assert_close(average, 0.9 * old[name] + 0.1 * parameter)
    torch.testing.assert_close(made.queue.keys[:16], k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.queue.keys[16:], negatives[16:])


def test_gradients_are_clipped(tiny):
    loose, (moco, _), _ = run_step(tiny(optim={"weight_decay": 0.0}), a_batch())
    tight, _, _ = run_step(tiny(optim={"weight_decay": 0.0, "clip_grad": 0.01}), a_batch())

    def moved(made):
        pairs = zip(made.moco.query_encoder.parameters(), moco.query_encoder.parameters(), strict=True)
        return torch.cat([(new - old).detach().flatten() for new, old in pairs]) / 0.05

    assert moved(loose).norm() > 0.1
    assert moved(tight).norm() == pytest.approx(0.01, rel=1e-3)
    assert F.cosine_similarity(moved(tight), moved(loose), dim=0) > 0.999


@pytest.mark.parametrize("images", [6, 7])
@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_the_last_batch_may_be_smaller_and_odd(tiny, mix, images):
    config = tiny(model={"bn": "plain"}, data={"drop_last": False}, method={"mix": mix})
    _, _, record = run_step(config, a_batch(images))
    assert record.isfinite().all()


@pytest.mark.slow
def test_compiled_encoders_give_the_same_step(tiny):
    _, _, eager = run_step(tiny(), a_batch())
    torch._dynamo.reset()
    made, _ = build_learner(tiny(), ALONE)
    made.query = torch.compile(made.query, backend="aot_eager", fullgraph=True)
    made.key = torch.compile(made.key, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(train_step(made, a_batch(), lambda part: None), eager)


READS = {"item", "cpu", "numpy", "tolist", "nonzero", "synchronize", "wait"}
CASTS = {"int", "float", "bool"}
ON_THE_PATH = [
    step.train_step,
    learner.Learner.without_reduction,
    learner.Learner.encode_keys,
    learner.Learner.own_rows,
    learner.Learner.mix_,
    learner.Learner.partners,
    autocast,
    distributed.gather_rows,
    distributed.upload,
    KeyShuffle,
    batchnorm.SplitBatchNorm2d.forward,
    batchnorm.one_statistics_update,
    batchnorm._move_running_statistics,
    grouped_batchnorm.grouped_batch_norm,
    KeyQueue.enqueue_,
    MoCo.momentum_update_,
    schedule.lr_at,
]


@pytest.mark.parametrize("part", ON_THE_PATH, ids=lambda part: part.__qualname__)
def test_no_code_of_a_step_reads_a_tensor_value(part):
    tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert name not in READS, f"line {node.lineno}: .{name}()"
            assert not (isinstance(node.func, ast.Name) and name in CASTS), f"line {node.lineno}: {name}()"


def as_fakes(made, config):
    """The learner on tensors with shapes but without values; call it in a FakeTensorMode."""
    for module in (*made.moco.modules(), made.queue):
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                    is_parameter = tensors is module._parameters
                    tensors[name] = nn.Parameter(fake, value.requires_grad) if is_parameter else fake
    # A GPU's optimizer, which the claim is about.
    groups = parameter_groups(made.moco.query_encoder, config.optim)
    optimizer = build_optimizer(config.optim, groups, torch.device("cuda"))
    return dataclasses.replace(made, optimizer=optimizer)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"mix": "mixup", "mix_per": "pair"}, "optim": {"clip_grad": 1.0}},
        {"model": {"bn": "plain"}},
        {"optim": {"optimizer": "adamw", "layer_decay": 0.9}},
    ],
    ids=["default", "pairs-clipped", "plain", "adamw"],
)
def test_a_step_runs_on_fake_tensors(tiny, changes, precision):
    """On tensors without values, ``.item()`` and similar calls raise, also inside torch's own code."""
    config = tiny(runtime={"precision": precision}, **changes)
    made, _ = build_learner(config, ALONE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = as_fakes(made, config)
        for _ in range(2):  # the first has no momentum yet
            batch = a_batch()
            fakes = [mode.from_tensor(view) for view in (batch.query, batch.key)]
            record = train_step(made, dataclasses.replace(batch, query=fakes[0], key=fakes[1]), lambda part: None)
        with pytest.raises(DataDependentOutputException):
            record[0].item()


@pytest.mark.parametrize("bn", ["plain", "split"])
def test_activations_weights_and_momentum_stay_channels_last(tiny, bn):
    config = tiny(runtime={"precision": "bf16"}, model={"bn": bn})
    made, _ = build_learner(config, ALONE)
    seen = []

    def look(module, inputs, output):
        seen.append((module, inputs[0].dtype, inputs[0].stride(1) == 1, output.stride(1) == 1))

    for module in made.moco.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(look)
    batch = a_batch()
    train_step(made, batch, lambda part: None)
    assert len(seen) == 3 * sum(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in made.moco.query_encoder.modules())
    assert all(inside and outside for _, _, inside, outside in seen)
    assert all(dtype == torch.bfloat16 for module, dtype, *_ in seen if isinstance(module, nn.BatchNorm2d))
    assert batch.query.stride(1) == 1  # mixed in place
    for query, key in zip(made.moco.query_encoder.parameters(), made.moco.key_encoder.parameters(), strict=True):
        momentum = made.optimizer.state[query]["momentum_buffer"]
        assert query.stride() == key.stride() == momentum.stride()  # else fused updates fall back to slow ones
        assert query.ndim < 4 or query.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bn", ["plain", "split"])
def test_recomputed_activations_give_the_same_step(tiny, bn):
    """Loss, weights and BatchNorm statistics are equal, and only the input of each block is stored."""
    kept, made, records = {}, {}, {}
    for recompute in (False, True):
        learner, _ = build_learner(tiny(model={"bn": bn}, runtime={"checkpoint_activations": recompute}), ALONE)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            learner.query(a_batch().query)
        learner, _ = build_learner(tiny(model={"bn": bn}, runtime={"checkpoint_activations": recompute}), ALONE)
        records[recompute] = [train_step(learner, a_batch(), lambda part: None) for _ in range(2)]
        kept[recompute], made[recompute] = sum(sizes), learner.moco.state_dict()
    torch.testing.assert_close(records[True], records[False], rtol=0, atol=0)
    torch.testing.assert_close(made[True], made[False], rtol=0, atol=0)
    assert kept[True] < 0.6 * kept[False]


def test_the_step_fits_a_screen():
    body = ast.parse(inspect.getsource(train_step)).body[0].body[1:]
    assert body[-1].end_lineno - body[0].lineno < 50


def test_momentum_starts_clean_if_the_scaler_skips_the_first_step(tiny):
    made, _ = build_learner(tiny(optim={"lr": 0.1}), ALONE)
    parameters = list(made.moco.query_encoder.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(made.optimizer)
    assert all(map(torch.equal, parameters, before))
    assert all((made.optimizer.state[parameter]["momentum_buffer"] == 0).all() for parameter in parameters)


def test_times_are_read_after_the_device_finishes(monkeypatch):
    class Event:
        count, done = 0, -1

        def __init__(self, enable_timing):
            self.number = Event.count
            Event.count += 1

        def record(self):
            pass

        def synchronize(self):
            Event.done = self.number

        def elapsed_time(self, end):
            assert end.number <= Event.done, "CUDA refuses the time of an event that is under way"
            return 1000.0 * (end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = PartTimes(torch.device("cuda"))
    assert times.read() == {}
    for _ in range(2):
        times.start()
        times.mark("keys")
        times.mark("loss")
    assert times.read() == {"keys": 2.0, "loss": 2.0}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"mix": "mixup", "mix_per": "pair"}, "optim": {"clip_grad": 1.0}},
        {"runtime": {"precision": "fp16"}},
        {"runtime": {"precision": "fp32"}, "method": {"mix_only": True}},
        {"optim": {"optimizer": "adamw", "layer_decay": 0.9}, "runtime": {"precision": "fp16"}},
        {"runtime": {"checkpoint_activations": True}},
    ],
    ids=["default", "pairs-clipped", "fp16", "fp32-mix-only", "adamw-fp16", "recomputed"],
)
def test_a_gpu_step_never_synchronizes(tiny, changes):
    device = torch.device("cuda", 0)
    made, _ = build_learner(tiny(**changes), Ranks(0, 1, device))
    batches = [a_batch(device=device, dtype=DTYPES[made.precision]) for _ in range(3)]
    train_step(made, batches[0], lambda part: None)  # kernels compile and caches fill
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = [train_step(made, batch, lambda part: None) for batch in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(records).isfinite().all()


def test_frozen_statistics_equal_the_initialization(tiny, tmp_path):
    start, _ = build_learner(tiny(), ALONE)
    for module in start.moco.query_encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    torch.save(start.moco.query_encoder.backbone.state_dict(), tmp_path / "start.pth")
    config = tiny(init=str(tmp_path / "start.pth"), model={"bn": "frozen"}, optim={"lr": 0.1})
    made, (before, _), _ = run_step(config, a_batch())
    statistics = {name: value for name, value in before.state_dict().items() if "running_" in name}
    assert statistics
    for name, value in statistics.items():
        assert torch.equal(made.moco.state_dict()[name], value), name
    # Images no longer see each other: a feature is the same in any batch, in training too.
    views = a_batch().query
    whole = made.moco.query_encoder.train()(views)
    torch.testing.assert_close(whole[:3], made.moco.query_encoder(views[:3]))
    assert not torch.equal(  # the weights do move
        made.moco.query_encoder.backbone.state_dict()["conv1.weight"],
        before.query_encoder.backbone.state_dict()["conv1.weight"],
    )


def test_frozen_statistics_need_an_initialization(tiny):
    with pytest.raises(ValueError, match=r"model.bn='frozen' .* set init, or use auto"):
        build_learner(tiny(model={"bn": "frozen"}), ALONE)


def test_the_head_can_be_trained_first(tiny):
    config = tiny(optim={"lr": 0.1})
    made, _ = build_learner(config, ALONE)
    before = copy.deepcopy(made.moco.query_encoder)
    for _ in range(2):
        train_step(made, a_batch(), lambda part: None, head_only=True)
    for name, parameter in made.moco.query_encoder.backbone.named_parameters():
        assert torch.equal(parameter, before.backbone.get_parameter(name)), name
    assert not torch.equal(made.moco.query_encoder.head[0].weight, before.head[0].weight)
    train_step(made, a_batch(), lambda part: None)
    assert any(
        not torch.equal(parameter, before.backbone.get_parameter(name))
        for name, parameter in made.moco.query_encoder.backbone.named_parameters()
    )
