"""A layout: the names that another library gives to a backbone's tensors, and their conversion in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Sources = Callable[[str], tuple[str, ...]]
Rules = Sequence[tuple[str, str]]


def joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """A single tensor unchanged; several (query, key and value) concatenated."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def divided(name: str, tensor: Tensor, count: int) -> Sequence[Tensor | None]:
    """The reverse of :func:`joined`."""
    return tensor.chunk(count) if count > 1 else [tensor]


@dataclass(frozen=True)
class Layout:
    """The names and shapes of a library's tensors.

    Args:
        name: its name in messages.
        sources: the library's names for a tensor of the backbone; empty if it has none.
        join: (backbone name, the library's tensors) -> the backbone's tensor.
        divide: (backbone name, its tensor, number of names) -> the library's tensors; None for one that is written with
            another tensor.
        canonical: a name in a file -> the name that ``sources`` returns, for libraries that add parts to names.
    """

    name: str
    sources: Sources
    join: Callable[[str, Sequence[Tensor]], Tensor] = joined
    divide: Callable[[str, Tensor, int], Sequence[Tensor | None]] = divided
    canonical: Callable[[str], str] = str

    def export(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A backbone's tensors under the library's names.

        Raises:
            ValueError: the library has no name for one of them.
        """
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            names = self.sources(name)
            if not names:
                raise ValueError(f"layout {self.name} has no tensor for {name}; export with another layout")
            for source, part in zip(names, self.divide(name, tensor, len(names)), strict=True):
                if part is not None:
                    out[source] = part.detach().cpu().contiguous().clone()
        return out


def renamed(rules: Rules) -> Sources:
    """Sources from the first pattern that matches a whole name; a replacement may have several names, with spaces between."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def sources(name: str) -> tuple[str, ...]:
        for pattern, replacement in compiled:
            match = pattern.fullmatch(name)
            if match:
                return tuple(match.expand(replacement).split())
        return ()

    return sources
