"""A layout: under which names another library keeps the tensors of a backbone, and how to convert them both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Sources = Callable[[str], tuple[str, ...]]
Rules = Sequence[tuple[str, str]]


def joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, several (query, key and value) one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def divided(name: str, tensor: Tensor, count: int) -> Sequence[Tensor | None]:
    """The reverse of :func:`joined`."""
    return tensor.chunk(count) if count > 1 else [tensor]


@dataclass(frozen=True)
class Layout:
    """Names and forms of a library's tensors.

    Args:
        name: for messages.
        sources: the library's names that make up a tensor of the backbone; empty where it has none.
        join: (backbone name, the library's tensors) -> the backbone's tensor.
        divide: (backbone name, its tensor, number of names) -> the library's tensors; None where another tensor's
            sources write it.
        canonical: a name in a file -> the name that ``sources`` gives; for libraries that add parts to it.
    """

    name: str
    sources: Sources
    join: Callable[[str, Sequence[Tensor]], Tensor] = joined
    divide: Callable[[str, Tensor, int], Sequence[Tensor | None]] = divided
    canonical: Callable[[str], str] = str

    def export(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A backbone's tensors under the library's names.

        Raises:
            ValueError: the library has no place for one of them.
        """
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            names = self.sources(name)
            if not names:
                raise ValueError(f"layout {self.name} has no place for {name}; export under another layout")
            for source, part in zip(names, self.divide(name, tensor, len(names)), strict=True):
                if part is not None:
                    out[source] = part.detach().cpu().contiguous().clone()
        return out


def renamed(rules: Rules) -> Sources:
    """Sources by the first pattern that matches a whole name; the replacement may name several, separated by blanks."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def sources(name: str) -> tuple[str, ...]:
        for pattern, replacement in compiled:
            match = pattern.fullmatch(name)
            if match:
                return tuple(match.expand(replacement).split())
        return ()

    return sources
