"""Checkpoint files as plain tensors by name: safetensors, torch archives, NumPy archives, folders of several files.

Nothing in a file is executed, and no array is allocated before its size is known to fit the file.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastuft.model.checkpoint.inert import inert_types
from fastuft.model.checkpoint.sniffing import FileFormat, sniff
from fastuft.names import printable
from fastuft.runfolder import damage

_DEEPEST = 16  # deepest nesting of dicts; deeper ones are taken for a loop
_LARGEST_ARCHIVE = 64 << 30  # bytes that the arrays of a NumPy archive may take together
_RATIO = 1000  # deflate shrinks an array by at most this factor; a larger claim is false
_PART = 1 << 20  # bytes of a member read at once
_SHARDS = {"model.safetensors.index.json": ".safetensors", "pytorch_model.bin.index.json": ".bin"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Content:
    """The content of a checkpoint.

    Args:
        path: the file or folder.
        tensors: tensors by name; names in nested dicts are joined by dots.
        metadata: the metadata of a safetensors file.
        settings: dicts beside the tensors that describe the network: ``model_config`` and ``init_report`` in this
            package's checkpoints, ``config`` in a transformers folder.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def shown(name: str, most: int = 100) -> str:
    """A name from a file as one line of a message, with control characters escaped and long names shortened."""
    plain = printable(name)
    return plain if len(plain) <= most else f"{plain[: most // 2]}...{plain[-most // 2 :]}"


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return shown(lines[0], 200)


def _read_safetensors(path: Path) -> Content:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = Content(path, tensors, file.metadata() or {})
    except Exception as error:  # the reader raises its own type, and Python's types for values that it cannot convert
        raise ValueError(
            f"checkpoint {str(path)!r} is a damaged safetensors file ({_reason(error)}); copy or download it again"
        ) from error
    altered = damage(path)
    if altered is not None:
        raise ValueError(f"checkpoint {altered}; copy or download it again")
    return content


def _array_header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) that a member of a NumPy archive declares."""
    import numpy as np

    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"NumPy format {version} is unknown")
        shape, _, dtype = readers[version](file)
        return shape, dtype


def _read_numpy(path: Path) -> Content:
    import numpy as np

    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > _LARGEST_ARCHIVE or total > _RATIO * max(path.stat().st_size, 1 << 20):
                raise ValueError(f"it would unpack to {total / 2**30:.0f} GiB from {path.stat().st_size} bytes")
            for member in members:
                name = member.filename.removesuffix(".npy")
                shape, dtype = _array_header(archive, member.filename)
                if dtype.kind not in "biufc":
                    left_out.append(f"{shown(name)} ({shown(str(dtype), 40)})")
                    continue
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{shown(name)} declares shape {shape} and is {member.file_size} bytes long")
                with archive.open(member) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                wide = np.float64 if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")
                tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=wide).reshape(shape))
    except Exception as error:  # zipfile, zlib and NumPy raise many types for damaged members
        raise ValueError(
            f"checkpoint {str(path)!r} is a damaged NumPy archive ({_reason(error)}); copy or download it again"
        ) from error
    if not tensors:
        raise ValueError(
            f"checkpoint {str(path)!r} is a NumPy archive without arrays of numbers; it has "
            f"{', '.join(left_out[:5]) or 'nothing'}. Arrays of Python objects are not read, because they could run code"
        )
    return Content(path, tensors)


def _objects(path: Path) -> str:
    """The types in a torch archive that are not read, for a message."""
    try:
        with inert_types():
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it only reads whole archives
        names = []
    listed = ", ".join(shown(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f" ({listed})" if names else ""


def _check_sums(path: Path) -> None:
    """Check each member of a torch archive against its checksum, which torch ignores; 0 means no checksum.

    Raises:
        BadZipFile: a member has been altered.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.CRC:
                with archive.open(member) as file:
                    while file.read(_PART):  # raises at the end
                        pass


def _read_torch(path: Path, kind: FileFormat) -> Content:
    from pickle import UnpicklingError

    try:
        if kind is FileFormat.TORCH:
            _check_sums(path)
        with inert_types():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        objects = _objects(path)
        if not objects and "nsupported operand" in str(error):
            raise ValueError(
                f"checkpoint {str(path)!r} is a damaged torch archive (an unknown instruction); copy or download it again"
            ) from error
        raise ValueError(
            f"checkpoint {str(path)!r} has Python objects beside its tensors{objects}. Nothing in a checkpoint is "
            "executed; if you trust it, save only its state_dict with torch.save or safetensors, in the program that "
            "wrote it"
        ) from error
    except Exception as error:  # torch raises many types for damaged archives
        raise ValueError(
            f"checkpoint {str(path)!r} is a damaged torch archive ({_reason(error)}); copy or download it again"
        ) from error
    settings = {}
    if isinstance(content, Mapping):
        kept = {name: content.get(name) for name in ("model_config", "init_report")}
        settings = {name: value for name, value in kept.items() if isinstance(value, Mapping)}
    return Content(path, dict(_named_tensors(content, path)), settings=settings)


def _named_tensors(content: object, path: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts; containers such as ``state_dict`` become part of their names."""
    waiting: list[tuple[str, object, int]] = [("", content, 0)]
    while waiting:
        prefix, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield prefix, value
        elif isinstance(value, Mapping):
            if depth > _DEEPEST:
                raise ValueError(
                    f"checkpoint {str(path)!r} nests dicts more than {_DEEPEST} deep at {shown(prefix)}; save only its "
                    "state_dict"
                )
            children = [(f"{prefix}.{key}" if prefix else str(key), child, depth + 1) for key, child in value.items()]
            waiting += reversed(children)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({_reason(error)}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object; copy or download it again")
    return content


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder was written by ``save_pretrained`` of transformers."""
    return path.is_dir() and (path / "config.json").is_file()


def _shards(folder: Path, index_name: str) -> list[Path]:
    index = _json(folder / index_name).get("weight_map")
    names = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
    if not names or any(name != Path(name).name or not name.endswith(_SHARDS[index_name]) for name in names):
        raise ValueError(
            f"{str(folder / index_name)!r} does not name shards beside it; copy or download the folder again"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {str(folder)!r} lacks {', '.join(shown(name) for name in missing[:5])}; download all {len(names)} "
            "files of its weights"
        )
    return [folder / name for name in names]


def _read_transformers(folder: Path) -> Content:
    """Read a transformers folder: ``config.json`` and the weights, in one or several files."""
    settings = {"config": _json(folder / "config.json")}
    if (folder / "preprocessor_config.json").is_file():
        settings["preprocessor"] = _json(folder / "preprocessor_config.json")
    single = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if single is not None:
        return Content(folder, read_checkpoint(single).tensors, settings=settings)
    index = next((name for name in _SHARDS if (folder / name).is_file()), None)
    if index is None:
        raise ValueError(
            f"checkpoint {str(folder)!r} has a config.json and no weights beside it ({', '.join((*_WEIGHTS, *_SHARDS))}); "
            "download the whole folder"
        )
    tensors: dict[str, Tensor] = {}
    for shard in _shards(folder, index):
        tensors |= read_checkpoint(shard).tensors
    return Content(folder, tensors, settings=settings)


def read_checkpoint(path: str | Path) -> Content:
    """Read a checkpoint file or a transformers folder.

    Raises:
        ValueError: it is missing, of another kind or damaged, or has objects whose loading would execute code.
    """
    path = Path(path)
    if is_transformers_folder(path):
        return _read_transformers(path)
    if not path.is_file():
        raise ValueError(
            f"checkpoint {str(path)!r} is not a file; name a checkpoint (.pth, .safetensors, .npz), a transformers folder "
            "or a run folder"
        )
    try:
        kind = sniff(path)
    except OSError as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read ({error.strerror})") from error
    if kind is FileFormat.SAFETENSORS:
        return _read_safetensors(path)
    content = _read_numpy(path) if kind is FileFormat.NUMPY else _read_torch(path, kind)
    if not content.tensors:
        raise ValueError(f"checkpoint {str(path)!r} has no tensors; name a checkpoint of a network")
    return content
