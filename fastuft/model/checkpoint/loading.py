"""Loading a checkpoint into a backbone, or building the backbone that a checkpoint describes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from fastuft.model.backbone import Backbone, Stem, Traits
from fastuft.model.checkpoint.conversion import Channels, Pixels, detectron2_settings
from fastuft.model.checkpoint.description import described
from fastuft.model.checkpoint.fitting import check_complete, check_no_surplus, check_usable, chosen, with_pixels
from fastuft.model.checkpoint.heads import load_head
from fastuft.model.checkpoint.init_report import InitReport
from fastuft.model.checkpoint.matching import find_matches
from fastuft.model.checkpoint.reading import Content, is_transformers_folder, read_checkpoint, shown
from fastuft.model.checkpoint.resnet_layouts import DETECTRON2
from fastuft.model.moco import Encoder, MoCo
from fastuft.model.networks import build_backbone
from fastuft.model.timm_network import TimmBackbone
from fastuft.runfolder import RunFolder


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
    backbone = _backbone_of(target)
    core = backbone.network if isinstance(backbone, TimmBackbone) else backbone
    file, tensors, wanted = str(content.path), content.tensors, core.state_dict()
    matches = find_matches(tensors, wanted)
    match = chosen(matches, wanted, key, file)
    pixels = Pixels()
    if match.layout is DETECTRON2:
        traits, pixels = detectron2_settings(content.path)
    if channels != "auto":
        pixels = replace(pixels, channels=channels)
    match = with_pixels(match, wanted, tensors, pixels)
    check_complete(match, wanted, allow_missing, file)
    for name, names in match.files.items():
        for source in names if name in match.values else ():
            check_usable(source, tensors[source], wanted[name], file)
    check_no_surplus(match, tensors, backbone.arch, file)
    core.load_state_dict({**wanted, **match.values})
    (target if isinstance(target, MoCo) else backbone).adopt(traits)
    head = load_head(encoder, match, tensors, file) if isinstance(encoder, Encoder) else ()
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
        traits=json.loads(json.dumps(asdict(traits))) if traits != Traits() else {},
        channels=pixels.channels,
    )


def _backbone_of(target: MoCo | Encoder | Backbone) -> Backbone:
    encoder = target.query_encoder if isinstance(target, MoCo) else target
    return encoder.backbone if isinstance(encoder, Encoder) else encoder


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
    known = described(content)
    try:
        return _load(target, content, known.traits, allow_missing, key, channels)
    except ValueError as error:
        arch = _backbone_of(target).arch
        if known.arch in (None, arch):
            raise
        said = str(error).rstrip(".")
        raise ValueError(f"{said}. It names {known.arch!r} as its network, and this one is {arch!r}") from error


def named_network(path: str | Path) -> tuple[str | None, Stem | None]:
    """(arch, stem) that a checkpoint names; None for what it does not name.

    Args:
        path: any checkpoint that :func:`load_init` reads.

    Raises:
        ValueError: unreadable, or its description is damaged.
    """
    known = described(read_checkpoint(_weights_file(Path(path))))
    return known.arch, known.stem


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
    known = described(content)
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
