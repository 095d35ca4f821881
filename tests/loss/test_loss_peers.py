"""Losses of other projects give equal values and gradients, by published formula and by package if installed."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from error_bound import relative_error
from loss_cases import Case
from torch import Tensor, nn
from torch.nn import functional as F

import fastuft
from fastuft.loss.lightly import NTXentLoss

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VALUE_BOUND, GRADIENT_BOUND = 1e-12, 1e-10  # in float64


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """facebookresearch/moco's expression; its queue is [D, K]."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.T.clone().detach())
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def ntxent_by_pairs(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """pytorch-metric-learning's NTXent: each positive pair against the negative pairs of the same anchor."""
    similarity = F.normalize(q, dim=1) @ F.normalize(torch.cat([k, queue]), dim=1).T / temperature
    anchors, positives, others, negatives = pairs(len(q), len(queue))
    losses = []
    for anchor, positive in zip(anchors, positives, strict=True):
        above = similarity[anchor, positive]
        below = similarity[anchor, negatives[others == anchor]]
        losses.append(-(above.exp() / (above.exp() + below.exp().sum())).log())
    return torch.stack(losses).mean()


def pairs(batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tuple (anchor, positive, anchor, negative) into references cat([k, queue])."""
    rows = torch.arange(batch)
    return rows, rows, rows.repeat_interleave(keys), batch + torch.arange(keys).repeat(batch)


def run(function, case: Case, *arguments) -> tuple[Tensor, Tensor]:
    q = case.q.detach().requires_grad_()
    loss = function(q, case.k_a, case.queue, *arguments)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


def agree(function, case: Case, temperature: float, bounds=(VALUE_BOUND, GRADIENT_BOUND)) -> None:
    found, expected = run(fastuft.info_nce, case, temperature), run(function, case, temperature)
    for ours, theirs, bound in zip(found, expected, bounds, strict=True):
        assert relative_error(ours, theirs) < bound


@pytest.fixture
def case() -> Case:
    """The queue's rows have unit length in float64, because pytorch-metric-learning normalizes its references again."""
    drawn = Case.random(12, 70, 16, torch.float64)
    return replace(drawn, queue=F.normalize(drawn.queue, dim=1))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 0.5])
@pytest.mark.parametrize("formula", [moco, ntxent_by_pairs])
def test_losses_equal_published_formulas(formula, temperature, case):
    agree(formula, case, temperature)


def test_the_mixed_loss_is_a_weighted_sum_of_two_moco_losses(case):
    """Eq. 6 as two calls of moco's expression, one per positive."""
    q = case.q.requires_grad_()
    lam = 0.3
    expected = lam * moco(q, case.k_a, case.queue, 0.2) + (1 - lam) * moco(q, case.k_b, case.queue, 0.2)
    found = fastuft.mixed_info_nce(q, case.k_a, case.k_b, lam, case.queue)
    assert relative_error(found, expected) < VALUE_BOUND
    first, second = (torch.autograd.grad(loss, q)[0] for loss in (found, expected))
    assert relative_error(first, second) < GRADIENT_BOUND


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_lightly_package(temperature, case):
    theirs = pytest.importorskip("lightly.loss").NTXentLoss(temperature, memory_bank_size=(70, 16))
    theirs.memory_bank.bank = case.queue.clone()
    agree(lambda q, k, queue, _: theirs(q, k), case, temperature)


def test_lightly_package_step_by_step():
    """Our drop-in and lightly's own loss through several batches that fill the bank exactly."""
    lightly = pytest.importorskip("lightly.loss")
    theirs, ours = lightly.NTXentLoss(0.1, memory_bank_size=(24, 16)), NTXentLoss(0.1, memory_bank_size=(24, 16))
    ours.memory_bank.keys.copy_(theirs.memory_bank.bank)
    for step in range(7):
        case = Case.random(8, 1, 16, seed=step)
        losses = []
        for loss in (ours, theirs):
            q = case.q.clone().requires_grad_(step != 3)  # without a gradient the bank stays as it is
            losses.append(loss(q, case.k_a))
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(ours.memory_bank.keys, theirs.memory_bank.bank)


def test_metric_learning_package(case):
    package = pytest.importorskip("pytorch_metric_learning.losses")

    def theirs(q, k, queue, temperature):
        loss = package.NTXentLoss(temperature)
        return loss(q, indices_tuple=pairs(len(q), len(queue)), ref_emb=torch.cat([k, queue]))

    agree(theirs, case, 0.2)


def test_lightly_formula_with_the_bank():
    """In the drop-in, negatives are those before the batch enters, and no rows are lost when the bank wraps."""
    loss = NTXentLoss(0.1, memory_bank_size=(10, 16))
    reference = loss.memory_bank.keys.clone()
    slot = 0
    for step in range(6):
        case = Case.random(7, 1, 16, seed=step)
        found = loss(case.q.requires_grad_(), case.k_a.requires_grad_())
        torch.testing.assert_close(found, moco(case.q, case.k_a, reference, 0.1))
        found.backward()
        assert case.k_a.grad is None
        for key in F.normalize(case.k_a.detach(), dim=1):
            reference[slot] = key
            slot = (slot + 1) % 10
        torch.testing.assert_close(loss.memory_bank.keys, reference)


def test_the_lightly_drop_in_resumes(tmp_path):
    loss = NTXentLoss(memory_bank_size=(10, 16))
    loss(torch.randn(7, 16, requires_grad=True), torch.randn(7, 16))
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other = NTXentLoss(memory_bank_size=[10, 16])
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    q, k = torch.randn(7, 16, requires_grad=True), torch.randn(7, 16)
    assert torch.equal(loss(q, k), other(q, k))
    assert torch.equal(loss.memory_bank.keys, other.memory_bank.keys) and other.memory_bank.pointer == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"memory_bank_size=0 is not allowed: 0 takes the negatives from the batch.*give \(K, D\)"),
        ({"memory_bank_size": (0, 16)}, r"memory_bank_size=\(0, 16\) is not allowed: 0 takes the negatives"),
        ({"memory_bank_size": 4096}, r"memory_bank_size=4096 is not allowed: the bank needs both sizes"),
        ({"memory_bank_size": (1, 2, 3)}, r"memory_bank_size=\(1, 2, 3\) is not allowed"),
        ({"memory_bank_size": (-4, 16)}, "size=-4 is out of range"),
        ({"memory_bank_size": (4, 16), "temperature": 0.0}, r"temperature=0\.0 is out of range"),
        ({"memory_bank_size": (4, 16), "impl": "cuda"}, "impl='cuda' is not allowed"),
    ],
    ids=str,
)
def test_unsupported_lightly_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NTXentLoss(**arguments)


def test_lightly_gathering_needs_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"gather_distributed=True needs torch\.distributed"):
        NTXentLoss(memory_bank_size=(4, 16), gather_distributed=True)


@pytest.mark.parametrize("name", ["drop_in_moco", "drop_in_lightly", "drop_in_metric_learning", "mixed_queries"])
def test_examples_run(name, capsys):
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "loss" in capsys.readouterr().out


def test_modules_work_in_another_training_loop():
    """A module that is built once is called with the project's own queue."""
    encoder, criterion = nn.Linear(16, 8), fastuft.MixedInfoNCELoss()
    foreign_queue = F.normalize(torch.randn(8, 40), dim=0)  # [D, K], as moco keeps it
    x, k_a, k_b = torch.randn(6, 16), torch.randn(6, 8), torch.randn(6, 8)
    loss = criterion(encoder(x), k_a, k_b, 0.4, foreign_queue.T)
    loss.backward()
    assert encoder.weight.grad.isfinite().all() and encoder.weight.grad.any()
