"""Every configuration of the launch table compiles for each architecture as the launch plan assumes.

Runs without a GPU. A few processes compile, the tests read the results, and the table is logged.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import get_args

import pytest
from compiled import Compiled, Job, bound, compile_job, config_of, waves

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

ARCHS = (80, 90, 100)


def sweep_jobs() -> list[Job]:
    """Every entry of the table, with the variants that calls use."""
    from fastuft.kernels.launch_table import table

    found: dict[Job, None] = {}
    for arch, precision, width, tall, keys, _ in table():
        if precision == "fp16" and width != 128:
            continue
        queue = {"fp8": "fp8", "converted": "fp32"}.get(keys, "")
        job = Job("sweep", arch, precision, width, tall=tall, aligned=keys != "unaligned", queue=queue)
        variants = [job]
        if width in (128, 512):
            variants.append(replace(job, need_mu=False))
        if precision == "ieee":
            variants.append(replace(job, tail=True))
        if keys == "fp8":
            variants.append(replace(job, unit=precision == "bf16", tail=True))
        elif precision == "bf16":
            variants.append(replace(job, unit=True, tail=True))
            if arch == 90 and keys == "aligned":
                variants.append(replace(job, unit=True))
        found |= dict.fromkeys(variants)
    return list(found)


def jobs() -> list[Job]:
    from fastuft.kernels.launch_table import WIDTHS

    found = sweep_jobs()
    for arch in ARCHS:
        for width in WIDTHS:
            found += [Job(name, arch, "bf16", width) for name in ("combine", "combine-one-key", "lse", "prepare")]
            found.append(Job("combine", arch, "bf16", width, unit=True))
        found += [Job(name, arch, "fp32", 128, need_mu=False) for name in ("combine", "combine-one-key", "lse")]
        found += [
            Job(name, arch, dtype, 128, need_mu=False) for dtype in ("bf16", "fp32") for name in ("enqueue", "scale")
        ]
        found += [Job("enqueue", arch, "bf16", width, need_mu=False, queue="fp8") for width in (16, 128, 512)]
    return found


COLUMNS = (
    "registers stack  shared CTAs | in the loop: products waits barriers LDSM shuffles all | waves | "
    "bound, cycles: products exp2 issue | warnings"
)


def line(job: Job, result: Compiled) -> str:
    """A row of the table; for kernels other than the sweep only their resources."""
    taken = f"{result.registers:9} {result.stack:5} {result.shared:7} {result.ctas:4}"
    if job.name != "sweep":
        return taken
    loop, cycles = result.loop, bound(job, result)
    return (
        f"{taken} | {result.matrix:>11} {loop.get(result.matrix, 0):9} {loop['wait']:5} {loop['barrier']:8} "
        f"{loop['ldsm']:4} {loop['shuffle']:8} {loop['all']:4} | {waves(job, result):5.2f} | "
        f"{cycles['products']:23} {cycles['exp2']:4} {cycles['issue']:5} | {' '.join(result.warnings)}"
    )


@pytest.fixture(scope="module")
def results() -> dict[Job, Compiled]:
    """All jobs, compiled once."""
    todo = jobs()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(todo, pool.map(compile_job, todo, chunksize=4), strict=True))
    print(f"\n{'kernel':57} {COLUMNS}")
    for job, result in found.items():
        print(f"{job!s:57} {line(job, result)}")
    return found


def of_sweep(results: dict[Job, Compiled], **fields: object) -> dict[Job, Compiled]:
    """Results of the sweep whose jobs have these fields."""
    chosen = {
        job: result
        for job, result in results.items()
        if job.name == "sweep" and all(getattr(job, name) == value for name, value in fields.items())
    }
    assert chosen
    return chosen


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_and_shared_memory_fits(results, arch):
    from fastuft.kernels.launch_table import SHARED_BYTES

    mine = {job: result for job, result in results.items() if job.arch == arch}
    assert len(mine) > 20
    assert {str(job): result.stack for job, result in mine.items() if result.stack} == {}
    assert {str(job): r.shared for job, r in mine.items() if r.shared > SHARED_BYTES[arch]} == {}


def test_the_plan_assumes_an_occupancy_that_fits(results):
    for job, result in of_sweep(results).items():
        planned = config_of(job).ctas
        assert result.ctas >= planned, f"{job}: {result.ctas} fit, {planned} are planned"
        assert waves(job, result) <= 1, str(job)


def test_the_plan_uses_the_occupancy_that_fits(results):
    """Up to three programs, which hide each other's waiting, where every gradient sweep of a configuration allows them."""
    fits: dict[tuple[object, ...], int] = {}
    for job, result in of_sweep(results, need_mu=True).items():
        configuration = (job.arch, job.precision, job.width, job.tall, config_of(job))
        fits[configuration] = min(result.ctas, fits.get(configuration, 3))
    assert {str(found): fit for found, fit in fits.items() if found[-1].ctas < fit} == {}


def test_products_on_sm_90_are_never_serialized(results):
    """ptxas warns of no serialized wgmma (C75xx), and the loop has only the waits that two products need."""
    assert {str(job): result.warnings for job, result in of_sweep(results, arch=90).items() if result.warnings} == {}
    for job, result in of_sweep(results, arch=90, precision="bf16", queue="").items():
        assert result.matrix == "HGMMA", str(job)
        if not job.aligned:
            continue
        assert result.loop["wait"] <= 2 and result.loop["ldsm"] == 0, f"{job}: {result.loop}"
        assert not job.need_mu or result.loop["barrier"] <= 3, f"{job}: {result.loop}"


def test_converted_tiles_on_sm_90_use_wgmma(results):
    """An fp32 or fp8 queue passes through registers, which at D = 512 cannot hold fp32 tiles beside 64 rows of sums."""
    for queue in ("fp32", "fp8"):
        for job, result in of_sweep(results, arch=90, precision="bf16", queue=queue).items():
            assert result.matrix == ("HMMA" if job.width == 512 and queue == "fp32" else "HGMMA"), str(job)


def test_only_gpus_with_fp8_conversion_use_it(results):
    """On sm_80 codes are decoded bit by bit, because Triton does not support the type there."""
    for job, result in of_sweep(results, queue="fp8").items():
        assert ("cvt.rn.f16x2.e4m3x2" in result.ptx) == (job.arch >= 90), str(job)


def test_combine_launches_while_the_sweep_runs(results):
    """From sm_90 on; combine reads memory only after the sweep has finished."""
    combines = {job: result.ptx for job, result in results.items() if job.name in ("combine", "combine-one-key", "lse")}
    for job, ptx in combines.items():
        before, wait, _ = ptx.partition("griddepcontrol.wait")
        assert bool(wait) == (job.arch >= 90), str(job)
        assert not wait or "ld.global" not in before, str(job)
    for job, result in of_sweep(results).items():
        assert ("griddepcontrol.launch_dependents" in result.ptx) == (job.arch >= 90), str(job)


# Cycles per unit of a sweep for gradients in bf16 on sm_90, by (queue, tall) and width; products alone from 128 columns on
# (512, 1,024 and 2,048), a tenth above what was compiled where instructions bound it.
CEILINGS = {
    ("", False): {16: 300, 32: 300, 64: 300, 128: 512, 256: 1024, 512: 2048},
    ("", True): {16: 600, 32: 600, 64: 630, 128: 512, 256: 2048},
    ("fp8", False): {16: 330, 32: 370, 64: 450, 128: 610, 256: 1060, 512: 1460},
}


def test_the_bound_from_instruction_counts_stays_below_its_ceiling(results):
    """A bound, not a time: it reveals growth of the loop without a GPU."""
    for (queue, tall), ceilings in CEILINGS.items():
        chosen = of_sweep(results, arch=90, precision="bf16", queue=queue, tall=tall, need_mu=True)
        for job, result in chosen.items():
            if queue or job.descriptors:
                cycles = bound(job, result)
                assert max(cycles.values()) <= ceilings[job.width], f"{job}: {cycles}"


def test_unit_rows_need_no_maximum(results):
    """The loop has four shuffles fewer, and fewer instructions."""
    for job, result in of_sweep(results, unit=True, tail=False, queue="", aligned=True).items():
        other = results[replace(job, unit=False)]
        assert result.loop["shuffle"] < other.loop["shuffle"] and result.loop["all"] < other.loop["all"], str(job)


def test_half_precision_uses_tensor_cores(results):
    for job, result in of_sweep(results).items():
        if job.precision != "ieee":
            assert result.matrix in ({90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA"), 80: ("HMMA",)}[job.arch]), str(
                job
            )


def test_exact_single_precision_uses_no_tensor_cores(results):
    assert {result.matrix for result in of_sweep(results, precision="ieee").values()} == {"FFMA"}


def test_every_launch_is_compiled(results):
    """The launcher's choice for any shape is one of the compiled configurations, through descriptors or not."""
    from fastuft.kernels.launch_table import PRECISIONS, WIDTHS, Keys, launch

    compiled = {
        (job.arch, job.precision, job.width, job.queue, job.descriptors, config_of(job)) for job in of_sweep(results)
    }
    queues = {"fp8": "fp8", "converted": "fp32"}
    for arch, precision, width, tall, keys in itertools.product(
        ARCHS, PRECISIONS, WIDTHS, (False, True), get_args(Keys)
    ):
        if (precision == "fp16" and width != 128) or (precision in ("ieee", "tf32") and keys != "aligned"):
            continue  # like bf16; these take no other configuration
        config = launch(arch, precision, width, tall, keys)
        descriptors = config.descriptors and keys != "unaligned"
        assert (arch, precision, width, queues.get(keys, ""), descriptors, config) in compiled, (arch, width, keys)
