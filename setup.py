"""Packages of fastuft and its optional extension, built by CMake; the rest of the metadata is in pyproject.toml.

FASTUFT_BUILD chooses the extension: auto (what this machine can build), cpu, cuda (both parts, or fail), none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")


def say(message: str) -> None:
    print(f"fastuft: {message}", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Builds both libraries into fastuft/mix; without a compiler the package still installs, and says what it lacks."""

    def run(self) -> None:
        choice = os.environ.get("FASTUFT_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(f"FASTUFT_BUILD={choice!r} is not allowed; choose one of {', '.join(CHOICES)}")
        if choice == "none":
            say("FASTUFT_BUILD=none: the extension is left out, mixing runs in plain PyTorch")
            return
        try:
            self.build(choice)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if choice != "auto":
                raise
            say(
                f"the extension could not be built ({error}); mixing will run in plain PyTorch, which is slower. "
                "Install a C++20 compiler and run: pip install --no-build-isolation --force-reinstall --no-deps ."
            )

    def build(self, choice: str) -> None:
        import torch

        cmake = shutil.which("cmake")
        if cmake is None:
            raise OSError("cmake was not found")
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        cuda = {"auto": "auto", "cpu": "off", "cuda": "on"}[choice]
        options = [
            f"-DTORCH_FOLDER={Path(torch.__file__).parent}",
            f"-DFASTUFT_CUDA={cuda}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(work), *options], check=True)
        subprocess.run([cmake, "--build", str(work), "--parallel"], check=True)
        place = ROOT if self.inplace else Path(self.build_lib).resolve()
        subprocess.run([cmake, "--install", str(work), "--prefix", str(place / "fastuft" / "mix")], check=True)
        if not any((place / "fastuft" / "mix").glob("_C_cuda.*so")):
            say("built for the CPU only; the CUDA part needs nvcc on PATH")

    def get_outputs(self) -> list[str]:
        place = Path(self.build_lib) / "fastuft" / "mix"
        return [str(path) for path in place.glob("_C*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """One wheel a platform: the libraries use the stable ABI of LibTorch and none of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["fastuft", "fastuft.*"]), "fastuft.kernels"],
    package_data={"fastuft": ["py.typed"], "fastuft.report": ["*.csv", "templates/*.html"]},
    ext_modules=[Extension("fastuft.mix._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
