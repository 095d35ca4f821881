"""AddressSanitizer and UndefinedBehaviorSanitizer for libraries loaded by a Python without sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fastuft

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> str:
    """g++, or a skip."""
    path = shutil.which("g++")
    if path is None:
        pytest.skip("needs g++")
    return path


def environment(site: Path, **variables: str) -> dict[str, str]:
    """Environment of a Python that imports packages from ``site`` and preloads the sanitizer libraries."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        libraries.append(path)
    return {
        **os.environ,
        "PYTHONPATH": str(site),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own are not ours to free
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **variables,
    }


def copy_package(site: Path) -> Path:
    """Copy the package to ``site`` without its libraries; returns the folder for new ones."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(fastuft.__file__).parent, site / "fastuft", ignore=ignore)
    return site / "fastuft" / "mix"
