"""The DALI backend: one pipeline function that decodes on the CPU or on the GPU ("mixed"), depending on the device."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia import nvimgcodec
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin
from torch import Tensor

from fastuft.data.backend import DecodeError, Request, ViewSpec
from fastuft.data.decoding import EncodedImage
from fastuft.data.strong import BINS, FILL, RANGES

_TWIST = ("brightness", "contrast", "saturation", "hue")


def _used(spec: ViewSpec) -> list[str]:
    """The names of the view parameters that the pipeline takes, in order."""
    names = ["roi_start", "roi_end"]
    names += ["angle"] if spec.rotation else []
    names += ["twisted", *_TWIST] if spec.color else []
    names += ["sigma"] if spec.blur else []
    return [*names, "flip"]


# auto_aug's own operators use older names, which cause a warning whenever a pipeline is built.
_filter, _equalize = (getattr(fn, name, None) or getattr(fn.experimental, name) for name in ("filter", "equalize"))


@augmentation(mag_to_param=augmentations.sharpness_kernel, param_device="auto")
def _sharpness(data: Any, kernel: Any) -> Any:
    return _filter(data, kernel)


@augmentation
def _equalized(data: Any, _: Any) -> Any:
    return _equalize(data)


_RENAMED = {"sharpness": _sharpness, "equalize": _equalized}
_STRONG = ("op", "magnitude_bin", "negate", "erase_start", "erase_shape")


def _operator(name: str) -> Any:
    """DALI's operator for a RandAugment name, with the range of magnitudes that both loaders use."""
    low, high, signed = RANGES[name]
    operator = _RENAMED[name] if name in _RENAMED else getattr(augmentations, name)
    return operator if low == high else operator.augmentation(mag_range=(low, high), randomly_negate=signed)


def _strong(x: Any, spec: ViewSpec, drawn: dict[str, Any]) -> Any:
    """RandAugment and Cutout on uint8 images [size, size, 3]."""
    assert spec.strong is not None
    operators = [_operator(name) for name in spec.strong.ops]
    for number in range(spec.strong.num_ops):
        x = select(
            operators,
            drawn["op"][number],
            x,
            magnitude_bin=signed_bin(drawn["magnitude_bin"][number], random_sign=drawn["negate"][number]),
            num_magnitude_bins=BINS,
            fill_value=FILL,
            shape=[spec.size, spec.size],
        )
    return fn.erase(x, anchor=drawn["erase_start"], shape=drawn["erase_shape"], fill_value=FILL)


def _decoded(encoded: Any, spec: ViewSpec) -> Any:
    """Upright RGB [H, W, 3] uint8 from a file's bytes, on the device that decodes."""
    options: dict[str, Any] = {"device": "cpu"}
    if spec.loading.device.type == "cuda":
        # The chroma upsampling of the CPU decoder, so that pixels differ between devices only by rounding.
        load = spec.loading.hw_decoder_load
        options = {"device": "mixed", "hw_decoder_load": load, "jpeg_fancy_upsampling": True}
        width, height = spec.largest
        if width and load > 0:
            options |= {"preallocate_width_hint": width, "preallocate_height_hint": height}
    # The only metadata is at most one tag of our own; see :class:`fastuft.data.feed.Feed`.
    return fn.decoders.image(encoded, output_type=types.RGB, **options)


@pipeline_def(enable_conditionals=True, exec_dynamic=True)
def _view_pipeline(source: Any, spec: ViewSpec) -> Any:
    """Bytes -> decode once -> per view: crop and resize, rotate, color and blur if drawn, flip and normalize."""
    used = _used(spec)
    strong = _STRONG if spec.strong is not None else ()
    count = 1 + len(used) * spec.num_views + len(strong)
    # On a CPU, requests are held until their views are ready; a GPU might still be reading them then.
    held = spec.loading.device.type == "cpu"
    encoded, *inputs = fn.external_source(source=source, num_outputs=count, batch=True, no_copy=held)
    image = _decoded(encoded, spec)
    # DALI has no bfloat16. For views, which are within +-3, float16 is more precise, and it halves the traffic on a GPU.
    half = spec.loading.dtype == torch.float16 or (
        spec.loading.dtype == torch.bfloat16 and spec.loading.device.type == "cuda"
    )
    outputs = []
    for view in range(spec.num_views):
        drawn = {name: inputs[view * len(used) + i] for i, name in enumerate(used)}
        roi = {"roi_start": drawn["roi_start"], "roi_end": drawn["roi_end"]}
        x = fn.resize(image, **roi, size=[spec.size, spec.size], interp_type=types.INTERP_LINEAR)
        if spec.rotation:
            x = fn.rotate(x, angle=drawn["angle"], keep_size=True, fill_value=0)
        if spec.strong is not None and view == spec.num_views - 1:
            rest = inputs[spec.num_views * len(used) :]
            x = _strong(x, spec, {name: rest[i] for i, name in enumerate(strong)})
        # The outer conditions below are evaluated by Python, for the pipeline; the inner ones by DALI, for each sample.
        # Samples without jitter and grayscale, or without blur, skip the operator. These two cost most on a CPU, and half
        # as much again if they round their results to bytes.
        if spec.color:
            if drawn["twisted"]:
                x = fn.color_twist(x, **{name: drawn[name] for name in _TWIST}, dtype=types.FLOAT)
                x = math.min(math.max(x, 0.0), 255.0)
            else:
                x = fn.cast(x, dtype=types.FLOAT)
        if spec.blur:
            if drawn["sigma"] > 0:
                x = fn.gaussian_blur(x, sigma=drawn["sigma"], dtype=types.FLOAT)
            elif not spec.color:  # otherwise they are floats already, and a cast would copy them
                x = fn.cast(x, dtype=types.FLOAT)
        outputs.append(
            fn.crop_mirror_normalize(
                x,
                mirror=drawn["flip"],
                mean=[255 * value for value in spec.loading.mean],
                std=[255 * value for value in spec.loading.std],
                dtype=types.FLOAT16 if half else types.FLOAT,
                output_layout="HWC",
            )
        )
    return tuple(outputs)


@pipeline_def(exec_dynamic=True)
def _decode_pipeline(source: Any, spec: ViewSpec) -> Any:
    return _decoded(fn.external_source(source=source, batch=False), spec)


class DaliBackend:
    """Makes views with a DALI pipeline that is built once and fed request by request."""

    def __init__(self, spec: ViewSpec) -> None:
        self.spec = spec
        self._requests: Iterator[Request] = iter(())
        self._under_way: deque[tuple[Request, list[Any]]] = deque()  # with the arrays that DALI reads
        self._failure: BaseException | None = None
        self._device_id: int | None = None
        if spec.loading.device.type == "cuda":
            index = spec.loading.device.index
            self._device_id = torch.cuda.current_device() if index is None else index
        self._build()

    def _build(self) -> None:
        with warnings.catch_warnings():
            # A short list of operators leaves some of the draws unused.
            warnings.filterwarnings("ignore", message=".*The external source node")
            self._pipeline: Any = _view_pipeline(
                self._feed,
                self.spec,
                batch_size=self.spec.batch_size,
                num_threads=self.spec.loading.num_threads,
                device_id=self._device_id,
                prefetch_queue_depth=self.spec.loading.prefetch,
            )
            self._pipeline.build()
        self._fresh = True

    def _feed(self) -> list[Any]:
        try:
            request = next(self._requests)
        except StopIteration:
            raise
        except BaseException as error:  # DALI would wrap it; run() raises it unchanged
            self._failure = error
            raise StopIteration from error
        arrays = self._arrays(request)
        self._under_way.append((request, arrays))
        return arrays

    def _arrays(self, request: Request) -> list[Any]:
        arrays: list[Any] = [[np.frombuffer(image.data, np.uint8) for image in request.images]]
        arrays += [getattr(view, name) for view in request.views for name in _used(self.spec)]
        if self.spec.strong is not None:
            arrays += [getattr(request.strong, name) for name in _STRONG]
        return arrays

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Tensor]]]:
        """See :class:`fastuft.data.backend.Backend`."""
        if not self._fresh:  # an earlier run was abandoned, and the prefetched batches belong to it
            self._build()
        self._fresh = False
        self._requests = requests
        self._under_way.clear()
        self._failure = None
        while True:
            try:
                results = self._next()
            except StopIteration:
                self._pipeline.reset()
                self._fresh = True
                if self._failure is not None:
                    raise self._failure from None
                return
            except RuntimeError as error:  # a failed pipeline cannot run again, so the next run builds a new one
                raise DecodeError([request for request, _ in self._under_way], error) from error
            request, _ = self._under_way.popleft()
            yield request, [self._to_torch(result) for result in results]

    def _next(self) -> Any:
        if self._device_id is None:
            return self._pipeline.run()
        # Results are ordered on the consumer's stream, so the host does not wait for them. The argument is positional
        # because DALI takes keywords for inputs of the pipeline.
        return self._pipeline.run(torch.cuda.current_stream(self._device_id))

    def _to_torch(self, result: Any) -> Tensor:
        # The dynamic executor does not overwrite buffers that are still held.
        tensor = torch.utils.dlpack.from_dlpack(result.as_tensor()).permute(0, 3, 1, 2)
        dtype = self.spec.loading.dtype
        return tensor if tensor.dtype == dtype else tensor.to(dtype)

    def understands(self, image: EncodedImage) -> bool:
        """See :class:`fastuft.data.backend.Backend`.

        DALI's decoder kills the process if it cannot parse a header in a batch, so its parser is asked beforehand.
        """
        try:
            stream = nvimgcodec.CodeStream(image.data)
            return (stream.width, stream.height) == (image.header.width, image.header.height)
        except RuntimeError:
            return False

    def decodes(self, images: Sequence[EncodedImage]) -> list[bool]:
        """See :class:`fastuft.data.backend.Backend`."""
        results: list[bool] = []
        while len(results) < len(images):  # a failed pipeline cannot run again
            contents = iter([np.frombuffer(image.data, np.uint8) for image in images[len(results) :]])
            pipeline = _decode_pipeline(
                contents,
                self.spec,
                batch_size=1,
                num_threads=1,
                device_id=self._device_id,
                prefetch_queue_depth=1,
            )
            pipeline.build()
            try:
                while len(results) < len(images):
                    pipeline.run()
                    results.append(True)
            except RuntimeError:
                results.append(False)
        return results

    def close(self) -> None:
        """See :class:`fastuft.data.backend.Backend`."""
        self._requests = iter(())
        self._under_way.clear()
        self._pipeline = None
