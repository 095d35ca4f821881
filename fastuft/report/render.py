"""HTML from the package's templates; every value is escaped unless it is markup made here."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastuft.atomic import write_whole


def render(template: str, **values: object) -> str:
    """Fill in one template; autoescape is always on, and an undefined name is an error."""
    loader = PackageLoader("fastuft.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (Path(__file__).parent / "templates" / "sort.js").read_text(encoding="utf-8")
    # The page's policy allows this script alone, by its digest: nothing from a run folder could run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        values, script=Markup(script), script_digest=Markup(f"sha256-{digest}")
    )


def write_page(path: Path, text: str) -> None:
    """Write a page or a table whole, creating its folder; bytes of names that are not UTF-8 are shown as escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode(errors="backslashreplace"))
