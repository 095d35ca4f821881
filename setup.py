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
AGAIN = "pip install --no-build-isolation --force-reinstall --no-deps ."


def say(message: str) -> None:
    print(f"fastuft: {message}", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Builds both libraries into fastuft/mix; without a compiler the package still installs, and says what it lacks."""

    @property
    def folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fastuft" / "mix"

    def clear(self) -> None:
        """Remove what an earlier build left, which may have had more parts."""
        for stale in self.folder.glob("_C*.so"):
            stale.unlink()

    def run(self) -> None:
        choice = os.environ.get("FASTUFT_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(f"FASTUFT_BUILD={choice!r} is not allowed; choose one of {', '.join(CHOICES)}")
        if choice == "none":
            self.clear()
            say("FASTUFT_BUILD=none: the extension is left out, mixing runs in plain PyTorch")
            return
        if choice != "auto":
            self.build({"cpu": "off", "cuda": "on"}[choice])
            return
        try:
            try:
                self.build("auto")
            except subprocess.CalledProcessError:
                say("the build with CUDA failed; trying without")
                self.build("off")
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            self.clear()
            say(
                f"the extension could not be built ({error}); mixing will run in plain PyTorch, which is slower. "
                f"Install a C++20 compiler, cmake and torch, and run: {AGAIN}"
            )

    def build(self, cuda: str) -> None:
        import torch

        # Those of this Python's environment come first, whether or not it is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if cmake is None:
            raise OSError("cmake was not found")
        options = [f"-DTORCH_FOLDER={Path(torch.__file__).parent}", f"-DFASTUFT_CUDA={cuda}"]
        if ninja:
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # CMake remembers tools and paths, which in an isolated build are gone the next time: then start afresh.
        tools = [cmake, torch.__version__, *(os.environ.get(name) for name in ("CC", "CXX", "CUDACXX"))]
        memory = repr([*options, *tools, shutil.which("nvcc")])
        work = Path(self.build_temp).resolve() / "cmake"
        note = work / "configured.txt"
        if not note.is_file() or note.read_text() != memory:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(work), *options], check=True)
        note.write_text(memory)
        subprocess.run([cmake, "--build", str(work), "--parallel"], check=True)
        self.clear()
        subprocess.run([cmake, "--install", str(work), "--prefix", str(self.folder)], check=True)
        if not (self.folder / "_C_cuda.so").is_file():
            say(f"built for the CPU only; the CUDA part needs nvcc on PATH, then run: {AGAIN}")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.folder.glob("_C*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """One wheel per platform: the libraries use the stable ABI of LibTorch and none of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["fastuft", "fastuft.*"]), "fastuft.kernels"],
    package_data={"fastuft": ["py.typed"], "fastuft.report": ["*.csv", "templates/*"]},
    include_package_data=False,  # those that are named above, and no folder taken for a package
    ext_modules=[Extension("fastuft.mix._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
