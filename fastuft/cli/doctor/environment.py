"""The packages and programs that are installed on this machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from types import ModuleType


def version(*names: str) -> str | None:
    """Name and version of the first of these distributions that is installed."""
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def older(found: str, lowest: str) -> bool:
    """Whether the version at the end of ``found`` belongs to a release before ``lowest``.

    Without the ``packaging`` package, nothing counts as older; the check of the packages then reports that it is missing.
    """
    try:
        from packaging.version import InvalidVersion, Version
    except ModuleNotFoundError:
        return False
    try:
        return Version(found.split()[-1]).release < Version(lowest).release
    except InvalidVersion:  # the version of a private build says nothing about its age
        return False


def run(*command: str) -> str | None:
    """The output of a program, or None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def importable(name: str) -> bool:
    """Whether a module can be imported; looked up in its parent, which is imported."""
    return importlib.util.find_spec(name) is not None


def load_torch() -> ModuleType | None:
    """torch, or None if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None


def driver_cuda() -> str | None:
    """The newest CUDA version that the driver supports ("?" if it does not say), or None without a driver."""
    text = run("nvidia-smi")
    if text is None:
        return None
    found = re.search(r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)", text)
    return found[1] if found else "?"


def major(cuda: str | None) -> int | None:
    """The first number of a CUDA version; None without one."""
    return int(cuda.split(".")[0]) if cuda and cuda[0].isdigit() else None
