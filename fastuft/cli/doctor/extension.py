"""The checks of the compiled extension and of the compilers that build it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastuft.cli.doctor import environment
from fastuft.cli.doctor.finding import Finding

FOLDER = Path(__file__).resolve().parents[2] / "mix"


def check_extension(torch: ModuleType | None) -> Iterator[Finding]:
    """The compiled extension, its CPU and CUDA parts, and the tools that build it."""
    build = "pip install -e . --no-build-isolation"
    on_gpu = torch is not None and torch.cuda.is_available()
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    nvcc = environment.run("nvcc", "--version")
    for name, device, tool in (("_C", "CPU", compiler), ("_C_cuda", "CUDA", nvcc)):
        part = f"extension {name}"
        library = next(iter(sorted(FOLDER.glob(f"{name}.*so"))), None)
        wanted = name == "_C" or on_gpu
        if library is None:
            tools = "a C++ compiler" if name == "_C" else "nvcc"
            how = build if tool else f"install {tools}, then {build}"
            remedy = (
                f"{how}; without it, {device} mixing runs in plain PyTorch" if wanted else "not needed without a GPU"
            )
            yield Finding(part, "missing", "not built", remedy)
        elif torch is None or not wanted:
            yield Finding(part, "ok", f"{library.name} (not loaded here)")
        else:
            try:
                torch.ops.load_library(str(library))
            except OSError as error:
                reason = " ".join(str(error).split())[:120]
                yield Finding(part, "problem", f"{library.name} does not load: {reason}", f"rebuild it: {build}")
            else:
                yield Finding(part, "ok", library.name)
    yield check_nvcc(nvcc, None if torch is None else torch.version.cuda)
    remedy = "" if compiler else "needed only to build the extension: install g++ or clang"
    yield Finding("C++ compiler", "ok" if compiler else "missing", compiler or "not found", remedy)


def check_nvcc(answer: str | None, torch_cuda: str | None) -> Finding:
    """The CUDA compiler, compared with the CUDA version that torch is built for."""
    if answer is None:
        return Finding("nvcc", "missing", "not found", "needed only to build the CUDA part of the extension")
    release = re.search(r"release ([\d.]+)", answer)
    found = release[1] if release else "unknown version"
    wanted = environment.major(torch_cuda)
    if release and wanted and environment.major(found) != wanted:
        remedy = (
            f"torch is built for CUDA {torch_cuda}; build the extension with the CUDA {wanted} toolkit first on PATH"
        )
        return Finding("nvcc", "ok", found, remedy)
    return Finding("nvcc", "ok", found)
