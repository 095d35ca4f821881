"""The direction of dependencies, checked in import statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {path.stem for path in (ROOT / "fastuft").iterdir() if path.is_dir() or path.suffix == ".py"} - {
    "__init__",
    "__pycache__",
}
# What each room may import from fastuft, besides itself and the leaves.
ALLOWED = {
    "loss": {"kernels"},
    "mix": set(),
    "data": set(),
    "model": {"kernels"},
    "evaluate": {"data", "model"},
    "trainer": {"loss", "mix", "data", "model", "evaluate"},
    "report": set(),
    "demo": {"data", "model", "evaluate", "trainer", "report"},
    "reproduce": {"data", "model", "evaluate", "trainer", "report", "demo"},
    "jobs": {"data", "model", "evaluate", "report"},
    "cli": {"data", "model", "evaluate", "trainer", "report", "demo", "reproduce", "jobs"},
    "api": {"model", "evaluate", "trainer", "jobs", "cli"},
}
# Leaves are for everyone, and import at most other leaves.
LEAVES = {
    "atomic",
    "config",
    "messages",
    "console",
    "device",
    "fused",
    "memory",
    "names",
    "nested",
    "randomness",
    "runfolder",
    "values",
    "version",
}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, also inside functions."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def sources(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "fastuft/kernels" not in path.as_posix()]


def of_other_rooms(path: Path, room: str) -> set[str]:
    """Full names of what a file imports from other rooms and leaves."""
    names = {name for name in imported_modules(path) if name.startswith("fastuft.")}
    return {name for name in names if name.split(".")[1] in PARTS - {room}}


def test_every_room_and_leaf_has_its_rule():
    assert {*ALLOWED, *LEAVES, "kernels"} == PARTS


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_allowed_rooms(room):
    for path in sources(f"fastuft/{room}"):
        for name in of_other_rooms(path, room):
            assert name.split(".")[1] in ALLOWED[room] | LEAVES, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_leaves_only(leaf):
    location = ROOT / "fastuft" / leaf
    for path in sources(f"fastuft/{leaf}") if location.is_dir() else [location.with_suffix(".py")]:
        for name in of_other_rooms(path, leaf):
            assert name.split(".")[1] in LEAVES, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_exported_names(room):
    """A room is imported through the names in its ``__init__``; ``kernels`` has none, so its modules are imported."""
    inner = set()
    for path in sources(f"fastuft/{room}"):
        for name in of_other_rooms(path, room):
            module = ".".join(name.split(".")[:3])
            location = ROOT.joinpath(*module.split("."))
            is_module = location.with_suffix(".py").is_file() or location.is_dir()
            if len(name.split(".")) > 2 and name.split(".")[1] != "kernels" and is_module:
                inner.add(module)
    assert not inner


def test_kernels_import_torch_and_triton_only():
    standard = set(sys.stdlib_module_names)
    for path in sources("kernels"):
        tops = {name.split(".")[0] for name in imported_modules(path)}
        ours = {name for name in imported_modules(path) if name.startswith("fastuft") and name != "fastuft"}
        assert all(name.startswith("fastuft.kernels") for name in ours), path
        assert tops - standard <= {"torch", "triton", "fastuft"}, f"{path.name} imports {tops - standard}"


def test_kernels_folder_is_not_a_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_config_imports_standard_library_only():
    for path in sources("fastuft/config"):
        for name in imported_modules(path):
            assert name.startswith("fastuft.config") or name.split(".")[0] in set(sys.stdlib_module_names), (path, name)


def test_csrc_knows_no_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "Python.h" not in text and "pybind" not in text and "torch/extension.h" not in text, path.name


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name + " is blocked", name=name)
sys.meta_path.insert(0, Block())
{code}
"""


def run_blocked(blocked: tuple[str, ...], code: str) -> None:
    script = BLOCKED.format(blocked=blocked, code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_fastuft_imports_without_triton_dali_numpy_and_extension():
    run_blocked(
        ("triton", "nvidia", "numpy", "jsonargparse", "PIL", "sklearn", "matplotlib", "yaml"),
        "import fastuft, torch\n"
        "from fastuft import *\n"
        "assert callable(finetune) and callable(evaluate) and callable(info_nce)\n"
        "assert mixed_info_nce is fastuft.mixed_info_nce and 'bcubed_precision' in dir(fastuft)\n"
        "q, k = torch.randn(4, 16), torch.randn(4, 16)\n"
        "queue = fastuft.KeyQueue(32, 16)\n"
        "assert fastuft.info_nce(q, k, queue.keys).isfinite()",
    )


def test_report_never_imports_torch():
    run_blocked(("torch",), "import fastuft.report")
