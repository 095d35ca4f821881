"""Every configuration of the launch table compiles for each chip as the launcher's plan counts on.

Runs without a GPU. Compilation happens in a few processes, each test reads its result; the table goes to the log.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
from compiled import Compiled, Job, compile_job, config_of

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

ARCHS = (80, 90, 100)


def sweep_jobs() -> list[Job]:
    """Every entry of the table, and on sm_90 each variant of the entries in bf16."""
    from fastuft.kernels.launch_table import table

    found: dict[Job, None] = {}
    for arch, precision, width, tall, direct, config in table():
        if precision == "fp16" and width != 128:
            continue
        job = Job("sweep", arch, precision, width, tall=tall, descriptors=config.descriptors and direct)
        variants = [job]
        if width in (128, 512):
            variants.append(replace(job, need_mu=False))
        if precision == "ieee":
            variants.append(replace(job, tail=True))
        if arch == 90 and precision == "bf16":
            variants.append(replace(job, unit=True, descriptors=config.descriptors, queue="fp32"))
            variants.append(replace(job, descriptors=False))
            if direct:
                variants += [replace(job, unit=True), replace(job, unit=True, tail=True)]
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
    return found


@pytest.fixture(scope="module")
def results() -> dict[Job, Compiled]:
    """All jobs, compiled once."""
    todo = jobs()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(todo, pool.map(compile_job, todo, chunksize=4), strict=True))
    print(
        f"\n{'kernel':52} registers  stack   shared  CTAs  matrix  in loop: waits barriers LDSM shuffles all  warnings"
    )
    for job, result in found.items():
        loop = result.loop
        print(
            f"{job!s:52} {result.registers:9}  {result.stack:5}  {result.shared:7}  {result.ctas:4}  {result.matrix:6} "
            f"{loop.get(result.matrix, 0):8} {loop['wait']:5} {loop['barrier']:8} {loop['ldsm']:4} {loop['shuffle']:8} "
            f"{loop['all']:4}  {' '.join(result.warnings)}"
        )
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
def test_nothing_spills_and_shared_memory_fits(results, arch):
    from fastuft.kernels.launch_table import SHARED_BYTES

    mine = {job: result for job, result in results.items() if job.arch == arch}
    assert len(mine) > 20
    assert {str(job): result.stack for job, result in mine.items() if result.stack} == {}
    assert {str(job): r.shared for job, r in mine.items() if r.shared > SHARED_BYTES[arch]} == {}


def test_the_plan_counts_on_as_many_programs_per_multiprocessor_as_fit(results):
    for job, result in of_sweep(results).items():
        planned = config_of(job).ctas
        assert result.ctas >= planned, f"{job}: {result.ctas} fit, {planned} are planned"


def test_products_on_sm_90_are_never_serialized(results):
    """No C75xx of ptxas (serialized or waited-for wgmma), as few waits as a loop with two products needs."""
    assert {str(job): result.warnings for job, result in of_sweep(results, arch=90).items() if result.warnings} == {}
    for job, result in of_sweep(results, arch=90, precision="bf16", descriptors=True, queue="").items():
        assert result.matrix == "HGMMA", str(job)
        assert result.loop["wait"] <= 2 and result.loop["ldsm"] == 0, f"{job}: {result.loop}"
        assert not job.need_mu or result.loop["barrier"] <= 3, f"{job}: {result.loop}"


def test_converted_tiles_on_sm_90_take_wgmma_up_to_256_columns(results):
    """An fp32 queue passes through registers; at D = 512 they do not hold 64 rows of sums beside it."""
    for job, result in of_sweep(results, arch=90, precision="bf16", queue="fp32").items():
        assert result.matrix == ("HMMA" if job.width == 512 else "HGMMA"), str(job)


def test_unit_rows_need_no_maximum(results):
    """Four shuffles fewer in the loop, and fewer instructions."""
    for job, result in of_sweep(results, unit=True, tail=False, queue="").items():
        other = results[replace(job, unit=False)]
        assert result.loop["shuffle"] < other.loop["shuffle"] and result.loop["all"] < other.loop["all"], str(job)


def test_half_precision_uses_the_matrix_units(results):
    for job, result in of_sweep(results).items():
        if job.precision != "ieee":
            assert result.matrix in ({90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA"), 80: ("HMMA",)}[job.arch]), str(
                job
            )


def test_exact_single_precision_takes_none_of_them(results):
    assert {result.matrix for result in of_sweep(results, precision="ieee").values()} == {"FFMA"}


def test_every_launch_is_in_the_table():
    """What the launcher would take for any shape is one of the compiled configurations."""
    from fastuft.kernels.launch_table import PRECISIONS, WIDTHS, launch, table

    compiled = {(arch, precision, width, config) for arch, precision, width, _, _, config in table()}
    for arch in ARCHS:
        for precision in PRECISIONS:
            for width in WIDTHS:
                for tall, direct in itertools.product((False, True), repeat=2):
                    assert (arch, precision, width, launch(arch, precision, width, tall, direct)) in compiled
