"""Doctor's look at the fused kernels on the chip, in a process of its own: one that crashes takes only itself along."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

COMMAND = (sys.executable, "-m", "fastuft.trainer.kernel_check")


def wrong_kernels(command: Sequence[str] = COMMAND, *, timeout: float = 300.0) -> list[tuple[str, str]]:
    """(what, why) of every fused kernel that this machine's GPU cannot use; empty where all are right.

    Args:
        command: prints verdicts as JSON.
        timeout: seconds after which it counts as hung.
    """
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return [("fused kernels", f"the check hung for {timeout:g} seconds")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        return [("fused kernels", f"the check ended with status {done.returncode}: {last}")]
    return [
        (f"{verdict['kernel']} on {verdict['chip']}", verdict["reason"])
        for verdict in json.loads(done.stdout)
        if verdict["reason"]
    ]
