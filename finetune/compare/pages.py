"""Pages and tables from the templates beside this file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).with_name("templates")
_MOST_DECIMALS = 6
_MINUS, _NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def render(template: str, content: Mapping[str, Any]) -> str:
    """A template of `TEMPLATES` with its blanks filled; text is escaped where the template is HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: ".html" in (name or ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": figure, "signed": signed, "chance": chance, "cell": _markdown_cell}
    return environment.get_template(template).render(content)


def signed(value: float | None) -> str:
    """A gain or difference, to three digits that say something: three decimals, or more where it is small."""
    if value is None:
        return _NONE
    decimals = 3 if value == 0 else min(max(3, 2 - math.floor(math.log10(abs(value)))), _MOST_DECIMALS)
    return f"{value:+,.{decimals}f}".replace("-", _MINUS)


def figure(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}".replace("-", _MINUS)


def chance(value: float | None, name: str = "p ") -> str:
    """A p-value."""
    if value is None:
        return _NONE
    return f"{name}< 0.001" if value < 0.001 else f"{name}{value:.3f}"


def _markdown_cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
