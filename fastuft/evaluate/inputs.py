"""Checks shared by all metrics: inputs become tensors, or a ValueError says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ArrayLike = np.ndarray | Tensor | Sequence[Any]

_QUOTED = 5  # values in a message before "and N more"


class UndefinedError(ValueError):
    """A metric has no value for these inputs, though others may; the message says why."""


def as_features(name: str, value: ArrayLike) -> Tensor:
    """``value`` as a finite floating tensor [N, F], N >= 1, F >= 1; half precisions become float32."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; features are [N, F] with N, F >= 1")
    if tensor.is_complex():
        raise ValueError(f"{name} is complex; features are real numbers")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    check_finite(name, tensor)
    return tensor


def check_finite(name: str, features: Tensor) -> None:
    """Raise ValueError unless all values of [N, F] are finite."""
    # The sum of finite values is finite unless it overflows: only then, or with bad values, each one is checked.
    if bool(torch.isfinite(features.sum())) or bool((finite := torch.isfinite(features).all(dim=1)).all()):
        return
    bad = (~finite).nonzero().flatten()
    raise ValueError(
        f"{name} has NaN or infinity in {len(bad)} of {len(features)} rows (first: row {int(bad[0])}); "
        "check the checkpoint and the images, or leave these rows out"
    )


def as_labels(name: str, value: ArrayLike, length: int | None = None) -> np.ndarray:
    """``value`` as a NumPy vector of integers, strings or booleans, with ``length`` entries if that is given."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} has shape {array.shape}; labels are a vector with at least one entry")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and (array == np.floor(array)).all()):
            raise ValueError(f"{name} has numbers that are not integers; labels are integers or strings")
        array = array.astype(np.int64)
    if array.dtype.kind not in "iubUS":
        raise ValueError(f"{name} has dtype {array.dtype}; labels are integers or strings")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries but there are {length} feature rows; they must agree")
    return array


def check_varied(name: str, features: Tensor) -> None:
    """Raise unless the directions of the rows [N, F] differ: neighbors and clusters of equal rows are ties.

    Raises:
        UndefinedError: all rows have the same direction, up to rounding.
    """
    unit = F.normalize(features, dim=1)
    if len(unit) > 1 and bool((unit - unit[0]).abs().max() < 1e-5):
        raise UndefinedError(
            f"{name}: the features of all {len(unit)} images are the same, so the network has collapsed"
        )


def quoted(values: Sequence[object]) -> str:
    """At most five values for an error message."""
    shown = ", ".join(repr(v.item() if isinstance(v, np.generic) else v) for v in values[:_QUOTED])
    return shown + (f" and {len(values) - _QUOTED} more" if len(values) > _QUOTED else "")


def check_seen(train_labels: np.ndarray, test_labels: np.ndarray) -> None:
    """Raise unless the training labels have at least two classes and include every test class."""
    classes = np.unique(train_labels)
    if len(classes) < 2:
        raise ValueError(
            f"the training labels have only one class ({quoted(list(classes))}); a labeled metric needs at least two"
        )
    unseen = np.setdiff1d(test_labels, classes)
    if len(unseen):
        raise ValueError(
            f"test classes without training examples: {quoted(list(unseen))}; "
            "add training examples of them, or leave them out of the test set"
        )
