"""What can be measured without labels: neighbors, alignment and uniformity, drift of the representation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastuft.evaluate.inputs import ArrayLike, as_features
from fastuft.evaluate.retrieval import nearest_neighbors
from fastuft.randomness import keyed_generator


def _paired(first: str, x: ArrayLike, second: str, y: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = as_features(first, x), as_features(second, y)
    if len(a) != len(b):
        raise ValueError(f"{first} has {len(a)} rows and {second} has {len(b)}; row i of both must be the same image")
    return a, b.to(a.device)


def alignment(first: ArrayLike, second: ArrayLike, power: float = 2.0) -> float:
    """Mean of |x - y|^power over unit features of two views of each image (Wang and Isola 2020); 0 is perfect."""
    a, b = _paired("first", first, "second", second)
    distance = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1)
    return float(distance.pow(power).double().mean())


def uniformity(features: ArrayLike, t: float = 2.0, *, most: int = 4096, seed: int = 0) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of unit features (Wang and Isola 2020); lower is more uniform.

    Over all pairs of at most ``most`` rows drawn with ``seed``.
    """
    x = as_features("features", features)
    if len(x) < 2:
        raise ValueError("uniformity needs at least two rows, got 1")
    if len(x) > most:
        x = x[torch.as_tensor(keyed_generator(seed, "uniformity").permutation(len(x))[:most], device=x.device)]
    unit = F.normalize(x.double(), dim=1)
    exponent = (unit @ unit.T).sub_(1.0).mul_(2.0 * t).fill_diagonal_(-math.inf)  # |x - y|^2 = 2 - 2 x.y
    return float(torch.logsumexp(exponent.flatten(), dim=0)) - math.log(len(x) * (len(x) - 1))


def alignment_uniformity(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Alignment of two views [N, F] each, and uniformity of the first."""
    return {"alignment": alignment(first, second), "uniformity": uniformity(first, seed=seed)}


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Linear centered kernel alignment of two representations of the same images (Kornblith et al. 2019).

    |Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F); 1 up to rotation and scale, 0 for unrelated. x: [N, F], y: [N, G].
    """
    a, b = _paired("x", x, "y", y)
    a, b = (v.double() - v.double().mean(0) for v in (a, b))
    scale = float((a.T @ a).norm() * (b.T @ b).norm())
    if scale == 0:
        raise ValueError("linear_cka needs features that vary over the images; one representation is constant")
    return float((b.T @ a).norm().square()) / scale


def drift(before: ArrayLike, after: ArrayLike) -> dict[str, float]:
    """How far the features of the same images moved: mean cosine (same width only) and linear CKA."""
    a, b = _paired("before", before, "after", after)
    result = {"linear_cka": linear_cka(a, b)}
    if a.shape[1] == b.shape[1]:
        result["mean_cosine"] = float(F.cosine_similarity(a, b, dim=1).double().mean())
    return result


def neighbor_overlap(before: ArrayLike, after: ArrayLike, k: int = 5) -> float:
    """Mean share of each item's ``k`` nearest other items that stay the same; 1 when neighborhoods are unchanged."""
    a, b = _paired("before", before, "after", after)
    old, new = (nearest_neighbors(x, x, k, exclude_self=True)[1] for x in (a, b))
    return float((old[:, :, None] == new[:, None, :]).any(dim=2).double().mean())
