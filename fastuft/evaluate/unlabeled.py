"""Measures that need no labels: neighbors, alignment, uniformity, rank, and drift of the representation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastuft.evaluate.inputs import ArrayLike, UndefinedError, as_features, check_varied
from fastuft.evaluate.retrieval import nearest_neighbors
from fastuft.randomness import keyed_generator

# Share of the features' squared norm below which their variation is rounding: (1e-6)^2 in float32.
_ROUNDING = 1e-12


def _paired(first: str, x: ArrayLike, second: str, y: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = as_features(first, x), as_features(second, y)
    if len(a) != len(b):
        raise ValueError(f"{first} has {len(a)} rows and {second} has {len(b)}; row i of both must be the same image")
    return a, b.to(a.device)


def alignment(first: ArrayLike, second: ArrayLike, power: float = 2.0) -> float:
    """Mean of ``|x - y|^power`` over unit features [N, F] of two views of each image (Wang and Isola 2020); 0 is perfect."""
    a, b = _paired("first", first, "second", second)
    distance = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1)
    return float(distance.pow(power).double().mean())


def uniformity(features: ArrayLike, t: float = 2.0, *, most: int = 4096, seed: int = 0) -> float:
    """log of the mean of ``exp(-t |x - y|^2)`` over pairs of unit features (Wang and Isola 2020); lower is more uniform.

    The pairs are all those of at most ``most`` rows of [N, F], drawn with ``seed``.

    Raises:
        UndefinedError: there are fewer than two rows.
    """
    x = as_features("features", features)
    if len(x) < 2:
        raise UndefinedError("uniformity needs pairs of images, but there is only one image")
    if len(x) > most:
        x = x[torch.as_tensor(keyed_generator(seed, "uniformity").permutation(len(x))[:most], device=x.device)]
    unit = F.normalize(x.double(), dim=1)
    exponent = (unit @ unit.T).sub_(1.0).mul_(2.0 * t).fill_diagonal_(-math.inf)  # |x - y|^2 = 2 - 2 x.y
    return float(torch.logsumexp(exponent.flatten(), dim=0)) - math.log(len(x) * (len(x) - 1))


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Linear centered kernel alignment of two representations of the same images (Kornblith et al. 2019).

    ``|Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F)``; 1 up to rotation and scale, 0 for unrelated. x: [N, F], y: [N, G].

    Raises:
        UndefinedError: one of them is constant over the images.
    """
    pair = _paired("x", x, "y", y)
    a, b = (v.double() - v.double().mean(0) for v in pair)
    scales = [float((v.T @ v).norm()) for v in (a, b)]
    for scale, given in zip(scales, pair, strict=True):
        if scale <= _ROUNDING * float(given.double().square().sum()):
            raise UndefinedError("linear CKA compares how features vary over the images, but one set is constant")
    return float((b.T @ a).norm().square()) / math.prod(scales)


def mean_cosine(before: ArrayLike, after: ArrayLike) -> float:
    """Mean cosine between the features of the same images; 1 if no features changed. Both [N, F].

    Raises:
        UndefinedError: their widths differ.
    """
    a, b = _paired("before", before, "after", after)
    if a.shape[1] != b.shape[1]:
        raise UndefinedError(f"the widths of the features differ ({a.shape[1]} before, {b.shape[1]} after)")
    return float(F.cosine_similarity(a, b, dim=1).double().mean())


def neighbor_overlap(before: ArrayLike, after: ArrayLike, k: int = 5) -> float:
    """Mean share of each item's ``k`` nearest other items that stay the same; 1 if none changes. Both [N, F]."""
    a, b = _paired("before", before, "after", after)
    check_varied("before", a)
    check_varied("after", b)
    rows = torch.arange(len(a))
    old, new = (nearest_neighbors(x, x, k, own=rows)[1] for x in (a, b))
    return float((old[:, :, None] == new[:, None, :]).any(dim=2).double().mean())


def view_agreement(first: ArrayLike, second: ArrayLike, k: int = 5) -> float:
    """Mean share of an image's ``k`` nearest other images that its two views agree on; both [N, F].

    First views have their neighbors among the first views, second views among the second. It is 1 if augmentation moves no
    image out of its neighborhood. Training that makes views agree raises it by itself.
    """
    return neighbor_overlap(first, second, k)


def effective_rank(features: ArrayLike) -> float:
    """RankMe (Garrido et al. 2023, Eq. 1): exp of the entropy of the normalized singular values of [N, F].

    It ranges from 1 (all features on one line: collapse) to min(N, F) (all directions equal). It depends on N, so compare
    samples of equal size.
    """
    x = as_features("features", features).double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return _entropy_rank("features", torch.linalg.eigvalsh(gram).clamp(min=0).sqrt())


def lidar(first: ArrayLike, second: ArrayLike, *, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2023, Eq. 5) of two views of each image, both [N, F].

    The effective rank of the linear discriminant matrix W^(-1/2) B W^(-1/2), where B is the covariance of the images'
    means and W that of views around their image's mean, plus ``delta`` times the identity. It counts the directions that
    distinguish images beyond what augmentation varies. The features are first scaled to unit mean square, so ``delta`` means
    the same for every network.

    Raises:
        UndefinedError: the features are constant over the images.
    """
    a, b = _paired("first", first, "second", second)
    views = torch.stack([a, b]).double()  # [2, N, F]
    views = views - views.mean((0, 1))
    scale = views.square().mean().sqrt()
    if float(scale) == 0:
        raise UndefinedError("LiDAR compares how features vary over the images, but they are constant")
    means = views.mean(0) / scale
    within = (views[0] - views[1]).div(2 * scale)  # the same for both views, up to the sign
    means, within = _in_their_span(torch.cat([means, within])).chunk(2)
    between, noise = (x.T @ x / len(x) for x in (means, within))
    values, vectors = torch.linalg.eigh(noise)
    whitening = vectors / (values.clamp(min=0) + delta).sqrt()
    return _entropy_rank("features", torch.linalg.eigvalsh(whitening.T @ between @ whitening).clamp(min=0))


def _in_their_span(rows: torch.Tensor) -> torch.Tensor:
    """Coordinates [M, R] of rows [M, F] in an orthonormal basis of their span, R <= min(M, F)."""
    if len(rows) >= rows.shape[1]:
        return rows
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > values[-1] * 1e-12
    found: torch.Tensor = vectors[:, kept] * values[kept].sqrt()
    return found


def _entropy_rank(name: str, spectrum: torch.Tensor) -> float:
    total = float(spectrum.sum())
    if total <= 0:
        raise UndefinedError(f"{name} are all zero, so they have no rank")
    shares = spectrum / total
    return float(torch.special.entr(shares).sum().exp())
