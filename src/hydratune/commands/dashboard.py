"""`hydratune dashboard`: all studies and runs on one page of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hydratune.commands.common import clear
from hydratune.runs import HOME


@clear
def dashboard(
    folder: Annotated[Path, typer.Argument(help="Where the studies and runs are.")] = HOME,
    port: Annotated[int, typer.Option(help="Of the page; 0: any free one.")] = 8080,
    open: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """One page on 127.0.0.1 for all studies and runs: filter, overlay, compare, live while they train.

    Example: `hydratune dashboard --port 8090 --no-open`
    """
    from hydratune.dashboard.start import start

    start(folder, port=port, show=open)
