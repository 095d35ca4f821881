"""The model card of a run's exported backbone: its training data and recipe, what is known about it, how to load it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from fastuft.model.backbone import Backbone
from fastuft.model.checkpoint.preprocessing import shorter_side
from fastuft.model.checkpoint.transformers_export import features_in_transformers
from fastuft.model.timm_network import TimmBackbone
from fastuft.names import printable
from fastuft.nested import flattened, lookup
from fastuft.runfolder import RunFolder, read_json

# Figures of eval.json by their keys, as fractions.
_FIGURES = {
    "retrieval accuracy": ("retrieval",),
    "clustering accuracy": ("clustering",),
    "source clustering accuracy": ("forgetting", "after"),
    "source clustering accuracy before": ("forgetting", "before"),
}
# Networks that other libraries have too, by their names there.
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101")
_TIMM = {arch: arch for arch in _TORCHVISION} | {
    "bit_resnet50": "resnetv2_50x1_bit",
    "bit_resnet101": "resnetv2_101x1_bit",
}
_RECIPE = ("method", "optim", "data", "augment")


def _or_nothing(read: Callable[[], dict[str, object]]) -> dict[str, object]:
    """The content of a run's file; a damaged file is left out with a warning."""
    try:
        return read()
    except (OSError, ValueError) as error:
        warnings.warn(f"the model card leaves out a file that cannot be read: {error}", stacklevel=3)
        return {}


def _cell(value: object) -> str:
    return printable(str(value)).replace("|", "\\|")


def _table(rows: Mapping[str, object]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()), ""]


def _percent(value: object) -> str | None:
    """A fraction, or a mean with its spread over trials, in per cent."""
    if isinstance(value, Mapping):
        mean, spread = value.get("mean"), value.get("std")
        if isinstance(mean, (int, float)):
            around = f" ± {100 * spread:.1f}" if isinstance(spread, (int, float)) else ""
            return f"{100 * mean:.1f} %{around}"
        return None
    return f"{100 * value:.1f} %" if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _figures(evaluation: Mapping[str, object]) -> dict[str, object]:
    found = {name: _percent(lookup(evaluation, *keys)) for name, keys in _FIGURES.items()}
    by_shots = (
        ("few-shot mean class accuracy", "fewshot"),
        ("few-shot mean class accuracy before", "before", "fewshot"),
        ("FixMatch mean class accuracy", "fixmatch"),
        ("mean class accuracy of class means", "class_means"),
        ("mean class accuracy of class means before", "before", "class_means"),
    )
    for label, *keys in by_shots:
        inner = () if "class_means" in keys else ("mean_class",)
        for shots, result in (lookup(evaluation, *keys) or {}).items():
            found[f"{label}, {shots} images per class"] = _percent(lookup(result, *inner))
    return {name: value for name, value in found.items() if value is not None}


def _state_dict(backbone: Backbone, layout: str, name: str) -> str:
    """Python code that loads a state dict, into the library's network if the library has it."""
    read = f"load_file({name!r})" if name.endswith(".safetensors") else f"torch.load({name!r}, weights_only=True)"
    networks = {"torchvision": {arch: f"torchvision.models.{arch}()" for arch in _TORCHVISION}}
    networks["timm"] = {arch: f"timm.create_model({theirs!r}, num_classes=0)" for arch, theirs in _TIMM.items()}
    if isinstance(backbone, TimmBackbone):
        networks["timm"][backbone.arch] = f"timm.create_model({backbone.arch.removeprefix('timm:')!r}, num_classes=0)"
    network = networks[layout].get(backbone.arch)
    if network is None:
        return f"state_dict = {read}"
    bare = "network.fc = torch.nn.Identity()\n" if layout == "torchvision" else ""
    pooling = {"cls": "[:, 0]", "mean": "[:, network.num_prefix_tokens :].mean(1)"}.get(backbone.traits.pool)
    features = f"\nfeatures = network.fc_norm(network.forward_features(images){pooling})" if pooling else ""
    return f"network = {network}\n{bare}network.load_state_dict({read}){features}"


def _use(backbone: Backbone, layout: str, name: str) -> str:
    """Python code that loads the export."""
    if layout in ("torchvision", "timm"):
        return _state_dict(backbone, layout, name)
    return {
        "fastuft": f"backbone = fastuft.load_backbone({name!r})\nfeatures = backbone(images)",
        "transformers": (
            f"network = transformers.AutoModel.from_pretrained({name!r})\noutput = network(images)\n"
            f"features = {features_in_transformers(backbone)}"
        ),
        "onnx": (
            f"session = onnxruntime.InferenceSession({name!r})\n"
            '(features,) = session.run(["features"], {"images": images})'
        ),
        "torch_export": f"program = torch.export.load({name!r}).module()\nfeatures = program(images)",
    }[layout]


def _evaluation_of(run: RunFolder) -> Path | None:
    """eval.json of the run, in its folder or in the sub-folder ``eval``."""
    files = (folder.evaluation_file for folder in (run, RunFolder(run.path / "eval")))
    return next((file for file in files if file.exists()), None)


def _verdict(summary: Mapping[str, object]) -> list[str]:
    verdict = summary.get("verdict")
    if not isinstance(verdict, Mapping) or "outcome" not in verdict:
        return []
    reasons = verdict.get("reasons")
    listed = [f"- {_cell(reason)}" for reason in reasons] if isinstance(reasons, list) else []
    return ["## Verdict", "", f"Without labels: **{_cell(verdict['outcome'])}**.", "", *listed, ""]


def model_card(backbone: Backbone, run: RunFolder, layout: str, name: str) -> str:
    """Markdown to accompany an exported backbone.

    Args:
        backbone: the exported backbone.
        run: its run.
        layout: as in :func:`export`.
        name: name of the exported file or folder.
    """
    summary, config = _or_nothing(run.read_summary), _or_nothing(run.read_config)
    evaluation_file = _evaluation_of(run)
    evaluation = _or_nothing(lambda: read_json(evaluation_file)) if evaluation_file else {}
    counts = summary.get("manifest", {})
    init = lookup(summary, "init", "path") or config.get("init") or "random initialization"
    training = {
        "started from": init,
        "target images, unlabeled": lookup(counts, "num_target"),
        "replayed source images": lookup(counts, "num_source"),
        "images seen": summary.get("images"),
        "steps": f"{summary.get('steps')} of {summary.get('total_steps')}",
        "bad files skipped": summary.get("bad_files"),
        "digest of the image list": lookup(counts, "content_hash"),
    }
    recipe = {key: value for section in _RECIPE for key, value in flattened({section: config.get(section) or {}})}
    figures = _figures(evaluation)
    statements = evaluation.get("statements")
    side, shown_init = backbone.input_size, Path(str(init)).name
    lines = [
        f"# {backbone.arch}, adapted to unlabeled images",
        "",
        f"A backbone without a classifier: it maps an RGB image to {backbone.num_features} features. It was finetuned "
        f"from {_cell(shown_init)} by contrastive learning without labels (Li et al. 2021, arXiv 2110.09510).",
        "",
        "## Use",
        "",
        f"Layout {layout}, written by fastuft {lookup(summary, 'versions', 'fastuft') or ''}".rstrip() + ":",
        "",
        "```python",
        _use(backbone, layout, name),
        "```",
        "",
        f"Preprocessing: resize the shorter side to {shorter_side(side)} pixels (bilinear), crop the center {side} pixels, "
        f"divide by 255, subtract the mean {list(backbone.mean)}, and divide by {list(backbone.std)}.",
        "",
        "## Training data",
        "",
        *(
            _table({key: value for key, value in training.items() if value is not None})
            if summary
            else ["Not recorded.", ""]
        ),
        *_verdict(summary),
        "## Figures",
        "",
        *(_table(figures) if figures else ["The run folder has no labeled evaluation; `fastuft eval` makes one.", ""]),
        *([f"- {_cell(line)}" for line in statements] + [""] if isinstance(statements, list) and statements else []),
        "## Recipe",
        "",
        *(_table(recipe) if recipe else ["Not recorded.", ""]),
    ]
    return "\n".join(lines)
