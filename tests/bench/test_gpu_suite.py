"""The script of the GPU suite on a machine without a GPU: syntax, dry run, and its parts with fake tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "bench" / "gpu_suite.sh"
FILES = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
FILES.remove("sources")  # a processor's work alone
LEFTOVER = ("bench-loss-compiled", "bench-step-compiled", "bench-evaluate", "bench-streams")
PARTS = {"build", "values", "other-tests", "small-cases", "memcheck", "racecheck", *(f"bench-{name}" for name in FILES)}
PARTS |= set(LEFTOVER)

# Stands for python3 on a GPU machine: it has CUDA, builds, tests and measures, each as FAKE_* says.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *is_available*) exit "${FAKE_CUDA-0}" ;;
  *"pip install"*) [ "$FASTUFT_BUILD" = none ] && exit 0; sleep "${FAKE_SLEEP-0}"; echo built; exit "${FAKE_BUILD-0}" ;;
  *nvidia.dali*) exit 1 ;;
  *"gpu and not slow"*) echo '3 passed in 1.00s'; exit "${FAKE_TESTS-0}" ;;
  *"bench_${FAKE_SLOW-none}.py"*) sleep 30 ;;
  *benchmark-json=*) for word in "$@"; do case $word in --benchmark-json=*) cp "$FAKE_RAW" "${word#*=}" ;; esac; done
    echo '1 passed' ;;
  *small_cases.py*) echo 'small cases ran' ;;
  *report.py*) exec "$REAL_PYTHON" "$@" ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
FAKE_SANITIZER = """#!/usr/bin/env bash
echo "========= ${FAKE_SANITIZER_SAYS-ERROR SUMMARY: 0 errors}"
exit "${FAKE_SANITIZER_STATUS-0}"
"""
RAW = {
    "datetime": "2026-01-02T03:04:05",
    "machine_info": {
        "device": "NVIDIA H200",
        "threads": 1,
        "system": "Linux",
        "machine": "x86_64",
        "versions": {"torch": "2.11.0"},
    },
    "commit_info": {"id": "abc", "dirty": False},
    "smoke": False,
    "left_out": {"lightly": "not installed (pip install lightly)"},
    "benchmarks": [
        {
            "fullname": "bench/bench_loss.py::test_fused",
            "group": "loss",
            "name": "test_fused",
            "params": None,
            "stats": {"median": 2e-5, "rounds": 20},
            "extra_info": {"percent_of_ceiling": 60.0, "ceiling": "matrix"},
        }
    ],
}


@pytest.fixture
def run(tmp_path):
    """Run the suite with fake tools; returns (exit status, output, parts by name)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("python3", FAKE_PYTHON), ("compute-sanitizer", FAKE_SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(RAW))

    def run(*arguments, **settings):
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "FAKE_RAW": str(raw),
            "FASTUFT_OUT": str(tmp_path / "out"),
            **settings,
        }
        done = subprocess.run(
            ["bash", str(SUITE), *arguments], capture_output=True, text=True, env=environment, timeout=60
        )
        file = tmp_path / "out" / "nvidia-h200" / "2026-01-02.json"
        parts = {part["name"]: part for part in json.loads(file.read_text())["parts"]} if file.exists() else {}
        return done.returncode, done.stdout + done.stderr, parts

    return run


def test_the_suite_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SUITE)], check=True)
    assert os.access(SUITE, os.X_OK)


def test_dry_run_names_every_part_and_stays_below_nine_minutes(run, tmp_path):
    status, output, _ = run("--dry-run")
    assert status == 0 and not (tmp_path / "out").exists()
    assert all(f"would run {part}" in output for part in PARTS)
    assert "FASTUFT_BUDGET:-530" in SUITE.read_text()
    caps = {name: int(seconds) for name, seconds in re.findall(r"would run (\S+) \(at most (\d+) s\)", output)}
    assert sum(caps[part] for part in PARTS if part not in LEFTOVER) <= 530
    order = list(caps)
    assert order[:5] == ["build", "values", "bench-loss", "bench-step", "bench-mix"]
    assert tuple(order[-4:]) == LEFTOVER


def test_a_wrong_argument_or_a_missing_gpu_is_refused(run):
    status, output, _ = run("--fast")
    assert status == 2 and "--dry-run" in output
    status, output, _ = run(FAKE_CUDA="1")
    assert status == 2 and "make test" in output


def test_all_parts_pass(run):
    status, output, parts = run()
    assert status == 0, output
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "ok")  # no file forgotten
    assert "3 passed" in parts["values"]["detail"]
    assert "60% matrix" in output and "left out: lightly" in output
    assert output.splitlines()[-1].startswith("total ")


def test_a_failing_part_does_not_stop_the_others(run):
    status, _, parts = run(FAKE_TESTS="1", FAKE_SANITIZER_STATUS="9", FAKE_SANITIZER_SAYS="Invalid __global__ write")
    assert status == 1
    assert parts["values"]["status"] == parts["memcheck"]["status"] == "failed"
    assert parts["build"]["status"] == parts["bench-loss"]["status"] == "ok"


def test_a_failing_build_leaves_the_package_without_its_extension(run):
    status, _, parts = run(FAKE_BUILD="1")
    assert status == 1 and parts["build"]["status"] == "failed"
    assert {part["status"] for name, part in parts.items() if name != "build"} == {"ok"}
    assert list(parts)[:2] == ["build", "install-without-extension"]


def test_an_unsupported_sanitizer_is_not_a_failure(run):
    status, _, parts = run(FAKE_SANITIZER_STATUS="1", FAKE_SANITIZER_SAYS="Error: Device not supported")
    assert status == 0 and parts["memcheck"]["status"] == "not available"


def test_a_slow_benchmark_loses_only_its_own_figures(run):
    status, output, parts = run(FAKE_SLOW="evaluate", FASTUFT_BUDGET="9")
    assert status == 1 and parts["bench-loss"]["status"] == "ok" and parts["bench-evaluate"]["status"] != "ok"
    assert "60% matrix" in output


def test_the_budget_ends_the_suite(run):
    status, output, _ = run(FAKE_SLEEP="30", FASTUFT_BUDGET="6")
    assert status == 1 and "timed out" in output and "the time is used up" in output


def test_wheels_are_installed_first_and_an_empty_folder_is_refused(run, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    status, output, _ = run("--dry-run", FASTUFT_WHEELS=str(wheels))
    assert status == 2 and f"FASTUFT_WHEELS='{wheels}' has no wheel" in output
    (wheels / "pillow-1-py3-none-any.whl").touch()
    status, output, _ = run("--dry-run", FASTUFT_WHEELS=str(wheels))
    assert status == 0 and output.index("would run wheels") < output.index("would run build")
    assert str(wheels / "pillow-1-py3-none-any.whl") in output
