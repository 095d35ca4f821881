"""Every command without a home folder, with warnings as errors, with -O, and in the C locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_job import write_small_job

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
ROOT = Path(__file__).resolve().parents[2]

# A container started with a number for a user: no entry in passwd, no HOME, and "/" may not be written.
NOBODY = """
import os, pathlib, pwd
def gone(*_):
    raise KeyError("getpwuid(): uid not found: 12345")
pwd.getpwuid = pwd.getpwnam = gone
"""
ENVIRONMENTS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no home": ([], {}, NOBODY),
    "warnings are errors": (["-W", "error"], {}, ""),
    "python -O in locale C": (["-O"], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ""),
}
COMMANDS = [
    "finetune --config photos.yaml --init start.safetensors --target photos --source source --out run --max_steps 1 "
    "--method.queue_size 32",
    "eval --config eval.yaml --checkpoint run --before start.safetensors --train photos --test test --out run --gallery 3 "
    "--map.points 8",
    "embed photos --checkpoint run --out photos.npz",
    "search photos/class0/000.png --in photos.npz --top 2",
    "verify-data photos --decode",
    "export --checkpoint run --out backbone.pth --layout timm",
    "report run --out report.html",
    "doctor",
]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command_works(tmp_path, name):
    options, more, prelude = ENVIRONMENTS[name]
    job = write_small_job(tmp_path / "jöb")
    script = f"{prelude}\nimport sys\nfrom fastuft.cli import main\nsys.exit(main(sys.argv[1:]))"
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    for command in COMMANDS:
        words = [sys.executable, *options, "-c", script, *command.split()]
        done = subprocess.run(words, env=environment, cwd=job, capture_output=True, timeout=240)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
