"""``fastuft bench``: the benchmarks of a source checkout, run by pytest in a separate process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from fastuft.cli.options import BenchOptions


def _bench_folder() -> Path:
    """The benchmarks of the checkout that this package belongs to, or else of the one in the current directory."""
    here = Path.cwd()
    for root in (Path(__file__).resolve().parents[2], here, *here.parents):
        # An installed package is among others, one of which may have a folder with that name.
        if (root / "bench" / "bench_loss.py").is_file() and (root / "pyproject.toml").is_file():
            return root / "bench"
    raise ValueError("bench needs a source checkout: clone the repository and run `fastuft bench` in its folder")


def run_benchmarks(config: BenchOptions) -> int:
    folder = _bench_folder()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("bench needs pytest and pytest-benchmark: pip install 'fastuft[bench]'")
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if config.what != "all" and config.what not in known:
        raise ValueError(f"what={config.what!r} is not allowed; choose one of all, {', '.join(known)}")
    target = folder if config.what == "all" else folder / f"bench_{config.what}.py"
    settings = folder.parent / "pyproject.toml"
    command = [sys.executable, "-m", "pytest", str(target), "-c", str(settings), "--benchmark-only"]
    command += [f"--device={config.device}", f"--threads={config.threads}", f"--seconds={config.seconds}"]
    command += ["--smoke"] if config.smoke else []
    command += [] if config.slow or config.smoke else ["-m", "not slow"]
    command += [f"--impl={impl}" for impl in config.impl]
    command += [f"--benchmark-json={Path(config.json).resolve()}"] if config.json else []
    return subprocess.run(command, check=False).returncode
