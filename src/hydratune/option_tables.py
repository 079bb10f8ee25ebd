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
`peft.FIELD`, and `model.init_kwargs.NAME` goes to `from_pretrained` untouched. Equations: `algorithms/`.
"""


def table(title: str, prefix: str, options: Iterable[Option]) -> str:
    """A section with one row an option: name, type, default, help."""
    rows = [
        f"| `{prefix}{o.name}` | `{_words(o.type)}` | `{'null' if o.default is None else o.default}` | {o.help} |"
        for o in options
    ]
    return "\n".join(
        [f"## {title}", "", "| option | type | default | what |", "|---|---|---|---|", *rows, ""]
    )


def _words(annotation: str) -> str:
    """A type without bars, which Markdown's tables split at, and with what is typed for None."""
    return annotation.replace(" | ", " or ").replace("None", "null")


def document() -> str:
    """The whole page."""
    sections = [table("Shortcuts", "", SHORTCUTS.values())]
    for name in ("Model", "Data", "Tracking", "Sweep"):
        declared = options_of(f"hydratune.settings:{name}Settings").values()
        sections.append(table(f"{name}: `{name.lower()}.*`", f"{name.lower()}.", declared))
    own = {algo: _own(algo) for algo in algos.names()}
    first = next(iter(own.values()))
    shared = [o for name, o in first.items() if all(_same(o, of.get(name)) for of in own.values())]
    sections.append(table("Every algorithm: `algo.*`", "algo.", shared))
    names = {o.name for o in shared}
    for algo, of in own.items():
        rest = [o for o in of.values() if o.name not in names]
        sections.append(table(f"Algorithm `{algo}`: `algo.*`", "algo.", rest))
    return "\n".join([HEAD, *sections])


def _same(one: Option, other: Option | None) -> bool:
    """Whether two algorithms declare an option alike."""
    return other is not None and (one.type, one.default, one.help) == (other.type, other.default, other.help)


def _own(algo: str) -> dict[str, Option]:
    """An algorithm's options, without those of transformers."""
    declared_in = config_class(f"hydratune.algos.{algo}", "BaseConfig")
    assert declared_in is not None
    return {o.name: o for o in options_of(declared_in).values() if o.owner != "TrainingArguments"}


if __name__ == "__main__":
    print(document(), end="")
