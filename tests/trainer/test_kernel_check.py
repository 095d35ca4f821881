"""A fused kernel that is wrong on this GPU is detected before training uses it, and the portable path is used."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("filelock")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from fastuft import fused
from fastuft.cli.doctor.kernels import wrong_kernels
from fastuft.loss import dispatch, portable
from fastuft.model import grouped_batchnorm
from fastuft.trainer import kernel_check
from fastuft.trainer.distributed import Ranks
from fastuft.trainer.kernel_check import (
    FP8,
    TOLERANCE,
    Probe,
    Uses,
    check_before_training,
    check_kernels,
    compare,
    probes,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _refusals_end_with_the_test(monkeypatch):
    monkeypatch.setattr(fused, "_refusals", {})


def probe_of(kernel, dtype=torch.float32):
    return next(probe for probe in probes(CPU, Uses(dtype, 32, dtype, (24,))) if probe.kernel == kernel)


def alone(own):
    return [own]


def kernel_that_is_wrong(wrong):
    """A stand-in whose fused path returns ``wrong`` and whose portable path returns ones."""

    def run():
        return [torch.ones(3)] if fused.refusal("stand-in") else [wrong()]

    return Probe("stand-in", run)


def failing():
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: torch.ones(3) * 1.01, "differs from the portable path by 0.01 of the largest value"),
        (lambda: torch.tensor([1.0, torch.nan, 1.0]), "differs from the portable path by inf"),
        (failing, "fails with RuntimeError: no kernel image is available for execution on the device"),
    ],
)
def test_a_wrong_kernel_is_refused_with_one_line(wrong, message):
    (verdict,) = check_kernels([kernel_that_is_wrong(wrong)], torch.float32, "Chip X", alone)
    assert message in verdict.line()
    assert verdict.line().startswith("stand-in on Chip X: ") and "\n" not in verdict.line()
    assert message in fused.refusal("stand-in")


def test_a_right_kernel_is_used():
    assert check_kernels([kernel_that_is_wrong(lambda: torch.ones(3) + 1e-6)], torch.float32, "Chip X", alone) == []
    assert not fused._refusals


def test_one_process_decides_for_all():
    good = kernel_that_is_wrong(lambda: torch.ones(3))
    (verdict,) = check_kernels([good], torch.float32, "Chip X", lambda own: [own, {"stand-in": "it differs"}])
    assert verdict.reason == "it differs"
    assert fused.refusal("stand-in") == "it differs"


@pytest.mark.parametrize("queue", ["same", "fp8"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_kernel_of_a_step_has_a_probe(dtype, queue):
    candidates = probes(CPU, Uses(dtype, 32, FP8 if queue == "fp8" else dtype, (3, 24)))
    kernels = [fused.LOSS, fused.GRADIENT, fused.ENQUEUE, fused.MIXING, fused.BATCHNORM, fused.BATCHNORM]
    assert [probe.kernel for probe in candidates] == kernels
    for probe in candidates:
        first, second = probe.run(), probe.run()
        assert all(map(torch.equal, first, second)), "a probe draws the same inputs each time"
        assert all(tensor.isfinite().all() for tensor in first)
        assert compare(probe, TOLERANCE[dtype]) is None


def test_a_wrong_batchnorm_kernel_falls_back_to_the_portable_path(monkeypatch):
    def wrong(problem):
        out, *rest = grouped_batchnorm.portable_forward(problem)
        return out + 0.05, *rest

    monkeypatch.setattr(grouped_batchnorm, "_use_fused", lambda x: fused.refusal(fused.BATCHNORM) is None)
    kernels = SimpleNamespace(unsupported=lambda x: None, forward=wrong, backward=grouped_batchnorm.portable_backward)
    for module in ("grouped_batchnorm", "grouped_batchnorm_gradient"):
        monkeypatch.setitem(sys.modules, f"fastuft.kernels.{module}", kernels)
    probe = probe_of(fused.BATCHNORM)
    (verdict,) = check_kernels([probe], torch.float32, "Chip X", alone)
    assert verdict.kernel == "grouped BatchNorm"
    after = probe.run()[0]
    monkeypatch.undo()
    assert torch.equal(after, probe.run()[0])


def test_a_wrong_loss_kernel_falls_back_to_the_portable_path(monkeypatch):
    pytest.importorskip("triton")
    from fastuft.kernels import queue_sweep

    def wrong(problem):
        loss, gradient, alignment = portable.mixed_info_nce(problem)
        return loss, gradient * 1.01, alignment

    monkeypatch.setattr(dispatch, "use_fused", lambda *_: fused.refusal(fused.LOSS, fused.GRADIENT) is None)
    monkeypatch.setattr(queue_sweep, "mixed_info_nce", wrong)
    verdicts = check_kernels([probe_of(fused.LOSS), probe_of(fused.GRADIENT)], torch.float32, "Chip X", alone)
    assert [verdict.kernel for verdict in verdicts] == ["loss gradient"]
    after = probe_of(fused.GRADIENT).run()[0]
    monkeypatch.undo()
    assert torch.equal(after, probe_of(fused.GRADIENT).run()[0])


def test_a_refused_loss_kernel_cannot_be_requested():
    fused.refuse(fused.LOSS, "it differs")
    q = torch.randn(2, 16)
    with pytest.raises(ValueError, match="impl='triton' cannot run: it differs"):
        dispatch.use_fused("triton", q, q)


def test_a_cpu_run_skips_the_kernel_check(monkeypatch):
    monkeypatch.setattr(kernel_check, "check_kernels", failing)
    check_before_training(Ranks(0, 1, CPU), Uses(torch.float32, 32, torch.float32), print)


def test_a_gpu_run_reports_unused_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip X")
    monkeypatch.setattr(kernel_check, "probes", lambda *_: [kernel_that_is_wrong(failing)])
    lines = []
    check_before_training(Ranks(0, 1, torch.device("cuda")), Uses(torch.bfloat16, 32, FP8), lines.append)
    assert len(lines) == 1 and "the slower portable path is used instead" in lines[0]


def script(text):
    return [sys.executable, "-c", text]


def test_doctor_runs_the_check_in_a_child_process():
    verdicts = [
        {"kernel": "loss (fp32)", "chip": "Chip X", "reason": None},
        {"kernel": "enqueue (bf16)", "chip": "Chip X", "reason": "it differs"},
    ]
    assert wrong_kernels(script(f"print({json.dumps(json.dumps(verdicts))})")) == [
        ("enqueue (bf16) on Chip X", "it differs")
    ]


def test_doctor_survives_a_check_that_crashes_or_hangs():
    ((what, why),) = wrong_kernels(
        script("import os, sys; sys.stderr.write('illegal access\\n'); sys.stderr.flush(); os.abort()")
    )
    assert what == "fused kernels" and "illegal access" in why and "status -6" in why
    ((_, why),) = wrong_kernels(script("import time; time.sleep(60)"), timeout=0.2)
    assert "hung for 0.2 seconds" in why


@pytest.mark.slow
def test_doctor_parses_the_output_of_its_child_process():
    text = "import torch; from fastuft.trainer.kernel_check import main; main(torch.device('cpu'), 'this processor')"
    assert wrong_kernels(script(text)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["same queue", "fp8 queue"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_kernel_is_right_on_this_gpu(dtype, fp8):
    uses = Uses(dtype, 128, FP8 if fp8 else dtype, (24, 64, 96, 2048))
    found = [(probe.kernel, compare(probe, TOLERANCE[dtype])) for probe in probes(torch.device("cuda", 0), uses)]
    assert not any(reason for _, reason in found), found
