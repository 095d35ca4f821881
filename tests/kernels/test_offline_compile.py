"""Every configuration of the launch table compiles for each chip: no spills, shared memory that fits, matrix units used.

Runs without a GPU. Compilation happens in a few processes, each test reads its result.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

ARCHS = (80, 90, 100)
# Pointers and strides as a typical call passes them: aligned, so that 16-byte copies are allowed.
ALIGNED = {"q_stride", "k_a_stride", "k_b_stride", "queue_stride", "keys_stride", "width", "channels", "rows_per_split"}
BATCHNORM = ("statistics", "normalize", "gradient_sums", "gradient")  # kernels of grouped_batchnorm
ACTIVATIONS = ("x_ptr", "residual_ptr", "out_ptr", "grad_ptr", "grad_x_ptr", "grad_residual_ptr")


@dataclass(frozen=True)
class Job:
    """One kernel with its constants for one chip."""

    name: str
    arch: int
    dtype: str
    width: int
    rows: int
    need_mu: bool

    def __str__(self) -> str:
        return f"{self.name}-sm{self.arch}-{self.dtype}-D{self.width}-B{self.rows}-{'grad' if self.need_mu else 'loss'}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job."""

    registers: int
    stack: int
    shared: int
    block_b: int
    instructions: dict[str, int]


def jobs() -> list[Job]:
    from fastuft.kernels.launch_table import WIDTHS, table

    found = []
    for arch, itemsize, width, rows, _ in table():
        for dtype in ("bf16", "fp16") if itemsize == 2 and width == 128 else ("bf16",) if itemsize == 2 else ("fp32",):
            found += [Job("sweep", arch, dtype, width, rows, need_mu) for need_mu in (True, False)]
    for arch in ARCHS:
        for width in WIDTHS:
            found += [Job(name, arch, "bf16", width, 0, True) for name in ("combine", "combine-one-key")]
            found.append(Job("lse", arch, "fp32", width, 0, True))
        found += [Job(name, arch, "fp32", 128, 0, False) for name in ("combine", "combine-one-key", "lse")]
        found += [Job("enqueue", arch, dtype, 128, 0, False) for dtype in ("bf16", "fp32")]
        found.append(Job("advance", arch, "fp32", 0, 0, False))
        found += [Job(name, arch, dtype, 64, 0, False) for name in BATCHNORM for dtype in ("bf16", "fp32")]
    return found


def compile_job(job: Job) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastuft.kernels import enqueue, grouped_batchnorm, queue_sweep
    from fastuft.kernels.launch_table import launch

    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    element, block_b = f"*{job.dtype}", 0
    options = {"num_warps": 4, "num_stages": 3}
    constants: dict[str, object] = {}
    if job.name == "sweep":
        kernel = queue_sweep.sweep_kernel
        config = launch(job.arch, 4 if job.dtype == "fp32" else 2, job.width, job.rows)
        block_b = config.block_b
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        constants = {"NORMALIZE": True, "NEED_MU": job.need_mu, "TILE_DTYPE": types[job.dtype]}
        constants |= {"BRANCH": config.branch, "PEEL": config.peel}
        constants |= {"BLOCK_B": config.block_b, "BLOCK_K": config.block_k, "BLOCK_D": job.width}
    elif job.name in ("combine", "combine-one-key", "lse"):
        kernel = queue_sweep.combine_kernel
        has_loss = job.name != "lse"
        options["num_warps"] = queue_sweep.COMBINE_WARPS
        constants = {"HAS_LOSS": has_loss, "TWO_KEYS": job.name == "combine", "NORMALIZE": has_loss}
        constants |= {"NEED_MU": job.need_mu, "BLOCK_S": queue_sweep.COMBINE_SPLITS, "BLOCK_D": job.width}
    elif job.name in BATCHNORM:
        kernel = getattr(grouped_batchnorm, f"{job.name}_kernel")
        options["num_warps"] = grouped_batchnorm.NUM_WARPS
        constants = {"AFFINE": True, "RESIDUAL": True, "RELU": True, "BLOCK_R": grouped_batchnorm.BLOCK_ROWS}
        constants |= {"BLOCK_C": job.width, "BLOCK_S": grouped_batchnorm.BLOCK_SPLITS}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    elif job.name == "enqueue":
        kernel = enqueue.enqueue_kernel
        constants = {"NORMALIZE": True, "BLOCK_R": 4, "BLOCK_D": job.width}
    else:
        kernel = enqueue.advance_kernel
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "pointer_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            inputs = ("q_ptr", "k_a_ptr", "k_b_ptr", "queue_ptr", "keys_ptr")
            inputs = ACTIVATIONS if job.name in BATCHNORM else inputs
            signature[name] = element if name in inputs else "*fp32"
        else:
            signature[name] = "fp32" if name in ("scale", "inverse_tau", "eps") else "i32"
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    kinds = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async", "cp.async.bulk")
    return Compiled(registers, stack, compiled.metadata.shared, block_b, {kind: ptx.count(kind) for kind in kinds})


@pytest.fixture(scope="module")
def results():
    """All jobs, compiled once; the readable table goes to the log."""
    from fastuft.kernels.launch_table import SHARED_BYTES

    todo = jobs()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(todo, pool.map(compile_job, todo, chunksize=4), strict=True))
    print(f"\n{'kernel':40} registers  stack   shared (limit)  matrix instructions")
    for job, result in found.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in result.instructions.items() if count)
        limit = SHARED_BYTES[job.arch]
        print(f"{job!s:40} {result.registers:9}  {result.stack:5}  {result.shared:7} ({limit})  {kinds}")
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_shared_memory_fits(results, arch):
    from fastuft.kernels.launch_table import SHARED_BYTES

    mine = {job: result for job, result in results.items() if job.arch == arch}
    assert len(mine) > 20
    assert {str(job): result.stack for job, result in mine.items() if result.stack} == {}
    assert {str(job): r.shared for job, r in mine.items() if r.shared > SHARED_BYTES[arch]} == {}


def test_half_precision_tiles_use_the_matrix_units(results):
    for job, result in results.items():
        if job.name != "sweep" or job.dtype == "fp32":
            continue
        kinds = result.instructions
        if job.arch == 90 and result.block_b >= 64:
            assert kinds["wgmma.mma_async"], str(job)
        elif job.arch == 100:
            assert kinds["tcgen05.mma"] or kinds["mma.sync"], str(job)
        else:
            assert kinds["mma.sync"], str(job)


def test_single_precision_never_takes_tf32(results):
    for job, result in results.items():
        if job.name == "sweep" and job.dtype == "fp32":
            kinds = result.instructions
            assert not (kinds["wgmma.mma_async"] or kinds["tcgen05.mma"] or kinds["mma.sync"]), str(job)


def test_every_launch_is_in_the_table():
    """What the launcher would take for any shape is one of the compiled configurations."""
    from fastuft.kernels.launch_table import WIDTHS, launch, table

    compiled = {(arch, size, width, config) for arch, size, width, _, config in table()}
    for arch in ARCHS:
        for itemsize in (2, 4):
            for width in WIDTHS:
                for rows in (1, 16, 63, 64, 65, 128, 255, 4096, 65536):
                    assert (arch, itemsize, width, launch(arch, itemsize, width, rows)) in compiled
