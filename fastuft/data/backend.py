"""What the DALI and the PyTorch loader have in common: requests in, normalized views out, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastuft.data.decoding import EncodedImage
from fastuft.data.loading import Loading
from fastuft.data.strong import StrongConfig, StrongParameters
from fastuft.data.views import ViewParameters
from fastuft.names import printable


@dataclass(frozen=True)
class Request:
    """One batch to make.

    Args:
        step: index of the batch in its pass.
        images: the encoded files [n].
        index: indices of the files in the stream, int64 [n].
        views: parameters of each view, in order; regions refer to the upright images.
        strong: parameters of the last view after its crop, if the spec has a strong view.
    """

    step: int
    images: list[EncodedImage]
    index: NDArray[np.int64]
    views: tuple[ViewParameters, ...]
    strong: StrongParameters | None = None


@dataclass(frozen=True)
class ViewSpec:
    """How to make views.

    Args:
        size: side of the result, pixels.
        num_views: views of each image.
        color: whether the color jitter is part of the pipeline.
        blur: whether the blur is part of it.
        rotation: whether the rotation is part of it.
        batch_size: largest batch.
        loading: device, format and loader of the views.
        largest: (width, height) to reserve memory for in a GPU's hardware decoder; larger images still work.
        strong: RandAugment and Cutout of the last view; None makes no strong view.
    """

    size: int
    num_views: int
    color: bool
    blur: bool
    rotation: bool
    batch_size: int
    loading: Loading
    largest: tuple[int, int] = (0, 0)
    strong: StrongConfig | None = None


class DecodeError(RuntimeError):
    """Making the current requests failed, usually because one image cannot be decoded."""

    def __init__(self, requests: Sequence[Request], cause: BaseException) -> None:
        paths = [printable(image.path) for request in requests for image in request.images]
        named = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        super().__init__(f"{cause}\nIt happened while decoding: {named}")
        self.requests = list(requests)


class Backend(Protocol):
    """Makes views from requests."""

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Tensor]]]:
        """(request, [one [n, 3, size, size] channels_last tensor per view]) per request, in order.

        Raises:
            DecodeError: an image cannot be decoded; the error has the requests that may contain it.
        """
        ...

    def understands(self, image: EncodedImage) -> bool:
        """Whether this backend's decoder reads the same size from a file's header as we do."""
        ...

    def decodes(self, images: Sequence[EncodedImage]) -> list[bool]:
        """Which images this backend can decode, each tried alone."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...
