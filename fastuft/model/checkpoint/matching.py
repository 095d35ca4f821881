"""Finding a backbone among the tensors of a file: the layout and prefix of its tensors, and which are missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastuft.model.checkpoint.layout import Layout
from fastuft.model.checkpoint.reading import shown
from fastuft.model.checkpoint.resnet_layouts import RESNET_LAYOUTS
from fastuft.model.checkpoint.transformer_layouts import TRANSFORMER_LAYOUTS

LAYOUTS: tuple[Layout, ...] = (*RESNET_LAYOUTS, *TRANSFORMER_LAYOUTS)

_COUNTER = "num_batches_tracked"
# A momentum or teacher copy never wins over the network that was trained by gradients.
_SECOND_CHOICE = re.compile(r"(encoder_k|key_encoder|momentum|teacher|ema)", re.IGNORECASE)


@dataclass(frozen=True)
class Match:
    """A set of tensors in a file that match the backbone.

    Args:
        layout: their layout.
        prefix: the prefix before the library's names.
        files: backbone name -> names in the file.
        values: backbone name -> its tensor, if the shape fits.
        misfits: backbone name -> shape in the file, if it does not fit.
    """

    layout: Layout
    prefix: str
    files: dict[str, tuple[str, ...]]
    values: dict[str, Tensor]
    misfits: dict[str, tuple[int, ...]]

    @property
    def score(self) -> tuple[int, int, int]:
        """The sort key of matches: most fitting tensors, not a momentum copy, shortest prefix."""
        return len(self.values), -bool(_SECOND_CHOICE.search(self.prefix)), -len(self.prefix)

    @property
    def shown_prefix(self) -> str:
        """The prefix as shown to users."""
        return shown(self.prefix.rstrip("./"))

    def is_whole(self, wanted: Mapping[str, Tensor]) -> bool:
        """Whether it has every tensor of the backbone, except counters."""
        return all(name in self.values or name.endswith(_COUNTER) for name in wanted)

    def named(self, key: str) -> bool:
        """Whether ``key`` is the prefix or whole parts of it."""
        return f".{key.strip('./')}." in f".{self.prefix.replace('/', '.')}"


def _suffixes(name: str, most: int) -> Iterator[int]:
    """The start indices of the last 1 to ``most`` parts of a name; a name may have thousands of parts."""
    end = len(name)
    for _ in range(most):
        cut = max(name.rfind(".", 0, end), name.rfind("/", 0, end))
        yield cut + 1
        if cut < 0:
            return
        end = cut


def _as_expected(tensor: Tensor, expected: Tensor) -> Tensor:
    """A matrix as a 1x1 convolution or the reverse, with the same numbers, if that gives the expected shape."""
    if tensor.shape != expected.shape and {tensor.ndim, expected.ndim} == {2, 4} and tensor.numel() == expected.numel():
        large = tensor.shape if tensor.ndim == 4 else expected.shape
        return tensor.reshape(expected.shape) if large[2:] == (1, 1) else tensor
    return tensor


def find_matches(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[Match]:
    """All matches of the backbone in a file, the best first.

    Args:
        tensors: the tensors of the file.
        wanted: the tensors of the backbone.
    """
    matches = []
    for layout in LAYOUTS:
        sources = {name: names for name in wanted if (names := layout.sources(name))}
        known = {name for names in sources.values() for name in names}
        depth = max((name.count(".") + name.count("/") + 1 for name in known), default=0)
        by_prefix: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for file in tensors:
            name = layout.canonical(file)
            for start in _suffixes(name, depth):
                if name[start:] in known:
                    by_prefix[name[:start]][name[start:]] = file
        for prefix, found in by_prefix.items():
            files, values, misfits = {}, {}, {}
            for name, names in sources.items():
                if not all(source in found for source in names):
                    continue
                files[name] = tuple(found[source] for source in names)
                value = _joined(layout, name, [tensors[file] for file in files[name]], wanted[name])
                if value is not None and value.shape == wanted[name].shape:
                    values[name] = value
                else:
                    misfits[name] = tuple(tensors[files[name][0]].shape if value is None else value.shape)
            if files:
                matches.append(Match(layout, prefix, files, values, misfits))
    return sorted(matches, key=lambda match: match.score, reverse=True)


def _joined(layout: Layout, name: str, parts: Sequence[Tensor], expected: Tensor) -> Tensor | None:
    """The backbone's tensor, or None if the parts do not fit together."""
    try:
        return _as_expected(layout.join(name, parts), expected)
    except (RuntimeError, ValueError, IndexError):  # parts with unexpected shapes
        return None


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def surplus(match: Match, tensors: Mapping[str, Tensor]) -> list[str]:
    """Unused tensors that belong to the same network but do not exist in the backbone.

    They are blocks of a deeper network, or weights and biases that a layer does not have here. Without them, the features
    would differ. All-zero tensors change nothing and are left out.
    """
    used = {file for files in match.files.values() for file in files}
    patterns = {_pattern(file) for file in used}
    layers = {file.rpartition(".")[0] for file in used if "." in file[len(match.prefix) :]}
    found = []
    for name, tensor in tensors.items():
        if name in used or not match.layout.canonical(name).startswith(match.prefix):
            continue
        sibling = name.endswith((".weight", ".bias")) and name.rpartition(".")[0] in layers
        if (_pattern(name) in patterns or sibling) and not name.endswith(_COUNTER) and not _all_zero(tensor):
            found.append(name)
    return found


def _all_zero(tensor: Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided) and not tensor.any()
