"""The mixing operators: the compiled extension if it is built, otherwise the plain PyTorch reference.

``_C`` has the schemas and the CPU kernels, ``_C_cuda`` the CUDA kernels; both are beside this file. ``_C_cuda`` is loaded if
PyTorch is a CUDA build, without asking the driver: importing must neither wait for a GPU nor initialize CUDA in a process that
will fork. Fake tensors and autograd are registered here for both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

from fastuft.mix import reference

_NAMES = ("cutmix", "cutmix_", "mixup", "mixup_")
_library = torch.library.Library("fastuft", "FRAGMENT")
_warned = False


def find_library(name: str) -> Path | None:
    """The built library with this name beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}.*so"))), None)


def _load(name: str) -> bool:
    path = find_library(name)
    if path is None:
        return False
    torch.ops.load_library(str(path))
    return True


HAS_CPU_EXTENSION = _load("_C")
# A ROCm build has None here and uses the key "CUDA" for its own devices, for which the reference runs.
HAS_CUDA_EXTENSION = HAS_CPU_EXTENSION and torch.version.cuda is not None and _load("_C_cuda")


def _why_the_reference_runs() -> str:
    if HAS_CPU_EXTENSION and torch.version.hip is not None:
        return "fastuft's compiled extension has no kernels for ROCm; mixing runs in plain PyTorch, which is slower."
    missing = "_C_cuda (CUDA)" if HAS_CPU_EXTENSION else "_C"
    return (
        f"fastuft's compiled extension {missing} is not built; mixing runs in plain PyTorch, which is slower. "
        "Build it with a C++ compiler (and nvcc for CUDA): pip install -e . --no-build-isolation"
    )


def _with_warning(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as an operator's kernel: it warns once, and its result has the same strides as the extension's."""

    def run(*arguments: Any) -> Any:
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(_why_the_reference_runs(), RuntimeWarning, stacklevel=2)
        result = function(*arguments)
        if result is None:
            return None
        like = torch.empty_like(arguments[0])
        return result if result.stride() == like.stride() else like.copy_(result)

    return run


def reference_schema(name: str) -> str:
    """The operator's schema, inferred from the reference function and equal to the extension's."""
    mutated = {"images"} if name.endswith("_") else ()
    schema = library.infer_schema(getattr(reference, name), mutates_args=mutated)
    return f"{name}{schema.replace('SymInt', 'int')}"  # the extension takes plain numbers


def _new_images(images: Tensor, *_: object) -> Tensor:
    return torch.empty_like(images)


def _nothing(*_: object) -> None:
    return None


for _name in _NAMES:
    if not HAS_CPU_EXTENSION:
        _library.define(reference_schema(_name))
        _library.impl(_name, _with_warning(getattr(reference, _name)), "CompositeExplicitAutograd")
    elif not HAS_CUDA_EXTENSION:
        _library.impl(_name, _with_warning(getattr(reference, _name)), "CUDA")
    _fake = _nothing if _name.endswith("_") else _new_images
    library.register_fake(f"fastuft::{_name}", _fake, lib=_library)


def _save_boxes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _add_to_partners(own: Tensor, partner: Tensor, grad: Tensor) -> Tensor:
    """own[partner[i]] += grad[i]; the gradient for a partner out of range is dropped (its images are NaN already)."""
    known = ((partner >= 0) & (partner < len(own))).view(-1, 1, 1, 1)
    return own.index_add(0, partner.clamp(0, len(own) - 1), torch.where(known, grad, 0))


def _cutmix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, partner = ctx.saved_tensors
    mask = reference.box_mask(boxes, grad.shape[2], grad.shape[3])
    own = torch.where(mask, 0, grad)
    return _add_to_partners(own, partner, torch.where(mask, grad, 0)), None, None


def _mixup_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lam, partner = ctx.saved_tensors
    weight = lam.to(torch.promote_types(grad.dtype, torch.float32)).view(-1, 1, 1, 1)
    own = (weight * grad).to(grad.dtype)
    return _add_to_partners(own, partner, ((1 - weight) * grad).to(grad.dtype)), None, None


library.register_autograd("fastuft::cutmix", _cutmix_backward, setup_context=_save_boxes, lib=_library)
library.register_autograd("fastuft::mixup", _mixup_backward, setup_context=_save_boxes, lib=_library)
