"""The command line.

``fastuft finetune | pretrain | eval | embed | search | reproduce | report | export | verify-data | bench | demo | doctor``
"""

from fastuft.cli.main import configured, main

__all__ = ["configured", "main"]
