"""README and documentation: every command parses, every Python block runs, the site builds without a warning."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from small_job import write_small_job

import fastuft
from fastuft.cli import main
from fastuft.cli.commands import COMMANDS
from fastuft.model import Encoder, build_backbone

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("loss", "mix", "model", "data", "trainer", "evaluate", "report")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(fastuft [^`\n]+)`(?!`)")
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(page, *languages):
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands(page):
    """Command lines of the shell blocks, continuation lines joined, comments left out."""
    text = "\n".join(blocks(page, "bash", "")).replace("\\\n", " ")
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(("fastuft ", "torchrun ", "pip ", "make ", "python ", "sbatch "))]


EVERY_COMMAND = [(page, line) for page in PAGES for line in commands(page)]


@pytest.fixture
def parse_only(monkeypatch):
    """Make commands parse and check their options without running."""
    for name, command in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, name, dataclasses.replace(command, run=lambda config: 0))


@pytest.mark.parametrize(("page", "line"), EVERY_COMMAND, ids=[f"{page.name}: {line}" for page, line in EVERY_COMMAND])
def test_every_command_of_a_page_parses(page, line, parse_only, capsys):
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = ["fastuft", *words[words.index("fastuft.cli") + 1 :]]
    if words[0] == "fastuft":
        assert main([word for word in words[1:] if word != "..."]) == 0, capsys.readouterr().err
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    elif words[0] == "pip":
        extras = [extra for found in re.findall(r"(?:fastuft|\.)\[([\w,-]+)\]", line) for extra in found.split(",")]
        assert set(extras) <= EXTRAS
    else:
        script = next(word for word in words[1:] if not word.startswith("-") and "/" in word)
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_option_files_of_a_page_parse(page, parse_only, tmp_path, capsys):
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        words = [
            "finetune",
            "--config",
            str(file),
            "--init",
            "start.pth",
            "--target",
            "photos/",
            "--out",
            "runs/photos",
        ]
        assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_a_sentence_parse(page, parse_only, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("optim: {epochs: 1}\n")
    for line in INLINE.findall(page.read_text()):
        words = shlex.split(line)[1:]
        if words[0].isupper() or words[-1] == "--config":  # a placeholder; half of an option
            continue
        assert words[0] in {*COMMANDS, "help"}, line
        if len(words) > 1 and not words[1].isupper():
            status = main(words)
            error = capsys.readouterr().err
            assert status == 0 or "missing" in error, (line, error)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "python.md"],  # whose results are looked at with the calls' other tests
    ids=lambda page: page.name,
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(write_small_job(tmp_path))
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_every_extra_is_explained():
    table = (ROOT / "docs" / "install.md").read_text()
    assert not [extra for extra in EXTRAS if f"`{extra}`" not in table]


def test_files_named_in_the_pages_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:examples|docker|kernels|bench|tests|docs|fastuft)/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists() or "/results/" in name, f"{page.name} names {name}"


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^([\w]+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_the_scaling_page_shows_the_table_of_its_model():
    model = runpy.run_path(str(ROOT / "docs" / "scaling.py"))
    cluster = model["Cluster"]()
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert model["table"](cluster) in page
    assert f"computes for {1e3 * cluster.compute():.0f} ms" in page
    assert f"checkpoint in {cluster.checkpoint():.2f} s" in page
    assert f"| {model['PARAMETERS']:,} |" in page


def test_the_scaling_model_counts_the_parameters_of_a_resnet50():
    backbone = build_backbone("resnet50")
    encoder = Encoder(backbone, 128)
    model = runpy.run_path(str(ROOT / "docs" / "scaling.py"))
    assert sum(each.numel() for each in encoder.parameters()) == model["PARAMETERS"]


@pytest.mark.docs
@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning_and_shows_every_public_name(tmp_path):
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "api.html").read_text() + (tmp_path / "rooms.html").read_text()
    assert 'id="fastuft.api.evaluate"' in reference and "cdn." not in reference
    wanted = {name: f"fastuft.{name}" for name in fastuft.__all__ if name not in ("__version__", "evaluate")}
    for room in ROOMS:
        face = import_module(f"fastuft.{room}")
        names = (
            name
            for name in face.__all__
            if inspect.isroutine(getattr(face, name)) or inspect.isclass(getattr(face, name))
        )
        wanted |= {name: f"fastuft.{room}.{name}" for name in names if name not in wanted}
    assert len(wanted) > 100
    assert not [full for full in wanted.values() if f'id="{full}"' not in reference]


@pytest.mark.docs
@pytest.mark.timeout(900)
def test_the_notebook_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=800, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("retrieval" in output.get("text", "") for output in outputs)


def test_the_tests_named_in_the_table_of_layouts_exist():
    rows = [line for line in (ROOT / "docs" / "checkpoints.md").read_text().splitlines() if "`test_" in line]
    assert len(rows) >= 20
    for row in rows:
        defined = ""
        for name in re.findall(r"`(test_[\w.]+)`", row):
            if name.endswith(".py"):
                defined = (ROOT / "tests" / "model" / name).read_text()
            else:
                assert f"def {name}(" in defined, row
