"""Counter-based random numbers: every draw is a pure function of (seed, purpose, position).

Nothing here has state, so results depend on neither the number of ranks, threads or workers nor on restarts.
"""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_generator(seed: int, *key: int | str) -> np.random.Generator:
    """A NumPy generator (Philox) for one purpose, e.g. ``keyed_generator(seed, "order", epoch)``.

    Args:
        seed: the run's seed, any Python integer.
        key: integers and strings that name the purpose; equal keys give equal streams, different keys independent ones.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (int(seed), *key))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def keyed_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed for generators of other libraries, e.g. ``torch.Generator().manual_seed``."""
    return int(keyed_generator(seed, *key).integers(0, 2**63 - 1))
