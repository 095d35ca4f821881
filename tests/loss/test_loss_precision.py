"""The precision in which query and queue are multiplied: explicit, by dtype, or by autocast."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from loss_cases import Case
from torch import nn
from torch.nn import functional as F

import fastuft
from fastuft.kernels.problem import LseProblem, Problem, tile_precision
from fastuft.loss import dispatch, ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chosen(monkeypatch):
    """The tile precision of each call of the operators."""
    found = []

    def watch(run):
        def spy(problem: Problem | LseProblem):
            found.append(tile_precision(problem.precision, problem[0].dtype, problem.queue.dtype))
            return run(problem)

        return spy

    for name in ("mixed_info_nce", "queue_lse"):
        monkeypatch.setattr(ops, name, watch(getattr(ops, name)))
    return found


@pytest.mark.parametrize(
    ("query", "queue", "expected"),
    [
        (torch.float32, torch.float32, "ieee"),
        (torch.bfloat16, torch.float32, "bf16"),
        (torch.float32, torch.bfloat16, "bf16"),
        (torch.float16, torch.float32, "fp16"),
        (torch.float16, torch.float16, "fp16"),
        (torch.float16, torch.bfloat16, "bf16"),
        (torch.float32, torch.float8_e4m3fn, "bf16"),
        (torch.float16, torch.float8_e4m3fn, "fp16"),
    ],
    ids=str,
)
def test_half_precision_of_either_input_decides(query, queue, expected, chosen):
    case, keys = Case.random(4, 10, 16, query), fastuft.KeyQueue(10, 16, dtype=queue)
    fastuft.info_nce(case.q, case.k_a, keys)
    fastuft.queue_lse(case.q, keys)
    for precision in ("ieee", "tf32", "bf16"):
        fastuft.info_nce(case.q, case.k_a, case.queue, precision=precision)
    assert chosen == [expected, expected, "ieee", "tf32", "bf16"]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_autocast_decides_unless_a_precision_is_given(dtype, expected, chosen):
    case = Case.random(4, 10, 16)
    with torch.autocast("cpu", dtype=dtype):
        fastuft.info_nce(case.q, case.k_a, case.queue)
        fastuft.info_nce(case.q, case.k_a, case.queue, precision="ieee")
    assert chosen == [expected, "ieee"]


def test_the_example_of_the_readme_takes_bf16_tiles_under_autocast(chosen):
    (block,) = re.findall(
        r"```python\n((?:(?!```).)*KeyQueue\(65536(?:(?!```).)*)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exec(block, {})
    assert chosen == ["bf16"]


def test_the_example_of_moco_takes_bf16_tiles_under_autocast(chosen):
    model = runpy.run_path(str(ROOT / "examples" / "drop_in_moco.py"))["MoCo"](nn.Linear(64, 32), dim=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(8, 64), torch.randn(8, 64)).backward()
    assert chosen == ["bf16"] and model.queue.keys.dtype == torch.float32


def test_compiled_under_autocast(chosen):
    case = Case.random(4, 10, 16)
    torch.compiler.reset()
    compiled = torch.compile(lambda q: fastuft.info_nce(q, case.k_a, case.queue), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(case.q)
    torch.testing.assert_close(found, fastuft.info_nce(case.q, case.k_a, case.queue))


def test_the_portable_path_is_exact_at_any_precision():
    case = Case.random(6, 40, 16)
    exact = fastuft.info_nce(case.q, case.k_a, case.queue)
    for precision in ("ieee", "tf32", "bf16"):
        found = fastuft.info_nce(case.q, case.k_a, case.queue, precision=precision, unit_queue=True)
        assert torch.equal(found, exact)


def test_exact_products_warn_once(monkeypatch):
    dispatch._tell_of_exact_products.cache_clear()
    q, queue = torch.randn(4, 16), F.normalize(torch.randn(10, 16), dim=1)
    with pytest.warns(RuntimeWarning, match="precision='auto' multiplies them exactly") as caught:
        for _ in range(2):
            dispatch.warn_of_exact_products("auto", q, queue)
    assert len(caught) == 1
    dispatch._tell_of_exact_products.cache_clear()
    for precision, query in (("ieee", q), ("bf16", q), ("auto", q.bfloat16())):
        dispatch.warn_of_exact_products(
            precision, query, queue
        )  # warnings of this kind would fail a later pytest.warns
    assert dispatch._tell_of_exact_products.cache_info().currsize == 0
