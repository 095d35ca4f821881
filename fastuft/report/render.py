"""HTML from the package's templates: every value is escaped unless it is markup made here."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """One template filled in; autoescape is always on and an undefined name is an error."""
    loader = PackageLoader("fastuft.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values)
