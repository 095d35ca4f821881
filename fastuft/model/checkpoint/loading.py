"""Loading a checkpoint into a backbone, or building the backbone that a checkpoint describes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastuft.model.backbone import Backbone, Stem, Traits
from fastuft.model.checkpoint.conversion import Channels, Pixels, detectron2_settings, saved_traits, traits_from
from fastuft.model.checkpoint.matching import Match, find_matches, surplus
from fastuft.model.checkpoint.reading import Content, is_transformers_folder, read_checkpoint, shown
from fastuft.model.checkpoint.resnet_layouts import DETECTRON2
from fastuft.model.checkpoint.transformers_folder import network_of
from fastuft.model.moco import Encoder, MoCo
from fastuft.model.networks import build_backbone
from fastuft.model.timm_network import TimmBackbone
from fastuft.runfolder import RunFolder

METADATA_KEY = "fastuft"
_LISTED = 12  # names shown in an error before "and N more"


@dataclass(frozen=True)
class InitReport:
    """The report on a checkpoint's tensors.

    Args:
        path: the file.
        layout: layout and prefix under which the backbone was found.
        matched: backbone tensors that were loaded.
        missing: backbone tensors that the file lacks (allowed by pattern, or BatchNorm's counters).
        ignored: tensors in the file that were not used.
        head_loaded: whether the projection head came from the file too; None if there is no head.
        others: prefixes of other whole backbones in the file.
        traits: traits that the network adopted, as plain values.
        channels: channels that the file's first convolution expects.
    """

    path: str
    layout: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    head_loaded: bool | None = None
    others: tuple[str, ...] = ()
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channels: Channels = "rgb"

    def __str__(self) -> str:
        head = "" if self.head_loaded is None else ", head loaded" if self.head_loaded else ", fresh head"
        others = f"; --init_key can choose {', '.join(self.others)}" if self.others else ""
        return (
            f"{self.path}: {self.layout}; {len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.ignored)} ignored{head}{others}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown(name) for name in names[:_LISTED]) + more


# Names of the heads in known layouts, relative to the encoder that contains the backbone.
_HEADS = (("fc.0.", "fc.2."), ("head.0.", "head.2."), ("projection_head.layers.0.", "projection_head.layers.2."))


def _find_head(tensors: Mapping[str, Tensor], prefix: str, head: Mapping[str, Tensor]) -> dict[str, str]:
    """{head name: file name} of a two-layer head of the right shapes beside or around the backbone, or nothing."""
    around = prefix.rstrip(".").removesuffix(".network").rpartition(".")[0]  # timm networks are one level deeper
    for base in (prefix, f"{around}." if around else ""):
        for first, second in _HEADS:
            found: dict[str, str] = {}
            for name, layer in (("0.", first), ("2.", second)):
                found |= {f"{name}{kind}": f"{base}{layer}{kind}" for kind in ("weight", "bias")}
            if all(file in tensors and tensors[file].shape == head[name].shape for name, file in found.items()):
                return found
    return {}


def _chosen(matches: Sequence[Match], wanted: Mapping[str, Tensor], key: str | None, file: str) -> Match:
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


def _check_usable(name: str, tensor: Tensor, wanted: Tensor, file: str) -> None:
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


def _with_pixels(match: Match, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], pixels: Pixels) -> Match:
    """The match with its first convolution converted to RGB images on this package's scale."""
    name = _first_convolution(wanted)
    if pixels == Pixels() or name is None or name not in match.files:
        return match
    weight = pixels.converted(match.layout.join(name, [tensors[file] for file in match.files[name]]).float())
    if weight.shape != wanted[name].shape:
        return match
    misfits = {other: shape for other, shape in match.misfits.items() if other != name}
    return dataclasses.replace(match, values={**match.values, name: weight}, misfits=misfits)


def _check_complete(match: Match, wanted: Mapping[str, Tensor], allow_missing: Sequence[str], file: str) -> None:
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


def _load(
    target: MoCo | Encoder | Backbone,
    content: Content,
    traits: Traits,
    allow_missing: Sequence[str],
    key: str | None,
    channels: Channels,
) -> InitReport:
    """:func:`load_init` for content that has been read."""
    if channels not in get_args(Channels):
        raise ValueError(f"init_channels={channels!r} is not allowed; choose one of 'auto', 'rgb', 'bgr', 'gray'")
    encoder = target.query_encoder if isinstance(target, MoCo) else target
    backbone = encoder.backbone if isinstance(encoder, Encoder) else encoder
    core = backbone.network if isinstance(backbone, TimmBackbone) else backbone
    file, tensors, wanted = str(content.path), content.tensors, core.state_dict()
    matches = find_matches(tensors, wanted)
    match = _chosen(matches, wanted, key, file)
    pixels = Pixels()
    if match.layout is DETECTRON2:
        traits, pixels = detectron2_settings(content.path)
    if channels != "auto":
        pixels = dataclasses.replace(pixels, channels=channels)
    match = _with_pixels(match, wanted, tensors, pixels)
    _check_complete(match, wanted, allow_missing, file)
    for name, names in match.files.items():
        for source in names if name in match.values else ():
            _check_usable(source, tensors[source], wanted[name], file)
    more = surplus(match, tensors)
    if more:
        raise ValueError(
            f"checkpoint {file!r} has a larger network than {backbone.arch}: {len(more)} more tensors of such layers, "
            f"{_listed(more)}. Choose the model.arch of the checkpoint"
        )
    core.load_state_dict({**wanted, **match.values})
    (target if isinstance(target, MoCo) else backbone).adopt(traits)
    head = _load_head(encoder, match, tensors, file) if isinstance(encoder, Encoder) else ()
    if isinstance(target, MoCo):
        target.copy_query_to_key()
    used = {source for name in match.values for source in match.files[name]} | set(head)
    others = dict.fromkeys(m.shown_prefix for m in matches if m.prefix != match.prefix and m.is_whole(wanted))
    return InitReport(
        path=file,
        layout=f"{match.layout.name} names under prefix {shown(match.prefix)!r}",
        matched=tuple(name for name in wanted if name in match.values),
        missing=tuple(name for name in wanted if name not in match.values),
        ignored=tuple(sorted(shown(name) for name in tensors if name not in used)),
        head_loaded=bool(head) if isinstance(encoder, Encoder) else None,
        others=tuple(others) if key is None else (),
        traits=json.loads(json.dumps(dataclasses.asdict(traits))) if traits != Traits() else {},
        channels=pixels.channels,
    )


def _load_head(encoder: Encoder, match: Match, tensors: Mapping[str, Tensor], file: str) -> tuple[str, ...]:
    """Load the head beside the backbone, if there is one; returns its names in the file."""
    wanted = encoder.head.state_dict()
    head = _find_head(tensors, match.prefix, wanted)
    for name, source in head.items():
        _check_usable(source, tensors[source], wanted[name], file)
    if head:
        encoder.head.load_state_dict({name: tensors[source] for name, source in head.items()})
    return tuple(head.values())


def _weights_file(path: Path, *, backbone_first: bool = False) -> Path:
    """The file to read; for a run folder, the newest whole checkpoint or the exported backbone."""
    if not path.is_dir() or is_transformers_folder(path):
        return path
    return RunFolder(path).weights_file(backbone_first=backbone_first)


def load_init(
    target: MoCo | Encoder | Backbone,
    path: str | Path,
    *,
    allow_missing: Sequence[str] = (),
    key: str | None = None,
    channels: Channels = "auto",
) -> InitReport:
    """Load a checkpoint into a backbone, and into its head if the checkpoint has one with the right shapes.

    Args:
        target: a MoCo pair (both encoders are set), an Encoder, or a bare backbone.
        path: a checkpoint in a known layout (docs/checkpoints.md), a transformers folder, or a run folder.
        allow_missing: shell patterns of backbone tensors that may be missing or have another shape.
        key: one of several backbones in the file: its prefix, or whole parts of it (``teacher``, ``encoder_k``).
        channels: channels of the first convolution: auto (RGB, or what the layout says), rgb, bgr or gray.

    Returns:
        The report on the checkpoint's tensors.

    Raises:
        ValueError: a backbone tensor has no counterpart with the same name and shape (except ``num_batches_tracked``); the
            file has a larger network; values are non-finite, quantized or missing; or the file is unreadable.
    """
    content = read_checkpoint(_weights_file(Path(path)))
    return _load(target, content, _known(content).traits, allow_missing, key, channels)


@dataclass(frozen=True)
class _Known:
    """What a checkpoint says about its network; None if it says nothing."""

    arch: str | None
    stem: Stem | None
    traits: Traits


def _known(content: Content) -> _Known:
    """What a checkpoint says about its network; raises ValueError if that is damaged."""
    file = str(content.path)
    said: Mapping[str, Any] = content.settings.get("model_config", {})
    try:
        traits = saved_traits(content)
        if METADATA_KEY in content.metadata:
            said = json.loads(content.metadata[METADATA_KEY])
            traits = traits_from(said.get("traits"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {file!r} has a damaged description of its network ({shown(str(error), 200)})"
        ) from error
    if "config" in content.settings:
        said = {"arch": network_of(content.settings["config"]), "stem": "imagenet"}
    arch, stem = said.get("arch"), said.get("stem")
    if not isinstance(arch, str | None) or stem not in (None, "imagenet", "small"):
        raise ValueError(f"checkpoint {file!r} has a damaged description of its network (arch={arch!r}, stem={stem!r})")
    return _Known(arch, stem, traits)


def open_backbone(
    path: str | Path,
    arch: str | None = None,
    stem: Stem | None = None,
    *,
    key: str | None = None,
    channels: Channels = "auto",
) -> tuple[Backbone, InitReport]:
    """:func:`load_backbone`, and the report on the checkpoint's tensors.

    Raises:
        ValueError: the checkpoint does not name its network, or cannot be used.
    """
    content = read_checkpoint(_weights_file(Path(path), backbone_first=True))
    known = _known(content)
    for name, given, said in (("arch", arch, known.arch), ("stem", stem, known.stem)):
        if given is not None and said is not None and said != given and not is_transformers_folder(content.path):
            raise ValueError(f"{name}={given!r} contradicts {str(content.path)!r}, which has {said!r}; omit {name}")
    arch = arch or known.arch
    if arch is None:
        raise ValueError(f"{str(content.path)!r} does not name its network; name it, for example arch=resnet50")
    backbone = build_backbone(arch, stem or known.stem or "imagenet")
    report = _load(backbone, content, known.traits, (), key, channels)
    return backbone.eval(), report


def load_backbone(
    path: str | Path,
    arch: str | None = None,
    stem: Stem | None = None,
    *,
    key: str | None = None,
    channels: Channels = "auto",
) -> Backbone:
    """A backbone ready for evaluation.

    Args:
        path: exported backbone, run folder, or any checkpoint that ``load_init`` reads.
        arch: its network; required if the file does not name it, otherwise it must agree.
        stem: its stem; likewise.
        key: one of several backbones in the file, as in :func:`load_init`.
        channels: channels of its first convolution, as in :func:`load_init`.

    Returns:
        The backbone in eval mode.

    Raises:
        ValueError: as in ``load_init``, or no network is named.
    """
    return open_backbone(path, arch, stem, key=key, channels=channels)[0]
