"""Checks of option values, read from the annotations of their dataclasses.

``Literal`` states the allowed values; ``Annotated`` with a `Range`, `Span` or `NonEmptyPath` states the rest, also for the
members of lists. The parser reads the same annotations, so each rule is stated once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    remedy: str = "",
) -> None:
    """Raise ValueError unless ``low <= value <= high`` (``low < value`` with ``low_open``)."""
    if not (value > low if low_open else value >= low) or not value <= high:
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name}={value!r} is out of range; allowed: {interval}{'; ' + remedy if remedy else ''}")


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``; ``low_open`` excludes ``low`` itself."""

    low: float
    high: float = math.inf
    low_open: bool = False

    def check(self, name: str, value: float) -> None:
        check_range(name, value, self.low, self.high, low_open=self.low_open)


@dataclass(frozen=True)
class Span:
    """A pair of numbers above 0, in ascending order, at most ``top``."""

    top: float = math.inf

    def check(self, name: str, value: tuple[float, float]) -> None:
        low, high = value
        check_range(f"{name}[0]", low, 0.0, high, low_open=True)
        check_range(f"{name}[1]", high, low, self.top)


@dataclass(frozen=True)
class NonEmptyPath:
    """A path or a list of paths, none of them empty, because an empty path would mean the working directory."""

    def check(self, name: str, value: str | list[str]) -> None:
        if any(not path.strip() for path in as_paths(value)):
            raise ValueError(
                f"{name}={value!r} contains an empty path; name a folder or file ('.' is the working directory)"
            )


PathName = Annotated[str, NonEmptyPath()]
Paths = Annotated[str | list[str], NonEmptyPath()]
Positive = Annotated[float, Range(0.0, low_open=True)]
NonNegative = Annotated[float, Range(0.0)]
Fraction = Annotated[float, Range(0.0, 1.0)]
AtLeast0 = Annotated[int, Range(0)]
Threads = Annotated[int, Range(0, 1024)]  # 0 derives them from the machine
AtLeast1 = Annotated[int, Range(1)]

AUTO = "auto"
# Options that a recipe may choose. A run replaces ``auto`` with numbers before anything else (fastuft.trainer.recipe), so the
# rest of the code and the type checker see numbers.
if TYPE_CHECKING:
    AutoAtLeast1 = int
    AutoAtLeast2 = int
    AutoSide = int
    AutoPositive = float
    AutoNonNegative = float
    AutoFraction = float
    AutoStem = Literal["imagenet", "small"]
else:
    AutoAtLeast1 = AtLeast1 | Literal["auto"]
    AutoAtLeast2 = Annotated[int, Range(2)] | Literal["auto"]
    AutoSide = Annotated[int, Range(8)] | Literal["auto"]
    AutoPositive = Positive | Literal["auto"]
    AutoNonNegative = NonNegative | Literal["auto"]
    AutoFraction = Fraction | Literal["auto"]
    AutoStem = Literal["auto", "imagenet", "small"]


def is_auto(value: object) -> bool:
    """Whether a value is left to the recipe."""
    return isinstance(value, str) and value == AUTO


def as_paths(value: str | list[str] | None) -> tuple[str, ...]:
    """A path, a list of paths or nothing, as a tuple of paths."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _check(name: str, value: Any, kind: Any) -> None:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        kind, *rules = parts
        _check(name, value, kind)
        for rule in rules:
            rule.check(name, value)
    elif origin is Literal:
        check_choice(name, value, parts)
    elif origin is list:
        for item in value:
            _check(name, item, parts[0])
    elif origin in (Union, UnionType) and value is not None:
        members = [part for part in parts if part is not NoneType]
        texts = [text for part in members if get_origin(part) is Literal for text in get_args(part)]
        others = [part for part in members if get_origin(part) is not Literal] or members
        if len(others) == 1 and not (isinstance(value, str) and value in texts):
            _check(name, value, others[0])


def check_values(config: object, group: str = "") -> None:
    """Check every field of a dataclass against its annotation.

    Args:
        config: instance of a dataclass.
        group: the group that the fields belong to, such as ``optim`` in ``optim.lr``; empty at the top.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        _check(f"{group}.{name}" if group else name, getattr(config, name), kind)
