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

from hydratune.commands.common import Home, clear
from hydratune.errors import UserError, Violation, nearest
from hydratune.runs import HOME, find_studies, is_study

app = typer.Typer(no_args_is_help=True, help="Studies: their state, their best trial, their dashboard.")
StudyName = Annotated[str, typer.Argument(help="A study's folder, or its name.")]
_AGAIN = "it is written anew when the study goes on: hydratune sweep resume STUDY"
_FACTS = {"trials": list, "objectives": list, "directions": list, "front": list, "commands": dict}


def find(study: str, home: Path = HOME) -> Path:
    """The folder of a study, begun or done, by its path, its path below `home`, or its name.

    Raises:
        UserError: there is none, or several have that name.
    """
    for folder in (Path(study).expanduser(), home / study, home / "sweeps" / study):
        if is_study(folder):
            return folder
    known = find_studies(home)
    named = [folder for folder in known if folder.name == study]
    if len(named) == 1:
        return named[0]
    if named:
        shown = ", ".join(map(str, named[:5]))
        raise UserError(Violation("STUDY", study, f"fits {len(named)} studies: {shown}", "give its folder"))
    why = f"is no folder of a study, and no name of one under {home}"
    fix = nearest(study, [folder.name for folder in known]) if known else "give its folder, or --home"
    raise UserError(Violation("STUDY", study, why, fix))


def read(folder: Path) -> dict[str, Any]:
    """What study.json tells.

    Raises:
        UserError: it is not there yet, or damaged.
    """
    path = folder / "study.json"
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            Violation("STUDY", str(folder), "no trial has finished yet", "let it go on")
        ) from None
    except (OSError, ValueError) as error:
        why = f"its study.json cannot be read ({error})"
        raise UserError(Violation("STUDY", str(folder), why, _AGAIN)) from None
    wrong = [
        k for k, kind in _FACTS.items() if not isinstance(facts, dict) or not isinstance(facts.get(k), kind)
    ]
    if wrong:
        why = f"its study.json does not tell {', '.join(wrong)}"
        raise UserError(Violation("STUDY", str(folder), why, _AGAIN))
    return facts


@app.command()
@clear
def status(
    study: Annotated[
        str | None, typer.Argument(help="A study's folder or name; none: list them all.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Trials to show, the best first; 0 for all.", min=0)] = 20,
    home: Home = HOME,
) -> None:
    """How a study stands, as of its last finished trial; without a name, one line for each study.

    Example: `hydratune sweep status STUDY --rows 0`
    """
    from rich.table import Table

    console = Console(soft_wrap=True)
    if study is None:
        studies = find_studies(home)
        for folder in sorted(studies, key=_modified, reverse=True):
            try:
                facts = read(folder)
                print(f"{folder}: {_counts(facts)}{_best_line(facts)}")
            except UserError as error:
                print(f"{folder}: {error.violations[0].why}")
        if not studies:
            print(f"no study under {home}")
        return
    facts = read(find(study, home))
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


def _modified(folder: Path) -> float:
    """When a study last had a result, or began."""
    marks = [folder / "study.json", folder / ".study"]
    return max((path.stat().st_mtime for path in marks if path.is_file()), default=0.0)


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
def best(study: StudyName, home: Home = HOME) -> None:
    """The command that runs the best trial again, or those of the Pareto front.

    Example: `hydratune sweep best STUDY`
    """
    folder = find(study, home)
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
    home: Home = HOME,
) -> None:
    """Run one trial again as a run of its own; what follows is added to its command.

    Example: `hydratune sweep rerun STUDY --trial 3 max_steps=1000`
    """
    folder = find(study, home)
    number = trial if trial is not None else next(iter(read(folder)["front"]), None)
    script = folder / str(number) / "command.sh"
    if number is None or not script.is_file():
        numbers = [path.parent.name for path in folder.glob("*/command.sh")]
        known = ", ".join(sorted(filter(str.isdecimal, numbers), key=int)) or "none has one yet"
        raise UserError(Violation("--trial", number, "has no command", f"give one of: {known}"))
    raise typer.Exit(subprocess.run(["sh", str(script), *context.args], check=False).returncode)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@clear
def resume(context: typer.Context, study: StudyName, home: Home = HOME) -> None:
    """Go on with a study; what follows is added to its command.

    Example: `hydratune sweep resume STUDY sweep.n_trials=60`
    """
    folder = find(study, home)
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
    port: Annotated[int, typer.Option(help="Of the page; 0: any free one.")] = 8080,
    open: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    home: Home = HOME,
) -> None:
    """Optuna's dashboard of one study on 127.0.0.1, with its runs; `hydratune dashboard` shows all.

    Example: `hydratune sweep dashboard STUDY --port 8080`
    """
    from hydratune.dashboard.start import start

    start(find(study, home), port=port, show=open, path="/dashboard/studies/1")
