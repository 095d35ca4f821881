"""How images become a network's inputs, in a form that other programs read."""

from __future__ import annotations

from fastuft.model.backbone import Backbone


def shorter_side(size: int) -> int:
    """The length in pixels to which an image's shorter side is resized before the center crop of ``size``."""
    return round(size * 256 / 224)


def preprocessing_of(backbone: Backbone) -> dict[str, object]:
    """The preprocessing steps of an evaluation, in order, as plain values."""
    return {
        "arch": backbone.arch,
        "input": {
            "name": "images",
            "shape": ["batch", 3, backbone.input_size, backbone.input_size],
            "dtype": "float32",
        },
        "output": {"name": "features", "shape": ["batch", backbone.num_features], "dtype": "float32"},
        "colors": "RGB",
        "resize_shorter_side": shorter_side(backbone.input_size),
        "interpolation": "bilinear, antialiased",
        "center_crop": backbone.input_size,
        "scale": "divide by 255",
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }


def transformers_preprocessor(backbone: Backbone) -> dict[str, object]:
    """The same in the form of ``preprocessor_config.json`` of transformers."""
    side = backbone.input_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": shorter_side(side)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
    }
