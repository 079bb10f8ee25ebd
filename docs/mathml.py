"""A hook of mkdocs: equations become MathML while the site is built, so that no page needs a script or a font."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """The page with MathML in the place of LaTeX.

    Raises:
        Exception: latex2mathml's, of an equation that it cannot read; the build fails with it.
    """
    return _EQUATION.sub(_converted, html)


def _converted(found: re.Match[str]) -> str:
    block = found[2] == "["
    made = convert(unescape(found[3]).strip(), display="block" if block else "inline")
    made = made.replace(
        "<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>'
    )  # browsers set none after a name
    return f'<div class="equation">{made}</div>' if block else made
