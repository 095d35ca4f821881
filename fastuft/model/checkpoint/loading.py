"""Loading a checkpoint into a backbone, or making the backbone that a checkpoint holds."""

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
    """What became of a checkpoint's tensors.

    Args:
        path: the file read.
        layout: naming and prefix under which the backbone was found.
        matched: backbone tensors loaded.
        missing: backbone tensors the file lacks (allowed by pattern, or BatchNorm's counters).
        ignored: tensors of the file that were not used.
        head_loaded: whether the projection head came from the file too; None where none was wanted.
        others: prefixes of further whole backbones in the file.
        traits: what the network does otherwise since then, as plain values.
        channels: what its first convolution was taken to expect.
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
        others = f"; also there: {', '.join(self.others)} (--init_key takes it)" if self.others else ""
        return (
            f"{self.path}: {self.layout}; {len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.ignored)} ignored{head}{others}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown(name) for name in names[:_LISTED]) + more


# Where the heads of known layouts stand, seen from the encoder that holds the backbone.
_HEADS = (("fc.0.", "fc.2."), ("head.0.", "head.2."), ("projection_head.layers.0.", "projection_head.layers.2."))


def _find_head(tensors: Mapping[str, Tensor], prefix: str, head: Mapping[str, Tensor]) -> dict[str, str]:
    """{head name: file name} of a two-layer head of the right shapes beside or around the backbone, or nothing."""
    around = prefix.rstrip(".").removesuffix(".network").rpartition(".")[0]  # timm's networks stand a level deeper
    for base in (prefix, f"{around}." if around else ""):
        for first, second in _HEADS:
            found: dict[str, str] = {}
            for name, layer in (("0.", first), ("2.", second)):
                found |= {f"{name}{kind}": f"{base}{layer}{kind}" for kind in ("weight", "bias")}
            if all(file in tensors and tensors[file].shape == head[name].shape for name, file in found.items()):
                return found
    return {}


def _chosen(matches: Sequence[Match], wanted: Mapping[str, Tensor], key: str | None, file: str) -> Match:
    """The match to load: the best, or the best that ``key`` names.

    Raises:
        ValueError: nothing in the file is like the backbone, or nothing under that key.
    """
    named = [match for match in matches if key is None or match.named(key)]
    if named:
        return named[0]
    whole = dict.fromkeys(match.place or "(no prefix)" for match in matches if match.is_whole(wanted))
    if key is not None and matches:
        there = ", ".join(whole) or matches[0].place or "(no prefix)"
        raise ValueError(f"init_key={key!r} names no backbone of {file!r}; there are: {there}")
    raise ValueError(
        f"checkpoint {file!r} has no tensor that the network has: a network of another kind. Choose the model.arch of the "
        "checkpoint"
    )


def _check_usable(name: str, tensor: Tensor, wanted: Tensor, file: str) -> None:
    """Refuse what would load without a word and compute something else."""
    fault = None
    if tensor.is_meta:
        fault = "has no values (it is on torch's meta device); save the checkpoint from the loaded network"
    elif tensor.is_quantized or (wanted.is_floating_point() and not tensor.is_floating_point()):
        fault = f"is {str(tensor.dtype).removeprefix('torch.')}, quantized or of whole numbers; save it dequantized"
    elif tensor.layout != torch.strided:
        fault = f"is stored as {str(tensor.layout).removeprefix('torch.')}; save it dense"
    elif tensor.is_floating_point() and not tensor.float().isfinite().all():
        fault = "holds NaN or infinite numbers: that training had diverged; take an earlier checkpoint"
    if fault:
        raise ValueError(f"checkpoint {file!r}: {shown(name)} {fault}")


def _first_convolution(wanted: Mapping[str, Tensor]) -> str | None:
    return next((name for name, value in wanted.items() if value.ndim == 4 and value.shape[1] == 3), None)


def _with_pixels(match: Match, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], pixels: Pixels) -> Match:
    """The match with its first convolution made for RGB images of this package's scale."""
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
            "The file's first convolution takes gray images: --init_channels gray makes it take RGB."
            if gray
            else "Choose the model.arch and model.stem of the checkpoint, or name what may be missing with "
            "--allow_missing PATTERN."
        )
        raise ValueError(
            f"checkpoint {file!r} does not fit the network: {len(refused)} of {len(wanted)} backbone tensors have no "
            f"counterpart of the same name and shape: {_listed(refused)}. Closest layout: {match.layout.name} names under "
            f"prefix {match.place!r}. {remedy}"
        )


def _load(
    target: MoCo | Encoder | Backbone,
    content: Content,
    traits: Traits,
    allow_missing: Sequence[str],
    key: str | None,
    channels: Channels,
) -> InitReport:
    """:func:`load_init` of what was read."""
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
            f"checkpoint {file!r} holds a larger network than {backbone.arch}: {len(more)} further tensors of its layers, "
            f"{_listed(more)}. Choose the model.arch of the checkpoint"
        )
    core.load_state_dict({**wanted, **match.values})
    (target if isinstance(target, MoCo) else backbone).adopt(traits)
    head = _load_head(encoder, match, tensors, file) if isinstance(encoder, Encoder) else ()
    if isinstance(target, MoCo):
        target.copy_query_to_key()
    used = {source for name in match.values for source in match.files[name]} | set(head)
    others = dict.fromkeys(m.place for m in matches if m.prefix != match.prefix and m.is_whole(wanted))
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
    """Load the head beside the backbone; the names it has in the file, or none."""
    wanted = encoder.head.state_dict()
    head = _find_head(tensors, match.prefix, wanted)
    for name, source in head.items():
        _check_usable(source, tensors[source], wanted[name], file)
    if head:
        encoder.head.load_state_dict({name: tensors[source] for name, source in head.items()})
    return tuple(head.values())


def _weights_file(path: Path, *, backbone_first: bool = False) -> Path:
    """The file to read: of a run folder, the newest whole checkpoint or the exported backbone."""
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
    """Load a checkpoint into a backbone, and into its head where the checkpoint has one of the right shapes.

    Args:
        target: a MoCo pair (both encoders are set), an Encoder, or a bare backbone.
        path: a checkpoint of a known layout (docs/checkpoints.md), a folder of transformers, or a run folder.
        allow_missing: shell patterns of backbone tensors that may be missing or of another shape.
        key: which of several backbones in the file: its prefix, or whole parts of it (``teacher``, ``encoder_k``).
        channels: what the first convolution takes: auto (RGB, or what the layout says), rgb, bgr or gray.

    Returns:
        What matched, what was missing, what was ignored.

    Raises:
        ValueError: a backbone tensor without counterpart of the same name and shape (``num_batches_tracked`` excepted);
            a larger network; values that are not finite, quantized or missing; or an unreadable file.
    """
    content = read_checkpoint(_weights_file(Path(path)))
    return _load(target, content, _known(content).traits, allow_missing, key, channels)


@dataclass(frozen=True)
class _Known:
    """What a checkpoint says of its network; None where it says nothing."""

    arch: str | None
    stem: Stem | None
    traits: Traits


def _known(content: Content) -> _Known:
    """Raises ValueError where what the file says of itself is damaged."""
    file = str(content.path)
    said: Mapping[str, Any] = content.settings.get("model_config", {})
    try:
        traits = saved_traits(content)
        if METADATA_KEY in content.metadata:
            said = json.loads(content.metadata[METADATA_KEY])
            traits = traits_from(said.get("traits"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {file!r} describes its network in a damaged way ({shown(str(error), 200)})"
        ) from error
    if "config" in content.settings:
        said = {"arch": network_of(content.settings["config"]), "stem": "imagenet"}
    arch, stem = said.get("arch"), said.get("stem")
    if not isinstance(arch, str | None) or stem not in (None, "imagenet", "small"):
        raise ValueError(f"checkpoint {file!r} describes its network in a damaged way (arch={arch!r}, stem={stem!r})")
    return _Known(arch, stem, traits)


def open_backbone(
    path: str | Path,
    arch: str | None = None,
    stem: Stem | None = None,
    *,
    key: str | None = None,
    channels: Channels = "auto",
) -> tuple[Backbone, InitReport]:
    """:func:`load_backbone`, and what became of the checkpoint's tensors.

    Raises:
        ValueError: the checkpoint does not say its network, or cannot be used.
    """
    content = read_checkpoint(_weights_file(Path(path), backbone_first=True))
    known = _known(content)
    for name, given, said in (("arch", arch, known.arch), ("stem", stem, known.stem)):
        if given is not None and said is not None and said != given and not is_transformers_folder(content.path):
            raise ValueError(
                f"{name}={given!r} contradicts {str(content.path)!r}, which holds {said!r}; leave {name} out"
            )
    arch = arch or known.arch
    if arch is None:
        raise ValueError(f"{str(content.path)!r} does not say its network; name it, for example arch=resnet50")
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
        path: exported backbone, run folder, or any checkpoint ``load_init`` reads.
        arch: its network, needed where the file does not say; must agree where it does.
        stem: its stem, likewise.
        key: which of several backbones in the file, as :func:`load_init` takes it.
        channels: what its first convolution takes, likewise.

    Returns:
        The backbone in eval mode.

    Raises:
        ValueError: as ``load_init``, or no network named.
    """
    return open_backbone(path, arch, stem, key=key, channels=channels)[0]
