"""The checks of torch, the GPU with its driver, Triton and the fused kernels."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastuft.cli.doctor import environment
from fastuft.cli.doctor.finding import Finding
from fastuft.cli.doctor.kernels import wrong_kernels

TORCH, TRITON = "2.11", "3.6"


def check_torch(torch: ModuleType | None) -> Iterator[Finding]:
    """torch and its CUDA version, the driver's CUDA version, the GPU."""
    if torch is None:
        yield Finding(
            "torch", "problem", "not installed", "install torch >= 2.11 for your CUDA version from pytorch.org"
        )
        return
    built = torch.version.cuda
    build = f"{torch.__version__} ({'CUDA ' + built if built else 'CPU build'})"
    if environment.older(torch.__version__, TORCH):
        yield Finding("torch", "problem", build, f"fastuft needs torch >= {TORCH}: pip install --upgrade torch")
    else:
        yield Finding("torch", "ok", build)

    driver = environment.driver_cuda()
    too_old = (environment.major(built) or 0) > (environment.major(driver) or 99)
    if driver is None:
        yield Finding("driver", "missing", "no nvidia-smi", "fine on a CPU; on a GPU machine, install NVIDIA's driver")
    elif too_old:
        remedy = f"install a newer driver, or a torch built for CUDA {environment.major(driver)}"
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


def check_triton(torch: ModuleType | None) -> Iterator[Finding]:
    """Triton, and the compiler and headers that it needs at run time on a GPU."""
    found = environment.version("triton")
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
    if environment.older(found, TRITON):
        remedy = f"the kernels need triton >= {TRITON}: pip install --upgrade triton"
        yield Finding("triton", "problem", found, remedy)
    elif lacking and on_gpu:
        yield Finding("triton", "problem", found, f"at run time, it needs {' and '.join(lacking)}")
    else:
        yield Finding("triton", "ok", found)


def check_kernels(torch: ModuleType | None) -> Iterator[Finding]:
    """The fused kernels, compared with their portable paths on the GPU."""
    if torch is None or not torch.cuda.is_available():
        return
    wrong = wrong_kernels()
    for what, why in wrong:
        remedy = "training uses the portable path instead, which is slower; please report this line"
        yield Finding("fused kernel", "problem", f"{what}: {why}", remedy)
    if not wrong:
        yield Finding("fused kernels", "ok", "agree with the portable paths in fp32, fp16 and bf16")
