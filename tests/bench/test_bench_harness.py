"""The timing that all benchmarks share, and the results page, on small benchmarks defined here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import harness  # noqa: E402
import report  # noqa: E402

BENCH = """
import pytest, torch
from harness import measure, peer

def inputs():
    return torch.randn(64, 64), torch.randn(64, 64)

def test_product(benchmark, ceilings, device, scale, smoke):
    assert scale == ("smoke" if smoke else "cpu") and device.type == "cpu"
    seconds = measure(benchmark, torch.mm, inputs, group="product", ceilings=ceilings, flops=2 * 64**3, items=64,
                      info={"B": 64})
    assert seconds > 0

def test_twice(benchmark, ceilings):
    measure(benchmark, lambda a, b: (a @ b) @ b, inputs, group="product", baseline=True, ceilings=ceilings,
            bytes_moved=4 * 64 * 64 * 3)

def test_absent(benchmark):
    peer("no_such_peer", "no-such-package")

def test_user(benchmark, user_impl):
    measure(benchmark, user_impl, inputs, group="product")
"""


@pytest.fixture
def bench(tmp_path):
    """Run the small benchmarks with options; (exit status, output, file of figures)."""
    file = tmp_path / "bench_small.py"
    file.write_text(BENCH)
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())

    def run(*options):
        raw = tmp_path / "raw.json"
        command = [sys.executable, "-m", "pytest", str(file), "-c", str(ROOT / "pyproject.toml")]
        command += ["--rootdir", str(tmp_path), f"--benchmark-json={raw}", "--device=cpu", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "bench")}
        environment.pop("PYTEST_XDIST_WORKER", None)  # by it pytest-benchmark turns itself off
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
        return done.returncode, done.stdout + done.stderr, raw

    return run


def test_figures_table_and_page(bench, tmp_path):
    status, output, raw = bench("--seconds=0.05", "--benchmark-only", "--impl=torch:matmul")
    assert status == 0, output
    assert "twice (baseline)" in output and "1.00x" in output and "user[torch:matmul]" in output
    assert "left out: no_such_peer not installed (pip install no-such-package)" in output
    content = json.loads(raw.read_text())
    info = {entry["name"]: entry["extra_info"] for entry in content["benchmarks"]}
    product = info["test_product"]
    assert product["peak_extra_bytes"] == 64 * 64 * 4 and product["input_sets"] == 2 and product["B"] == 64
    assert product["ceiling"] == "matrix" and product["percent_of_ceiling"] > 0
    assert info["test_twice"]["ceiling"] == "bandwidth" and info["test_twice"]["peak_extra_bytes"] == 2 * 64 * 64 * 4
    quantiles = [product["quantiles_seconds"][q] for q in ("0.2", "0.5", "0.8")]
    assert quantiles == sorted(quantiles)
    assert content["machine_info"]["versions"]["torch"] == torch.__version__

    results, page = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    assert report.main(["collect", str(raw), "--results", str(results)]) == 0
    (saved,) = (results / "cpu").glob("*.json")
    assert report.main(["page", "--results", str(results), "--out", str(page)]) == 0
    text = page.read_text()
    assert "bench/bench_mix.py" in text and "On a GPU: not measured yet." in text
    assert (page.parent / "benchmarks" / "cpu-ceilings.svg").exists()
    assert json.loads(saved.read_text())["left_out"] == {"no_such_peer": "not installed (pip install no-such-package)"}


def test_a_smoke_run_measures_each_case_once(bench, tmp_path, capsys):
    status, output, raw = bench("--smoke")
    assert status == 0, output
    assert {entry["stats"]["rounds"] for entry in json.loads(raw.read_text())["benchmarks"]} == {1}
    assert report.main(["collect", str(raw), "--results", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err


FAKE_CUDA = """
import contextlib, time
from types import SimpleNamespace
import torch

class Event:
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.at = time.perf_counter()
    def synchronize(self): pass
    def elapsed_time(self, end): return 1e3 * (end.at - self.at)

class Graph:
    replays = 0
    def replay(self): Graph.replays += 1

class Stream:
    def wait_stream(self, other): pass

def null(*_): return contextlib.nullcontext()

cuda = torch.cuda
cuda.is_available = lambda: True
cuda.Event, cuda.CUDAGraph, cuda.Stream, cuda.graph, cuda.stream = Event, Graph, Stream, null, null
cuda.current_stream = Stream
cuda.synchronize = cuda.reset_peak_memory_stats = cuda._sleep = lambda *_: None
cuda.memory_allocated, cuda.max_memory_allocated = lambda *_: 100, lambda *_: 350
cuda.get_device_name = lambda *_: "NVIDIA Fake"
cuda.get_device_properties = lambda *_: SimpleNamespace(L2_cache_size=6 * 64 * 64 * 4, uuid="abc")
"""
CUDA_BENCH = """
import torch
from harness import measure

calls = []

def inputs():
    return (torch.randn(64, 64),)

def test_captured(benchmark):
    measure(benchmark, lambda x: calls.append(x.data_ptr()), inputs, device="cuda")
    assert len(set(calls)) == 24  # four times the L2 cache

def test_uncaptured(benchmark):
    calls.clear()
    measure(benchmark, lambda x: calls.append(x.data_ptr()), inputs, device="cuda", graph=False, items=24)
    assert len(set(calls)) == 24

def test_warm(benchmark):
    calls.clear()
    measure(benchmark, lambda x: calls.append(x.data_ptr()), inputs, device="cuda", cold=False)
    assert len(set(calls)) == 1
"""


def test_the_gpu_path_rotates_inputs_and_records_event_times(bench, tmp_path):
    (tmp_path / "bench_small.py").write_text(CUDA_BENCH)
    conftest = tmp_path / "conftest.py"
    conftest.write_text(FAKE_CUDA + conftest.read_text().replace("from __future__ import annotations", ""))
    status, output, raw = bench("--seconds=0.05", "--benchmark-only", "--device=cuda")
    assert status == 0, output
    sets = {"test_captured": 24, "test_uncaptured": 24, "test_warm": 1}
    for entry in json.loads(raw.read_text())["benchmarks"]:
        assert entry["options"]["timer"] == "cuda_event"
        assert entry["extra_info"]["peak_extra_bytes"] == 250
        assert entry["extra_info"]["input_sets"] == sets.pop(entry["name"])
        assert 0 < entry["stats"]["median"] < 1e-3
    assert report.main(["collect", str(raw), "--results", str(tmp_path / "results")]) == 0
    assert not sets and list((tmp_path / "results" / "nvidia-fake").glob("*.json"))


def test_an_interrupted_benchmark_loses_only_its_own_figures(bench, tmp_path):
    file = tmp_path / "bench_small.py"
    interrupted = (
        "\ndef test_interrupted(benchmark):\n    def stop():\n        raise KeyboardInterrupt\n    benchmark(stop)\n"
    )
    file.write_text(BENCH + interrupted)
    status, output, raw = bench("--seconds=0.05", "--impl=torch:mm")
    assert status == 2, output
    assert len(json.loads(raw.read_text())["benchmarks"]) == 3


@pytest.mark.parametrize("spec", ["torch", "torch:", "no_such_module:f", "torch:no_such_function", "torch:float32"])
def test_wrong_implementations_are_refused(bench, spec):
    with pytest.raises(ValueError, match="impl="):
        harness.load_function(spec)


def test_a_wrong_implementation_on_the_command_line_is_refused(bench):
    status, output, _ = bench("--impl=nothing")
    assert status != 0 and "MODULE:FUNCTION" in output


def test_peak_extra_bytes_counts_live_tensors():
    x = torch.randn(1000)

    def chain():
        for _ in range(5):
            y = x + 1
            del y

    scalars = 64  # the numbers 1 and 2 become small tensors
    assert 4000 <= harness.peak_extra_bytes(chain) < 4000 + scalars
    assert 12000 <= harness.peak_extra_bytes(lambda: (x + 1) + (x + 2)) < 12000 + scalars
    assert harness.peak_extra_bytes(lambda: None) == 0


def test_interleaved_ratio_compares_two_functions():
    matrix = torch.randn(200, 200)
    ratio = harness.interleaved_ratio(lambda m: m @ m, lambda m: [m @ m for _ in range(20)], lambda: (matrix,))
    assert ratio > 5


def test_quantiles():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    assert harness.quantile([7.0], 0.8) == 7.0


def test_cuda_clock_divides_device_time_by_calls():
    class Event:
        def __init__(self, milliseconds):
            self.milliseconds = milliseconds

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.milliseconds - self.milliseconds

    start, end = (harness.CudaClock.Reading(Event(ms), calls=4) for ms in (10.0, 18.0))
    assert end - start == pytest.approx(2e-3)


def test_the_slower_ceiling_binds(monkeypatch):
    ceilings = harness.Ceilings(torch.device("cpu"))
    ceilings.__dict__["bytes_per_second"] = 100.0
    ceilings._rates[torch.float32] = 10.0
    assert ceilings.bound(50, 1, torch.float32) == (0.5, "bandwidth")
    assert ceilings.bound(50, 20, torch.float32) == (2.0, "matrix")
    assert ceilings.bound(None, None, torch.float32) is None


def test_clocks_are_read_and_never_set(monkeypatch):
    commands = []

    class Query:
        def __init__(self, command, **_):
            commands.append(command)
            self.stdout = SimpleNamespace(read=lambda: " 1980, 3201, 512.5\n")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def poll(self):
            return 0

        def kill(self):
            pass

    monkeypatch.setattr(harness.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(harness.subprocess, "Popen", Query)
    monkeypatch.setattr(harness.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    clocks = harness.read_clocks(lambda: None, torch.device("cpu"))
    assert clocks == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "power_watts": 512.5}
    assert all(not word.startswith(("-pl", "-lgc", "-ac", "--lock")) for word in commands[0])
    assert "--id=GPU-abc" in commands[0]


def entry(name, group="loss", **values):
    return {"file": "bench_loss.py", "name": name, "group": group, "median": 1e-3, **values}


def test_groups_have_tables():
    entries = [entry("test_a", median=2e-3, baseline=True), entry("test_b", median=1e-3, items_per_second=5000.0)]
    lines = report.table_lines(entries)
    assert lines[1] == "loss" and lines[2].split()[:4] == ["b", "1", "ms", "2.00x"] and "5,000/s" in lines[2]
    assert lines[3].startswith("  a (baseline)")
    assert report.table_lines([]) == []


def test_plots_of_sweeps_and_throughput(tmp_path):
    entries = [
        entry(
            f"test_{impl}[{k}]", group=f"K={k}", impl=impl, B=256, K=k, D=128, median=k * 1e-6, peak_extra_bytes=k * 100
        )
        for impl in ("fused", "eager")
        for k in (1024, 4096, 16384)
    ]
    entries += [entry(f"test_b{b}", impl="fused", B=b, K=65536, D=128) for b in (32, 256)]
    entries += [
        entry(f"test_images[{part}]", group="images per second, resnet50", items_per_second=rate)
        for part, rate in (("loader", 900.0), ("end_to_end", 400.0))
    ]
    result = {"device": "CPU", "benchmarks": entries}
    made = {file for _, file in report._plots("cpu", result, tmp_path)}
    assert made == {f"cpu-{stem}.svg" for stem in ("loss-time-k", "loss-time-b", "loss-memory-k", "throughput")}
    first = (tmp_path / "cpu-loss-time-k.svg").read_bytes()
    report._plots("cpu", result, tmp_path)
    assert (tmp_path / "cpu-loss-time-k.svg").read_bytes() == first


def test_page_shows_figures_and_what_is_not_measured(tmp_path):
    entries = [entry("test_mix", group="g", median=2e-3) | {"file": "bench_mix.py"}]
    result = {"device": "Some CPU", "date": "2026-01-02", "versions": {"torch": "2.13"}, "left_out": {}}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "2026-01-02.json").write_text(json.dumps(result | {"benchmarks": entries}))
    page = tmp_path / "page.md"
    report.write_page(tmp_path, page)
    text = page.read_text()
    files = len(list(Path(report.ROOT, "bench").glob("bench_*.py")))
    assert "| mix | 2 ms |" in text
    assert text.count("On a GPU: not measured yet.") == files + 1
    assert text.count("On Some CPU: not measured yet.") == files - 1
    report.write_page(tmp_path / "nothing", page)
    assert page.read_text().count("On a CPU: not measured yet.") == files + 1


def test_device_folders():
    assert report.slug("NVIDIA H200") == "nvidia-h200"
    assert report.slug("AMD EPYC, 1 thread") == "cpu"


def test_a_simulated_source_is_drawn_from_its_index_only(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "simulate_source.py"), "--images", "400", "--shards", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found, index = map(json.loads, done.stdout.splitlines())
    assert found["source_images"] == 400 and found["drawn"] == 40 and found["held_mb"] <= found["peak_mb"] + 1
    assert index["bytes_per_image"] > 0
