"""Nearest neighbors by cosine similarity, and the paper's retrieval accuracy."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastuft.evaluate.inputs import ArrayLike, as_features, as_labels, check_seen

Backend = Literal["auto", "faiss", "torch"]

# Similarities held at once: 2^26 float32 values are 256 MiB.
BLOCK_VALUES = 1 << 26


def nearest_neighbors(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int = 5,
    *,
    exclude_self: bool = False,
    backend: Backend = "auto",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` gallery rows of highest cosine similarity for each query, best first; exact.

    Args:
        queries: [Q, F].
        gallery: [N, F].
        k: neighbors, 1 <= k <= N (N - 1 with ``exclude_self``).
        exclude_self: queries are the gallery's own first Q rows, and none may find itself.
        backend: torch (blocked matmul and top-k; never a [Q, N] tensor), faiss (flat inner-product index, where it is
            installed), or auto: torch, whose matrix product took a quarter of the time of faiss's on a CPU.
        device: where to compute; None stays with the queries.

    Returns:
        similarities [Q, k] float and indices [Q, k] int64, on the CPU.
    """
    q, g = as_features("queries", queries), as_features("gallery", gallery)
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"queries have {q.shape[1]} features and the gallery has {g.shape[1]}; they must agree")
    if exclude_self and len(q) > len(g):
        raise ValueError(f"exclude_self needs queries to be gallery rows, but there are {len(q)} for {len(g)} rows")
    most = len(g) - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"k={k!r} is out of range; allowed: 1 to {most}, the number of gallery rows to choose from")
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"backend={backend!r} is not allowed; choose one of 'auto', 'faiss', 'torch'")
    where = torch.device(device) if device is not None else q.device
    dtype = torch.promote_types(q.dtype, g.dtype)
    q, g = (F.normalize(x.to(where, dtype), dim=1) for x in (q, g))
    found = k + exclude_self
    if backend == "faiss":
        import faiss  # optional dependency

        index = faiss.IndexFlatIP(g.shape[1])
        index.add(g.cpu().float().numpy())
        values, indices = (torch.from_numpy(x) for x in index.search(q.cpu().float().numpy(), found))
    else:
        rows = max(1, BLOCK_VALUES // len(g))
        best = [(block @ g.T).topk(found, dim=1) for block in q.split(rows)]
        values, indices = (torch.cat([b[i] for b in best]).cpu() for i in (0, 1))
    if exclude_self:
        # A duplicate image may push the query itself beyond the first place, or out of the list altogether.
        other = indices != torch.arange(len(q))[:, None]
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
    backend: Backend = "auto",
    device: torch.device | str | None = None,
) -> float:
    """Mean over test items of the share of their ``k`` nearest training items (cosine) with their label.

    Args:
        train_x: features [N, F]: NumPy array, tensor or nested sequence.
        train_y: labels [N], integers or strings.
        test_x: features [Q, F].
        test_y: labels [Q]; every class must occur in ``train_y``.
        k: neighbors (the paper takes 5).
        backend: see :func:`nearest_neighbors`.
        device: see :func:`nearest_neighbors`.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: shapes disagree, features are not finite, one class only, a test class absent from training.
    """
    train, test = as_features("train_x", train_x), as_features("test_x", test_x)
    gallery_labels = as_labels("train_y", train_y, len(train))
    query_labels = as_labels("test_y", test_y, len(test))
    check_seen(gallery_labels, query_labels)
    _, neighbors = nearest_neighbors(test, train, k, backend=backend, device=device)
    return float((gallery_labels[neighbors.numpy()] == query_labels[:, None]).mean())
