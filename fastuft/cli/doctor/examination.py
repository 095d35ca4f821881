"""All of the doctor's checks, and how their findings are shown."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict

from fastuft.cli.doctor import environment
from fastuft.cli.doctor.extension import check_extension
from fastuft.cli.doctor.finding import Finding
from fastuft.cli.doctor.machine import check_kernels, check_torch, check_triton
from fastuft.cli.doctor.packages import check_apex, check_dali, check_packages
from fastuft.console import say
from fastuft.version import VERSION


def examine() -> list[Finding]:
    """All findings, in order."""
    torch = environment.load_torch()
    ours = Finding("fastuft", "ok", f"{VERSION}, Python {platform.python_version()}")
    return [
        ours,
        *check_torch(torch),
        *check_triton(torch),
        *check_extension(torch),
        *check_kernels(torch),
        *check_dali(torch),
        *check_apex(),
        *check_packages(),
    ]


def print_findings(*, as_json: bool = False) -> int:
    """Print the findings; status 1 if a required part is missing or a present one cannot work."""
    findings = examine()
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        widths = [max(len(getattr(f, name)) for f in findings) for name in ("part", "state", "found")]
        for f in findings:
            cells = (f.part.ljust(widths[0]), f.state.ljust(widths[1]), f.found.ljust(widths[2]))
            say("  ".join([*cells, f.remedy]).rstrip())
    return int(any(finding.state == "problem" for finding in findings))
