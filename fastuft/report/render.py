"""HTML from the package's templates: every value is escaped unless it is markup made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastuft.atomic import write_whole


def render(template: str, **values: Any) -> str:
    """One template filled in; autoescape is always on and an undefined name is an error."""
    loader = PackageLoader("fastuft.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, text: str) -> None:
    """Write a page or a table whole, its folder too; bytes of names that are not UTF-8 are shown as escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode(errors="backslashreplace"))
