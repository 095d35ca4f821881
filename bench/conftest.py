"""Options, fixtures and the summary table of the benchmarks; timing itself is in ``harness``."""

from __future__ import annotations

import os
import sys

import harness
import pytest
import report
import torch

from fastuft import fused


def pytest_addoption(parser):
    group = parser.getgroup("fastuft benchmarks")
    group.addoption("--smoke", action="store_true", help="smallest sizes, each benchmark once (continuous integration)")
    group.addoption("--seconds", type=float, default=1.0, help="time for the rounds of one benchmark (default 1)")
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
    """Whether to use the smallest sizes."""
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device under test: a GPU if there is one."""
    return chosen_device(request.config)


@pytest.fixture(scope="session")
def scale(smoke, device) -> str:
    """The kind of sizes to use: smoke, cpu or cuda."""
    return "smoke" if smoke else device.type


@pytest.fixture(scope="session")
def ceilings(device) -> harness.Ceilings:
    """Memory bandwidth and matrix rate of this device, measured in this session."""
    return harness.Ceilings(device)


@pytest.fixture(scope="session")
def cpu_ceilings() -> harness.Ceilings:
    """The same for the CPU, for host work on a machine with a GPU."""
    return harness.Ceilings(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_fallback():
    """No benchmark times a portable path in place of a fused kernel that was found wrong."""
    yield
    assert not fused._refusals


@pytest.fixture(autouse=True)
def _same_conditions(request):
    """The same seed for every benchmark, and for NumPy's and scikit-learn's thread pools PyTorch's number of threads."""
    torch.manual_seed(0)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # comes with scikit-learn; without it there is no pool of theirs to limit
        yield
        return
    with threadpool_limits(limits=request.config.getoption("--threads")):
        yield


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = harness.device_name(chosen_device(config))
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = harness.versions()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left_out"] = dict(harness.LEFT_OUT)
    output_json["smoke"] = config.getoption("--smoke")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Benchmarks that were interrupted go, so that the others' figures are written: theirs are recorded at the end."""
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if benchmarks is not None:
        benchmarks.benchmarks = [b for b in benchmarks.benchmarks if b.stats.data and b.extra_info]
    return (yield)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [] if session is None else [bench for bench in session.benchmarks if bench.stats.data]
    entries = [{"group": b.group, "name": b.name, "median": b.stats.median, **b.extra_info} for b in measured]
    if entries:
        terminalreporter.section(f"fastuft benchmarks: {harness.device_name(chosen_device(config))}")
    for line in report.table_lines(entries):
        terminalreporter.write_line(line)
    for name, reason in harness.LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {name} {reason}")
