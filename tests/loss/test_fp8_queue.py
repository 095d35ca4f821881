"""A queue in 8-bit floating point: rows, losses, saving. test_loss_accuracy has its errors on features of a network."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_cases import FP8, PATHS, Case
from torch.nn import functional as F

import fastuft
from fastuft.loss import fp8

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def unit_rows(count, width=64, seed=0):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_rows_keep_their_norm_to_e4m3_precision():
    rows = unit_rows(500)
    codes, scales = fp8.encode(rows)
    found = fp8.decode(codes, scales)
    assert codes.dtype == torch.uint8 and scales.shape == (500,)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(500))
    error = (found - rows).norm(dim=1)
    assert error.mean() > 0.01 and error.max() < 2**-4  # half a unit in the fourth bit


def test_zero_tiny_and_nan_rows():
    rows = unit_rows(4)
    rows[1], rows[2] = 0, 1e-9 * rows[2]
    rows[3, 5] = torch.nan
    codes, scales = fp8.encode(rows)
    found = fp8.decode(codes, scales)
    assert (found[1:3] == 0).all() and found[3].isnan().all() and found[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_queue_has_the_last_keys(device):
    queue = fastuft.KeyQueue(8, 64, dtype=FP8, device=device)
    start, new = queue.rows(), unit_rows(5, seed=1).to(device)
    assert queue.keys.dtype == torch.uint8 and queue.keys.nbytes + queue.scales.nbytes == 8 * (64 + 4)
    assert repr(queue) == "KeyQueue(size=8, dim=64, fp8)"
    for _ in range(2):
        queue.enqueue_(7 * new)
    assert queue.pointer == 2
    for slot, row in enumerate([3, 4, 2, 3, 4, 0, 1, 2]):
        ours = queue.rows()[slot]
        assert (ours - (new[row] if slot != 2 else ours)).norm() < 2**-4
    assert not torch.equal(queue.rows(), start)
    queue.enqueue_(unit_rows(20, seed=2).to(device))  # more than fit
    expected = fp8.decode(*fp8.encode(unit_rows(20, seed=2)[-8:])).roll((2 + 20) % 8, 0)
    torch.testing.assert_close(queue.rows().cpu(), expected, rtol=0.13, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_losses_equal_those_of_decoded_rows(dtype, path):
    device, impl = path
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("no float64 kernel")
    case, queue = Case.random(9, 40, 32, dtype, device=device), fastuft.KeyQueue(40, 32, dtype=FP8, device=device)
    decoded = queue.rows().to(dtype if dtype != torch.bfloat16 else torch.float32)
    q = case.q.requires_grad_()
    found, expected = [], []
    for results, keys in ((found, queue), (expected, decoded)):
        loss = fastuft.mixed_info_nce(q, case.k_a, case.k_b, case.lam, keys, impl=impl, precision="bf16")
        results += [loss, *torch.autograd.grad(loss, q), *fastuft.queue_lse(q, keys, impl=impl, precision="bf16")]
        results.append(fastuft.InfoNCELoss(0.1, impl=impl, precision="bf16")(q, case.k_a, keys))
    torch.testing.assert_close(found, expected)


def test_a_saved_queue_loads_into_either_dtype(tmp_path):
    queue, wide = fastuft.KeyQueue(8, 64, dtype=FP8), fastuft.KeyQueue(8, 64)
    for target in (queue, wide):
        target.enqueue_(unit_rows(3))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    saved = torch.load(tmp_path / "queue.pt", weights_only=True)
    same, other = fastuft.KeyQueue(8, 64, dtype=FP8), fastuft.KeyQueue(8, 64, dtype=torch.bfloat16)
    same.load_state_dict(saved)
    other.load_state_dict(saved)
    assert torch.equal(same.keys, queue.keys) and torch.equal(same.scales, queue.scales) and same.pointer == 3
    torch.testing.assert_close(other.keys, queue.rows().bfloat16())
    assert set(saved) == {"keys", "scales", "pointer"} and set(other.state_dict()) == {"keys", "pointer"}
    same.load_state_dict(wide.state_dict())
    assert torch.equal(same.rows(), fp8.decode(*fp8.encode(wide.keys)))
    assert torch.equal(copy.deepcopy(queue).rows(), queue.rows())


def test_casting_a_model_does_not_cast_its_queue():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), fastuft.KeyQueue(8, 64, dtype=FP8))
    before = model[1].rows()
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].scales.dtype == torch.float32 and torch.equal(model[1].rows(), before)


def test_a_nan_key_gives_a_nan_loss():
    queue = fastuft.KeyQueue(8, 64, dtype=FP8)
    keys = unit_rows(2)
    keys[1, 3] = torch.nan
    queue.enqueue_(keys)
    q = unit_rows(2, seed=3)
    assert queue.scales.isnan().tolist() == [False, True] + [False] * 6
    assert fastuft.info_nce(q, q, queue).isnan()
