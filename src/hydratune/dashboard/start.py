"""Starts the dashboard, or says what it lacks."""

from __future__ import annotations

from pathlib import Path

from hydratune.errors import UserError, Violation

_NEEDED = ("dash", "dash_ag_grid", "flask", "optuna_dashboard", "werkzeug")


def start(home: Path, *, port: int, show: bool, path: str = "/") -> None:
    """Serve the page until Ctrl-C; see `server.serve`.

    Raises:
        UserError: a package of the extra is missing, there is no such folder, or the port is taken.
    """
    try:
        from hydratune.dashboard.server import serve
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        fix = "pip install 'hydratune[dashboard]', or: make dashboard"
        raise UserError(Violation("dashboard", None, f"needs the package {missing}", fix)) from None
    serve(home, port=port, show=show, path=path)
