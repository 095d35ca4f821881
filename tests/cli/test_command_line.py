"""Parsing, errors and dispatch of the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastuft.cli import benchmarks, main
from fastuft.cli.commands import COMMANDS
from fastuft.config import AugmentConfig, DataConfig, TrainConfig

NEEDED = ["--target", "images", "--out", "run", "--init", "start.pth"]


@pytest.fixture
def received(monkeypatch):
    """Records the configurations of sub-commands instead of running them."""
    calls = []
    for name, command in list(COMMANDS.items()):
        fake = dataclasses.replace(command, run=lambda config: calls.append(config) or 0)
        monkeypatch.setitem(COMMANDS, name, fake)
    return calls


def refused(capsys, *arguments):
    """The single line that a refused command prints."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def words_of(example):
    """The arguments of an example, split as a shell would."""
    words = shlex.split(example.partition(" > ")[0], comments=True)
    return words[words.index("-m") + 2 :] if "-m" in words else words[1:]


def test_examples_parse(received):
    examples = [text for command in COMMANDS.values() for text in (command.example, *command.more_examples)]
    for example in examples:
        if "--config" not in example:
            assert main(words_of(example)) == 0, example
    assert len(received) == sum("--config" not in example for example in examples)


def test_help_is_quick_because_torch_is_not_imported():
    script = "import sys; from fastuft.cli import main\nmain(['--help']); main(['finetune', '--help', 'all'])\n"
    script += "heavy = {'torch', 'nvidia.dali', 'matplotlib', 'sklearn', 'triton', 'jsonargparse'}\n"
    script += "assert not heavy & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_dash_and_underscore_flags_and_lists(received):
    main(
        [
            "finetune",
            *NEEDED,
            "--max-steps",
            "3",
            "--data.batch-size=64",
            "--runtime.compile",
            "--allow-missing",
            "*.fc",
        ]
    )
    main(["finetune", *NEEDED, "--max_steps=3", "--data.batch_size", "64", "--runtime.compile", "true", "--seed", "4"])
    main(["eval", "--checkpoint", "c", "--train", "t", "--fewshot.shots", "4,8", "--fewshot.crop-scale", "0.5,1"])
    dashed, underscored, evaluated = received
    assert dashed.max_steps == underscored.max_steps == 3
    assert dashed.data.batch_size == underscored.data.batch_size == 64
    assert dashed.runtime.compile and underscored.runtime.compile
    assert dashed.allow_missing == ["*.fc"] and underscored.seed == 4
    assert evaluated.fewshot.shots == [4, 8] and evaluated.fewshot.crop_scale == (0.5, 1.0)


def test_several_targets(received):
    main(
        [
            "finetune",
            *NEEDED,
            "--target+",
            "more",
            "--source",
            "[a, b]",
            "--allow-missing",
            "x",
            "--allow-missing+",
            "y",
        ]
    )
    (config,) = received
    assert config.target == ["images", "more"] and config.source == ["a", "b"]
    assert config.allow_missing == ["x", "y"]


def test_values_that_yaml_would_convert_stay_text(received):
    main(["finetune", "--target", "123", "--out", "no", "--init", "null.pth", "--resume", "no"])
    (config,) = received
    assert (config.target, config.out, config.resume) == ("123", "no", "no")


def test_pretraining_has_its_own_recipe(received):
    main(["pretrain", "--target", "images", "--out", "run"])
    main(["pretrain", "--target", "images", "--out", "run", "--optim.lr", "0.5"])
    main(["finetune", *NEEDED, "--recipe", "paper"])
    main(["finetune", *NEEDED])
    pretrain, changed, paper, finetune = received
    assert (pretrain.optim.lr, pretrain.data.batch_size, pretrain.optim.epochs) == (0.24, 2048, 800)
    assert not pretrain.method.queue_prefill and pretrain.method.mix == "none" and pretrain.source is None
    assert changed.optim.lr == 0.5 and changed.optim.epochs == 800
    assert paper == TrainConfig(target="images", out="run", init="start.pth")
    assert finetune.recipe == finetune.optim.lr == finetune.data.batch_size == "auto"
    assert pretrain.recipe == "paper"


def test_the_command_line_overrides_yaml(received, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lr: 1e-3\n  epochs: 7\ndata:\n  batch_size: 32\n")
    main(["finetune", "--config", str(file), *NEEDED, "--optim.epochs", "9"])
    (config,) = received
    assert (config.optim.lr, config.optim.epochs, config.data.batch_size) == (1e-3, 9, 32)


def test_the_resolved_configuration_round_trips(received, tmp_path, capsys):
    arguments = [*NEEDED, "--target+", "b", "--augment.crop_scale", "[0.3, 0.9]", "--data.replay_cache", "d"]
    with pytest.raises(SystemExit):
        main(["finetune", *arguments, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    saved = tmp_path / "saved.yaml"
    main(["finetune", *arguments])
    content = json.loads(json.dumps(dataclasses.asdict(received[0])))
    saved.write_text(yaml.safe_dump(content, sort_keys=False))
    main(["finetune", "--config", str(printed)])
    main(["finetune", "--config", str(saved)])
    assert received[0] == received[1] == received[2]
    assert received[2].augment == AugmentConfig(size="auto", crop_scale=(0.3, 0.9))
    assert isinstance(received[2].augment.crop_scale, tuple)
    assert received[2].data == DataConfig(replay_cache="d", batch_size="auto", replay_fraction="auto")
    assert received[2].max_steps is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.lrr", "3"], ["'optim.lrr'", "optim.lr"]),
        (["--zzz", "3"], ["'zzz'", "allowed: target, out, init"]),
        (["--optim.lr", "abc"], ["optim.lr=abc", "a number"]),
        (["--optim.epochs", "1.5"], ["optim.epochs=1.5", "whole number"]),
        (["--method.mix", "blend"], ["method.mix=blend", "none, cutmix, mixup"]),
        (["--runtime.compile", "maybe"], ["runtime.compile=maybe", "true or false"]),
        (["--augment.crop_scale", "[0.5]"], ["augment.crop_scale", "[a number, a number]"]),
        (["--augment.crop_scale", "[0.5, 0.2]"], ["augment.crop_scale[0]=0.5", "(0, 0.2]"]),
        (["--method.mix", "none", "--method.mix_only"], ["method.mix_only", "cutmix or mixup"]),
        (["--data.replay_mode", "balanced"], ["data.replay_mode", "set source"]),
        (["--model.bn", "split", "--data.drop_last", "false"], ["model.bn", "data.drop_last"]),
        (["--method.temperature=0"], ["method.temperature=0", "(0, inf]"]),
        (["--seed"], ["seed needs a value", "a whole number"]),
        (["stray"], ["'stray'", "--NAME VALUE", "'[A, B]'"]),
        (["--out="], ["out=''", "empty path"]),
        (["--optim.epochs", "3", "--optim.warmup_epochs", "4"], ["optim.warmup_epochs=4", "[0, 3]"]),
        (["--model", "3"], ["model=3 is not allowed", "a group of arch, ", "--model.arch VALUE", "YAML file"]),
        (["--model="], ["--model.arch VALUE"]),
        (["--optim", "{lr: x}"], ["optim.lr=x", "a number"]),
        (["--data.suffixes", "[1"], ["data.suffixes=[1", "a list, each item text"]),
        (["--config", "absent.yaml"], ["config", "absent.yaml"]),
        (["--config"], ["config needs a value"]),
        (["--optim.lr="], ["optim.lr= is not allowed", "a number or auto"]),
        (["--optim.betas", "[0.1, x]"], ["optim.betas=[0.1, x]", "[a number, a number]"]),
        (["--target+", "more", "--seed", "-3x"], ["seed=-3x", "a whole number"]),
        (["--", "x"], ["unexpected argument '--'"]),
    ],
)
def test_wrong_options_give_a_one_line_error(capsys, arguments, words):
    line = refused(capsys, "finetune", *NEEDED, *arguments)
    assert line.startswith("fastuft finetune: error: ")
    assert all(word in line for word in words), line


def test_an_option_without_a_name_says_so_when_it_is_named(capsys):
    line = refused(capsys, "embed", "--images", "photos", "--checkpoint", "start.pth", "--out", "photos.npz")
    assert "images is given without its name" in line and "fastuft embed photos/" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim:\n  lrr: 3\n", ["'optim.lrr'", "optim.lr"]),
        ("optimm:\n  lr: 3\n", ["optimm"]),
        ("optim:\n  lr: many\n", ["optim.lr=many", "a number"]),
        ("optim: 3\n", ["optim=3", "weight_decay"]),
        ("just words\n", ["config", "mapping"]),
        ("a: [1\n", ["config", "at line 2"]),
        ("target: null\n", ["missing target", "text or a list"]),
    ],
)
def test_wrong_files_give_a_one_line_error(capsys, tmp_path, content, words):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    line = refused(capsys, "finetune", *NEEDED, "--config", str(file))
    assert all(word in line for word in words), line


def test_missing_options_and_commands_are_named(capsys):
    line = refused(capsys, "finetune", "--out", "run")
    assert "target" in line and "Example: " in line
    line = refused(capsys, "finetune", "--target", "images", "--out", "run")
    assert "init" in line and "fastuft pretrain" in line
    line = refused(capsys, "finetuen")
    assert "'finetuen'" in line and "finetune" in line
    line = refused(capsys, "verify-data")
    assert "paths" in line
    line = refused(capsys, "bench", "nothing")
    assert "what='nothing'" in line and "evaluate" in line
    line = refused(capsys, "demo", "--seeds", "0")
    assert "seeds=0" in line
    line = refused(capsys, "eval", "--checkpoint", "nothing.pth", "--train", "images")
    assert "checkpoint='nothing.pth' does not exist" in line and "run folder" in line
    line = refused(capsys, "eval", "--checkpoint", ".", "--before", "nothing.pth", "--train", "images")
    assert "before='nothing.pth'" in line
    line = refused(capsys, "export", "--checkpoint", "nothing.pth", "--out", "b.pth")
    assert "checkpoint='nothing.pth'" in line


def test_user_errors_are_one_line_and_bugs_keep_their_traceback(capsys, monkeypatch):
    def fail_with(error):
        def run(config):
            raise error

        monkeypatch.setitem(COMMANDS, "doctor", dataclasses.replace(COMMANDS["doctor"], run=run))

    fail_with(ValueError("out='x' holds a run"))
    assert refused(capsys, "doctor") == "fastuft doctor: error: out='x' holds a run\n"
    fail_with(KeyError("surprise"))
    with pytest.raises(KeyError):
        main(["doctor"])


def test_missing_files_and_interrupts_are_one_line(capsys, monkeypatch):
    def run(config):
        if config.json:
            raise KeyboardInterrupt
        Path("/nowhere/at/all").read_text()

    monkeypatch.setitem(COMMANDS, "doctor", dataclasses.replace(COMMANDS["doctor"], run=run))
    assert main(["doctor"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("fastuft doctor: error: /nowhere/at/all: No such file") and line.count("\n") == 1
    assert main(["doctor", "--json"]) == 130
    assert capsys.readouterr().err == "fastuft doctor: interrupted\n"


def test_own_warnings_are_one_line_and_others_keep_their_source(monkeypatch):
    shown = []

    def run(config):
        own = str(Path(benchmarks.__file__).parent / "main.py")
        shown.append(warnings.formatwarning("the queue is long", UserWarning, own, 3))
        shown.append(warnings.formatwarning("old call", DeprecationWarning, "/elsewhere/module.py", 3))
        return 0

    before = warnings.formatwarning
    monkeypatch.setitem(COMMANDS, "doctor", dataclasses.replace(COMMANDS["doctor"], run=run))
    assert main(["doctor"]) == 0
    assert shown[0] == "fastuft: warning: the queue is long\n" and "module.py:3" in shown[1]
    assert warnings.formatwarning is before


def test_missing_extras_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)  # importing it raises ModuleNotFoundError

    assert "fastuft[train-" in refused(capsys, "finetune", *NEEDED)
    assert main(["doctor"]) in (0, 1)
    assert "torch" in capsys.readouterr().out


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """As if the package were installed from a wheel, next to another package that has benchmarks."""
    package = tmp_path / "site-packages" / "fastuft" / "cli"
    (tmp_path / "site-packages" / "bench").mkdir(parents=True)
    monkeypatch.setattr(benchmarks, "__file__", str(package / "benchmarks.py"))
    monkeypatch.chdir(tmp_path)


def test_bench_needs_a_checkout(installed, capsys):
    assert "clone the repository and run `fastuft bench` in its folder" in refused(capsys, "bench")


def test_bench_of_an_installed_package_runs_in_a_clone(installed, monkeypatch):
    calls = []
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root / "docs")
    monkeypatch.setattr(
        benchmarks.subprocess, "run", lambda command, check: calls.append(command) or subprocess.CompletedProcess("", 0)
    )
    assert main(["bench", "loss"]) == 0
    assert calls[0][3] == str(root / "bench" / "bench_loss.py")


def test_bench_without_its_packages_names_them(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fastuft[bench]'" in refused(capsys, "bench", "loss")


def test_bench_runs_pytest(monkeypatch):
    ran = []
    monkeypatch.setattr(
        benchmarks.subprocess,
        "run",
        lambda command, **_: ran.append(command) or subprocess.CompletedProcess(command, 0),
    )
    assert main(["bench", "evaluate", "--smoke", "--json", "out.json"]) == 0
    (command,) = ran
    assert command[3].endswith("bench_evaluate.py") and "--smoke" in command
    assert f"--benchmark-json={Path('out.json').resolve()}" in command


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two class folders of small noise images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(16):
        inner = folder / "ab"[index % 2]
        inner.mkdir(exist_ok=True)
        pixels = generator.integers(0, 255, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(inner / f"{index}.png")
    return folder


SMALL = ["--model.arch", "resnet_tiny", "--model.stem", "small", "--model.bn", "plain", "--augment.size", "32"]
SMALL += ["--data.batch-size", "8", "--data.loader", "torch", "--method.queue_size", "16", "--optim.epochs", "1"]
SMALL += ["--runtime.device", "cpu", "--runtime.log_every", "1", "--runtime.tensorboard", "false"]


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_run_repeats_from_its_saved_configuration(images, tmp_path, capsys):
    first, again, tuned = tmp_path / "first", tmp_path / "again", tmp_path / "tuned"
    assert main(["pretrain", "--target", str(images), "--out", str(first), *SMALL]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert main(["pretrain", "--config", str(first / "config.yaml"), "--out", str(again)]) == 0
    assert losses(first) == losses(again) and len(losses(first)) == 2
    capsys.readouterr()
    assert "already has a run" in refused(capsys, "pretrain", "--config", str(first / "config.yaml"))
    arguments = ["--init", str(first), "--target", str(images), "--out", str(tuned), *SMALL, "--max-steps", "1"]
    assert main(["finetune", *arguments]) == 0
    saved = yaml.safe_load((tuned / "config.yaml").read_text())
    assert saved["max_steps"] == 1 and saved["augment"]["crop_scale"] == [0.2, 1.0] and saved["source"] is None
    out = tmp_path / "eval"
    evaluation = [
        "--train",
        str(images),
        "--test",
        str(images),
        "--size",
        "32",
        "--fewshot.shots",
        "[]",
        "--map.points",
        "0",
    ]
    assert main(["eval", "--checkpoint", str(tuned), "--before", str(first), *evaluation, "--out", str(out)]) == 0
    assert (out / "report.html").exists() and (out / "eval.json").exists()
    assert "tuned" in capsys.readouterr().out
    exported = tmp_path / "backbone.safetensors"
    assert main(["export", "--checkpoint", str(tuned), "--out", str(exported)]) == 0 and exported.exists()
    page = tmp_path / "report.html"
    assert main(["report", f"first={first}", f"tuned={tuned}", "--out", str(page)]) == 0
    assert "tuned" in page.read_text()


def test_verify_data(images, tmp_path, capsys):
    bad_list = tmp_path / "bad.txt"
    assert main(["verify-data", str(images), "--bad-list", str(bad_list)]) == 0
    assert "all 16 files are good" in capsys.readouterr().out and not bad_list.exists()
    folder = tmp_path / "broken"
    folder.mkdir()
    whole = next((images / "a").iterdir()).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "good.png").write_bytes(whole)
    assert main(["verify-data", str(folder), "--decode", "--bad-list", str(bad_list)]) == 1
    assert "1 of 2 files are bad" in capsys.readouterr().out
    assert bad_list.read_text().startswith(str(folder / "cut.png") + "\t")
    os.mkfifo(folder / "pipe.tif")
    assert main(["verify-data", str(folder), "--suffixes", "[.tif]", "--bad-list", str(bad_list)]) == 1
    assert "pipe.tif: cannot be read (it is a pipe" in capsys.readouterr().out
