"""The command line.

``fastuft finetune | pretrain | eval | report | export | verify-data | bench | demo | doctor``
"""

from fastuft.cli.main import main

__all__ = ["main"]
