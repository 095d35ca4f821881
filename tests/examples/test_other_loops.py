"""Lightning and the Hugging Face Trainer with the loss and the queue: AMP, the queue in checkpoints, exact resuming."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.peers
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def same_state(first, second):
    """Whether two modules hold equal tensors under the same names."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def lightning_example():
    pytest.importorskip("lightning")
    return runpy.run_path(str(EXAMPLES / "lightning_module.py"))


@pytest.fixture
def trainer_example():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_resumes_exactly(lightning_example, tmp_path, precision):
    fit = lightning_example["fit"]
    whole = fit(tmp_path / "whole", 2, precision=precision)
    fit(tmp_path / "parts", 1, precision=precision)
    resumed = fit(tmp_path / "parts", 2, resume=tmp_path / "parts" / "last.ckpt", precision=precision)
    assert same_state(whole, resumed)
    assert int(resumed.queue.pointer) == 2 * 96 % 1024


def test_lightning_learns_and_its_queue_has_the_last_keys(lightning_example, tmp_path):
    start = lightning_example["fit"](tmp_path / "a", 1)
    after = lightning_example["fit"](tmp_path / "b", 12)
    views = lightning_example["views"]().tensors

    def agreement(module):
        with torch.no_grad():
            q, k = (torch.nn.functional.normalize(module.encoder(view), dim=1) for view in views)
        return (q @ k.T).argmax(1).eq(torch.arange(len(q))).float().mean().item()

    assert agreement(after) >= agreement(start) and agreement(after) > 0.9
    torch.testing.assert_close(after.queue.keys.norm(dim=1), torch.ones(1024), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_transformers_trainer_resumes_exactly(trainer_example, tmp_path, bf16):
    fit = trainer_example["fit"]
    whole = fit(tmp_path / "whole", 2, bf16=bf16)
    fit(tmp_path / "parts", 1, bf16=bf16)
    resumed = fit(tmp_path / "parts", 2, resume=True, bf16=bf16)
    assert same_state(whole.model, resumed.model)
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_transformers_trainer_saves_the_queue(trainer_example, tmp_path):
    from safetensors.torch import load_file

    trainer = trainer_example["fit"](tmp_path, 1)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    saved = load_file(checkpoint / "model.safetensors")
    assert torch.equal(saved["queue.keys"], trainer.model.queue.keys) and int(saved["queue.pointer"]) == 96
