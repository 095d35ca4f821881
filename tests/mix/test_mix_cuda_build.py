"""The machine code in the built _C_cuda: every kernel for each architecture, without spills. Runs without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastuft.mix import ops

pytestmark = pytest.mark.compile

CHIPS = {"sm_80", "sm_90", "sm_100"}
CHIPS_BEFORE_CUDA_12_8 = {"sm_80", "sm_90"}  # the driver makes the code of newer chips from PTX then
ELEMENTS = {
    "h": "uint8",
    "t": "uint16",
    "j": "uint32",
    "m": "uint64",
    "f": "float",
    "d": "double",
    "6__half": "half",
    "13__nv_bfloat16": "bfloat16",
}
# Each with 16-byte vectors and 32-bit indices, single elements and 32-bit indices, single elements and 64-bit ones.
INSTANCES = {"cutmix_kernel": 4 * 3, "cutmix_swap_kernel": 4 * 3, "mixup_kernel": 5 * 3, "mixup_pair_kernel": 5 * 3}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template for one architecture, and its resources per thread."""

    chip: str
    name: str
    element: str
    vector: int
    index_bits: int
    registers: int
    stack: int
    local: int

    def __str__(self) -> str:
        template = f"{self.name}<{self.element}, {self.vector}, {self.index_bits}-bit>"
        return f"{self.chip:7} {template:44} {self.registers:9}  {self.stack:5}  {self.local:5}"


def cuobjdump() -> str:
    """cuobjdump of the CUDA toolkit, or the one inside Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def parse(usage: str) -> list[Kernel]:
    """The kernels in the output of ``cuobjdump --dump-resource-usage``."""
    kernels, chip, template = [], "", None
    for line in usage.splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            chip = found[1]
        elif line.lstrip().startswith("Function "):
            template = re.search(r"\d((?:cutmix|mixup)(?:_swap|_pair)?_kernel)I(\w+?)Li(\d+)E([jl])EE", line)
            assert template is not None, f"an unknown kernel: {line}"
        elif (found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line)) and template is not None:
            name, element, vector, index = template.groups()
            bits = 32 if index == "j" else 64
            kernels.append(Kernel(chip, name, ELEMENTS[element], int(vector), bits, *map(int, found.groups())))
            template = None
    return kernels


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """The kernels in the library; a readable table is logged."""
    library = ops.find_library("_C_cuda")
    if library is None:
        pytest.skip("_C_cuda is not built here: it needs nvcc")
    command = [cuobjdump(), "--dump-resource-usage", str(library)]
    found = parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"\n{'chip':7} {'kernel':44} registers  stack  local")
    for kernel in sorted(found, key=lambda kernel: (int(kernel.chip[3:]), str(kernel))):
        print(kernel)
    return found


def test_every_kernel_is_compiled_for_each_architecture(kernels):
    chips = {kernel.chip for kernel in kernels}
    assert chips in (CHIPS, CHIPS_BEFORE_CUDA_12_8)
    for chip in chips:
        names = [kernel.name for kernel in kernels if kernel.chip == chip]
        assert {name: names.count(name) for name in sorted(set(names))} == INSTANCES, chip


def test_no_kernel_spills_registers(kernels):
    spilled = [str(kernel) for kernel in kernels if kernel.stack or kernel.local]
    assert not spilled, "\n".join(spilled)
