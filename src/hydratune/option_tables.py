"""The option tables of the docs, made from the declarations: `python -m hydratune.option_tables > docs/options.md`."""

from __future__ import annotations

from collections.abc import Iterable

from hydratune import algos
from hydratune.config import SHORTCUTS
from hydratune.options import Option, config_class, options_of

HEAD = """\
# Options

Made from the declarations by `python -m hydratune.option_tables > docs/options.md`; a test keeps it fresh.

Besides these, every field of `transformers.TrainingArguments` is `trainer.FIELD`, every field of the chosen peft config
`peft.FIELD`, and `model.init_kwargs.NAME` goes to `from_pretrained` untouched.
"""


def table(title: str, prefix: str, options: Iterable[Option]) -> str:
    """A section with one row an option: name, type, default, help."""
    rows = [
        f"| `{prefix}{o.name}` | `{o.type.replace('|', chr(92) + '|')}` | `{'null' if o.default is None else o.default}` | {o.help} |"
        for o in options
    ]
    return "\n".join(
        [f"## {title}", "", "| option | type | default | what |", "|---|---|---|---|", *rows, ""]
    )


def document() -> str:
    """The whole page."""
    sections = [table("Shortcuts", "", SHORTCUTS.values())]
    for name in ("Model", "Data", "Tracking", "Sweep"):
        declared = options_of(f"hydratune.settings:{name}Settings").values()
        sections.append(table(f"{name}: `{name.lower()}.*`", f"{name.lower()}.", declared))
    for algo in algos.names():
        declared_in = config_class(f"hydratune.algos.{algo}", "BaseConfig")
        assert declared_in is not None
        own = [o for o in options_of(declared_in).values() if o.owner != "TrainingArguments"]
        sections.append(table(f"Algorithm `{algo}`: `algo.*`", "algo.", own))
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    print(document(), end="")
