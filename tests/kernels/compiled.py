"""Kernels compiled offline for a GPU architecture, and properties of their machine code. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastuft.kernels.launch_table import Keys, Launch

# Resources of a multiprocessor by arch: registers, threads, shared memory, of which each program reserves another 1 KB.
REGISTERS, THREADS = 65_536, {80: 1_536, 90: 2_048, 100: 2_048}
SHARED = {80: 102_400, 90: 233_472, 100: 233_472}
TENSOR_COLUMNS = 512  # of sm_100's tensor memory
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100, B200
# Products and sums of bf16 that a multiprocessor's matrix units do in a cycle; of tf32 half as many. Exponentials and
# instructions of warps that it issues in a cycle.
FMA, EXP2, ISSUE = {80: 1_024, 90: 2_048, 100: 4_096}, 16, 4
MATRIX = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")  # most specific first


@dataclass(frozen=True)
class Job:
    """One kernel with its constants for one chip.

    Args:
        name: sweep, prepare, combine, combine-one-key, lse, scale or enqueue.
        arch: 80, 90 or 100. precision: of the tiles. queue: the queue in memory, where not as
            it is multiplied: fp32 or fp8.
        width: padded D. tall: the table's entry for many rows. need_mu, unit: as in the kernels.
        aligned: whether addresses allow the tensor memory accelerator. tail: K is not a whole number of tiles.
    """

    name: str
    arch: int
    precision: str
    width: int
    need_mu: bool = True
    tall: bool = False
    unit: bool = False
    queue: str = ""
    aligned: bool = True
    tail: bool = False

    @property
    def keys(self) -> Keys:
        """How the table is asked."""
        return (
            "fp8" if self.queue == "fp8" else "converted" if self.queue else "aligned" if self.aligned else "unaligned"
        )

    @property
    def descriptors(self) -> bool:
        """Whether the launcher reads by the tensor memory accelerator."""
        return self.name == "sweep" and self.aligned and config_of(self).descriptors

    def __str__(self) -> str:
        parts = [self.name, f"sm{self.arch}", self.precision, f"D{self.width}", "grad" if self.need_mu else "loss"]
        parts += [word for word in ("tall", "unit", "tail", "descriptors") if getattr(self, word)]
        parts += [] if self.aligned else ["unaligned"]
        return "-".join(parts + ([f"{self.queue}-queue"] if self.queue else []))


@dataclass(frozen=True)
class Compiled:
    """The compiled job; the loop is the innermost one with a matrix instruction."""

    registers: int
    stack: int
    shared: int
    tensor_columns: int
    num_warps: int
    arch: int
    warnings: tuple[str, ...]
    matrix: str
    instructions: int
    loop: dict[str, int]
    ptx: str

    @property
    def ctas(self) -> int:
        """Number of programs that share a multiprocessor."""
        threads = 32 * self.num_warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_memory = SHARED[self.arch] // (self.shared + 1024)
        by_tensor_memory = TENSOR_COLUMNS // self.tensor_columns if self.tensor_columns else by_memory
        return min(by_registers, THREADS[self.arch] // threads, by_memory, by_tensor_memory)


def waves(job: Job, result: Compiled) -> float:
    """Programs of a sweep of 256 rows (tall: 4,096) over 65,536 keys, divided by those that run at once."""
    from fastuft.kernels.launch_plan import plan_units

    plan = plan_units(4_096 if job.tall else 256, 65_536, config_of(job), MULTIPROCESSORS[job.arch])
    return plan.programs / (MULTIPROCESSORS[job.arch] * result.ctas)


def bound(job: Job, result: Compiled) -> dict[str, int]:
    """A bound, not a time: cycles that a multiprocessor cannot go below for one unit of a sweep, by instruction counts.

    products: on the matrix units, or the CUDA cores for exact fp32. exp2: on the special function units. issue: of all
    instructions of the loop. Perfectly overlapped, a unit takes the largest.
    """
    config, loop = config_of(job), result.loop
    products = (2 if job.need_mu else 1) * config.block_b * config.block_k * job.width
    rate = {"ieee": 128, "tf32": FMA[job.arch] // 2}.get(job.precision, FMA[job.arch])
    cycles = {"products": products / rate, "exp2": 32 * loop["exp2"] * config.num_warps / EXP2}
    return {name: round(value) for name, value in {**cycles, "issue": loop["all"] * config.num_warps / ISSUE}.items()}


def _count(operations: list[str]) -> dict[str, int]:
    kinds = {"wait": "WARPGROUP.DEPBAR", "barrier": "BAR", "ldsm": "LDSM", "shuffle": "SHFL", "exp2": "MUFU.EX2"}
    counts = {name: sum(op.startswith(kind) for op in operations) for name, kind in kinds.items()}
    counts |= {kind: sum(op.startswith(kind) for op in operations) for kind in MATRIX}
    return counts | {"all": len(operations)}


def read_loop(sass: str) -> tuple[str, int, dict[str, int]]:
    """(matrix instruction, instructions, counts within the first innermost loop that has it) of machine code."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", sass)
    code = [(int(address, 16), op, rest) for address, op, rest in found]
    matrix = next((kind for kind in MATRIX if any(op.startswith(kind) for _, op, _ in code)), "")
    loops = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and target and int(target[1], 16) <= address:
            body = [o for a, o, _ in code if int(target[1], 16) <= a <= address]
            if any(o.startswith(matrix) for o in body):
                loops.append((int(target[1], 16), address, body))
    inner = [one for one in loops if not any(one[0] <= o[0] and o[1] <= one[1] and o != one for o in loops)]
    return matrix, len(code), _count(min(inner)[2] if inner else [])


def config_of(job: Job) -> Launch:
    """The table's entry for a sweep."""
    from fastuft.kernels.launch_table import launch

    return launch(job.arch, job.precision, job.width, job.tall, job.keys)


def sweep_constants(job: Job) -> tuple[dict[str, object], dict[str, int]]:
    """(constants, options) of the sweep for a job."""
    import triton.language as tl

    config = config_of(job)
    tile = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(job.precision, tl.float32)
    constants = {"DESCRIPTORS": job.descriptors, "UNIT": job.unit, "NEED_MU": job.need_mu, "TAIL": job.tail}
    constants |= {"FP8": job.queue == "fp8", "NATIVE_FP8": job.arch >= 90, "PDL": job.arch >= 90}
    constants |= {"TILE_DTYPE": tile, "DOT_DTYPE": tile, "PRECISION": "tf32" if job.precision == "tf32" else "ieee"}
    constants |= {"BLOCK_B": config.block_b, "BLOCK_K": config.block_k, "BLOCK_D": job.width}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    return constants, options


def kernel_of(job: Job):
    """(kernel, constants, options) of a job."""
    from fastuft.kernels import enqueue, queue_combine, queue_sweep

    if job.name == "sweep":
        return queue_sweep.sweep_kernel, *sweep_constants(job)
    if job.name == "prepare":
        constants = {"NORMALIZE": True, "BLOCK_R": queue_sweep.PREPARE_ROWS, "BLOCK_D": job.width}
        return queue_sweep.prepare_kernel, constants, {"num_warps": 4}
    if job.name == "enqueue":
        constants = {"FP8": job.queue == "fp8", "BLOCK_R": 4, "BLOCK_D": job.width}
        return enqueue.enqueue_kernel, constants, {"num_warps": 4}
    if job.name == "scale":
        return queue_combine.scale_kernel, {"BLOCK": queue_combine.SCALE_BLOCK}, {"num_warps": 4}
    has_loss = job.name != "lse"
    constants = {
        "PDL": job.arch >= 90,
        "UNIT": job.unit,
        "HAS_LOSS": has_loss,
        "TWO_KEYS": job.name == "combine",
        "NORMALIZE": has_loss,
    }
    constants |= {"NEED_MU": job.need_mu, "BLOCK_B": 64, "BLOCK_S": queue_combine.COMBINE_SLOTS, "BLOCK_D": job.width}
    options = {"num_warps": queue_combine.COMBINE_WARPS} | ({"launch_pdl": True} if job.arch >= 90 else {})
    return queue_combine.combine_kernel, constants, options


def compile_job(job: Job) -> Compiled:
    """Compile a job, and read registers, warnings and machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, options = kernel_of(job)
    element = "fp32" if job.precision in ("ieee", "tf32") else job.precision
    queue = {"": element, "fp8": "u8"}.get(job.queue, job.queue)
    # Pointers and strides as a typical call passes them: aligned, so that 16-byte copies are allowed.
    aligned = {"z_stride", "q_stride", "k_a_stride", "k_b_stride", "queue_stride", "keys_stride", "width"}
    types = {"q_ptr": element, "k_a_ptr": element, "k_b_ptr": element, "keys_ptr": element, "z_ptr": element}
    types |= {"queue_ptr": queue, "out_ptr": element, "pointer_ptr": "i64"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("z", "queue"):
            kind, block = (element, "BLOCK_B") if name == "z" else (queue, "BLOCK_K")
            signature[name] = f"tensordesc<{kind}[{constants[block]}, {job.width}]>" if job.descriptors else f"*{kind}"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, "fp32")
        else:
            signature[name] = "fp32" if name in ("scale", "inverse_tau", "factor") else "i32"
        if signature[name].startswith("*") or name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        sass = run(tools / "cuobjdump", "-sass", cubin) if job.name == "sweep" else ""  # of the others no loop is read
        notes = run(tools / "ptxas", "--gpu-name=sm_90a", ptx, "-o", cubin) if job.arch == 90 else ""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    warnings = tuple(sorted(set(re.findall(r"C75\d\d", notes))))
    shared, warps = compiled.metadata.shared, options["num_warps"]
    columns = getattr(compiled.metadata, "tmem_size", 0)
    return Compiled(registers, stack, shared, columns, warps, job.arch, warnings, *read_loop(sass), compiled.asm["ptx"])
