"""What this machine has for fastuft, what is missing, and the remedy for each."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import fastuft
from fastuft.cli.kernels import wrong_kernels
from fastuft.console import say

State = Literal["ok", "missing", "problem"]

OPTIONAL = {
    "timm": "for model.arch=timm:NAME: pip install timm",
    "torchvision": "for checking exports; the program itself does not need it",
    "openTSNE": "for faster t-SNE maps: pip install openTSNE",
    "wandb": "for runtime.wandb=true: pip install wandb",
    "pyarrow": "for fastuft embed --out FILE.parquet: pip install pyarrow",
}
# The lowest versions in pyproject.toml.
NEEDED = {
    "numpy": "1.26",
    "filelock": "3.13",
    "jsonargparse": "4.49",
    "PyYAML": "6",
    "safetensors": "0.5",
    "tensorboard": "2.18",
    "tqdm": "4.66",
    "pillow": "11",
    "scikit-learn": "1.5",
    "matplotlib": "3.9",
    "jinja2": "3.1",
    "packaging": "23",
}
TORCH, TRITON, DALI = "2.11", "3.6", "2.0"
EXTRA = "pip install 'fastuft[train-cu13]' (or -cu12, -cpu)"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output.

    Args:
        part: what was checked.
        state: ok, missing (fastuft works without it, slower or with less), or problem (required, or present but broken).
        found: what was found.
        remedy: what to do; empty if nothing.
    """

    part: str
    state: State
    found: str
    remedy: str = ""


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

    Without the ``packaging`` package, nothing counts as older; `check_packages` then reports that it is missing.
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


def load_torch() -> Any | None:
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


def _major(cuda: str | None) -> int | None:
    return int(cuda.split(".")[0]) if cuda and cuda[0].isdigit() else None


def check_torch(torch: Any | None) -> Iterator[Finding]:
    """torch and its CUDA version, the driver's CUDA version, the GPU."""
    if torch is None:
        yield Finding(
            "torch", "problem", "not installed", "install torch >= 2.11 for your CUDA version from pytorch.org"
        )
        return
    built = torch.version.cuda
    build = f"{torch.__version__} ({'CUDA ' + built if built else 'CPU build'})"
    if older(torch.__version__, TORCH):
        yield Finding("torch", "problem", build, f"fastuft needs torch >= {TORCH}: pip install --upgrade torch")
    else:
        yield Finding("torch", "ok", build)

    driver = driver_cuda()
    too_old = (_major(built) or 0) > (_major(driver) or 99)
    if driver is None:
        yield Finding("driver", "missing", "no nvidia-smi", "fine on a CPU; on a GPU machine, install NVIDIA's driver")
    elif too_old:
        remedy = f"install a newer driver, or a torch built for CUDA {_major(driver)}"
        yield Finding("driver", "problem", f"supports CUDA {driver}, torch is built for {built}", remedy)
    else:
        yield Finding("driver", "ok", f"supports CUDA {driver}")

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
            if major >= 8:
                yield Finding("GPU", "ok", name)
            else:
                yield Finding("GPU", "missing", name, "the fused kernels need sm_80 or newer; the portable path runs")
    elif driver is not None and built is None:
        yield Finding("GPU", "problem", "a driver, but torch is a CPU build", "install torch's CUDA build")
    elif driver is not None:
        remedy = "see `nvidia-smi` and CUDA_VISIBLE_DEVICES" + ("; the driver is too old" if too_old else "")
        yield Finding("GPU", "problem", "a driver, but torch sees no device", remedy)
    else:
        yield Finding("GPU", "missing", "none", "training runs on the CPU, slowly")


def check_triton(torch: Any | None) -> Iterator[Finding]:
    """Triton, and the compiler and headers that it needs at run time on a GPU."""
    found = version("triton")
    on_gpu = torch is not None and torch.cuda.is_available()
    if found is None:
        remedy = "pip install triton (Linux); without it the losses take the portable path"
        yield Finding("triton", "missing", "not installed", remedy)
        return
    lacking = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        lacking.append("a C compiler (install gcc)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        lacking.append("Python's headers (install python3-dev)")
    if older(found, TRITON):
        remedy = f"the kernels need triton >= {TRITON}: pip install --upgrade triton"
        yield Finding("triton", "problem", found, remedy)
    elif lacking and on_gpu:
        yield Finding("triton", "problem", found, f"at run time, it needs {' and '.join(lacking)}")
    else:
        yield Finding("triton", "ok", found)


def check_extension(torch: Any | None) -> Iterator[Finding]:
    """The compiled extension, its CPU and CUDA parts, and the tools that build it."""
    folder = Path(fastuft.__file__).parent / "mix"
    build = "pip install -e . --no-build-isolation"
    on_gpu = torch is not None and torch.cuda.is_available()
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    nvcc = run("nvcc", "--version")
    for name, device, tool in (("_C", "CPU", compiler), ("_C_cuda", "CUDA", nvcc)):
        part = f"extension {name}"
        library = next(iter(sorted(folder.glob(f"{name}.*so"))), None)
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
    wanted = _major(torch_cuda)
    if release and wanted and _major(found) != wanted:
        remedy = (
            f"torch is built for CUDA {torch_cuda}; build the extension with the CUDA {wanted} toolkit first on PATH"
        )
        return Finding("nvcc", "ok", found, remedy)
    return Finding("nvcc", "ok", found)


def check_kernels(torch: Any | None) -> Iterator[Finding]:
    """The fused kernels, compared with their portable paths on the GPU."""
    if torch is None or not torch.cuda.is_available():
        return
    wrong = wrong_kernels()
    for what, why in wrong:
        remedy = "training uses the portable path instead, which is slower; please report this line"
        yield Finding("fused kernel", "problem", f"{what}: {why}", remedy)
    if not wrong:
        yield Finding("fused kernels", "ok", "agree with the portable paths in fp32, fp16 and bf16")


def check_dali(torch: Any | None) -> Iterator[Finding]:
    """DALI, its CUDA version compared with torch's and the driver's, and the decoy package."""
    wheels = [wheel for wheel in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if version(wheel)]
    decoy = version("nvidia-dali")
    if decoy and not wheels:
        remedy = f"that package is a placeholder: pip uninstall nvidia-dali; {EXTRA}"
        yield Finding("DALI", "problem", decoy, remedy)
        return
    if not wheels:
        yield Finding("DALI", "missing", "not installed", f"{EXTRA}; without it the slower PyTorch loader runs")
        return
    if len(wheels) > 1:
        remedy = "they overwrite each other's files: uninstall both, then install the one for your CUDA"
        yield Finding("DALI", "problem", " and ".join(wheels), remedy)
        return
    found = version(*wheels) or wheels[0]
    dali_cuda = 12 if wheels[0].endswith("cuda120") else 13
    torch_cuda = _major(torch.version.cuda) if torch is not None else None
    driver = _major(driver_cuda())
    if older(found, DALI):
        yield Finding("DALI", "problem", found, f"pip install --upgrade '{wheels[0]}>={DALI}'")
    elif torch_cuda and torch_cuda != dali_cuda:
        remedy = f"pip uninstall {wheels[0]}; pip install nvidia-dali-cuda{torch_cuda}0"
        yield Finding("DALI", "problem", f"{found} beside torch for CUDA {torch_cuda}", remedy)
    elif driver is not None and driver < dali_cuda:
        remedy = f"install a newer driver, or nvidia-dali-cuda{driver}0"
        yield Finding("DALI", "problem", f"{found}, but the driver supports CUDA {driver}", remedy)
    else:
        remedy = "" if decoy is None else "the placeholder nvidia-dali is installed too: pip uninstall nvidia-dali"
        yield Finding("DALI", "ok", found, remedy)


def check_apex() -> Iterator[Finding]:
    """NVIDIA's apex (opt-in), and the unrelated package with the same name."""
    found = version("apex")
    if found is None:
        yield Finding("apex", "missing", "not installed", "only for optim.optimizer=apex_fused_sgd; sgd is fused too")
    elif importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
        yield Finding("apex", "ok", found)
    else:
        remedy = "this is an unrelated web toolkit: pip uninstall apex; build NVIDIA's apex from its repository"
        yield Finding("apex", "problem", found, remedy)


def check_packages() -> Iterator[Finding]:
    """The packages that the command line needs, and optional ones."""
    installed = {name: version(name) for name in NEEDED}
    lacking = [name for name, found in installed.items() if found is None]
    stale = [f"{found} < {NEEDED[name]}" for name, found in installed.items() if found and older(found, NEEDED[name])]
    if lacking or stale:
        parts = [f"missing: {', '.join(lacking)}"] if lacking else []
        parts += [f"too old: {', '.join(stale)}"] if stale else []
        parts += ["versions not compared"] if "packaging" in lacking else []
        yield Finding("packages", "problem", "; ".join(parts), EXTRA)
    else:
        yield Finding("packages", "ok", "all installed")
    for name, remedy in OPTIONAL.items():
        found = version(name)
        yield Finding(name, "ok" if found else "missing", found or "not installed", "" if found else remedy)


def examine() -> list[Finding]:
    """All findings, in order."""
    torch = load_torch()
    ours = Finding("fastuft", "ok", f"{fastuft.__version__}, Python {platform.python_version()}")
    return [
        ours,
        *check_torch(torch),
        *check_triton(torch),
        *check_extension(torch),
        *check_kernels(torch),
        *check_dali(torch),
        *check_apex(),
        *check_packages(),
    ]


def run_doctor(*, as_json: bool = False) -> int:
    """Print the findings; status 1 if a required part is missing or a present one cannot work."""
    findings = examine()
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        widths = [max(len(getattr(f, name)) for f in findings) for name in ("part", "state", "found")]
        for f in findings:
            cells = (f.part.ljust(widths[0]), f.state.ljust(widths[1]), f.found.ljust(widths[2]))
            say("  ".join([*cells, f.remedy]).rstrip())
    return int(any(finding.state == "problem" for finding in findings))
