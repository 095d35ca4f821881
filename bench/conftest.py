"""Options, fixtures and the summary table of the benchmarks; timing itself is in ``harness``."""

from __future__ import annotations

import os
import sys

import harness
import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("fastuft benchmarks")
    group.addoption("--smoke", action="store_true", help="smallest sizes, each benchmark once (continuous integration)")
    group.addoption("--seconds", type=float, default=2.0, help="time for the rounds of one benchmark (default 2)")
    group.addoption("--threads", type=int, default=1, help="CPU threads of PyTorch (default 1)")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda when present")
    group.addoption(
        "--impl",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="another implementation of info_nce(q, k, queue, temperature) for the loss table; may be repeated",
    )


def pytest_configure(config):
    harness.SMOKE = config.getoption("--smoke")
    harness.SECONDS = config.getoption("--seconds")
    if os.getcwd() not in sys.path:  # so that --impl finds modules of the caller
        sys.path.append(os.getcwd())
    torch.set_num_threads(config.getoption("--threads"))
    harness.keep_heap()
    # The summary below is shorter; `--benchmark-verbose` and `pytest-benchmark compare` show the long tables.
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc):
    if "user_impl" in metafunc.fixturenames:
        specs = metafunc.config.getoption("--impl")
        try:
            functions = [harness.load_function(spec) for spec in specs]
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        metafunc.parametrize("user_impl", functions, ids=specs)


def pytest_collection_modifyitems(config, items):
    if chosen_device(config).type == "cuda":
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def chosen_device(config) -> torch.device:
    name = config.getoption("--device")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    """Whether the smallest sizes are to be used."""
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device under test: a GPU when there is one."""
    return chosen_device(request.config)


@pytest.fixture(scope="session")
def scale(smoke, device) -> str:
    """Which sizes to take: smoke, cpu or cuda."""
    return "smoke" if smoke else device.type


@pytest.fixture(scope="session")
def ceilings(device) -> harness.Ceilings:
    """Copy bandwidth and matrix rate of this device, measured in this session."""
    return harness.Ceilings(device)


@pytest.fixture(scope="session")
def cpu_ceilings() -> harness.Ceilings:
    """The same for the CPU, for host work on a machine with a GPU."""
    return harness.Ceilings(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = harness.device_name(chosen_device(config))
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = harness.versions()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left_out"] = dict(harness.LEFT_OUT)
    output_json["smoke"] = config.getoption("--smoke")


def readable_time(seconds: float) -> str:
    """Seconds with a fitting unit, three significant digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def summary_rows(benchmarks) -> list[tuple[str, ...]]:
    """Rows of the table, group after group: (group, name, median, ratio, ceiling, memory, rate)."""
    groups: dict[str, list] = {}
    for bench in benchmarks:
        if bench.stats.data:
            groups.setdefault(bench.group or "", []).append(bench)
    rows = []
    for group, members in groups.items():
        reference = next((b.stats.median for b in members if b.extra_info.get("baseline")), None)
        for bench in sorted(members, key=lambda b: b.stats.median):
            info, median = bench.extra_info, bench.stats.median
            percent, peak, rate = (info.get(k) for k in ("percent_of_ceiling", "peak_extra_bytes", "items_per_second"))
            rows.append(
                (
                    group,
                    bench.name.removeprefix("test_") + (" (baseline)" if info.get("baseline") else ""),
                    readable_time(median),
                    "" if reference is None else f"{reference / median:.2f}x",
                    "" if percent is None else f"{percent:.0f}% {info['ceiling']}",
                    "" if peak is None else f"{peak / 1e6:.1f}",
                    "" if rate is None else f"{rate:,.0f}/s",
                )
            )
    return rows


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = summary_rows(session.benchmarks) if session is not None else []
    write = terminalreporter.write_line
    if rows:
        terminalreporter.section(f"fastuft benchmarks: {harness.device_name(chosen_device(config))}")
        head = ("", "", "median", "speed", "ceiling", "extra MB", "rate")
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(1, len(head))]
        write("  " + "  ".join([" " * widths[0], *(h.rjust(w) for h, w in zip(head[2:], widths[1:], strict=True))]))
        previous = None
        for group, *cells in rows:
            if group != previous:
                write(group or "(no group)")
                previous = group
            numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            write(("  " + "  ".join([cells[0].ljust(widths[0]), *numbers])).rstrip())
        write(
            "speed: the baseline's median over this one's; ceiling: of the copy bandwidth or matrix rate measured here"
        )
    for name, reason in harness.LEFT_OUT.items():
        write(f"left out: {name} {reason}")
