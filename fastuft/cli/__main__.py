"""``python -m fastuft.cli``, for torchrun: ``torchrun --nproc-per-node 8 -m fastuft.cli finetune ...``."""

import sys

from fastuft.cli.main import main

sys.exit(main())
