"""Nearest neighbors by cosine similarity, and the paper's retrieval accuracy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastuft.evaluate.inputs import ArrayLike, UndefinedError, as_features, as_labels, check_seen, check_varied

# Similarities held at once: 2^26 float32 values are 256 MiB.
BLOCK_VALUES = 1 << 26


def nearest_neighbors(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int = 5,
    *,
    own: ArrayLike | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` gallery rows with the highest cosine similarity to each query, best first; exact.

    Args:
        queries: [Q, F].
        gallery: [N, F].
        k: neighbors, 1 <= k <= N (N - 1 with ``own``).
        own: the gallery row that is the query itself and is excluded, [Q]; None if queries are not gallery rows.
        device: the device to compute on; None takes that of the queries.

    Returns:
        similarities [Q, k] float and indices [Q, k] int64, on the CPU.

    Raises:
        ValueError: shapes disagree, or features are not finite.
        UndefinedError: the gallery has too few rows for ``k`` neighbors.
    """
    q, g = as_features("queries", queries), as_features("gallery", gallery)
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"queries have {q.shape[1]} features and the gallery has {g.shape[1]}; they must agree")
    selves = None if own is None else torch.from_numpy(as_labels("own", own, len(q)).astype(np.int64))
    if selves is not None and not 0 <= int(selves.min()) <= int(selves.max()) < len(g):
        raise ValueError(f"own has rows outside the gallery; allowed: 0 to {len(g) - 1}")
    others = len(g) - (selves is not None)
    if k < 1:
        raise ValueError(f"k={k!r} is out of range; at least 1 neighbor is needed")
    if k > others:
        raise UndefinedError(f"it needs the {k} nearest neighbors, but there are only {others} images to choose from")
    where = torch.device(device) if device is not None else q.device
    dtype = torch.promote_types(q.dtype, g.dtype)
    q, g = (F.normalize(x.to(where, dtype), dim=1) for x in (q, g))
    rows = max(1, BLOCK_VALUES // len(g))
    best = [(block @ g.T).topk(k + (selves is not None), dim=1) for block in q.split(rows)]
    values, indices = (torch.cat([b[i] for b in best]).cpu() for i in (0, 1))
    if selves is not None:
        # A duplicate image may push the query itself out of the first rank, or out of the list altogether.
        other = indices != selves[:, None]
        other[other.all(dim=1), -1] = False
        values, indices = values[other].view(-1, k), indices[other].view(-1, k)
    return values, indices


def retrieval_accuracy(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    k: int = 5,
    *,
    device: torch.device | str | None = None,
) -> float:
    """Mean over test items of the share of their ``k`` nearest training items (by cosine) that have their label.

    Args:
        train_x: features [N, F]: NumPy array, tensor or nested sequence.
        train_y: labels [N], integers or strings.
        test_x: features [Q, F].
        test_y: labels [Q]; every class must occur in ``train_y``.
        k: neighbors (5 in the paper).
        device: see :func:`nearest_neighbors`.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: shapes disagree, features are not finite, there is only one class, or a test class is not in training.
        UndefinedError: there are fewer training items than neighbors, or their features are all the same.
    """
    train, test = as_features("train_x", train_x), as_features("test_x", test_x)
    gallery_labels = as_labels("train_y", train_y, len(train))
    query_labels = as_labels("test_y", test_y, len(test))
    check_seen(gallery_labels, query_labels)
    check_varied("train_x", train)
    _, neighbors = nearest_neighbors(test, train, k, device=device)
    return float((gallery_labels[neighbors.numpy()] == query_labels[:, None]).mean())
