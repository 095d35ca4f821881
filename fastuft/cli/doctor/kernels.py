"""The doctor's check of the fused kernels on the GPU, in a separate process, so that a crash stops nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

COMMAND = (sys.executable, "-m", "fastuft.trainer.kernel_check")


def wrong_kernels(command: Sequence[str] = COMMAND, *, timeout: float = 300.0) -> list[tuple[str, str]]:
    """(kernel, reason) for every fused kernel that this machine's GPU cannot use; empty if all are right.

    Args:
        command: a program that prints verdicts as JSON.
        timeout: seconds after which the check counts as hung.
    """
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return [("fused kernels", f"the check hung for {timeout:g} seconds")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        return [("fused kernels", f"the check exited with status {done.returncode}: {last}")]
    return [
        (f"{verdict['kernel']} on {verdict['chip']}", verdict["reason"])
        for verdict in json.loads(done.stdout)
        if verdict["reason"]
    ]
