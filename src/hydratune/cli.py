"""`hydratune …`: the small commands beside `python train.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hydratune.errors import UserError
from hydratune.sweep.commands import app as sweep

app = typer.Typer(no_args_is_help=True, add_completion=True, rich_markup_mode="markdown")
app.add_typer(sweep, name="sweep")


@app.callback()
def main() -> None:
    """Small commands around the runs that `python train.py` makes."""


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(help="A run directory, or a saved adapter.")],
    target: Annotated[Path, typer.Argument(help="Where the stand-alone model goes; a new directory.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
) -> None:
    """Merge an adapter into its base model, saved so that plain transformers loads it."""
    import torch

    from hydratune.adapters import merge_adapter

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(kinds)}")
    try:
        saved = merge_adapter(source, target, dtype=kinds[dtype] if dtype else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    print(f"merged model in {saved}")


@app.command()
def dashboard(
    folder: Annotated[Path, typer.Argument(help="Where the studies and runs are.")] = Path("outputs"),
    port: Annotated[int, typer.Option(help="Of the page; 0: any free one.")] = 8080,
    open: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """One page on 127.0.0.1 for all studies and runs: filter, overlay, compare, live while they train."""
    from hydratune.dashboard.start import start

    try:
        start(folder, port=port, show=open)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
