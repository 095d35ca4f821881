"""Reading the checkpoints people have, and writing ones that other libraries read.

A file's format is told from its content: safetensors, a torch archive (read with ``weights_only``), or BiT's NumPy
archive (read without pickle). Its layout is told from its tensors: the prefix and naming under which they match the
backbone's names and shapes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastuft
from fastuft.atomic import write_whole
from fastuft.model.backbone import Backbone, Stem
from fastuft.model.moco import Encoder, MoCo
from fastuft.model.networks import build_backbone
from fastuft.model.resnet_v2 import ResNetV2
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
        head_loaded: whether the projection head came from the file too.
    """

    path: str
    layout: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    head_loaded: bool = False

    def __str__(self) -> str:
        head = "head loaded" if self.head_loaded else "fresh head"
        return (
            f"{self.path}: {self.layout}; {len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.ignored)} ignored, {head}"
        )


def _shown(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here; each means that the file is not plain tensors
        raise ValueError(
            f"init={str(path)!r} could not be read as plain tensors: {str(error).splitlines()[0]} "
            "Nothing in a checkpoint is executed; re-save its state_dict alone with torch.save or safetensors."
        ) from error


def read_checkpoint(path: str | Path) -> tuple[Any, dict[str, str]]:
    """Content of a checkpoint file and its metadata (empty where the format has none).

    Raises:
        ValueError: missing, empty, of unknown format, or a pickle of more than plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"init={str(path)!r} is not a file; name a checkpoint (.pth, .safetensors, .npz) or a run folder"
        )
    with path.open("rb") as file:
        head = file.read(16)
    if len(head) < 16:
        raise ValueError(f"init={str(path)!r} holds {len(head)} bytes, which is no checkpoint; copy it again")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_numpy = all(name.endswith(".npy") for name in archive.namelist())
        return (_read_npz(path) if is_numpy else _read_torch(path)), {}
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"init={str(path)!r} is a damaged safetensors file: {error}; copy it again") from error
    return _read_torch(path), {}


def find_state_dict(content: Any, path: str = "checkpoint") -> dict[str, Tensor]:
    """All tensors of a checkpoint under dotted names, containers such as ``state_dict`` included in the name."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, Tensor):
            found[prefix] = value
        elif isinstance(value, Mapping):
            for key, child in value.items():
                walk(child, f"{prefix}.{key}" if prefix else str(key))

    walk(content, "")
    if not found:
        raise ValueError(f"init={path!r} holds no tensors; name a checkpoint of a network")
    return found


_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def _from_sequential(name: str) -> str | None:
    """``nn.Sequential(*resnet.children())`` numbering, as lightly's examples keep their backbones."""
    first, _, rest = name.partition(".")
    return f"{_SEQUENTIAL[first]}.{rest}" if first in _SEQUENTIAL else None


_TIMM_V2 = (
    (re.compile(r"^stem\.conv\."), "conv1."),
    (re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\.norm(\d)\."), lambda m: f"layer{int(m[1]) + 1}.{m[2]}.gn{m[3]}."),
    (re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\.conv(\d)\."), lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{m[3]}."),
    (
        re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\.downsample\.conv\."),
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.",
    ),
    (re.compile(r"^norm\."), "norm."),
)


def _from_timm_v2(name: str) -> str | None:
    """timm's names of ResNet-v2."""
    for pattern, replacement in _TIMM_V2:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return None


_BIT_UNIT = re.compile(r"^block(\d)/unit(\d+)/([abc])/(proj/)?(standardized_conv2d/kernel|group_norm/(?:gamma|beta))$")


def _from_bit_npz(name: str) -> str | None:
    """The names of BiT's published NumPy archives, behind their leading ``resnet/``."""
    name = name.removeprefix("resnet/")
    plain = {
        "root_block/standardized_conv2d/kernel": "conv1.weight",
        "group_norm/gamma": "norm.weight",
        "group_norm/beta": "norm.bias",
    }
    if name in plain:
        return plain[name]
    match = _BIT_UNIT.match(name)
    if match is None:
        return None
    index = "abc".index(match[3]) + 1
    unit = f"layer{match[1]}.{int(match[2]) - 1}"
    if match[5].endswith("kernel"):
        return f"{unit}.downsample.weight" if match[4] else f"{unit}.conv{index}.weight"
    return f"{unit}.gn{index}.{'weight' if match[5].endswith('gamma') else 'bias'}"


_NAMINGS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("torchvision", lambda name: name),
    ("sequential", _from_sequential),
    ("timm ResNet-v2", _from_timm_v2),
    ("BiT npz", _from_bit_npz),
)
# A momentum or teacher copy never wins over the network that takes gradients.
_SECOND_CHOICE = re.compile(r"(encoder_k|key_encoder|momentum|teacher|ema)", re.IGNORECASE)


def _prefixes(names: Sequence[str]) -> list[str]:
    found = {""}
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
    return sorted(found)


def _as_backbone(tensor: Tensor, expected: Tensor, naming: str) -> Tensor:
    """TensorFlow kernels are HWIO; torch's are OIHW."""
    return tensor.permute(3, 2, 0, 1) if naming == "BiT npz" and tensor.ndim == 4 and expected.ndim == 4 else tensor


def _best_match(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, str, dict[str, str]]:
    """(naming, prefix, {backbone name: file name}) that covers most of the backbone's names, shapes aside."""
    best: tuple[tuple[int, int, int], str, str, dict[str, str]] = ((-1, 0, 0), "torchvision", "", {})
    by_prefix: dict[str, list[str]] = {prefix: [] for prefix in _prefixes(list(tensors))}
    for name in tensors:
        parts = name.split(".")
        for depth in range(len(parts)):
            by_prefix["".join(f"{part}." for part in parts[:depth])].append(name)
    for prefix, names in by_prefix.items():
        for naming, rename in _NAMINGS:
            found = {}
            for name in names:
                renamed = rename(name[len(prefix) :])
                if renamed is not None and renamed in wanted:
                    found[renamed] = name
            shaped = sum(
                _as_backbone(tensors[file], wanted[name], naming).shape == wanted[name].shape
                for name, file in found.items()
            )
            score = (shaped, -bool(_SECOND_CHOICE.search(prefix)), -len(prefix))
            if score > best[0]:
                best = (score, naming, prefix, found)
    return best[1:]


# Where the heads of known layouts stand, seen from the encoder that holds the backbone.
_HEADS = (("fc.0.", "fc.2."), ("head.0.", "head.2."), ("projection_head.layers.0.", "projection_head.layers.2."))


def _find_head(tensors: Mapping[str, Tensor], prefix: str, head: Mapping[str, Tensor]) -> dict[str, str]:
    """{head name: file name} of a two-layer head of the right shapes beside or around the backbone, or nothing."""
    around = prefix.rstrip(".").rpartition(".")[0]
    for base in (prefix, f"{around}." if around else ""):
        for first, second in _HEADS:
            found: dict[str, str] = {}
            for name, layer in (("0.", first), ("2.", second)):
                found |= {f"{name}{kind}": f"{base}{layer}{kind}" for kind in ("weight", "bias")}
            if all(file in tensors and tensors[file].shape == head[name].shape for name, file in found.items()):
                return found
    return {}


def resolve_checkpoint(path: str | Path) -> Path:
    """The file to read: a run folder stands for its newest checkpoint, or else its exported backbone."""
    path = Path(path)
    if not path.is_dir():
        return path
    return RunFolder(path).weights_file()


def load_init(target: MoCo | Encoder | Backbone, path: str | Path, *, allow_missing: Sequence[str] = ()) -> InitReport:
    """Load a checkpoint into a backbone, and into its head where the checkpoint has one of the right shapes.

    Args:
        target: a MoCo pair (both encoders are set), an Encoder, or a bare backbone.
        path: MoCo v1/v2, torchvision, timm, lightly, BiT or fastuft checkpoint, or a run folder.
        allow_missing: shell patterns of backbone tensors that may be missing or of another shape.

    Returns:
        What matched, what was missing, what was ignored.

    Raises:
        ValueError: a backbone tensor without counterpart of the same name and shape (``num_batches_tracked`` excepted),
            or an unreadable file.
    """
    encoder = target.query_encoder if isinstance(target, MoCo) else target
    backbone = encoder.backbone if isinstance(encoder, Encoder) else encoder
    core = backbone.network if isinstance(backbone, TimmBackbone) else backbone
    file = resolve_checkpoint(path)
    content, _ = read_checkpoint(file)
    tensors = find_state_dict(content, str(file))
    wanted = core.state_dict()
    naming, prefix, found = _best_match(tensors, wanted)

    missing, wrong, state = [], [], dict(wanted)
    for name, parameter in wanted.items():
        if name not in found:
            missing.append(name)
            continue
        value = _as_backbone(tensors[found[name]], parameter, naming)
        if value.shape == parameter.shape:
            state[name] = value
        else:
            wrong.append(f"{name} (file {tuple(value.shape)}, network {tuple(parameter.shape)})")

    def allowed(name: str) -> bool:
        return name.endswith("num_batches_tracked") or any(fnmatchcase(name, pattern) for pattern in allow_missing)

    refused = [name for name in missing if not allowed(name)]
    refused += [entry for entry in wrong if not allowed(entry.split(" ")[0])]
    if refused:
        raise ValueError(
            f"init={str(file)!r} does not fit the network: {len(refused)} of {len(wanted)} backbone tensors have no "
            f"counterpart of the same name and shape: {_shown(refused)}. Closest layout: {naming} under prefix "
            f"{prefix!r}. Choose the model.arch and model.stem of the checkpoint, or name what may be missing with "
            "--allow_missing PATTERN."
        )
    core.load_state_dict(state)

    head: dict[str, str] = {}
    if isinstance(encoder, Encoder):
        head = _find_head(tensors, prefix, encoder.head.state_dict())
        if head:
            encoder.head.load_state_dict({name: tensors[file_name] for name, file_name in head.items()})
    if isinstance(target, MoCo):
        target.copy_query_to_key()
    wrong_names = {entry.split(" ")[0] for entry in wrong}
    used = {found[name] for name in found if name not in wrong_names} | set(head.values())
    return InitReport(
        path=str(file),
        layout=f"{naming} names under prefix {prefix!r}",
        matched=[name for name in wanted if name in found and name not in wrong_names],
        missing=[*missing, *sorted(wrong_names)],
        ignored=sorted(set(tensors) - used),
        head_loaded=bool(head),
    )


def export_backbone(backbone: Backbone, path: str | Path) -> None:
    """Write a backbone as safetensors whose metadata says how to rebuild it and how to normalize its inputs.

    Args:
        backbone: as ``build_backbone`` gives it.
        path: file to write, atomically.

    Raises:
        OSError: the disk refused; an older file is as it was.
    """
    from safetensors.torch import save

    metadata = {
        "arch": backbone.arch,
        "stem": backbone.stem,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "num_features": backbone.num_features,
        "fastuft_version": fastuft.__version__,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    write_whole(path, save(state, metadata={METADATA_KEY: json.dumps(metadata)}))


def load_backbone(path: str | Path, arch: str | None = None, stem: Stem | None = None) -> Backbone:
    """A backbone ready for evaluation.

    Args:
        path: exported backbone, run folder, or any checkpoint ``load_init`` reads.
        arch: its network, needed where the file does not say; must agree where it does.
        stem: its stem, likewise.

    Returns:
        The backbone in eval mode.

    Raises:
        ValueError: as ``load_init``, or no network named.
    """
    path = Path(path)
    file = RunFolder(path).weights_file(backbone_first=True) if path.is_dir() else path
    content, metadata = read_checkpoint(file)
    known = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else {}
    if isinstance(content, Mapping) and isinstance(content.get("model_config"), Mapping):  # a fastuft checkpoint
        known = dict(content["model_config"])
    for name, given in (("arch", arch), ("stem", stem)):
        if given is not None and name in known and known[name] != given:
            raise ValueError(
                f"{name}={given!r} contradicts {str(file)!r}, which holds {known[name]!r}; leave {name} out"
            )
    arch = arch or known.get("arch")
    if arch is None:
        raise ValueError(f"arch is not told by {str(file)!r}; name it, for example arch=resnet50")
    chosen_stem = stem or known.get("stem") or "imagenet"
    backbone = build_backbone(arch, chosen_stem)
    load_init(backbone, file)
    return backbone.eval()


def _to_timm_v2(name: str) -> str:
    name = re.sub(r"^conv1\.", "stem.conv.", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", name)
    return re.sub(r"\.gn(\d)\.", r".norm\1.", name).replace(".downsample.", ".downsample.conv.")


def export_state_dict(backbone: Backbone, layout: str, *, num_classes: int = 0) -> dict[str, Tensor]:
    """State dict under another library's names.

    Args:
        backbone: a backbone of this package.
        layout: torchvision or timm. Without classes it loads strictly into ``timm.create_model(NAME, num_classes=0)``
            and into a torchvision network whose ``fc`` is ``nn.Identity()``.
        num_classes: adds a zero classifier of this size, so that the file loads strictly into the full network.

    Raises:
        ValueError: unknown layout, or a network that the library does not have.
    """
    if layout not in ("torchvision", "timm"):
        raise ValueError(f"layout={layout!r} is not allowed; choose one of 'fastuft', 'torchvision', 'timm'")
    if isinstance(backbone, TimmBackbone):
        if layout == "torchvision":
            raise ValueError("layout='torchvision' cannot hold a timm network; export with layout timm")
        if num_classes:
            raise ValueError(f"num_classes={num_classes} is not available for timm networks; leave it at 0")
        return dict(backbone.network.state_dict())
    state = backbone.state_dict()
    classifier = "fc"
    if isinstance(backbone, ResNetV2):
        if layout == "torchvision":
            raise ValueError("layout='torchvision' has no ResNet-v2; export with layout timm")
        state = {_to_timm_v2(name): value for name, value in state.items()}
        classifier = "head.fc"
    if num_classes:
        shape = (num_classes, backbone.num_features)
        # timm's ResNet-v2 classifies by a 1x1 convolution
        weight = torch.zeros(*shape, 1, 1) if classifier == "head.fc" else torch.zeros(shape)
        state = {**state, f"{classifier}.weight": weight, f"{classifier}.bias": torch.zeros(num_classes)}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    layout: str = "fastuft",
    arch: str | None = None,
    stem: Stem | None = None,
    num_classes: int = 0,
) -> None:
    """Write a checkpoint's backbone for other libraries (``fastuft export``).

    Args:
        checkpoint: as :func:`load_backbone` takes it.
        out: file to write; ``.safetensors``, or ``.pth`` for ``torch.save``.
        layout: fastuft, torchvision or timm.
        arch: network of a checkpoint that does not say it.
        stem: stem of a checkpoint that does not say it.
        num_classes: see :func:`export_state_dict`.

    Raises:
        ValueError: unknown suffix or layout, or as :func:`load_backbone`.
    """
    out = Path(out)
    if out.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"out={str(out)!r} has an unknown suffix; use .safetensors or .pth")
    backbone = load_backbone(checkpoint, arch, stem)
    if layout == "fastuft":
        if out.suffix != ".safetensors":
            raise ValueError(f"out={str(out)!r}: layout fastuft keeps metadata, which needs the suffix .safetensors")
        export_backbone(backbone, out)
        return
    state = export_state_dict(backbone, layout, num_classes=num_classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        write_whole(out, save(state))
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(out, buffer.getbuffer())
