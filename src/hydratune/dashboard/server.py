"""One local server for our page of runs, their files, and optuna-dashboard; on 127.0.0.1, and for requests made to it only."""

from __future__ import annotations

import json
import mimetypes
import os
import socket
import sys
import webbrowser
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, abort, redirect, send_file
from jinja2 import Environment, PackageLoader
from optuna_dashboard import wsgi as optuna_dashboard
from werkzeug.serving import WSGIRequestHandler, make_server

from hydratune.dashboard.drawn import drawn
from hydratune.dashboard.library import Library, below
from hydratune.dashboard.page import build
from hydratune.dashboard.studies import Curves, Studies
from hydratune.errors import UserError, Violation
from hydratune.runs import find_runs, find_studies
from hydratune.secrets import redact_file

HOST = "127.0.0.1"
_NAMES = {"127.0.0.1", "localhost"}  # another name that leads here is a trick of some web page's
_OPTUNA = {"dashboard", "api", "static", "artifacts", "csv", "favicon.ico", "incompatible-rdb-schema"}
_CHANGE = "This dashboard shows studies and takes notes; it does not change them. Use the command line."
# Our pages, Dash's and Optuna's; what runs have written, which runs no script; and the page of a study, whose plots need theirs,
# in an origin of its own. None may ask anything of another machine, and the last two nothing of this server but pictures.
_PAGE = "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'self'"
_FILE = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PLOTS = _FILE.replace("sandbox;", "sandbox allow-scripts; script-src 'unsafe-inline';")
_WAY_BACK = b"""<style>#dashboard a:not([class]) { color:#3f8cf0 } #runs { position:fixed; z-index:2000; top:14px; right:24px; color:#fff;
background:#2f6fde; border-radius:8px; padding:6px 14px; font:600 14px system-ui,sans-serif; text-decoration:none }</style><a id="runs" href="/">Runs</a>"""
_TEXT = {".jsonl", ".json", ".yaml", ".yml", ".log", ".md", ".sh", ".csv", ".txt", ".jinja", ".py", ""}


def application(home: Path) -> Callable[..., Iterable[bytes]]:
    """The WSGI application that serves the studies and runs below a folder."""
    studies = Studies(home)
    dash = build(Library(home), studies)
    _serve_files(dash.server, home)
    dash.server.after_request(_confine)
    optuna = optuna_dashboard(studies, artifact_store=Curves(studies))

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = environ.get("HTTP_HOST", "")
        if not {asked, asked.rpartition(":")[0]} & _NAMES:
            return _refuse(start, "Only requests to 127.0.0.1 or localhost are answered.")
        path = environ.get("PATH_INFO", "/")
        if path.lstrip("/").partition("/")[0] in _OPTUNA:
            method = environ["REQUEST_METHOD"]
            if method not in ("GET", "HEAD") and not (method == "PUT" and path.endswith("/note")):
                return _refuse(start, _CHANGE)
            return (
                _with_way_back(optuna, environ, start)
                if path.startswith("/dashboard")
                else optuna(environ, start)
            )
        return dash.server(environ, start)

    return serve


def _with_way_back(optuna: Any, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Optuna's page with a link to ours, and with links that can be read on dark."""
    told: list[Any] = []
    answer = optuna({**environ, "HTTP_IF_MODIFIED_SINCE": ""}, lambda *status: told.extend(status[:2]))
    body = b"".join(answer).replace(b"</body>", _WAY_BACK + b"</body>")
    if hasattr(answer, "close"):
        answer.close()
    kept = [
        (name, value)
        for name, value in told[1]
        if name.lower() not in ("content-length", "last-modified", "etag")
    ]
    start(told[0], [*kept, ("Content-Length", str(len(body))), ("Content-Security-Policy", _PAGE)])
    return [body]


def _refuse(start: Callable[..., Any], why: str) -> list[bytes]:
    body = json.dumps({"reason": why}).encode()
    start("403 Forbidden", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _confine(response: Response) -> Response:
    response.headers.setdefault("Content-Security-Policy", _PAGE)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _serve_files(server: Flask, home: Path) -> None:
    """`/runs/PATH`: a file below the folder, or the list of what is in one of its folders."""
    root = home.resolve()
    page = Environment(loader=PackageLoader("hydratune"), autoescape=True).get_template("files.html.j2")

    @server.get("/runs/")
    @server.get("/runs/<path:name>")
    def files(name: str = "") -> Any:
        path = _inside(root, root / name)
        if path is None:
            abort(404)
        if not path.exists():
            content = drawn(path)
            if content is None:
                abort(404)
            return _file(Response(content, mimetype=mimetypes.guess_type(path.name)[0]), path)
        if path.is_dir():
            if name and not name.endswith("/"):
                return redirect(f"/runs/{name}/")
            rows = _listed(root, path)
            is_run = any(entry in ("config.yaml", "summary.json") for entry, _ in rows)
            place = "" if path == root else str(path.relative_to(root))
            return page.render(
                name=name.strip("/"),
                folder=path,
                rows=rows,
                curves=f"/?run={quote(place)}" if place and is_run else below(place),
            )
        kind = "text/plain" if path.suffix in _TEXT else mimetypes.guess_type(path.name)[0]
        if path.suffix in _TEXT and path.suffix not in (".jsonl", ".csv"):
            text = path.read_text(encoding="utf-8", errors="replace")
            answer = Response(redact_file(text, path.suffix), mimetype=kind)
        else:
            answer = send_file(path, mimetype=kind or "application/octet-stream")
        return _file(answer, path)


def _inside(root: Path, path: Path) -> Path | None:
    """Where a path leads, links followed; None where that is outside of the folder, or nowhere."""
    try:
        found = path.resolve()
        found.exists()
    except (OSError, RuntimeError, ValueError):  # links in a circle, too long, or no name of a file at all
        return None
    return found if found.is_relative_to(root) else None


def _listed(root: Path, folder: Path) -> list[tuple[str, str]]:
    """The name of each thing in a folder and its size, folders first; not of what has gone meanwhile, or leads out."""
    rows = []
    for entry in folder.iterdir():
        with suppress(OSError):
            if _inside(root, entry):
                is_dir, size = entry.is_dir(), entry.stat().st_size
                rows.append((not is_dir, entry.name + "/" * is_dir, "" if is_dir else _size(size)))
    return [(name, size) for _, name, size in sorted(rows)]


def _file(answer: Response, path: Path) -> Response:
    plots = path.name == "report.html" and (path.parent / "study.json").is_file()
    answer.headers["Content-Security-Policy"] = _PLOTS if plots else _FILE
    return answer


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        if type == "error":
            super().log(type, message, *args)


def serve(home: Path, *, port: int, show: bool, path: str = "/") -> None:
    """Serve until Ctrl-C.

    Args:
        port: 0 for any free one.
        show: open the page in the browser, where there is a screen.
        path: the page to open.

    Raises:
        UserError: there is no such folder, or the port is taken.
    """
    if not home.is_dir():
        raise UserError(
            Violation("FOLDER", str(home), "is no folder", "give the one that runs are in: outputs")
        )
    try:
        listening = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        why = f"cannot be used ({os.strerror(number) if number else error})"
        fix = "give another one; 0 is any free one"
        raise UserError(Violation("--port", port, why, fix)) from None
    server = make_server(HOST, port, application(home.absolute()), threaded=True, request_handler=_Quiet, fd=listening.fileno())  # fmt: skip
    address = f"http://{HOST}:{listening.getsockname()[1]}{path}"
    empty = "" if find_runs(home) or find_studies(home) else "; nothing is there yet, what starts will appear"
    print(f"{address} shows {home}{empty} (Ctrl-C ends it)", flush=True)
    screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if show and screen:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
