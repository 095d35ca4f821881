"""Wheel, sdist and editable installs from temporary folders, with and without compilers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
USE = (
    "import torch, fastuft, warnings\n"
    "warnings.simplefilter('ignore')\n"
    "x = torch.rand(4, 3, 8, 8)\n"
    "boxes, lam = fastuft.sample_boxes(4, 8, 8)\n"
    "fastuft.cutmix_(x, boxes[:2].contiguous())\n"
    "q = torch.randn(4, 16, requires_grad=True)\n"
    "fastuft.info_nce(q, torch.randn(4, 16), fastuft.KeyQueue(32, 16).keys).backward()\n"
    "import importlib.util\n"
    "assert importlib.util.find_spec('fastuft.kernels.queue_sweep') is not None\n"
    "from fastuft.mix import ops\n"
    "from fastuft.report import paper_figures\n"
    "assert paper_figures()\n"
    "print(fastuft.__file__, ops.HAS_CPU_EXTENSION)\n"
)


def checkout(folder: Path) -> Path:
    """A copy of the tracked files, as in a clone."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    copy = folder / "checkout"
    for name in names.stdout.splitlines():
        source, target = ROOT / name, copy / name
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return copy


def pip(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--no-cache-dir", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def use(site: Path, cwd: Path) -> str:
    """Import and run the installed package from another folder; returns its path and whether the extension is built."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", USE], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, extension = done.stdout.split()
    assert path.startswith(str(site)), path
    return extension


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist, output of the wheel's build), built from a copy of the checkout without a network."""
    folder = tmp_path_factory.mktemp("build")
    copy = checkout(folder)
    wheel = pip("wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), str(copy))
    assert wheel.returncode == 0, wheel.stdout[-3000:] + wheel.stderr[-3000:]
    script = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    sdist = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert sdist.returncode == 0, sdist.stderr[-3000:]
    return next(folder.glob("*.whl")), next((copy / "dist").glob("*.tar.gz")), wheel.stdout + wheel.stderr


def test_one_wheel_serves_every_python_and_is_complete(built, tmp_path):
    wheel, _, log = built
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "fastuft/kernels/queue_sweep.py",
        "fastuft/kernels/launch_table.py",
        "fastuft/mix/_C.so",
        "fastuft/report/paper_tables.csv",
        "fastuft/py.typed",
    ):
        assert needed in names, needed
    assert any(name.startswith("fastuft/report/templates/") for name in names)
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    if shutil.which("nvcc"):
        assert "fastuft/mix/_C_cuda.so" in names
    else:
        assert "built for the CPU only" in log
    site = tmp_path / "site"
    assert pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel)).returncode == 0
    assert use(site, tmp_path) == "True"


def test_the_cuda_library_lists_its_dependencies(built, tmp_path):
    wheel, _, _ = built
    if "fastuft/mix/_C_cuda.so" not in zipfile.ZipFile(wheel).namelist():
        pytest.skip("built without nvcc")
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    zipfile.ZipFile(wheel).extract("fastuft/mix/_C_cuda.so", tmp_path)
    library = tmp_path / "fastuft/mix/_C_cuda.so"
    dynamic = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cpu.so]" in dynamic and "[libtorch_cuda.so]" in dynamic
    assert "libpython" not in dynamic


def test_libraries_use_only_the_stable_abi(built, tmp_path):
    """No C++ symbols of PyTorch, which change between releases, and no symbols of Python."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    wheel, _, _ = built
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fastuft/mix/_C")]
    zipfile.ZipFile(wheel).extractall(tmp_path, names)
    for name in names:
        command = [nm, "-D", "--undefined-only", tmp_path / name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        needed = {line.split()[-1] for line in lines}
        assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in needed), name
        foreign = {symbol for symbol in needed if re.match(r"_Z\w*(2at|3c10|5torch)\d|_?Py", symbol)}
        assert not foreign, f"{name}: {sorted(foreign)}"


def test_one_wheel_serves_several_torch_versions(built, tmp_path):
    """FASTUFT_OTHER_PYTHON is an interpreter with another torch than the one that built the wheel."""
    python = os.environ.get("FASTUFT_OTHER_PYTHON")
    if not python:
        pytest.skip("set FASTUFT_OTHER_PYTHON to a Python with another torch >= 2.11")
    wheel, _, _ = built
    site = tmp_path / "site"
    assert pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel)).returncode == 0
    has_cuda = (site / "fastuft" / "mix" / "_C_cuda.so").is_file()
    script = USE + (
        "has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key('fastuft::cutmix_', 'CUDA')\n"
        "print(torch.__version__, torch.version.cuda is not None, ops.HAS_CUDA_EXTENSION, has_kernel)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([python, "-P", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path, extension), (version, built_for_cuda, loaded, has_kernel) = map(str.split, done.stdout.splitlines())
    assert path.startswith(str(site)) and extension == "True"
    assert version != torch.__version__, "that Python has the same torch: nothing is tested"
    assert loaded == str(has_cuda and built_for_cuda == "True") and has_kernel == "True"


def test_without_a_compiler_the_sdist_installs_the_portable_paths(built, tmp_path):
    _, sdist, _ = built
    site = tmp_path / "site"
    arguments = ("install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(site), str(sdist))
    done = pip(*arguments, CC="/bin/false", CXX="/bin/false", CUDACXX="/bin/false", PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the extension could not be built" in done.stdout + done.stderr
    assert use(site, tmp_path) == "False"


def test_without_nvcc_only_the_cpu_part_is_built_and_reported(built, tmp_path):
    _, sdist, _ = built
    site = tmp_path / "site"
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    if shutil.which("nvcc", path=path):
        pytest.skip("nvcc is on the system's own path")
    arguments = ("install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(site), str(sdist))
    done = pip(*arguments, PATH=path, CUDACXX="", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(site.glob("fastuft/mix/_C_cuda*"))
    assert "built for the CPU only" in done.stdout + done.stderr
    assert use(site, tmp_path) == "True"


def test_unknown_build_choice_is_refused(tmp_path):
    copy = checkout(tmp_path)
    arguments = (
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "s"),
        str(copy),
    )
    done = pip(*arguments, FASTUFT_BUILD="gpu")
    assert done.returncode != 0
    assert "FASTUFT_BUILD='gpu' is not allowed; choose one of auto, cpu, cuda, none" in done.stdout + done.stderr


def test_editable_install_uses_the_checkout(tmp_path):
    copy = checkout(tmp_path)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", venv], check=True)
    # A virtual environment's site packages are not inherited by one made inside it: name them.
    outer = next(path for path in sys.path if path.endswith("site-packages"))
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(outer + "\n")
    python = venv / "bin" / "python"
    # The outer setuptools comes first: an older one that the interpreter bundles cannot build this package.
    environment = {**os.environ, "FASTUFT_BUILD": "cpu", "PYTHONPATH": outer}
    command = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", copy]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = subprocess.run([python, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    path, extension = ran.stdout.split()
    assert extension == "True" and Path(path).is_relative_to(copy), path
