"""The CUDA kernels without a GPU: compiled for the host and run thread by thread under the sanitizers.

This covers indices, bounds, alignment, clamping and NaN values. Streams, graphs and concurrent threads are left to the
tests on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitizers import FLAGS, compiler, copy_package, environment

HERE = Path(__file__).resolve().parent
PROPERTIES = "bitwise or rounds_once or odd_batches or non_dense"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """csrc/cuda.cu compiled to a shared library for the host."""
    library = tmp_path_factory.mktemp("host_cuda") / "kernels.so"
    folder = Path(torch.__file__).parent
    command = [
        *(compiler(), "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off", *FLAGS),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *(f"-I{HERE / 'host_cuda'}", "-isystem", str(folder / "include")),
        *(str(HERE / "host_cuda" / "kernels.cpp"), "-o", str(library), f"-L{folder / 'lib'}", "-ltorch_cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_kernels_run_on_the_host(kernels, order, tmp_path):
    copy_package(tmp_path)
    variables = {"FASTUFT_HOST_KERNELS": str(kernels)}
    if order == "backward":
        variables["FASTUFT_THREAD_ORDER"] = "backward"
    variables = environment(tmp_path, **variables)
    cases = HERE / "host_kernel_cases.py"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    selection = ["-k", f"host_kernel_cases or {PROPERTIES}"]
    files = [cases, HERE / "test_mix_ops.py"]
    done = subprocess.run([*command, *selection, *files], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:] + done.stderr[-4000:]
