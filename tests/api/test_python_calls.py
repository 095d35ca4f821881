"""The Python calls take the options of the commands, write the same messages and files, and do not change the process."""

from __future__ import annotations

import re
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_job import write_small_job

import fastuft
from fastuft.cli import configured
from fastuft.config import TrainConfig

DOCS = Path(__file__).resolve().parents[2] / "docs" / "python.md"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = write_small_job(tmp_path_factory.mktemp("job"))
    given = {"target": root / "photos", "init": root / "start.safetensors", "config": root / "photos.yaml"}
    return SimpleNamespace(root=root, given=given)


def test_the_examples_of_the_python_page_run(job, monkeypatch):
    monkeypatch.chdir(job.root)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(DOCS), "exec"), names)
    run, result = names["run"], names["result"]
    assert run.finished and run.steps == 2 * ((24 + 16) // 16) == len(names["losses"])
    assert names["again"].steps == 1  # of 24 images without the source's
    assert 0 <= result.metrics["retrieval"] <= 1
    assert names["features"].shape == (24, run.backbone().num_features) and len(names["paths"]) == 24
    assert (job.root / "runs/photos/eval/report.html").exists()
    assert {"photos.npz", "backbone.safetensors"} <= {path.name for path in job.root.iterdir()}


def test_callbacks_see_every_step_and_epoch(job, tmp_path):
    steps, epochs = [], []
    run = fastuft.finetune(
        **job.given,
        out=tmp_path / "run",
        **{"optim.epochs": 2},
        on_step=lambda progress: steps.append(progress.global_step),
        on_epoch=lambda progress, row: epochs.append((progress.epoch, row["loss"])),
    )
    assert steps == [1, 2] and len(epochs) == 2 and epochs[-1][1] == run.metrics["loss"]


def test_an_exception_in_a_callback_ends_the_run_and_the_call_resumes(job, tmp_path):
    def stop(progress):
        raise RuntimeError("enough")

    call = {**job.given, "out": tmp_path / "run", "resume": "auto"}
    with pytest.raises(RuntimeError, match="enough"):
        fastuft.finetune(**call, on_step=stop)
    assert fastuft.finetune(**call).finished


def test_a_call_does_not_change_the_process(job, tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fastuft.finetune(**job.given, out=tmp_path / "run", runtime={"deterministic": True})
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.distributed.is_initialized()
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_runs_in_one_process_and_in_threads_are_equal(job, tmp_path):
    def finetune(name):
        runs[name] = fastuft.finetune(**job.given, out=tmp_path / name, **{"runtime.deterministic": True})

    runs = {}
    finetune("first")
    for name in ("second", "third"):
        thread = threading.Thread(target=finetune, args=(name,))
        thread.start()
        thread.join()
    assert runs["first"].metrics["loss"] == runs["second"].metrics["loss"] == runs["third"].metrics["loss"]


def test_a_signal_saves_and_the_result_says_stopped(job, tmp_path):
    call = {**job.given, "out": tmp_path / "run", "resume": "auto", "optim": {"epochs": 3}}
    run = fastuft.finetune(**call, on_step=lambda _: signal.raise_signal(signal.SIGINT))
    assert (run.interrupted, run.finished, run.steps) == ("SIGINT", False, 1)
    assert fastuft.finetune(**call).steps == 3


def test_a_notebook_shows_a_progress_bar(job, tmp_path, monkeypatch, capsys):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=__import__("tqdm").tqdm))
    fastuft.embed(job.root / "photos", job.root / "start.safetensors", size=32, loader="torch")
    assert "24/24" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optm": {"lr": 1}}, "unknown option 'optm.lr'; closest: optim.lr"),
        ({"optim.lr": -1.0}, r"optim.lr=-1.0 is out of range; allowed: \(0, inf\]|optim.lr=-1.0"),
        ({"optim.lr": "fast"}, "optim.lr=fast is not allowed; it takes a number"),
        ({"method": {"mix": "blend"}}, "method.mix=.*blend"),
        ({"target": "nowhere"}, "'nowhere' does not exist"),
        ({"init": "nowhere.pth"}, "nowhere.pth"),
        ({"runtime": {"device": "cuda"}}, "torch sees no CUDA device"),
    ],
)
def test_errors_equal_those_of_the_command(job, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        fastuft.finetune(**{**job.given, "out": tmp_path / "run", **options})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_calls_refuse_equally(job, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint='nowhere\.pth' does not exist"):
        fastuft.evaluate(checkpoint="nowhere.pth", train=job.root / "photos", out=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint='nowhere\.pth' does not exist"):
        fastuft.embed(job.root / "photos", "nowhere.pth")
    with pytest.raises(ValueError, match=r"layout=.*is not allowed"):
        fastuft.export(job.root / "start.safetensors", tmp_path / "b.pth", layout="other")
    with pytest.raises(ValueError, match="missing images"):
        fastuft.embed([], job.root / "start.safetensors")


def test_python_values_make_the_configuration_of_the_command_line():
    given = {"target": [Path("a b"), "c,d"], "out": Path("run"), "init": "x.pth", "source": None, "seed": np.int64(3)}
    given |= {"augment": {"crop_scale": (0.3, 1)}, "optim.lr": torch.tensor(0.5).item(), "allow_missing": ["fc.*"]}
    config = configured("finetune", given | {"runtime.tensorboard": False, "max_steps": None})
    assert isinstance(config, TrainConfig) and config.target == ["a b", "c,d"] and config.source is None
    assert (config.out, config.seed, config.optim.lr, config.allow_missing) == ("run", 3, 0.5, ["fc.*"])
    assert config.augment.crop_scale == (0.3, 1.0) and config.runtime.tensorboard is False


def test_a_loaded_backbone_embeds_and_its_file_needs_a_checkpoint(job, tmp_path):
    backbone = fastuft.load_backbone(job.root / "start.safetensors")
    backbone.train()
    options = {"size": 32, "loader": "torch"}
    features, _ = fastuft.embed(job.root / "photos", backbone, **options)
    assert backbone.training and not features.requires_grad
    again, _ = fastuft.embed([job.root / "photos"], job.root / "start.safetensors", **options)
    torch.testing.assert_close(features, again)
    with pytest.raises(ValueError, match="pass its path instead"):
        fastuft.embed(job.root / "photos", backbone, out=tmp_path / "a.npz")
