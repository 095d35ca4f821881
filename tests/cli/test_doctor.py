"""The doctor on fake machines."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastuft.cli import main
from fastuft.cli.doctor import environment, examine, extension, packages
from fastuft.cli.doctor import machine as machine_checks


class Machine:
    """A fake environment: installed distributions, output of programs, and a stand-in for torch."""

    def __init__(self, monkeypatch):
        self.installed = dict.fromkeys(packages.NEEDED, "99.0")
        self.programs = {}
        self.torch = self.make_torch("2.13.0+cpu", cuda=None, gpus=())
        self.tools = {"c++": "/usr/bin/c++", "gcc": "/usr/bin/gcc"}
        self.specs = set()
        self.wrong_kernels = []
        monkeypatch.setattr(environment, "version", self.version)
        monkeypatch.setattr(environment, "run", lambda *command: self.programs.get(command[0]))
        monkeypatch.setattr(environment, "load_torch", lambda: self.torch)
        monkeypatch.setattr(machine_checks, "wrong_kernels", lambda: self.wrong_kernels)
        monkeypatch.setattr(shutil, "which", self.tools.get)
        monkeypatch.setattr(environment, "importable", self.specs.__contains__)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.delenv("CXX", raising=False)

    def version(self, *names):
        return next((f"{name} {self.installed[name]}" for name in names if name in self.installed), None)

    @staticmethod
    def make_torch(version, *, cuda, gpus, load_error=None):
        def load_library(path):
            if load_error:
                raise OSError(load_error)

        devices = SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_capability=lambda index: gpus[index],
            get_device_name=lambda index: "Some GPU",
        )
        return SimpleNamespace(
            __version__=version,
            version=SimpleNamespace(cuda=cuda),
            cuda=devices,
            ops=SimpleNamespace(load_library=load_library),
        )

    def driver(self, cuda):
        self.programs["nvidia-smi"] = f"| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: {cuda} |"

    def findings(self):
        return {finding.part: finding for finding in examine()}


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_doctor_finds_no_problem_on_a_cpu_machine(machine, capsys):
    assert main(["doctor"]) == 0
    found = machine.findings()
    assert found["torch"].state == "ok" and "CPU build" in found["torch"].found
    assert found["driver"].state == found["GPU"].state == found["DALI"].state == "missing"
    text = capsys.readouterr().out
    assert all(part in text for part in found)


def test_doctor_finds_no_problem_on_a_complete_gpu_machine(machine):
    machine.torch = machine.make_torch("2.13.0+cu130", cuda="13.0", gpus=((9, 0), (9, 0)))
    machine.driver("13.0")
    machine.installed |= {"triton": "3.7", "nvidia-dali-cuda130": "2.4.0", "apex": "0.1"}
    machine.programs["nvcc"] = "Cuda compilation tools, release 13.0, V13.0.88"
    machine.specs |= {"apex", "apex.optimizers"}
    found = machine.findings()
    assert {
        found[part].state for part in ("torch", "driver", "GPU", "fused kernels", "triton", "DALI", "apex", "nvcc")
    } == {"ok"}
    assert found["nvcc"].found == "13.0"


def test_a_wrong_kernel_is_named_with_its_fallback(machine):
    machine.torch = machine.make_torch("2.13.0+cu130", cuda="13.0", gpus=((9, 0),))
    machine.driver("13.0")
    machine.wrong_kernels = [("enqueue (bf16) on Some GPU", "it differs by 0.5")]
    found = machine.findings()["fused kernel"]
    assert found.state == "problem" and "enqueue (bf16) on Some GPU: it differs by 0.5" in found.found
    assert "portable path" in found.remedy


def test_every_missing_part_and_problem_has_a_remedy(machine):
    for finding in machine.findings().values():
        assert finding.state == "ok" or finding.remedy, finding


@pytest.mark.parametrize(
    ("prepare", "part", "words"),
    [
        (lambda m: setattr(m, "torch", None), "torch", "not installed"),
        (lambda m: setattr(m, "torch", m.make_torch("2.9.1", cuda=None, gpus=())), "torch", ">= 2.11"),
        (lambda m: m.installed.pop("safetensors"), "packages", "missing: safetensors"),
        (lambda m: m.installed.update(numpy="1.9.3"), "packages", "numpy 1.9.3 < 1.26"),
        (lambda m: m.installed.update(triton="3.5.1"), "triton", ">= 3.6"),
        (lambda m: m.installed.update({"nvidia-dali-cuda130": "1.52.0"}), "DALI", "nvidia-dali-cuda130>=2.0"),
        (lambda m: m.installed.update({"nvidia-dali": "0.0.1"}), "DALI", "placeholder"),
        (
            lambda m: m.installed.update({"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"}),
            "DALI",
            "overwrite",
        ),
        (lambda m: m.installed.update({"apex": "0.9.10dev"}), "apex", "unrelated web toolkit"),
        (lambda m: m.driver("13.0"), "GPU", "CPU build"),
    ],
)
def test_each_problem_has_its_remedy(machine, prepare, part, words, capsys):
    prepare(machine)
    assert main(["doctor"]) == 1
    found = machine.findings()[part]
    assert found.state == "problem" and words in found.found + found.remedy
    assert words in capsys.readouterr().out


def test_a_driver_older_than_the_cuda_of_torch_is_a_problem(machine):
    machine.torch = machine.make_torch("2.13.0+cu130", cuda="13.0", gpus=())
    machine.driver("12.4")
    found = machine.findings()
    assert found["driver"].state == "problem" and "CUDA 12" in found["driver"].remedy
    assert found["GPU"].state == "problem"


def test_dali_for_another_cuda_than_torch_is_a_problem(machine):
    machine.torch = machine.make_torch("2.13.0+cu126", cuda="12.6", gpus=((9, 0),))
    machine.driver("13.0")
    machine.installed |= {"nvidia-dali-cuda130": "2.4.0"}
    found = machine.findings()["DALI"]
    assert found.state == "problem" and "nvidia-dali-cuda120" in found.remedy


def test_dali_newer_than_the_driver_is_a_problem(machine):
    machine.driver("12.4")
    machine.installed |= {"nvidia-dali-cuda130": "2.4.0"}
    assert "newer driver" in machine.findings()["DALI"].remedy


def test_the_dali_placeholder_package_is_a_problem(machine):
    machine.installed |= {"nvidia-dali": "0.0.1", "nvidia-dali-cuda130": "2.4.0"}
    found = machine.findings()["DALI"]
    assert found.state == "ok" and "pip uninstall nvidia-dali" in found.remedy


def test_an_old_gpu_uses_the_portable_path(machine):
    machine.torch = machine.make_torch("2.13.0+cu130", cuda="13.0", gpus=((7, 5),))
    machine.driver("13.0")
    assert "portable path" in machine.findings()["GPU"].remedy


def test_triton_on_a_gpu_needs_a_compiler(machine):
    machine.installed |= {"triton": "3.7"}
    machine.tools.clear()
    assert machine.findings()["triton"].state == "ok"  # nothing runs on it here
    machine.torch = machine.make_torch("2.13.0+cu130", cuda="13.0", gpus=((9, 0),))
    machine.driver("13.0")
    assert "C compiler" in machine.findings()["triton"].remedy


def test_an_extension_that_is_missing_or_does_not_load_is_a_problem(machine, tmp_path, monkeypatch):
    (tmp_path / "mix").mkdir()
    monkeypatch.setattr(extension, "FOLDER", tmp_path / "mix")
    machine.tools.clear()
    found = machine.findings()
    assert "install a C++ compiler" in found["extension _C"].remedy
    assert "not needed without a GPU" in found["extension _C_cuda"].remedy
    (tmp_path / "mix" / "_C.so").touch()
    machine.torch = machine.make_torch("2.13.0", cuda=None, gpus=(), load_error="undefined symbol: x")
    found = machine.findings()["extension _C"]
    assert found.state == "problem" and "undefined symbol" in found.found


def test_nvcc_for_another_cuda_than_torch_is_a_problem(machine):
    machine.torch = machine.make_torch("2.13.0+cu130", cuda="13.0", gpus=((9, 0),))
    machine.programs["nvcc"] = "Cuda compilation tools, release 12.4, V12.4.131"
    found = machine.findings()["nvcc"]
    assert found.state == "ok" and "CUDA 13 toolkit" in found.remedy


def test_minimum_versions_equal_the_package_requirements():
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    train = [line for line in (*extras["report"], *extras["train"]) if not line.startswith("fastuft")]
    wanted = [*project["dependencies"], *train, *extras["train-cu13"]]
    lowest = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(wanted), re.MULTILINE))
    names = [re.match(r"[\w-]+", line)[0] for line in train]
    assert {name: lowest[name] for name in names} == packages.NEEDED
    assert (lowest["torch"], lowest["nvidia-dali-cuda130"]) == (machine_checks.TORCH, packages.DALI)


def test_versions_compare_by_release():
    assert environment.older("numpy 1.9", "1.26") and environment.older("2.9.1+cu126", "2.11")
    assert not environment.older("2.11.0a0+git1", "2.11") and not environment.older("PyYAML 6.0", "6")
    assert not environment.older("torch internal-build", "2.11")


def test_without_packaging_the_missing_comparison_is_reported(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.version", None)  # importing it raises ModuleNotFoundError
    machine.installed |= {"numpy": "1.9.3"}
    del machine.installed["packaging"]
    found = machine.findings()["packages"]
    assert found.state == "problem" and found.found == "missing: packaging; versions not compared"


def test_json_output_has_every_check(machine, capsys):
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"part", "state", "found", "remedy"} == set(rows[0])
    assert {row["part"] for row in rows} >= {"torch", "GPU", "DALI", "apex", "timm"}
