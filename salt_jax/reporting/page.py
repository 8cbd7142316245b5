"""Renders a report as one HTML page with its images inside, without scripts or network access.

Every text from a run is escaped, and the page's content policy forbids scripts and external
resources. The template is page.html.
"""

import base64
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from salt_jax.errors import visible
from salt_jax.reporting.runs import Origin
from salt_jax.reporting.sections import Report
from salt_jax.terminal import WRITING

TEMPLATE = pathlib.Path(__file__).parent / "page.html"


def render(title: str, report: Report, origins: Sequence[tuple[str, Origin]], made: str) -> str:
    """The page, with the runs' `origins` by their names in the report; `made` is in the footer."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters["base64"] = lambda data: markupsafe.Markup(base64.b64encode(data).decode())
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, report=report, origins=origins, made=made)


def _shown(value: Any) -> Any:
    """A text with control characters escaped; jinja2 then escapes markup."""
    is_markup = isinstance(value, markupsafe.Markup)
    return value if is_markup else visible(str(value), f"\n{WRITING}")
