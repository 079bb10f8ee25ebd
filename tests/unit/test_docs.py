"""The documents say what is true: option tables are those of the declarations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hydratune.option_tables import document

ROOT = Path(__file__).parents[2]


def test_option_tables_are_fresh():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == document(), (
        "run: python -m hydratune.option_tables > docs/options.md"
    )


def test_every_own_option_has_a_help_text():
    rows = [line for line in document().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.rstrip(" |").endswith("`")]


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_documents_name_commands_and_options_that_exist(path):
    from typer.main import get_command

    from hydratune.cli import app

    commands = get_command(app).commands
    for line in re.findall(
        r"^(?:\$ )?hydratune ([a-z].*?)(?: +#.*)?$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE
    ):
        command = commands.get(line.split()[0])
        assert command is not None, line
        command = getattr(command, "commands", {}).get(line.split()[1] if " " in line else "", command)
        known = {option for parameter in command.params for option in parameter.opts}
        assert not {*re.findall(r"--[a-z-]+", line)} - known, line
