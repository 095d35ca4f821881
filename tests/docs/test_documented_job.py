"""The commands of README and tutorial, run in order on small files with the same names."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from small_job import EVALUATION, TINY, write_small_job
from test_documentation import INLINE, ROOT, commands

from fastuft.cli import main
from fastuft.model import build_backbone, export_backbone

pytestmark = pytest.mark.e2e

RESNET = TINY | {"model": {"arch": "resnet18", "bn_group": 8}}
# The pages train with the defaults; here a file of small settings precedes the options of the page.
SMALL = {"finetune": "photos.yaml", "eval": "eval.yaml"}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace with every file that the pages mention."""
    write_small_job(tmp_path)
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(RESNET))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(EVALUATION | {"device": "cpu"}))
    export_backbone(build_backbone("resnet18"), tmp_path / "new.safetensors")
    for name in ("moco_v2_800ep_pretrain.pth.tar", "resnet50.pth"):
        shutil.copy(tmp_path / "new.safetensors", tmp_path / name)
    for name, source in (("imagenet/train", "source"), ("labeled/train", "photos"), ("labeled/test", "test")):
        shutil.copytree(tmp_path / source, tmp_path / name)
    shutil.copy(next((tmp_path / "test").rglob("*.png")), tmp_path / "query.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    words = line.split()[1:]
    small = ["--config", SMALL[words[0]]] if words[0] in SMALL else []
    assert main([words[0], *small, *words[1:]]) == 0, line


@pytest.mark.timeout(300)
def test_the_commands_of_the_readme_work(workspace, capsys):
    lines = [line for line in commands(ROOT / "README.md") if line.startswith("fastuft ")]
    lines += [
        line for line in INLINE.findall((ROOT / "README.md").read_text()) if line.split()[1] in ("embed", "search")
    ]
    assert [line.split()[1] for line in lines] == ["finetune", "eval", "export", "embed", "search"]
    for line in lines:
        run(line)
    assert "photos/class" in capsys.readouterr().out  # the nearest images
    assert (workspace / "backbone.pth").is_file() and (workspace / "photos.npz").is_file()
    assert (workspace / "runs/photos/eval/report.html").is_file()


@pytest.mark.timeout(300)
def test_the_commands_of_the_tutorial_work(workspace, capsys):
    lines = commands(ROOT / "docs" / "tutorial.md")
    assert [line.split()[1] for line in lines] == [
        "doctor",
        "verify-data",
        "finetune",
        "eval",
        "eval",
        "report",
        "export",
    ]
    for line in lines[1:]:  # doctor looks at the machine: its own tests
        if " report " in line:
            shutil.copytree(workspace / "runs" / "photos", workspace / "runs" / "naive")
        run(line)
    assert json.loads((workspace / "runs/photos/eval/eval.json").read_text())["retrieval"] >= 0
    assert (workspace / "report.html").is_file() and (workspace / "runs/photos/eval/report.html").is_file()
