"""HTML pages, each whole in one file."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """A page made of one of the templates beside this file; a value that it lacks is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ort_train.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)
