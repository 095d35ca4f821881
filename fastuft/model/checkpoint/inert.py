"""Objects beside a checkpoint's tensors: known harmless types are read as stand-ins, so that no code runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


class Opaque:
    """Stands in for an object whose value is not needed; its content is dropped."""

    def __new__(cls, *_: object, **__: object) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PlainDict:
    """Stands in for a kind of dict, so that tensors inside are found."""

    def __new__(cls, *_: object) -> dict[object, object]:  # type: ignore[misc]  # the unpickler fills exact dicts only
        return {}


class _PlainList:
    """Stands in for a kind of list, so that tensors inside are found."""

    def __new__(cls, *_: object) -> list[object]:  # type: ignore[misc]
        return []


_PYTHON = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "slice", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "typing.Any",
)
_NUMPY = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{name}" for name in ("bool_", "float16", "float32", "float64", "int32", "int64", "str_", "uint8")),
    *(
        f"numpy.dtypes.{name}DType"
        for name in (
            "Bool",
            "Float16",
            "Float32",
            "Float64",
            "Int8",
            "Int16",
            "Int32",
            "Int64",
            "UInt8",
            "Object",
            "Str",
        )
    ),
    # The modules of arrays and scalars in NumPy 1 and 2.
    *(f"{core}.multiarray.{name}" for core in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")),
)
# Settings and counters that other programs leave in their checkpoints.
_PROGRAMS = (
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")),
    "mmengine.logging.history_buffer.HistoryBuffer",
)
_DICTS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def inert_types() -> AbstractContextManager[None]:
    """A context in which ``torch.load(weights_only=True)`` reads objects of these types as stand-ins."""
    allowed: list[Any] = [(Opaque, name) for name in (*_PYTHON, *_NUMPY, *_PROGRAMS)]
    allowed += [(_PlainDict, name) for name in _DICTS]
    allowed += [(_PlainList, "collections.deque")]
    return torch.serialization.safe_globals(allowed)
