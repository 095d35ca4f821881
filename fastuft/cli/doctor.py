"""What this machine has for fastuft, what is missing, and the remedy for each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Args:
        part: what was looked at.
        state: ok, missing (works without it, slower or less), or problem (something asked for cannot work).
        found: what is there.
        remedy: what to do, empty when nothing.
    """

    part: str
    state: State
    found: str
    remedy: str = ""


def version(*names: str) -> str | None:
    """Installed version of the first distribution of these names that is installed."""
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def run(*command: str) -> str | None:
    """Output of a program, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def check_torch() -> Iterator[Finding]:
    """torch, its CUDA, the driver's CUDA and the GPU."""
    import torch

    built = torch.version.cuda
    yield Finding("torch", "ok", f"{torch.__version__} ({'CUDA ' + built if built else 'CPU build'})")
    driver = run("nvidia-smi")
    supports = re.search(r"CUDA Version:\s*([\d.]+)", driver or "")
    if driver is None:
        yield Finding("driver", "missing", "no nvidia-smi", "fine on a CPU; on a GPU machine install NVIDIA's driver")
    else:
        newest = supports[1] if supports else "?"
        too_new = bool(built and supports and int(built.split(".")[0]) > int(newest.split(".")[0]))
        remedy = f"install a torch built for CUDA {newest.split('.')[0]}, or a newer driver" if too_new else ""
        yield Finding("driver", "problem" if too_new else "ok", f"supports CUDA {newest}", remedy)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        remedy = "" if major >= 8 else "the fused kernels need sm_80 or newer; the portable path runs"
        yield Finding(
            "GPU", "ok" if major >= 8 else "missing", f"{torch.cuda.get_device_name()}, sm_{major}{minor}", remedy
        )
    elif driver is not None and built is None:
        yield Finding("GPU", "problem", "a driver, but torch is a CPU build", "install torch's CUDA build")
    else:
        yield Finding("GPU", "missing", "none visible to torch", "training runs on the CPU, slowly")


def check_kernels() -> Iterator[Finding]:
    """Triton and the compiled extension."""
    found = version("triton")
    remedy = "" if found else "pip install triton (Linux); without it the losses take the portable path"
    yield Finding("triton", "ok" if found else "missing", found or "not installed", remedy)
    from fastuft.mix import ops

    built = [name for name in ("_C", "_C_cuda") if ops.find_library(name) is not None]
    state: State = "ok" if "_C" in built else "missing"
    remedy = "" if "_C" in built else "install a C++ compiler, then pip install -e . --no-build-isolation"
    if "_C" in built and "_C_cuda" not in built:
        remedy = "for GPU mixing install nvcc, then pip install -e . --no-build-isolation"
    yield Finding("extension", state, " ".join(built) or "not built (plain PyTorch mixing)", remedy)
    nvcc = run("nvcc", "--version")
    release = re.search(r"release ([\d.]+)", nvcc or "")
    remedy = "" if nvcc else "needed only to build the CUDA part of the extension"
    yield Finding("nvcc", "ok" if nvcc else "missing", release[1] if release else "not found", remedy)
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    remedy = "" if compiler else "needed only to build the extension: install g++ or clang"
    yield Finding("C++ compiler", "ok" if compiler else "missing", compiler or "not found", remedy)


def check_dali() -> Iterator[Finding]:
    """DALI, its CUDA against torch's, and the decoy of that name."""
    import torch

    found = version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    decoy = version("nvidia-dali")
    if decoy and not found:
        remedy = "that package is a placeholder: pip uninstall nvidia-dali; pip install nvidia-dali-cuda130"
        yield Finding("DALI", "problem", decoy, remedy)
        return
    if found is None:
        remedy = "pip install 'fastuft[train-cu13]' (or -cu12, -cpu); without it the slower PyTorch loader runs"
        yield Finding("DALI", "missing", "not installed", remedy)
        return
    dali_cuda = "12" if "cuda120" in found else "13"
    torch_cuda = (torch.version.cuda or "").split(".")[0]
    if torch.cuda.is_available() and torch_cuda and torch_cuda != dali_cuda:
        remedy = f"pip uninstall {found.split()[0]}; pip install nvidia-dali-cuda{torch_cuda}0"
        yield Finding("DALI", "problem", f"{found} beside torch for CUDA {torch_cuda}", remedy)
        return
    yield Finding("DALI", "ok", found)


def check_apex() -> Iterator[Finding]:
    """NVIDIA's apex (opt-in) and the unrelated package of that name."""
    found = version("apex")
    if found is None:
        yield Finding("apex", "missing", "not installed", "only for optim.optimizer=apex_fused_sgd; sgd is fused too")
    elif importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
        yield Finding("apex", "ok", found)
    else:
        remedy = "this is an unrelated web toolkit: pip uninstall apex; build NVIDIA's apex from its repository"
        yield Finding("apex", "problem", found, remedy)


OPTIONAL = {
    "timm": "for model.arch=timm:NAME: pip install timm",
    "torchvision": "for checking exports; the program itself does not need it",
    "faiss-cpu": "for faster retrieval and K-means at large sizes: pip install faiss-cpu",
    "openTSNE": "for faster t-SNE maps: pip install openTSNE",
    "wandb": "for runtime.wandb=true: pip install wandb",
}
NEEDED = (
    "numpy",
    "jsonargparse",
    "PyYAML",
    "safetensors",
    "tensorboard",
    "tqdm",
    "pillow",
    "scikit-learn",
    "matplotlib",
    "jinja2",
)


def check_packages() -> Iterator[Finding]:
    """What the command line needs, and optional companions."""
    lacking = [name for name in NEEDED if version(name) is None]
    remedy = "pip install 'fastuft[train-cu13]' (or -cu12, -cpu)" if lacking else ""
    found = f"lacking {', '.join(lacking)}" if lacking else "all installed"
    yield Finding("packages", "problem" if lacking else "ok", found, remedy)
    for name, remedy in OPTIONAL.items():
        there = version(name, "faiss-gpu") if name == "faiss-cpu" else version(name)
        yield Finding(name, "ok" if there else "missing", there or "not installed", "" if there else remedy)


def examine() -> list[Finding]:
    """All findings, in order."""
    checks = (check_torch, check_kernels, check_dali, check_apex, check_packages)
    return [finding for check in checks for finding in check()]


def run_doctor(*, as_json: bool = False) -> int:
    """Print the findings; status 1 when something that is there cannot work."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        widths = [max(len(getattr(f, name)) for f in findings) for name in ("part", "state", "found")]
        for f in findings:
            cells = (f.part.ljust(widths[0]), f.state.ljust(widths[1]), f.found.ljust(widths[2]))
            print("  ".join([*cells, f.remedy]).rstrip())
    return int(any(finding.state == "problem" for finding in findings))
