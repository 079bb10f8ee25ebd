"""`hydratune eval`: a run's model on rows: its own metrics, verified answers, and rewards against another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hydratune import terminal
from hydratune.commands.common import Home, RunName, clear
from hydratune.errors import UserError, Violation
from hydratune.runs import HOME


@clear
def evaluate(
    run: RunName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA", help="Other rows, as for train.py: data=gsm8k, data.path=FILE, …"),
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(help="A run, directory or hub id of a reward model: mean reward and win rate."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another run, or `base`. Default with a reward model: base, if known.")
    ] = None,
    completions: Annotated[int, typer.Option(help="Rows whose prompts are completed; 0: none.", min=0)] = 256,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest completion. Default: as the run's samples.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of completions above temperature 0.")] = 42,
    batch_size: Annotated[int | None, typer.Option(help="Rows at a time. Default: the run's.", min=1)] = None,
    home: Home = HOME,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Evaluate a run's model: loss, verified answers, reward, win rate, each with its standard error.

    Errors take rows as independent and the tokens of a row as not. PPO and GRPO are judged twice: `sampled` as in training,
    with its rewards, and by greedy completions.

    Example: `hydratune eval latest data=gsm8k --reward-model RUN`
    """
    from hydratune.command import read_run
    from hydratune.trained import BASE, find_model, find_writer

    place = find_model(run, home)
    if place.run is None:
        why = "is a model without a run: no config.yaml tells how to evaluate it"
        raise UserError(Violation("RUN", run, why, "give a run directory"))
    settings, every = read_run(place.run.path, overrides or [])
    if settings.algo == "reward" and (reward_model or against):
        why = "is a reward model: it writes nothing that could be compared"
        raise UserError(Violation("RUN", run, why, "leave out --reward-model and --against"))
    judge = _judge_place(reward_model, home) if reward_model else None
    if against not in (None, BASE):
        find_writer(str(against), home, key="--against")  # refused before anything is loaded
    note = Console(stderr=True)
    from hydratune.tracking import quiet_libraries

    quiet_libraries()
    from hydratune.commands.evaluation import Compared, Evaluation

    with note.status(f"evaluating {place.name}") if note.is_terminal else _nothing():
        evaluation = Evaluation(place, settings, every, batch_size)
        report = evaluation.measured()
        if completions and evaluation.trainer_class.generates:
            made = Compared(evaluation, completions, max_new_tokens, temperature, seed)
            report |= made.report(judge, against, home)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(Console(), report)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _judge_place(name: str, home: Path) -> str:
    """The directory of a reward model, or its hub id."""
    from hydratune.reward_sources import check_sources
    from hydratune.trained import find_model

    try:
        folder = str(find_model(name, home, key="--reward-model").folder)
    except UserError:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise
        folder = name
    if wrong := check_sources([folder], columns=None, key="--reward-model"):
        raise UserError(wrong)
    return folder


# ------------------------------------------------------------------ shown

_NAMES = {
    "verified_accuracy": "verified answers",
    "reward": "mean reward",
    "mean_token_accuracy": "token accuracy",
}
_SHARES = ("accuracy", "accuracies", "win_rate")


def _number(name: str, value: float) -> str:
    return (
        f"{value:.1%}" if name.endswith(_SHARES) else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    )


def _with_error(name: str, value: float, error: float | None) -> str:
    return _number(name, value) + ("" if error is None else f" ± {_number(name, error)}")


def _of(name: str, found: dict[str, Any]) -> str:
    return _with_error(name, found["mean"], found["standard_error"])


def _show(console: Console, report: dict[str, Any]) -> None:
    tokens = f", {report['tokens']:,} tokens" if report["tokens"] else ""
    rows = [
        ("run", f"{report['run']} ({report['algo']})"),
        ("rows", f"{report['rows']:,}, {report['of']}{tokens}"),
    ]
    first, errors = ("loss", "perplexity"), report["standard_errors"]
    metrics = {k: report["metrics"][k] for k in first if k in report["metrics"]} | report["metrics"]
    for key, value in metrics.items():
        if isinstance(value, int | float):
            rows.append((_name(key, report, "sampled"), _with_error(key, value, errors.get(key))))
    made = report.get("completions")
    how = ""
    if made:
        how = "greedy" if not made["temperature"] else f"temperature {made['temperature']:g}"
        rows.append(("completions", f"{made['count']}, {how}, of up to {made['max_new_tokens']} tokens"))
    other = report.get("against") or {}
    for key in ("verified_accuracy", "reward"):
        if key in report:
            text = f"{_of(key, report[key])}, {report[key]['count']} rows"
            also = f"; {other['name']}: {_of(key, other[key])}" if key in other else ""
            rows.append((_name(key, report, how), text + also))
    if win := report.get("win_rate"):
        counts = f"{win['won']} won, {win['lost']} lost, {win['tied']} tied"
        rows.append(("win rate", f"{_of('win_rate', win)} against {other['name']}: {counts}"))
    terminal.facts(console, rows)
    if made or errors:
        terminal.say(console, "± one standard error")


def _name(key: str, report: dict[str, Any], how: str) -> str:
    """What a row is called; of PPO and GRPO, which judge completions twice, with how these were made."""
    twice = report["sampled"] and key in ("verified_accuracy", "reward")
    return _NAMES.get(key, key) + (f", {how}" if twice else "")
