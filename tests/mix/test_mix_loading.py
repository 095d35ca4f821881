"""The libraries that an import loads depend on PyTorch's version, never on a call to the driver."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from sanitizers import copy_package

from fastuft.mix import ops

SCRIPT = """
import sys
from pathlib import Path
import torch

def refuse(*_):
    raise AssertionError("the driver was asked")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, refuse)
torch.version.cuda, torch.version.hip = (None if value == "-" else value for value in sys.argv[1:])
loaded, load = [], torch.ops.load_library

def load_library(path):
    loaded.append(Path(path).stem)
    if loaded[-1] == "_C":
        load(path)

torch.ops.load_library = load_library
import fastuft
from fastuft.mix import ops
print(*loaded, ops.HAS_CUDA_EXTENSION, ops._why_the_reference_runs(), sep="|")
"""


@pytest.mark.skipif(not ops.HAS_CPU_EXTENSION, reason="the compiled extension _C is not built")
@pytest.mark.parametrize(
    ("cuda", "hip", "has_library", "loaded", "reason"),
    [
        ("13.0", "-", True, ["_C", "_C_cuda"], ""),
        ("13.0", "-", False, ["_C"], "extension _C_cuda (CUDA) is not built"),
        ("-", "-", True, ["_C"], ""),
        ("-", "7.1", True, ["_C"], "has no kernels for ROCm"),
    ],
    ids=["CUDA", "CUDA without the library", "CPU", "ROCm"],
)
def test_importing_does_not_initialize_cuda(tmp_path, cuda, hip, has_library, loaded, reason):
    folder = copy_package(tmp_path)
    shutil.copy2(ops.find_library("_C"), folder)
    if has_library:
        (folder / "_C_cuda.so").touch()
    command = [sys.executable, "-c", SCRIPT, cuda, hip]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *found, has_cuda, why = done.stdout.strip().split("|")
    assert found == loaded and has_cuda == str("_C_cuda" in loaded)
    assert reason in why
