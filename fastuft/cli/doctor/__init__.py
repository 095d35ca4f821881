"""What this machine has for fastuft, what is missing, and the remedy for each: a file of checks per subject."""

from fastuft.cli.doctor.examination import examine, print_findings
from fastuft.cli.doctor.finding import Finding

__all__ = ["Finding", "examine", "print_findings"]
