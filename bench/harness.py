"""Timing shared by all benchmarks: warm CPU timing, CUDA-graph timing over rotated buffers, ceilings, memory, peers.

A benchmark file is ``bench/bench_NAME.py``, holds one claim, and compares with the reference *before* it times::

    from harness import measure

    def test_scale(benchmark, device, scale, ceilings):
        n = {"smoke": 1_000, "cpu": 1_000_000, "cuda": 100_000_000}[scale]

        def inputs():                       # a fresh set of random tensors, never zeros
            return (torch.randn(n, device=device),)

        torch.testing.assert_close(ours(*(x := inputs())), theirs(*x))
        measure(benchmark, ours, inputs, group=f"scale n={n}", ceilings=ceilings, bytes_moved=8 * n)

The row that others are compared with has ``baseline=True``; there is one per group. A peer that may be absent is imported with
``peer("lightly")``: without it, the benchmark is skipped, and the summary says what was left out. A ratio that must hold in
continuous integration comes from :func:`interleaved_ratio` or :func:`peak_extra_bytes`; never assert a time.

On a CPU, every round is one call, on two alternating sets of inputs (with ``cold=True``, on enough sets to exceed the
last-level cache), with one thread (``--threads``) and a heap that keeps its pages, so that page faults of temporaries are not
counted. The time of one thread is its processor time, without other programs' turns; with several threads, or with ``wall``,
it is the time that passes. On a GPU, the calls are captured in one CUDA graph over enough sets of inputs to exceed the L2
cache four times (with ``cold=False``, over one set, which stays there if it fits). A round is one replay between two CUDA
events, enqueued after a short spin so that no launch latency is counted, divided by the number of calls. Bytes and FLOPs are
explicit counts of what the operation must move and compute. The percentage of the ceiling is the larger of bytes / bandwidth
and FLOPs / matrix rate, over the median, with both rates measured in the same session. Where a row cannot be faster than
another one that does less (a copy, products alone), that one has ``limit=True``, and the table gives its share of each row's
time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

LEFT_OUT: dict[str, str] = {}  # peers that could not be imported, with the reason; printed in the summary
SMOKE = False  # set by conftest from --smoke
SECONDS = 1.0  # time for the rounds of one benchmark; set by conftest from --seconds

_MAX_SETS = 32
_MIN_CALLS = 10  # calls in one CUDA graph, so that event resolution does not matter
_MAX_ROUNDS = 200


def keep_heap() -> None:
    """Let the C allocator keep and reuse the pages of large temporaries (glibc only; elsewhere nothing changes)."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_max = -1, -4
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(mmap_max, 0)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolated quantile of some values."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def cpu_clock(wall: bool = False) -> Callable[[], float]:
    """The clock of work on a CPU: of this process while it has one thread and ``wall`` is not asked for."""
    return time.perf_counter if wall or torch.get_num_threads() > 1 else time.process_time


def _best_seconds(fn: Callable[[], object], device: torch.device, rounds: int) -> float:
    fn()
    clock = cpu_clock()
    best = math.inf
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) * 1e-3)
        else:
            begin = clock()
            fn()
            best = min(best, clock() - begin)
    return best


@dataclass
class Ceilings:
    """Rates of this machine, each measured at its first use: memory bandwidth and matrix product by dtype."""

    device: torch.device
    _rates: dict[torch.dtype, float] = field(default_factory=dict)

    @functools.cached_property
    def bytes_per_second(self) -> float:
        """Bytes read plus bytes written per second: the better of copying a large tensor and scaling one in place.

        On a CPU, a store to memory that was not read first costs a read of its own, which a copy pays and an
        operation in place does not.
        """
        count = 2**16 if SMOKE else 2**28 if self.device.type == "cuda" else 2**26
        source = torch.randn(count, device=self.device)
        target = torch.empty_like(source)
        rounds = 3 if SMOKE else 8
        copying = _best_seconds(lambda: target.copy_(source), self.device, rounds)
        scaling = _best_seconds(lambda: source.mul_(-1.0), self.device, rounds)
        return 8 * count / min(copying, scaling)

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """FLOPs a second of a large matrix product in ``dtype`` (float32 on a GPU without TF32)."""
        if dtype not in self._rates:
            side = 64 if SMOKE else 8192 if self.device.type == "cuda" else 1024
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            self._rates[dtype] = 2 * side**3 / _best_seconds(lambda: a @ b, self.device, 3 if SMOKE else 8)
        return self._rates[dtype]

    def bound(self, bytes_moved: float | None, flops: float | None, dtype: torch.dtype) -> tuple[float, str] | None:
        """(seconds that the work takes at least, name of the binding ceiling), or None without counts."""
        bounds = []
        if bytes_moved:
            bounds.append((bytes_moved / self.bytes_per_second, "bandwidth"))
        if flops:
            bounds.append((flops / self.flops_per_second(dtype), "matrix"))
        return max(bounds) if bounds else None

    def as_dict(self) -> dict[str, float]:
        """The rates measured so far, for the record."""
        rates = {f"matrix_{str(dtype).removeprefix('torch.')}_flops_per_second": r for dtype, r in self._rates.items()}
        if "bytes_per_second" in self.__dict__:
            rates["bytes_per_second"] = self.bytes_per_second
        return rates


def peak_extra_bytes(fn: Callable[..., object], *arguments: object, device: torch.device | str = "cpu") -> int:
    """Largest bytes alive at once during one call, above what was alive before it.

    CUDA: the caching allocator's peak. CPU: the running sum of the allocations and frees that the PyTorch profiler
    records; memory that other libraries take (NumPy, DALI) is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn(*arguments)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        fn(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    ]
    return int(max(itertools.accumulate((size for _, size in sorted(changes)), initial=0)))


class CudaClock:
    """A timer for pytest-benchmark that reads CUDA events: the difference of two readings is device time.

    Args:
        calls: calls made between two readings; differences are divided by it.
    """

    __name__ = "cuda_event"

    @dataclass(frozen=True)
    class Reading:
        event: torch.cuda.Event
        calls: int

        def __sub__(self, start: CudaClock.Reading) -> float:
            self.event.synchronize()
            return start.event.elapsed_time(self.event) * 1e-3 / self.calls

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> CudaClock.Reading:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return CudaClock.Reading(event, self.calls)


def _tensor_bytes(values: object) -> int:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, (tuple, list)):
        return sum(_tensor_bytes(value) for value in values)
    return 0


def _cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L2 of a GPU, L3 of a CPU (32 MB where it is not told)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 2**25)
    except (ValueError, OSError, AttributeError):
        return 2**25


def _rotation(inputs: Callable[[], Sequence[Any]] | None, device: torch.device, cold: bool) -> list[Sequence[Any]]:
    """Sets of inputs: with ``cold`` so many that together they exceed the last-level cache (four times a GPU's L2).

    Otherwise two on a CPU and one on a GPU.
    """
    if inputs is None:
        return [()]
    if device.type == "cuda" and not cold:
        return [inputs()]  # two sets might not fit into L2 together
    sets = [inputs(), inputs()]
    if cold and not SMOKE:
        size = max(_tensor_bytes(sets[0]), 1)
        wanted = (4 if device.type == "cuda" else 2) * _cache_bytes(device)
        sets += [inputs() for _ in range(min(math.ceil(wanted / size), _MAX_SETS) - 2)]
    return sets


def _captured(fn: Callable[..., object], sets: Sequence[Sequence[Any]], calls: int) -> Callable[[], None]:
    """``calls`` calls over the sets in turn, as one CUDA graph; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialization, autotuning and allocations happen before the capture
        for arguments in sets:
            fn(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            fn(*sets[index % len(sets)])
    return graph.replay


def _rounds(seconds_a_round: float) -> int:
    if SMOKE:
        return 1
    return max(3, min(_MAX_ROUNDS, int(SECONDS / max(seconds_a_round, 1e-9))))


def measure(
    benchmark: Any,
    fn: Callable[..., object],
    inputs: Callable[[], Sequence[Any]] | None = None,
    *,
    group: str | None = None,
    baseline: bool = False,
    limit: bool = False,
    device: torch.device | str | None = None,
    ceilings: Ceilings | None = None,
    bytes_moved: float | None = None,
    flops: float | None = None,
    dtype: torch.dtype = torch.float32,
    items: float | None = None,
    graph: bool = True,
    cold: bool | None = None,
    memory: bool = True,
    rounds: int | None = None,
    wall: bool = False,
    info: dict[str, Any] | None = None,
) -> float:
    """Time ``fn(*inputs())`` with the benchmark fixture and record what the table and the page show.

    Args:
        benchmark: pytest-benchmark's fixture.
        fn: what is timed; it may run forward and backward, and must not wait for the device on CUDA with ``graph``.
        inputs: makes one set of random inputs; called several times, outside the timed part. None: fn takes none.
        group: rows compared with each other; name the sizes in it.
        baseline: this row is what the group's ratios refer to.
        limit: this row does less than any other of the group can.
        device: where fn works; by default a GPU when there is one (pass "cpu" for host work).
        ceilings: the fixture of that name, for the per cent of the ceiling.
        bytes_moved: bytes the operation must read plus write in one call.
        flops: floating-point operations of one call.
        dtype: whose matrix rate bounds the FLOPs.
        items: things done in one call (images, rows), for a rate.
        graph: capture calls in a CUDA graph; False for work that cannot be captured (host logic, data streams).
        cold: take turns over more inputs than the last-level cache holds; by default on a GPU only, where a caller's
            other work fills the cache between two calls.
        memory: measure the peak extra memory of one call.
        rounds: fixed number of rounds; by default as many as fit ``--seconds``.
        wall: on a CPU, time that passes although one thread works: for work that waits, or has threads of its own.
        info: more to record: sizes, parameters.

    Returns:
        Median seconds of one call.
    """
    target_device = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if group is not None:
        benchmark.group = group
    sets = _rotation(inputs, target_device, target_device.type == "cuda" if cold is None else cold)
    if target_device.type == "cuda":
        fn(*sets[0])  # compilation and autotuning allocate; the memory of a call is that of the next one
    peak = peak_extra_bytes(fn, *sets[0], device=target_device) if memory else None
    synchronize(target_device)
    begin = time.perf_counter()
    fn(*sets[-1])
    synchronize(target_device)
    estimate = time.perf_counter() - begin
    warmup = 0 if SMOKE or estimate > 0.5 else 2

    if target_device.type == "cuda":
        # The same number of calls for every row of a group, short or long; at least all sets once.
        calls = 1 if SMOKE else max(len(sets), 1 if estimate > 0.05 else _MIN_CALLS)
        if graph:
            target = _captured(fn, sets, calls)
        else:

            def target() -> None:
                for index in range(calls):
                    fn(*sets[index % len(sets)])

        def spin() -> None:
            torch.cuda._sleep(300_000)  # about 0.2 ms, while the replay is being enqueued

        benchmark._timer = CudaClock(calls)
        benchmark.pedantic(target, setup=spin, rounds=rounds or _rounds(estimate * calls), warmup_rounds=warmup)
        clocks = (  # once per group, because reading takes a while
            read_clocks(target, target_device) if baseline and not SMOKE else {}
        )
    else:
        turn = itertools.cycle(sets)

        def next_set() -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(next(turn)), {}

        benchmark._timer = cpu_clock(wall)
        benchmark.pedantic(fn, setup=next_set, rounds=rounds or _rounds(estimate), warmup_rounds=warmup)
        clocks = {}

    if benchmark.stats is None:  # --benchmark-disable
        return math.nan
    times = benchmark.stats.stats.data
    median = statistics.median(times)
    record: dict[str, Any] = {
        "device": device_name(target_device),
        "baseline": baseline,
        "limit": limit,
        "clock": "cuda events" if target_device.type == "cuda" else cpu_clock(wall).__name__,
        "quantiles_seconds": {str(q): quantile(times, q) for q in (0.2, 0.5, 0.8)},
        "bytes": bytes_moved,
        "flops": flops,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_extra_bytes": peak,
        "input_sets": len(sets),
        **clocks,
        **(info or {}),
    }
    if items is not None:
        record["items_per_second"] = items / median
    if ceilings is not None and ceilings.device.type == target_device.type:
        bound = ceilings.bound(bytes_moved, flops, dtype)
        if bound is not None:
            record["ceiling"] = bound[1]
            record["percent_of_ceiling"] = 100 * bound[0] / median
        record["ceilings"] = ceilings.as_dict()
    benchmark.extra_info.update(record)
    return median


def interleaved_ratio(
    ours: Callable[..., object],
    theirs: Callable[..., object],
    inputs: Callable[[], Sequence[Any]] | None = None,
    *,
    rounds: int = 9,
    device: torch.device | str = "cpu",
) -> float:
    """Median time of ``theirs`` over that of ``ours``, in alternating rounds, so that drift of the machine cancels."""
    target_device = torch.device(device)
    arguments = () if inputs is None else inputs()
    times: dict[Callable[..., object], list[float]] = {ours: [], theirs: []}
    for turn in range(rounds + 1):
        for fn, own in times.items():
            synchronize(target_device)
            begin = time.perf_counter()
            fn(*arguments)
            synchronize(target_device)
            if turn:  # the first is the warm-up
                own.append(time.perf_counter() - begin)
    return statistics.median(times[theirs]) / statistics.median(times[ours])


def device_name(device: torch.device) -> str:
    """The device in words."""
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        first: dict[str, str] = {}
        for name, _, value in lines:
            first.setdefault(name.strip(), value.strip())
        if "model name" in first:
            kind = [f"{word.split()[-1]} {first[word]}" for word in ("cpu family", "model") if word in first]
            return first["model name"] + (f" ({', '.join(kind)})" if kind else "") + f", {threads}"
    return f"CPU, {threads}"


def read_clocks(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Clocks (MHz) and power (W) that nvidia-smi reads while ``work`` runs; nothing is ever set. Empty without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "power_watts"}
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    which = [f"--id={uuid if uuid.startswith('GPU-') else 'GPU-' + uuid}"] if uuid else []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *which]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as query:
        deadline = time.monotonic() + 5
        while query.poll() is None and time.monotonic() < deadline:
            work()
            synchronize(device)
        query.kill()
        assert query.stdout is not None
        values = query.stdout.read().strip().split(",")
    try:
        return {name: float(value) for name, value in zip(fields.values(), values, strict=True)}
    except ValueError:  # a field that this GPU or driver does not report
        return {}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": sys.version.split()[0], "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    for name in ("triton", "fastuft", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peer(module: str, package: str | None = None) -> ModuleType:
    """Import an optional baseline, or skip the benchmark and note in the summary that it was left out.

    Args:
        module: module to import.
        package: name to install where it differs.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a binary built for another torch raises the latter two
        missing = getattr(error, "name", None) == module.split(".")[0]
        reason = f"not installed (pip install {package or module})" if missing else f"does not import: {error}"
        LEFT_OUT[module] = reason
        pytest.skip(f"left out: {module} {reason}")


def load_function(spec: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
        ValueError: the text has another form, or there is no such function.
    """
    module, separator, name = spec.partition(":")
    if not (module and separator and name):
        raise ValueError(f"impl={spec!r} is not of the form MODULE:FUNCTION")
    try:
        function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"impl={spec!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise ValueError(f"impl={spec!r} names a {type(function).__name__}, not a function")
    return function
