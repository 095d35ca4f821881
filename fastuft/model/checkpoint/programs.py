"""Backbones as programs that run without this package: ONNX and torch.export."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from fastuft.atomic import whole_file, write_whole
from fastuft.model.backbone import Backbone
from fastuft.model.checkpoint.preprocessing import preprocessing_of

_TOLERANCE = 1e-4  # difference between the program and the backbone, relative to the largest feature
_BATCHES = (1, 3)  # batch sizes of the check; tracing uses 2


def _images(backbone: Backbone, batch: int) -> Tensor:
    side = backbone.input_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def trace(backbone: Backbone) -> torch.export.ExportedProgram:
    """The backbone in eval mode as a graph for any batch size."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(backbone, (_images(backbone, 2),), dynamic_shapes={"images": {0: batch}})


def _check(given: Tensor, expected: Tensor, what: str) -> None:
    error = (given - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"{what}: the features differ from the backbone's by {float(error):.1e} of the largest feature"
        )


def _write_preprocessing(backbone: Backbone, out: Path) -> None:
    content = json.dumps(preprocessing_of(backbone), indent=1) + "\n"
    write_whole(out.with_suffix(".json"), content.encode())


@torch.no_grad()
def write_torch_export(backbone: Backbone, out: Path) -> None:
    """Write a ``.pt2`` program that ``torch.export.load`` reads, and its preprocessing beside it as JSON.

    Raises:
        RuntimeError: the features differ from the backbone's; nothing was written.
    """
    buffer = io.BytesIO()
    torch.export.save(trace(backbone), buffer)
    buffer.seek(0)
    written = torch.export.load(buffer).module()
    for batch in _BATCHES:
        images = _images(backbone, batch)
        _check(written(images), backbone(images), str(out))
    write_whole(out, buffer.getbuffer())
    _write_preprocessing(backbone, out)


@torch.no_grad()
def write_onnx(backbone: Backbone, out: Path) -> None:
    """Write an ONNX model for any batch size, and its preprocessing beside it as JSON.

    Its input is ``images`` [batch, 3, side, side], its output ``features`` [batch, num_features], both float32; it has the
    operator version that torch's exporter targets.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: onnxruntime's features differ from the backbone's; nothing was written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ValueError(
            f"layout='onnx' needs {error.name}, which is not installed; pip install 'fastuft[onnx]', or choose torch_export"
        ) from error
    program = torch.onnx.export(
        trace(backbone), input_names=["images"], output_names=["features"], dynamo=True, verbose=False
    )
    if program is None:
        raise RuntimeError("torch's ONNX exporter returned no program")
    with whole_file(out) as partial:
        program.save(partial, external_data=False)
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        for batch in _BATCHES:
            images = _images(backbone, batch)
            (features,) = session.run(["features"], {"images": images.numpy()})
            _check(torch.from_numpy(features), backbone(images), str(out))
    _write_preprocessing(backbone, out)
