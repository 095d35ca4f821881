"""One sweep over a queue of keys gives the loss and its gradient; no logits are stored.

For a query h [D], z = h / |h|, queue rows x_j, c = log2(e) / tau, scores in log2 units s_j = c z.x_j:

    (1)  m = max_j s_j            or the constant c, which bounds them, if |z| = 1 and the caller states |x_j| <= 1
    (2)  l = sum_j 2^(s_j - m),   acc = sum_j 2^(s_j - m) x_j
    (3)  lse = ln(2) (m + log2 l),   mu = acc / l

Parts of the queue give partial (m, l, acc), which are combined in a fixed order (in ``queue_combine``, like all that follows):

    (4)  M = max_p m_p,   l = sum_p l_p 2^(m_p - M),   acc = sum_p acc_p 2^(m_p - M)

With a = z.k_a / tau, b = z.k_b / tau, s_a = sigmoid(lse - a), s_b = sigmoid(lse - b), w = lam s_a + (1 - lam) s_b:

    (5)  L = lam softplus(lse - a) + (1 - lam) softplus(lse - b)          Eq. 4 is lam = 1
    (6)  g = dL/dz = (w mu - lam s_a k_a - (1 - lam) s_b k_b) / tau
    (7)  dL/dh = (g - (g.z) z) / |h|                                      0 for rows shorter than 1e-12

Equals, for unit rows z and one positive::

    F.cross_entropy(torch.cat([(z * k).sum(1, keepdim=True), z @ queue.T], 1) / tau, torch.zeros(len(z)).long())

Queries and keys are multiplied in one precision (``problem.tile_precision``) and accumulated in fp32; the scale c is applied
after the product. The launches are: preparing the queries for the product, if needed; the sweep; combine. The result is
deterministic: there are no atomics.

Work is counted in units, one tile of rows against one tile of keys, with rows slowest. Each program takes the same number of
consecutive units, whatever B and K are, and writes one partial result for each tile of rows that it works on. The slot of row
tile t and program p is t + p.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastuft.kernels.fp8 import decode_rows
from fastuft.kernels.launch_plan import Plan, chip, plan_units, tall_rows
from fastuft.kernels.launch_table import Keys, Launch, launch
from fastuft.kernels.problem import LseProblem, Problem, tile_precision
from fastuft.kernels.queue_combine import Partials, combine, dependent_launches
from fastuft.kernels.rows import load_rows, unit_rows

LOG2_E = math.log2(math.e)
MAX_WIDTH = 512
LEAST_UNIT_TEMPERATURE = 0.05  # below, 2^(s - c) of opposite rows leaves the range of fp32: 2^-(2 c) at tau = 0.02
PREPARE_ROWS = 4
_INTERPRETED = triton.knobs.runtime.interpret
_TILE_DTYPES = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def prepare_kernel(
    q_ptr,  # [B, D]
    z_ptr,  # [B, D] in the dtype of the tiles
    q_stride,
    num_rows,
    width,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z of BLOCK_R rows."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    z = load_rows(q_ptr, q_stride, rows, columns, num_rows, width)
    if NORMALIZE:
        z, _ = unit_rows(z)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    tl.store(z_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], z.to(z_ptr.dtype.element_ty), inside)


@triton.jit
def load_tile(
    source, stride, start, limit, width, DESCRIPTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows [start, start + BLOCK) of a matrix with ``limit`` rows; rows and columns outside are 0."""
    if DESCRIPTOR:
        tile = source.load([start, 0])
    else:
        rows, columns = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < limit) & (columns[None, :] < width)
        tile = tl.load(source + rows.to(tl.int64)[:, None] * stride + columns[None, :], inside, 0.0)
    return tile


@triton.jit
def fold_tile(
    b_z,  # [BLOCK_B, BLOCK_D]
    x,  # [BLOCK_K, BLOCK_D] as the queue holds them, or fp32
    left,  # number of keys from here on, used if MASKED
    m,
    l,  # noqa: E741 (the formula's name)
    acc,
    scale,
    MASKED: tl.constexpr,
    UNIT: tl.constexpr,
    NEED_MU: tl.constexpr,
    TILE_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(m, l, acc) of (1), (2) after one more tile of keys."""
    b_x = x.to(TILE_DTYPE).to(DOT_DTYPE)
    dots = tl.dot(b_z, tl.trans(b_x), input_precision=PRECISION)
    if MASKED:
        dots = tl.where(tl.arange(0, x.shape[0])[None, :] < left, dots, -float("inf"))
    if UNIT:
        p = tl.exp2(dots * scale - scale)
    else:
        m_new = tl.maximum(m, tl.max(dots, 1) * scale)
        correction = tl.exp2(m - m_new)
        m = m_new
        l *= correction  # noqa: E741
        if NEED_MU:
            acc *= correction[:, None]
        p = tl.exp2(dots * scale - m[:, None])  # scaled here, so that product and difference are one instruction
    l += tl.sum(p, 1)  # noqa: E741
    if NEED_MU:
        acc = tl.dot(p.to(TILE_DTYPE).to(DOT_DTYPE), b_x, acc, input_precision=PRECISION)
    return m, l, acc


@triton.jit
def sweep_kernel(
    z,  # [B, D] in TILE_DTYPE, a descriptor or a pointer
    queue,  # [K, D], a descriptor or a pointer; codes if FP8
    scales_ptr,  # [K] fp32, if FP8
    m_ptr,  # [slots, slot_rows] fp32, unless UNIT
    l_ptr,  # [slots, slot_rows] fp32
    acc_ptr,  # [slots, slot_rows, D] fp32, if NEED_MU
    z_stride,
    queue_stride,
    num_rows,
    num_keys,
    key_tiles,
    units,
    units_per_program,
    slot_rows,
    width,
    scale,  # c
    DESCRIPTORS: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PDL: tl.constexpr,  # whether combine may be launched early; it waits for the end of this launch
    UNIT: tl.constexpr,
    NEED_MU: tl.constexpr,
    TAIL: tl.constexpr,  # whether K is not a whole number of tiles
    TILE_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(1), (2) for the units of one program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    first_unit = program * units_per_program
    last_unit = tl.minimum(first_unit + units_per_program, units)
    for row_tile in range(first_unit // key_tiles, (last_unit - 1) // key_tiles + 1):
        before = row_tile * key_tiles
        first = tl.maximum(first_unit - before, 0) * BLOCK_K
        last = tl.minimum(tl.minimum(last_unit - before, key_tiles) * BLOCK_K, num_keys)
        b_z = load_tile(z, z_stride, row_tile * BLOCK_B, num_rows, width, DESCRIPTORS, BLOCK_B, BLOCK_D).to(DOT_DTYPE)
        m = tl.full([BLOCK_B], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_B], tl.float32)  # noqa: E741 (the formula's name)
        acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for start in range(first, last, BLOCK_K):
            x = load_tile(queue, queue_stride, start, num_keys, width, DESCRIPTORS, BLOCK_K, BLOCK_D)
            if FP8:
                x = decode_rows(x, scales_ptr, start, num_keys, NATIVE_FP8, BLOCK_K)
            m, l, acc = fold_tile(  # noqa: E741
                b_z, x, last - start, m, l, acc, scale, TAIL, UNIT, NEED_MU, TILE_DTYPE, DOT_DTYPE, PRECISION
            )
        rows, columns = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
        out = (row_tile + program).to(tl.int64) * slot_rows + rows
        inside = rows < slot_rows
        tl.store(l_ptr + out, l, inside)
        if not UNIT:
            tl.store(m_ptr + out, m, inside)
        if NEED_MU:
            m_out = inside[:, None] & (columns[None, :] < width)
            tl.store(acc_ptr + out[:, None] * width + columns[None, :], acc, m_out)


def unsupported(q: Tensor, queue: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    if not (q.is_cuda or _INTERPRETED):
        return f"the query is on {q.device}, but the fused kernels need a CUDA device"
    if torch.float64 in (q.dtype, queue.dtype):
        return "float64 has no fused kernel"
    if q.shape[1] > MAX_WIDTH:
        return f"D={q.shape[1]} is above {MAX_WIDTH}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the fused kernels need compute capability 8.0 or newer"
    return None


def _rows(value: Tensor) -> Tensor:
    """The tensor with consecutive elements within each row."""
    return value if value.stride(1) == 1 or value.shape[1] == 1 else value.contiguous()


def _fits_a_descriptor(value: Tensor, width: int) -> bool:
    """Whether the tensor memory accelerator can read rows of this padded width: addresses and strides aligned to 16 bytes."""
    aligned = value.data_ptr() % 16 == 0 and value.stride(0) * value.element_size() % 16 == 0
    return aligned and value.shape[1] == width and value.shape[0] > 0


def _keys(z: Tensor, queue: Tensor, problem: Problem, width: int) -> Keys:
    if problem.queue_scales is not None:
        return "fp8"
    if queue.dtype != z.dtype:
        return "converted"
    return "aligned" if _fits_a_descriptor(z, width) and _fits_a_descriptor(queue, width) else "unaligned"


def _prepared(q: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """The queries in the form that the sweep multiplies, [B, D] in dtype."""
    if q.dtype == dtype and not normalize:
        return q
    (num_rows, width), z = q.shape, torch.empty(q.shape, dtype=dtype, device=q.device)
    prepare_kernel[(triton.cdiv(num_rows, PREPARE_ROWS),)](
        q, z, q.stride(0), num_rows, width, normalize, PREPARE_ROWS, triton.next_power_of_2(width), num_warps=4
    )
    return z


def is_unit(problem: Problem, precision: str) -> bool:
    """Whether (1) uses the constant. fp16 tiles keep the maximum, because they cannot represent 2^(s - c)."""
    unit = problem.unit_queue and problem.normalize and precision != "fp16"
    return unit and problem.temperature >= LEAST_UNIT_TEMPERATURE


def _sweep(z: Tensor, queue: Tensor, problem: Problem, precision: str, config: Launch, plan: Plan) -> Partials:
    """Launch the sweep over prepared queries."""
    (num_rows, width), num_keys = z.shape, queue.shape[0]
    block_d = max(16, triton.next_power_of_2(width))
    slot_rows = min(config.block_b, num_rows)
    slots, unit, dtype = plan.row_tiles + plan.programs, is_unit(problem, precision), _TILE_DTYPES[precision]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z.device)

    total = new(slots, slot_rows)
    m = total if unit else new(slots, slot_rows)
    acc = new(slots, slot_rows, width) if problem.need_grad else total
    descriptors = config.descriptors and _fits_a_descriptor(z, block_d) and _fits_a_descriptor(queue, block_d)
    p_z, p_queue, scales = z, queue, problem.queue_scales
    if descriptors:
        p_z = TensorDescriptor.from_tensor(z, [config.block_b, block_d])
        p_queue = TensorDescriptor.from_tensor(queue, [config.block_k, block_d])
    tile = _TRITON_DTYPES[dtype]
    # The interpreter multiplies bf16 tiles wrongly; there they are widened once rounded.
    dot = tl.float32 if _INTERPRETED and dtype == torch.bfloat16 else tile
    scale = LOG2_E / problem.temperature
    hopper = chip(z.device)[0] >= 90
    sweep_kernel[(plan.programs,)](
        p_z, p_queue, total if scales is None else scales, m, total, acc, z.stride(0), queue.stride(0), num_rows,
        num_keys, plan.key_tiles, plan.units, plan.units_per_program, slot_rows, width, scale, descriptors,
        scales is not None, hopper, dependent_launches(z.device), unit, problem.need_grad,
        num_keys % config.block_k != 0, tile, dot, "tf32" if precision == "tf32" else "ieee", config.block_b,
        config.block_k, block_d, num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    return Partials(m, total, acc, unit, scale, config.block_b, plan)


def _run(problem: Problem, has_loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient or mu, alignment or lse); the loss is empty without ``has_loss``."""
    q, queue = _rows(problem.q), _rows(problem.queue)
    (num_rows, width), num_keys = q.shape, queue.shape[0]
    with torch.cuda.device_of(q):
        precision = tile_precision(problem.precision, q.dtype, queue.dtype)
        arch, multiprocessors = chip(q.device)
        dtype, block_d = _TILE_DTYPES[precision], max(16, triton.next_power_of_2(width))
        z = _prepared(q, dtype, problem.normalize)
        config = launch(
            arch, precision, block_d, tall_rows(num_rows, num_keys, width), _keys(z, queue, problem, block_d)
        )
        plan = plan_units(num_rows, num_keys, config, multiprocessors)
        k_a, k_b = _rows(problem.k_a), None if problem.k_b is None else _rows(problem.k_b)
        partials = _sweep(z, queue, problem, precision, config, plan)
        return combine(problem._replace(q=q, k_a=k_a, k_b=k_b), partials, has_loss)


def queue_lse(problem: LseProblem) -> tuple[Tensor, Tensor]:
    """(lse [B], mu [B, D] or [B, 0]) in fp32."""
    z, queue, scales, temperature, precision, need_mu, impl = problem
    loss = Problem(z, z, None, None, queue, scales, temperature, False, False, precision, "none", need_mu, impl)
    _, mu, lse = _run(loss, False)
    return lse, mu


def mixed_info_nce(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D] or [B, 0], alignment [B]) of each sample in fp32."""
    return _run(problem, True)
