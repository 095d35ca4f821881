"""The DALI backend: one pipeline function, decoding on the CPU or on the GPU ("mixed") as the device says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from fastuft.data.backend import DecodeError, Request, ViewSpec


def _used(spec: ViewSpec) -> list[str]:
    """Names of the view parameters that the pipeline takes, in order."""
    names = ["roi_start", "roi_end"]
    names += ["angle"] if spec.rotation else []
    names += ["brightness", "contrast", "saturation", "hue"] if spec.colour else []
    names += ["sigma"] if spec.blur else []
    return [*names, "flip"]


@pipeline_def(enable_conditionals=True, exec_dynamic=True)
def _view_pipeline(source: Any, spec: ViewSpec) -> Any:
    """Bytes -> decode once -> for each view: crop and resize, rotate, colour, blur where drawn, flip and normalise."""
    mixed = spec.device.type == "cuda"
    used = _used(spec)
    inputs = fn.external_source(source=source, num_outputs=1 + len(used) * spec.num_views, batch=True)
    decoder: dict[str, Any] = {"hw_decoder_load": spec.hw_decoder_load} if mixed else {}
    image = fn.decoders.image(
        fn.io.file.read(inputs[0]), device="mixed" if mixed else "cpu", output_type=types.RGB, **decoder
    )
    outputs = []
    for view in range(spec.num_views):
        drawn = {name: inputs[1 + view * len(used) + place] for place, name in enumerate(used)}
        roi = {"roi_start": drawn["roi_start"], "roi_end": drawn["roi_end"]}
        x = fn.resize(image, **roi, size=[spec.size, spec.size], interp_type=types.INTERP_LINEAR)
        if spec.rotation:
            x = fn.rotate(x, angle=drawn["angle"], keep_size=True, fill_value=0)
        if spec.colour:
            twist = {name: drawn[name] for name in ("brightness", "contrast", "saturation", "hue")}
            x = fn.color_twist(x, **twist)
        if spec.blur:  # noqa: SIM102 (the inner condition is one of the pipeline, on each sample)
            # Blur is the dearest operator of a CPU pipeline; samples that drew none skip it.
            if drawn["sigma"] > 0:
                x = fn.gaussian_blur(x, sigma=drawn["sigma"])
        outputs.append(
            fn.crop_mirror_normalize(
                x,
                mirror=drawn["flip"],
                mean=[255 * value for value in spec.mean],
                std=[255 * value for value in spec.std],
                dtype=types.FLOAT16 if spec.dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
            )
        )
    return tuple(outputs)


class DaliBackend:
    """Views by a DALI pipeline that is built once and fed request by request."""

    def __init__(self, spec: ViewSpec) -> None:
        self.spec = spec
        self._requests: Iterator[Request] = iter(())
        self._under_way: deque[Request] = deque()
        self._failure: BaseException | None = None
        self._build()

    def _build(self) -> None:
        self._pipeline = _view_pipeline(
            self._feed,
            self.spec,
            batch_size=self.spec.batch_size,
            num_threads=self.spec.num_threads,
            device_id=(self.spec.device.index or 0) if self.spec.device.type == "cuda" else None,
            prefetch_queue_depth=self.spec.prefetch,
        )
        self._pipeline.build()

    def _feed(self) -> list[Any]:
        try:
            request = next(self._requests)
        except StopIteration:
            raise
        except BaseException as error:  # DALI would wrap it; run() raises it as it was
            self._failure = error
            raise StopIteration from error
        self._under_way.append(request)
        names = [np.frombuffer(path.encode(), np.uint8) for path in request.paths]
        return [names, *(getattr(view, name) for view in request.views for name in _used(self.spec))]

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[Tensor]]]:
        """See :class:`fastuft.data.backend.Backend`."""
        if self._under_way:  # an epoch was left early: batches made ahead belong to it
            self._build()
        self._requests = requests
        self._under_way.clear()
        self._failure = None
        while True:
            try:
                results = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                if self._failure is not None:
                    raise self._failure from None
                return
            except RuntimeError as error:
                paths = [path for request in self._under_way for path in request.paths]
                self._build()  # a failed pipeline does not run again
                self._under_way.clear()
                raise DecodeError(paths, error) from error
            request = self._under_way.popleft()
            yield request, [self._to_torch(result) for result in results]

    def _to_torch(self, result: Any) -> Tensor:
        # The dynamic executor hands out buffers that it does not write again while they are held.
        tensor = torch.from_dlpack(result.as_tensor()).permute(0, 3, 1, 2)
        return tensor if tensor.dtype == self.spec.dtype else tensor.to(self.spec.dtype)

    def close(self) -> None:
        """See :class:`fastuft.data.backend.Backend`."""
        self._requests = iter(())
        self._under_way.clear()
        del self._pipeline


@pipeline_def(exec_dynamic=True)
def _decode_pipeline(path: Any) -> Any:
    return fn.decoders.image(fn.io.file.read(path), device="cpu", output_type=types.RGB)


def undecodable(paths: list[str]) -> list[tuple[str, str]]:
    """(path, reason) of the files that DALI cannot decode, each tried alone."""
    bad = []
    for path in dict.fromkeys(paths):
        name = types.Constant(np.frombuffer(path.encode(), np.uint8))
        pipeline = _decode_pipeline(name, batch_size=1, num_threads=1, device_id=None)
        try:
            pipeline.build()
            pipeline.run()
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines() if line.strip()]
            bad.append((path, f"cannot be decoded ({reasons[0] if reasons else 'decoder failed'})"))
    return bad
