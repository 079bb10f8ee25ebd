"""`hydratune …`: the commands beside `python train.py`, one file of `commands/` each."""

from __future__ import annotations

import typer

from hydratune.commands import chat, compare, dashboard, doctor, evaluate, export, generate, runs
from hydratune.sweep.commands import app as sweep

app = typer.Typer(no_args_is_help=True, add_completion=True, rich_markup_mode="markdown")


@app.callback()
def main() -> None:
    """Commands around the runs that `python train.py` makes."""


app.command()(runs.runs)
app.command()(compare.compare)
app.command()(chat.chat)
app.command()(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command()(export.export)
app.command()(export.merge)
app.command()(doctor.doctor)
app.command()(dashboard.dashboard)
app.add_typer(sweep, name="sweep")
