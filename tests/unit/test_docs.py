"""The documents say what is true: option tables are those of the declarations."""

from __future__ import annotations

from pathlib import Path

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
