"""Self-contained HTML pages: one file, no network, right in the light, in the dark, on a phone and on paper."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dora_cli.reporting.terminal import duration, number


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write a page made from ``templates/TEMPLATE``; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(_environment().get_template(template).render(**content), encoding="utf-8")
    partial.replace(path)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dora_cli.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "count": lambda n: f"{n:,}"}
    environment.filters["breakable"] = lambda name: Markup(".<wbr>").join(name.split("."))
    return environment
