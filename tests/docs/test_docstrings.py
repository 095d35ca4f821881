"""Public docstrings describe every argument, shapes of tensors, units of quantities, and raised errors."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path

from torch import Tensor

import fastuft

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("loss", "mix", "data", "model", "evaluate", "report", "trainer")
# Quantities that need a unit: (name of the argument, words of which the description must have one).
UNITS = {
    "timeout": ("second",),
    "seconds": ("second",),
    "size": ("pixel", "side", "K,", "keys", "number"),
    "resize": ("pixel", "side"),
    "rotation": ("degree",),
    "max_megapixels": ("megapixel",),
}


def public_objects():
    """(name, object) of each public object of fastuft and of its rooms, once."""
    found = {}
    for module in ("fastuft", *(f"fastuft.{room}" for room in ROOMS)):
        face = import_module(module)
        for name in face.__all__:
            value = getattr(face, name)
            if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, BaseException)):
                found.setdefault(f"{value.__module__}.{value.__qualname__}", value)
    return sorted(found.items())


OBJECTS = public_objects()
PUBLIC = {
    f"{value.__module__}.{value.__qualname__}" for name in dir(fastuft) if callable(value := getattr(fastuft, name))
}
FUNCTIONS = [(name, value) for name, value in OBJECTS if inspect.isfunction(value)]


def public_methods():
    """(name, function) of the methods that public classes define themselves."""
    for name, value in OBJECTS:
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(function, "__func__", function)  # of class and static methods
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function


CALLABLES = [*FUNCTIONS, *public_methods()]
ARRAY = re.compile(r"\b(Tensor|ndarray|ArrayLike)\b")
SHAPE = re.compile(r"\[|shape|as for :func:")  # a shape, or a reference to it


def arguments_of(value):
    """(name, annotation) of each argument of a call; for a class, of those that it does not inherit."""
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return []
    return [(p.name, str(p.annotation)) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def described(value):
    """Text of each argument in the docstring's Args, continuation lines joined."""
    texts: dict[str, str] = {}
    documentation = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        documentation += "\n" + (inspect.getdoc(value.__init__) or "")
    _, _, rest = documentation.partition("Args:\n")
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.match(r"^    (\**[\w, *]+): (.*)$", line)
        if entry:
            name = entry[1]
            for each in name.split(", "):
                texts[each.lstrip("*")] = entry[2]
        elif name:
            for each in name.split(", "):
                texts[each.lstrip("*")] += f" {line.strip()}"
    return texts


def test_public_objects_are_found():
    assert len(OBJECTS) > 60 and len(PUBLIC) > 10 and len(CALLABLES) > 100


def wrong_arguments(name, value):
    """Arguments that a docstring omits or invents; names from other packages need no list."""
    arguments, texts = [argument for argument, _ in arguments_of(value)], described(value)
    if inspect.isclass(value) and value.__bases__ != (object,):
        arguments = [argument for argument in arguments if argument in vars(value).get("__annotations__", arguments)]
    if not texts and (name not in PUBLIC or len(arguments) < 2):
        return []
    taken = set(inspect.signature(value).parameters) if inspect.isfunction(value) else set(texts)
    invented = set(texts) - taken
    return [*(f"{name}: no {argument}" for argument in arguments if argument not in texts), *sorted(invented)]


def test_docstrings_begin_with_a_sentence():
    firsts = {name: (inspect.getdoc(value) or "").partition("\n\n")[0] for name, value in OBJECTS}
    assert not [name for name, first in firsts.items() if not first.endswith((".", ":"))]


def test_docstrings_list_every_argument():
    assert not [wrong for name, value in OBJECTS for wrong in wrong_arguments(name, value)]


def without_shape_or_unit(name, value):
    """Arrays and returned arrays whose shape, and quantities whose unit, the docstring does not say."""
    texts, whole = described(value), inspect.getdoc(value) or ""
    for argument, annotation in arguments_of(value):
        text = texts.get(argument, whole)
        if ARRAY.search(annotation) and "[tuple" not in annotation and not SHAPE.search(text):
            yield f"{name}: {argument} has no shape: {text!r}"
        if argument in UNITS and argument in texts and not any(unit in text for unit in UNITS[argument]):
            yield f"{name}: {argument} has no unit: {text!r}"
    if ARRAY.search(str(inspect.signature(value).return_annotation)) and not SHAPE.search(whole):
        yield f"{name}: what it returns has no shape"


def undocumented_errors(name, value):
    """Exceptions that a function raises itself, or a class when it is made, and does not name."""
    makers = [vars(value)[maker] for maker in ("__init__", "__post_init__") if maker in vars(value)]
    documentation = inspect.getdoc(value) or ""
    for function in makers if inspect.isclass(value) else [value]:
        try:
            source = inspect.getsource(function)
        except OSError:  # made by dataclass
            continue
        documentation += inspect.getdoc(function) or ""
        raised = [node.exc for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Raise)]
        names = {getattr(call.func, "id", "") for call in raised if isinstance(call, ast.Call)}
        yield from (f"{name}: {error}" for error in sorted(names) if error not in documentation)


def test_everything_public_has_a_docstring():
    assert not [name for name, value in (*OBJECTS, *CALLABLES) if not inspect.getdoc(value)]


def test_docstrings_give_shapes_and_units():
    assert not [wrong for name, value in CALLABLES for wrong in without_shape_or_unit(name, value)]


def test_raised_errors_are_documented():
    classes = [(name, value) for name, value in OBJECTS if inspect.isclass(value)]
    assert not [wrong for name, value in (*CALLABLES, *classes) for wrong in undocumented_errors(name, value)]


def test_the_docstring_checks_find_mistakes():
    def scaled(x: Tensor, timeout: float) -> Tensor:
        """Scale.

        Args:
            x: a tensor.
            wait: how long.
        """
        raise ValueError("never")

    assert wrong_arguments("scaled", scaled) == ["scaled: no timeout", "wait"]
    assert described(scaled) == {"x": "a tensor.", "wait": "how long."}
    assert list(without_shape_or_unit("scaled", scaled)) == [
        "scaled: x has no shape: 'a tensor.'",
        "scaled: what it returns has no shape",
    ]
    assert list(undocumented_errors("scaled", scaled)) == ["scaled: ValueError"]


def test_a_missing_unit_is_found():
    def wait(timeout: float) -> None:
        """Wait.

        Args:
            timeout: how long.
        """

    assert list(without_shape_or_unit("wait", wait)) == ["wait: timeout has no unit: 'how long.'"]
