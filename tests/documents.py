"""The documents for tests: their pages, fenced blocks and command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHELL = ("bash", "sh", "shell", "console")


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """First line, language and text of every fenced block of a page."""
    fence: list[str] | None = None
    start, language = 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            if fence is None:
                fence, start, language = [], number + 1, line.strip().strip("`").split(" ")[0]
            else:
                yield start, language, "\n".join(fence)
                fence = None
        elif fence is not None:
            fence.append(line)
    assert fence is None, f"{page}: a block is not closed"


def command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """The command lines of a page: all lines of shell blocks, and those behind `$ ` in others; a block's variables put in."""
    for start, language, text in blocks(page):
        whole = ""
        variables: dict[str, str] = {}
        for offset, line in enumerate(text.splitlines()):
            shown = line.strip().startswith("$ ")
            if not whole and not shown and language not in SHELL:
                continue
            whole += line.strip().removeprefix("$ ")
            if whole.endswith("\\"):
                whole = whole[:-1]
            else:
                for name, value in variables.items():
                    whole = whole.replace(f"${name}", value)
                if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', whole):
                    variables[assigned[1]] = assigned[2]
                elif shlex.split(whole, comments=True):
                    yield start + offset, whole
                whole = ""


def in_text(page: Path) -> Iterator[tuple[int, str]]:
    """The `hydratune` commands in a page's running text that name what they work on."""
    text = re.sub(
        r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text("utf-8"), flags=re.M | re.S
    )
    for found in re.finditer(r"`(hydratune \w+ [^`|…]+)`", text):
        yield text[: found.start()].count("\n") + 1, found[1]
