"""Writing backbones for this package and other libraries."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastuft.atomic import write_whole
from fastuft.model.backbone import Backbone, Stem
from fastuft.model.checkpoint.card import model_card
from fastuft.model.checkpoint.conversion import Channels
from fastuft.model.checkpoint.description import METADATA_KEY
from fastuft.model.checkpoint.init_report import InitReport
from fastuft.model.checkpoint.loading import open_backbone
from fastuft.model.checkpoint.programs import write_onnx, write_torch_export
from fastuft.model.checkpoint.resnet_layouts import OWN_NAMES, TIMM_V2
from fastuft.model.checkpoint.transformers_export import write_transformers
from fastuft.model.resnet_v2 import ResNetV2
from fastuft.model.timm_network import TimmBackbone
from fastuft.runfolder import UNSEALED, RunFolder, seal
from fastuft.version import VERSION


def export_backbone(backbone: Backbone, path: str | Path) -> None:
    """Write a backbone as safetensors, with metadata to rebuild it and to normalize its inputs.

    The file contains its own digest (:func:`fastuft.runfolder.seal`), which is checked when it is read.

    Args:
        backbone: a backbone of this package.
        path: file to write, whole or not at all.

    Raises:
        OSError: the file could not be written; an older file is unchanged.
    """
    from safetensors.torch import save

    metadata = {
        "arch": backbone.arch,
        "stem": backbone.stem,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "num_features": backbone.num_features,
        "traits": dataclasses.asdict(backbone.traits),
        "fastuft_version": VERSION,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    write_whole(path, seal(save(state, metadata={METADATA_KEY: json.dumps(metadata), **UNSEALED})))


def export_state_dict(backbone: Backbone, layout: str, *, num_classes: int = 0) -> dict[str, Tensor]:
    """The state dict under another library's names.

    Args:
        backbone: a backbone of this package.
        layout: torchvision or timm. Without classes, it loads strictly into ``timm.create_model(NAME, num_classes=0)``
            and into a torchvision network whose ``fc`` is ``nn.Identity()``.
        num_classes: adds a classifier of zeros with this many classes, so that the file loads strictly into the full network.

    Returns:
        tensors by their names there, in the shapes that the library expects.

    Raises:
        ValueError: an unknown layout, or the library does not have the network.
    """
    if layout not in ("torchvision", "timm"):
        raise ValueError(f"layout={layout!r} is not allowed; choose one of 'torchvision', 'timm'")
    if backbone.traits.stride_in_1x1:
        raise ValueError(
            f"layout={layout!r} has no ResNet with the stride in 1x1 convolutions, as in this checkpoint; export with "
            "layout fastuft"
        )
    if isinstance(backbone, TimmBackbone):
        if layout == "torchvision":
            raise ValueError("layout='torchvision' is not possible for timm networks; export with layout timm")
        if num_classes:
            raise ValueError(f"num_classes={num_classes} is not available for timm networks; leave it at 0")
        return OWN_NAMES.export(backbone.network.state_dict())
    names, classifier = OWN_NAMES, "fc"
    if isinstance(backbone, ResNetV2):
        if layout == "torchvision":
            raise ValueError("layout='torchvision' has no ResNet-v2; export with layout timm")
        names, classifier = TIMM_V2, "head.fc"
    state = names.export(backbone.state_dict())
    if num_classes:
        shape = (num_classes, backbone.num_features)
        # timm's ResNet-v2 classifies with a 1x1 convolution
        state[f"{classifier}.weight"] = torch.zeros(*shape, 1, 1) if classifier == "head.fc" else torch.zeros(shape)
        state[f"{classifier}.bias"] = torch.zeros(num_classes)
    return state


SUFFIXES = {
    "fastuft": (".safetensors",),
    "torchvision": (".safetensors", ".pth", ".pt"),
    "timm": (".safetensors", ".pth", ".pt"),
    "transformers": ("",),
    "onnx": (".onnx",),
    "torch_export": (".pt2",),
}
_WRITERS: dict[str, Callable[[Backbone, Path], None]] = {
    "fastuft": export_backbone,
    "transformers": write_transformers,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


def _check_target(out: Path, layout: str, num_classes: int) -> None:
    """Raise ValueError unless the layout can be written to ``out``."""
    if layout not in SUFFIXES:
        raise ValueError(f"layout={layout!r} is not allowed; choose one of {', '.join(SUFFIXES)}")
    if layout == "transformers":
        if out.is_file():
            raise ValueError(f"out={str(out)!r} is a file, but layout transformers writes a folder; name a folder")
    elif out.suffix not in SUFFIXES[layout]:
        raise ValueError(
            f"out={str(out)!r} has the wrong suffix for layout {layout}; use {' or '.join(SUFFIXES[layout])}"
        )
    if num_classes and layout not in ("torchvision", "timm"):
        raise ValueError(f"num_classes={num_classes} is not available for layout {layout}; leave it at 0")


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    layout: str = "fastuft",
    arch: str | None = None,
    stem: Stem | None = None,
    num_classes: int = 0,
    key: str | None = None,
    channels: Channels = "auto",
) -> InitReport:
    """Write a checkpoint's backbone for other libraries (``fastuft export``); for a run, also its model card.

    Args:
        checkpoint: as in :func:`load_backbone`.
        out: what to write: ``.safetensors``, or ``.pth`` for ``torch.save``; ``.onnx`` for onnx, ``.pt2`` for
            torch_export, a folder for transformers.
        layout: fastuft, torchvision, timm, transformers, onnx or torch_export.
        arch: the network, if the checkpoint does not name it.
        stem: the stem, if the checkpoint does not name it.
        num_classes: see :func:`export_state_dict`.
        key: prefix of one of several backbones in the checkpoint.
        channels: channels of its first convolution.

    Returns:
        The report on the checkpoint's tensors.

    Raises:
        ValueError: a wrong suffix, an unknown layout, the layout does not have the network, or as in :func:`load_backbone`.
    """
    out = Path(out)
    _check_target(out, layout, num_classes)
    backbone, report = open_backbone(checkpoint, arch, stem, key=key, channels=channels)
    out.parent.mkdir(parents=True, exist_ok=True)
    if layout in _WRITERS:
        _WRITERS[layout](backbone, out)
    else:
        _write_state(export_state_dict(backbone, layout, num_classes=num_classes), out)
    run = RunFolder(Path(checkpoint))
    if run.config_file.exists():
        card = out / "README.md" if layout == "transformers" else out.with_suffix(".md")
        write_whole(card, model_card(backbone, run, layout, out.name).encode())
    return report


def _write_state(state: dict[str, Tensor], out: Path) -> None:
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        write_whole(out, save(state))
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(out, buffer.getbuffer())
