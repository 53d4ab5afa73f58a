"""HTML pages from templates. They need no other file and no network when they are shown."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, **values: object) -> str:
    """Returns a page. Every value is escaped, so that a prompt or a file name cannot add HTML.

    Args:
        template: the file of a Jinja template; it may include files beside it.
        values: of the template's variables.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
