"""Whether a checkpoint's tensors fit a network, and the messages where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fastuft.model.checkpoint.conversion import Pixels
from fastuft.model.checkpoint.matching import Match, surplus
from fastuft.model.checkpoint.reading import shown

_LISTED = 12  # names shown in an error before "and N more"


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown(name) for name in names[:_LISTED]) + more


def chosen(matches: Sequence[Match], wanted: Mapping[str, Tensor], key: str | None, file: str) -> Match:
    """The match to load: the best one, or the best one that ``key`` names.

    Raises:
        ValueError: nothing in the file matches the backbone, or nothing with this key does.
    """
    named = [match for match in matches if key is None or match.named(key)]
    if named:
        return named[0]
    whole = dict.fromkeys(match.shown_prefix or "(no prefix)" for match in matches if match.is_whole(wanted))
    if key is not None and matches:
        available = ", ".join(whole) or matches[0].shown_prefix or "(no prefix)"
        raise ValueError(f"init_key={key!r} is not a backbone in {file!r}; available: {available}")
    raise ValueError(
        f"checkpoint {file!r} has none of the network's tensors, so it is for another kind of network. Choose the model.arch "
        "of the checkpoint"
    )


def check_usable(name: str, tensor: Tensor, wanted: Tensor, file: str) -> None:
    """Refuse tensors that would load silently and give wrong results."""
    fault = None
    if tensor.is_meta:
        fault = "has no data (it is on torch's meta device); save the checkpoint from the loaded network"
    elif tensor.is_quantized or (wanted.is_floating_point() and not tensor.is_floating_point()):
        fault = f"is {str(tensor.dtype).removeprefix('torch.')}, quantized or integer; save it dequantized"
    elif tensor.layout != torch.strided:
        fault = f"is stored as {str(tensor.layout).removeprefix('torch.')}; save it dense"
    elif tensor.is_floating_point() and not tensor.float().isfinite().all():
        fault = "has NaN or infinity, so its training had diverged; use an earlier checkpoint"
    if fault:
        raise ValueError(f"checkpoint {file!r}: {shown(name)} {fault}")


def _first_convolution(wanted: Mapping[str, Tensor]) -> str | None:
    return next((name for name, value in wanted.items() if value.ndim == 4 and value.shape[1] == 3), None)


def with_pixels(match: Match, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], pixels: Pixels) -> Match:
    """The match with its first convolution converted to RGB images on this package's scale."""
    name = _first_convolution(wanted)
    if pixels == Pixels() or name is None or name not in match.files:
        return match
    weight = pixels.converted(match.layout.join(name, [tensors[file] for file in match.files[name]]).float())
    if weight.shape != wanted[name].shape:
        return match
    misfits = {other: shape for other, shape in match.misfits.items() if other != name}
    return dataclasses.replace(match, values={**match.values, name: weight}, misfits=misfits)


def check_complete(match: Match, wanted: Mapping[str, Tensor], allow_missing: Sequence[str], file: str) -> None:
    def allowed(name: str) -> bool:
        return name.endswith("num_batches_tracked") or any(fnmatchcase(name, pattern) for pattern in allow_missing)

    refused = [name for name in wanted if name not in match.files and not allowed(name)]
    for name, shape in match.misfits.items():
        if not allowed(name):
            refused.append(f"{name} (file {shape}, network {tuple(wanted[name].shape)})")
    first = _first_convolution(wanted)
    gray = first in match.misfits and match.misfits[first][1:2] == (1,)
    if refused:
        remedy = (
            "The file's first convolution takes gray images; --init_channels gray converts it to RGB."
            if gray
            else "Choose the model.arch and model.stem of the checkpoint, or allow tensors to be missing with "
            "--allow_missing PATTERN."
        )
        raise ValueError(
            f"checkpoint {file!r} does not fit the network: {len(refused)} of {len(wanted)} backbone tensors have no "
            f"counterpart with the same name and shape: {_listed(refused)}. Closest layout: {match.layout.name} names under "
            f"prefix {match.shown_prefix!r}. {remedy}"
        )


def check_no_surplus(match: Match, tensors: Mapping[str, Tensor], arch: str, file: str) -> None:
    """Raise ValueError if the file has more layers of the kind than the network."""
    more = surplus(match, tensors)
    if more:
        raise ValueError(
            f"checkpoint {file!r} has a larger network than {arch}: {len(more)} more tensors of such layers, "
            f"{_listed(more)}. Choose the model.arch of the checkpoint"
        )
