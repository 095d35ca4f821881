"""The number of operators that the host launches per step, none of which waits for the device."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from trainer.test_train_step import ALONE, a_batch, as_fakes

from fastuft.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from fastuft.data import Batch
from fastuft.trainer.distributed import KeyShuffle, Ranks
from fastuft.trainer.learner_setup import build_learner
from fastuft.trainer.step import train_step

MOST_CALLS = 2000
# Operators whose result the host has to see, or whose size depends on values.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "allclose", "_assert_async", "repeat_interleave", "bincount",
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace != "prim":  # questions about a tensor
            self.calls[function.name().removeprefix("aten::").partition(".")[0]] += 1
        return function(*arguments, **(options or {}))


def trace_a_step(precision, optim=None, **method):
    config = TrainConfig(
        target="images",
        out="run",
        model=ModelConfig(arch="resnet50"),
        method=MethodConfig(queue_size=1024, **method),
        data=DataConfig(batch_size=256),
        optim=OptimConfig(**(optim or {})),
        runtime=RuntimeConfig(device="cpu", precision=precision),
    )
    made, _ = build_learner(config, ALONE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = as_fakes(made, config)
        for step in range(2):  # the first has no gradients' memory yet
            query, key = (torch.empty(256, 3, 64, 64).contiguous(memory_format=torch.channels_last) for _ in range(2))
            batch = Batch(query, key, torch.arange(256), torch.zeros(256, dtype=torch.bool), 0, step)
            with Trace() as trace:
                train_step(made, batch, lambda part: None)
    return trace.calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resnet50_step_launches_at_most_2000_operators(precision):
    calls = trace_a_step(precision)
    print(f"{sum(calls.values())} operator calls ({precision}): {calls.most_common(12)}")
    assert calls["fastuft::grouped_batch_norm"] == 3 * 53
    assert calls["fastuft::grouped_batch_norm_backward"] == 2 * 53
    assert calls["native_batch_norm"] == 0
    assert sum(calls.values()) <= MOST_CALLS
    assert not WAITING & calls.keys()


def test_adamw_with_a_rate_per_layer_is_one_operator_per_group():
    calls = trace_a_step("fp32", {"optimizer": "adamw", "layer_decay": 0.9, "decay_norms": False})
    assert calls["_fused_adamw_"] == 2 * 17 + 2  # 16 blocks and the stem, and the head; with decay and without
    assert sum(calls.values()) <= MOST_CALLS
    assert not WAITING & calls.keys()


@pytest.mark.parametrize("changes", [{}, {"method": {"mix": "mixup", "mix_per": "pair"}}], ids=["default", "pairs"])
def test_nothing_is_copied_to_the_host(tiny, monkeypatch, changes):
    """On the ``meta`` device, which has no memory, every copy to the host raises."""
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device: False
    )  # the meta device has no autocast, and the query raises
    device = torch.device("meta")
    config = tiny(**changes)
    made, _ = build_learner(config, ALONE)
    moco, queue = made.moco.to(device), made.queue.to(device)
    made = dataclasses.replace(
        made,
        ranks=Ranks(0, 1, device),
        shuffle=KeyShuffle(Ranks(0, 1, device), config.seed),
        query=moco.query_encoder,
        key=moco.key_encoder,
        queue=queue,
        optimizer=torch.optim.SGD(moco.query_encoder.parameters(), lr=0.1, momentum=0.9),  # fused has no meta form
    )
    batch = a_batch()
    on_device = dataclasses.replace(batch, query=batch.query.to(device), key=batch.key.to(device))
    record = train_step(made, on_device, lambda part: None)
    assert record.device == device
    with pytest.raises((NotImplementedError, RuntimeError)):
        record.cpu()
