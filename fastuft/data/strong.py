"""The strong view of consistency training: RandAugment and Cutout, with every number drawn on the host.

Operators and ranges are those of FixMatch (Sohn et al. 2020, Table 12); a magnitude is drawn uniformly over its range for
each operator of each image. The DALI loader applies DALI's own ``auto_aug`` operators, the PyTorch loader Pillow's; the draws
are the same for both, for any number of threads, and after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastuft.config import check_choice, check_range

# (weakest magnitude, strongest magnitude, whether the sign is drawn too), in the units of the operator's parameter: a factor
# minus one, degrees, shares of the side, bits, or a threshold.
RANGES: dict[str, tuple[float, float, bool]] = {
    "auto_contrast": (0, 0, False),
    "brightness": (-0.05, -0.95, False),
    "color": (-0.05, -0.95, False),
    "contrast": (-0.05, -0.95, False),
    "equalize": (0, 0, False),
    "identity": (0, 0, False),
    "posterize": (8, 4, False),
    "rotate": (0, 30, True),
    "sharpness": (-0.05, -0.95, False),
    "shear_x": (0, 0.3, True),
    "shear_y": (0, 0.3, True),
    "solarize": (255, 0, False),
    "translate_x": (0, 0.3, True),
    "translate_y": (0, 0.3, True),
}
BINS = 31  # number of evenly spaced magnitudes to draw from
FILL = 128  # gray, for areas outside the image


@dataclass(frozen=True)
class StrongConfig:
    """RandAugment and Cutout.

    Args:
        ops: operators to draw from.
        num_ops: operators applied to each image, drawn with replacement.
        cutout: side of the erased square as a share of the image's, centered anywhere and clipped.

    Raises:
        ValueError: no or unknown operators, or a number out of range.
    """

    ops: tuple[str, ...] = tuple(RANGES)
    num_ops: int = 2
    cutout: float = 0.5

    def __post_init__(self) -> None:
        if not self.ops:
            raise ValueError(f"ops is empty; choose from {', '.join(RANGES)}")
        for name in self.ops:
            check_choice("ops", name, tuple(RANGES))
        check_range("num_ops", self.num_ops, 0)
        check_range("cutout", self.cutout, 0.0, 1.0)


@dataclass(frozen=True)
class StrongParameters:
    """Parameters of the strong view of each image, applied after its crop.

    Args:
        op: indices into ``StrongConfig.ops``, int32 [n, N].
        magnitude_bin: values in 0..BINS-1, int32 [n, N].
        negate: 1 flips the sign of operators that have one, int32 [n, N].
        erase_start: (y, x) of the erased square's first corner in pixels, [n, 2].
        erase_shape: its sides in pixels, [n, 2].
    """

    op: NDArray[np.int32]
    magnitude_bin: NDArray[np.int32]
    negate: NDArray[np.int32]
    erase_start: NDArray[np.float32]
    erase_shape: NDArray[np.float32]


def draws_of(config: StrongConfig) -> int:
    """The number of uniform draws per image."""
    return 3 * config.num_ops + 2


def draw_strong(config: StrongConfig, size: int, u: np.ndarray) -> StrongParameters:
    """The parameters of one strong view of each image.

    Args:
        config: operators, their number, and the erased share.
        size: side of the view, pixels.
        u: uniform draws [n, draws_of(config)].
    """
    count = config.num_ops
    op, level, sign = (u[:, i * count : (i + 1) * count] for i in range(3))
    side = round(config.cutout * size)
    center = np.floor(u[:, 3 * count :] * size)
    start, end = np.clip(center - side // 2, 0, size), np.clip(center - side // 2 + side, 0, size)
    return StrongParameters(
        op=(op * len(config.ops)).astype(np.int32),
        magnitude_bin=(level * BINS).astype(np.int32),
        negate=(sign < 0.5).astype(np.int32),
        erase_start=start.astype(np.float32),
        erase_shape=(end - start).astype(np.float32),
    )


def magnitude(name: str, magnitude_bin: int, negate: int) -> float:
    """An operator's magnitude, in the units of ``RANGES``."""
    low, high, signed = RANGES[name]
    value = low + (high - low) * magnitude_bin / (BINS - 1)
    return -value if signed and negate else value
