"""The property tests again, on a CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitizers import compiler, copy_package, environment

ROOT = Path(__file__).resolve().parents[2]
TESTS = "bitwise or rounds_once or odd_batches or non_dense or larger_than_the_cache"


@pytest.mark.slow
def test_no_access_is_out_of_bounds(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    build, site = tmp_path / "build", tmp_path / "site"
    variables = environment(site)
    options = [f"-DTORCH_FOLDER={Path(torch.__file__).parent}", "-DFASTUFT_CUDA=off", "-DFASTUFT_SANITIZE=ON"]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True, env={**os.environ, "CXX": compiler()})
    subprocess.run(["cmake", "--build", build], check=True)
    subprocess.run(["cmake", "--install", build, "--prefix", copy_package(site)], check=True)
    where = [sys.executable, "-P", "-c", "from fastuft.mix import ops; print(ops.find_library('_C'))"]
    found = subprocess.run(where, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert found.stdout.strip() == str(site / "fastuft" / "mix" / "_C.so"), found.stdout + found.stderr
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS]
    target = str(ROOT / "tests" / "mix" / "test_mix_ops.py")
    done = subprocess.run([*command, target], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
