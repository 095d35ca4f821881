"""Embeddings as files: ``.npz`` for NumPy, ``.parquet`` for tables."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastuft.atomic import whole_file
from fastuft.names import printable

ENDINGS = (".npz", ".parquet")
_SETTINGS = b"fastuft"  # key of the table's metadata


@dataclass(frozen=True)
class Embeddings:
    """Features of images.

    Args:
        features: features as the network returns them, float32 [N, D], not normalized.
        paths: absolute paths of the images.
        settings: the checkpoint and its preprocessing.
        bad_files: why files were left out, by name.
    """

    features: np.ndarray
    paths: tuple[str, ...]
    settings: dict[str, Any]
    bad_files: dict[str, str] = field(default_factory=dict)


def check_out(out: str, option: str = "out") -> None:
    """Check early that a file, the value of ``option``, can be written or read.

    Raises:
        ValueError: the suffix is wrong, or a table needs pyarrow.
    """
    ending = Path(out).suffix
    if ending not in ENDINGS:
        raise ValueError(f"{option}={out!r} ends in {ending or 'nothing'}; allowed: {', '.join(ENDINGS)}")
    if ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{option}={out!r} needs pyarrow: pip install 'fastuft[parquet]', or use .npz")


def write_embeddings(out: str, embeddings: Embeddings) -> None:
    """Write a file whole: arrays ``features``, ``paths`` and ``settings`` (text), or columns ``path`` and ``features``.

    Raises:
        ValueError: the suffix is wrong, or a table needs pyarrow or has names that are not UTF-8.
        OSError: the file could not be written.
    """
    check_out(out)
    file = Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(embeddings.settings)
    with whole_file(file) as partial:
        if file.suffix == ".parquet":
            _write_table(partial, embeddings, settings)
            return
        with partial.open("wb") as stream:
            np.savez(
                stream, features=embeddings.features, paths=np.array(embeddings.paths), settings=np.array(settings)
            )


def _write_table(file: Path, embeddings: Embeddings, settings: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        "".join(embeddings.paths).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a table cannot have names that are not UTF-8; write .npz") from error
    count, width = embeddings.features.shape
    values = pa.array(np.ascontiguousarray(embeddings.features).reshape(count * width))
    table = pa.table(
        {"path": pa.array(embeddings.paths, pa.string()), "features": pa.FixedSizeListArray.from_arrays(values, width)}
    )
    pq.write_table(table.replace_schema_metadata({_SETTINGS: settings.encode()}), file)


def read_embeddings(path: str) -> Embeddings:
    """Read what :func:`write_embeddings` wrote.

    Raises:
        ValueError: the file is of another kind, or damaged.
        OSError: it cannot be read.
    """
    check_out(path, "in")
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(f"{printable(path)} is not a file; name one that `fastuft embed` wrote")
    try:
        features, paths, settings = _read_table(path) if path.endswith(".parquet") else _read_arrays(path)
        values = json.loads(settings)
        fits = features.dtype == np.float32 and features.ndim == 2 and len(features) == len(paths) > 0
        if not fits or not isinstance(values, dict) or not np.isfinite(features).all():
            raise ValueError("features, paths and settings do not fit together")
    except OSError:
        raise
    except Exception as error:  # whatever a reader raises for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{printable(path)} does not have embeddings ({reason}); write it with `fastuft embed`"
        ) from error
    return Embeddings(features, tuple(paths), values)


def _read_arrays(path: str) -> tuple[np.ndarray, list[str], str]:
    with np.load(path, allow_pickle=False) as file:
        return file["features"], file["paths"].tolist(), str(file["settings"])


def _read_table(path: str) -> tuple[np.ndarray, list[str], str]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    column = table["features"].combine_chunks()
    features = column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return features, table["path"].to_pylist(), table.schema.metadata[_SETTINGS].decode()
