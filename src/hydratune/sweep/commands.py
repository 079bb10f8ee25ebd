"""`hydratune sweep …`: look at a study, run its best trial again, go on with it, open its dashboard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hydratune.commands.common import clear
from hydratune.errors import UserError, Violation, nearest

app = typer.Typer(no_args_is_help=True, help="Studies: their state, their best trial, their dashboard.")
HOME = Path("outputs/sweeps")
StudyName = Annotated[str, typer.Argument(help="A study's folder, or its name under outputs/sweeps.")]


def find(study: str) -> Path:
    """The folder of a study.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(study).expanduser(), HOME / study):
        if (folder / "study.json").is_file():
            return folder
    known = [p.parent.name for p in HOME.glob("*/study.json")]
    why = "is no folder of a study with a finished trial, and no name of one in outputs/sweeps"
    raise UserError(Violation("STUDY", study, why, nearest(study, known) if known else "give its folder"))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "study.json").read_text(encoding="utf-8"))


@app.command()
@clear
def status(
    study: Annotated[
        str | None, typer.Argument(help="A study's folder or name; none: list them all.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Trials to show, the best first; 0 for all.")] = 20,
) -> None:
    """How a study stands, as of its last finished trial; without a name, one line for each study.

    Example: `hydratune sweep status STUDY --rows 0`
    """
    from rich.table import Table

    console = Console(soft_wrap=True)
    if study is None:
        for path in sorted(HOME.glob("*/study.json"), key=lambda p: -p.stat().st_mtime):
            facts = read(path.parent)
            print(f"{path.parent}: {_counts(facts)}{_best_line(facts)}")
        return
    folder = find(study)
    facts = read(folder)
    names = list(dict.fromkeys(k for t in facts["trials"] for k in t["settings"]))
    table = Table(box=None, pad_edge=False)
    for name in ["", "trial", "state", *facts["objectives"], *names, "seconds", "reason"]:
        table.add_column(name, no_wrap=name != "reason")
    sign = 1.0 if facts["directions"][0] == "minimize" else -1.0
    ranked = sorted(
        facts["trials"],
        key=lambda t: (not t["values"], sign * t["values"][0] if t["values"] else 0.0, t["number"]),
    )
    for t in ranked[: rows or None]:
        values = [f"{v:.6g}" for v in t["values"]] if t["values"] else [""] * len(facts["objectives"])
        seconds = "" if t["seconds"] is None else f"{t['seconds']:.1f}"
        star = "★" if t["number"] in facts["front"] else ""
        table.add_row(
            star,
            str(t["number"]),
            t["state"],
            *values,
            *(escape(str(t["settings"].get(n, ""))) for n in names),
            seconds,
            escape(t["reason"]),
        )
    console.print(table)
    print(_counts(facts))
    for number in facts["front"]:
        if command := facts["commands"].get(str(number)):
            print(command)


def _counts(facts: dict[str, Any]) -> str:
    states: dict[str, int] = {}
    for t in facts["trials"]:
        states[t["state"]] = states.get(t["state"], 0) + 1
    return ", ".join(f"{n} {state}" for state, n in states.items())


def _best_line(facts: dict[str, Any]) -> str:
    best = [t for t in facts["trials"] if t["number"] in facts["front"]][:1]
    values = [f"{o} {v:.6g}" for t in best for o, v in zip(facts["objectives"], t["values"], strict=True)]
    return f" · best {', '.join(values)}" if values else ""


@app.command()
@clear
def best(study: StudyName) -> None:
    """The command that runs the best trial again, or those of the Pareto front.

    Example: `hydratune sweep best STUDY`
    """
    folder = find(study)
    facts = read(folder)
    if not facts["front"]:
        raise UserError(
            Violation("STUDY", study, "no trial has completed within the constraints", "let it go on")
        )
    for number in facts["front"]:
        print(
            facts["commands"].get(str(number))
            or f"trial {number} of a Python function; its settings: {folder / 'best.yaml'}"
        )


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@clear
def rerun(
    context: typer.Context,
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Number of the trial; default: the best.")] = None,
) -> None:
    """Run one trial again as a run of its own; what follows is added to its command.

    Example: `hydratune sweep rerun STUDY --trial 3 max_steps=1000`
    """
    folder = find(study)
    facts = read(folder)
    number = trial if trial is not None else next(iter(facts["front"]), None)
    script = folder / str(number) / "command.sh"
    if number is None or not script.is_file():
        known = ", ".join(str(t["number"]) for t in facts["trials"])
        raise UserError(Violation("--trial", number, "has no command", f"give one of: {known}"))
    raise typer.Exit(subprocess.run(["sh", str(script), *context.args], check=False).returncode)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@clear
def resume(context: typer.Context, study: StudyName) -> None:
    """Go on with a study; what follows is added to its command.

    Example: `hydratune sweep resume STUDY sweep.n_trials=60`
    """
    folder = find(study)
    try:
        known = json.loads((folder / "command.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            Violation("STUDY", study, "it was begun from Python", "run its script again")
        ) from None
    line = [sys.executable, known["script"], f"resume={folder.absolute()}", *context.args]
    raise typer.Exit(subprocess.run(line, check=False, cwd=known["folder"]).returncode)


@app.command()
@clear
def dashboard(
    study: StudyName,
    port: Annotated[int, typer.Option(help="Of the page.")] = 8080,
    storage: Annotated[
        str | None, typer.Option(help="Of the study; default: the journal in its folder.")
    ] = None,
) -> None:
    """Optuna's dashboard on 127.0.0.1, each trial with a note of its command and directory.

    Example: `hydratune sweep dashboard STUDY --port 8080`
    """
    try:
        from optuna_dashboard import run_server
    except ImportError:
        why = "needs the package optuna-dashboard"
        raise UserError(Violation("dashboard", None, why, "pip install 'hydratune[dashboard]'")) from None
    from hydratune.sweep.storage import open_storage

    folder = find(study)
    opened = open_storage(storage or str(folder / "journal.log"))
    write_notes(folder, opened)
    print(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)")
    run_server(opened, host="127.0.0.1", port=port)


def write_notes(folder: Path, storage: Any) -> None:
    """A note for every finished trial that has none: its command, its directory, why it failed."""
    import optuna
    from optuna_dashboard import get_note, save_note

    facts = read(folder)
    study = optuna.load_study(study_name=facts["name"], storage=storage)
    ids = {t.number: t._trial_id for t in study.get_trials(deepcopy=False)}
    for t in facts["trials"]:
        if t["number"] not in ids or not t["ended"]:
            continue
        handle = optuna.trial.Trial(study, ids[t["number"]])
        if not get_note(handle):
            run = (folder / str(t["number"])).absolute()
            lines = [
                f"**{t['state']}** {t['reason']}",
                f"Run directory: `{run}`",
                f"Curves: `{run / 'report.html'}`",
            ]
            if command := facts["commands"].get(str(t["number"])):
                lines.append(f"```\n{command}\n```")
            save_note(handle, "\n\n".join(lines))
