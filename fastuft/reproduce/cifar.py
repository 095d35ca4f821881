"""Reads the files of ``cifar-100-python``, which are pickles, without running any code that they name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# The errors that reading a damaged pickle may raise.
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
)
_REMEDY = "download cifar-100-python.tar.gz again"


def _array_from_pickle(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, dtype=dtype).reshape(shape)


class _InertArray:
    """Stands in for a NumPy array while its pickle is read; keeps the state and runs no code."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin-1") if isinstance(data, str) else data
        if fortran:
            self.array = _array_from_pickle(raw, np.dtype(dtype.code), shape[::-1]).T
        else:
            self.array = _array_from_pickle(raw, np.dtype(dtype.code), shape)


class _InertDtype:
    """Stands in for a NumPy dtype; keeps its code (only unsigned bytes and integers are accepted)."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        if self.code not in ("u1", "i4", "i8"):
            raise pickle.UnpicklingError(f"dtype {self.code!r} is not expected in CIFAR-100")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


class _CifarUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and byte arrays; every global resolves to an inert class."""

    _STAND_INS: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _InertArray,
        ("numpy._core.multiarray", "_reconstruct"): _InertArray,
        ("numpy", "ndarray"): _InertArray,
        ("numpy", "dtype"): _InertDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin-1")
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"refusing to load {module}.{name}; a CIFAR-100 file does not need it")
        return self._STAND_INS[module, name]


def read_cifar_pickle(path: Path) -> dict[str, Any]:
    """One file of ``cifar-100-python`` as a dict of lists and arrays, without running any code that it names."""
    try:
        raw = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="latin-1").load()
    except _BROKEN as error:
        raise ValueError(f"{path} is not a CIFAR-100 file: {error}; {_REMEDY}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a CIFAR-100 file: it has a {type(raw).__name__}, not a dict; {_REMEDY}")
    entries = ((key.decode() if isinstance(key, bytes) else key, value) for key, value in raw.items())
    return {key: value.array if isinstance(value, _InertArray) else value for key, value in entries}


def read_cifar_names(path: Path) -> list[str]:
    """The class names of ``meta``, by label."""
    names = read_cifar_pickle(path).get("fine_label_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no list of fine_label_names; {_REMEDY} (CIFAR-10 is another data set)")
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names a class twice; {_REMEDY}")
    return names


def read_cifar_images(path: Path, classes: int) -> tuple[np.ndarray, list[int]]:
    """The images uint8 [n, 32, 32, 3] of ``train`` or ``test``, and their labels in 0..classes-1."""
    content = read_cifar_pickle(path)
    data, labels = content.get("data"), content.get("fine_labels")
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise ValueError(f"{path} has no fine_labels from 0 to {classes - 1}; {_REMEDY} (CIFAR-10 is another data set)")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path} has {found} as data, expected {len(labels)} rows of 3072 bytes; {_REMEDY}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
