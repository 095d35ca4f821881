"""The property tests again, on a CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastuft

ROOT = Path(__file__).resolve().parents[2]
TESTS = "bitwise or rounds_once or odd_batches or non_dense or larger_than_the_cache"


def runtime(name: str) -> str:
    """Path of one of the compiler's sanitizer libraries."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not Path(path.stdout.strip()).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return path.stdout.strip()


@pytest.mark.slow
def test_no_access_leaves_the_batch(tmp_path):
    libraries = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
    build, site = tmp_path / "build", tmp_path / "site"
    options = [f"-DTORCH_FOLDER={Path(torch.__file__).parent}", "-DFASTUFT_CUDA=off", "-DFASTUFT_SANITIZE=ON"]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True, env={**os.environ, "CXX": "g++"})
    subprocess.run(["cmake", "--build", build], check=True)
    package = Path(fastuft.__file__).parent
    shutil.copytree(package, site / "fastuft", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run(["cmake", "--install", build, "--prefix", site / "fastuft" / "mix"], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own are not ours to free
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    where = [sys.executable, "-P", "-c", "from fastuft.mix import ops; print(ops.find_library('_C'))"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(site / "fastuft" / "mix" / "_C.so"), found.stdout + found.stderr
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({TESTS}) and not Gpu"]
    target = str(ROOT / "tests" / "mix" / "test_mix_ops.py")
    done = subprocess.run([*command, target], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
