"""`hydratune eval`: a run's model on rows: its own metrics, verified answers, and rewards against another model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hydratune import terminal
from hydratune.commands.common import Home, RunName, clear
from hydratune.errors import UserError, Violation
from hydratune.runs import HOME

BASE = "base"
_QUIET = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")


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
    """Evaluate a run's model: `hydratune eval latest data=gsm8k --reward-model RUN`"""
    from hydratune.command import read_run
    from hydratune.trained import find_model

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
        find_model(str(against), home, key="--against")  # refused before anything is loaded
    note = Console(stderr=True)
    with note.status(f"evaluating {place.name}") if note.is_terminal else _nothing():
        evaluation = _Evaluation(place, settings, every, batch_size)
        report = evaluation.measured()
        if completions and evaluation.trainer_class.generates:
            made = _Compared(evaluation, completions, max_new_tokens, temperature, seed)
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


class _Evaluation:
    """The trainer of a run, with the weights that it ended with, and the rows.

    Args:
        place: of the model.
        settings, every: of `command.read_run`.
        batch_size: in place of the run's.

    Raises:
        UserError: there are no such rows, they do not fit the algorithm, or a model is not to be had.
    """

    def __init__(self, place: Any, settings: Any, every: bool, batch_size: int | None) -> None:
        import transformers

        from hydratune import algos, attention, checks_model
        from hydratune.data.load import load
        from hydratune.models import load_tokenizer
        from hydratune.run import arguments, recipe_of
        from hydratune.tracking import quiet_libraries

        attention.register()
        quiet_libraries()
        self.place, self.settings, self.every = place, settings, every
        data = settings.data
        device = checks_model.device_facts()
        config_class, self.trainer_class = algos.classes(settings.algo)
        args = arguments(settings, config_class, device)
        args.use_checkpointing(False)
        if batch_size is not None:
            args.per_device_eval_batch_size = batch_size
        for name in ("precompute_ref_log_probs", "sync_ref_model", "generate_during_eval"):
            if hasattr(args, name):
                setattr(args, name, False)
        self.tokenizer = load_tokenizer(str(place.folder), trust_remote_code=settings.model.trust_remote_code)
        goal = self.trainer_class.goal
        train, held_out = load(data, settings.seed if data.seed is None else data.seed, goal)
        self.rows = train if every else held_out
        if self.rows is None:
            why = "held no rows out to evaluate on"
            raise UserError(Violation("RUN", place.name, why, "name rows: data.path=FILE, or data=ENTRY"))
        prepared, self.prepared = self.trainer_class.prepare_rows(
            self.rows, self.tokenizer, args, where="eval", training=False, cache=data.cache, settings=data
        )
        recipe, outline = recipe_of(settings, self.trainer_class, args, self.tokenizer, device)
        self.trainer_class.check_rows(args, outline.config, {"eval": prepared})
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        held = self.trainer_class.reference_kind(args, place.adapter) is not None
        if place.adapter:
            from hydratune.adapters import base_of_adapter

            recipe = replace(recipe, name_or_path=base_of_adapter(place.folder), architecture=None)
        elif not held:
            recipe = replace(recipe, name_or_path=str(place.folder), architecture=None)
        # a reference is what the run started from, so the weights come after it
        self.trainer = self.trainer_class(
            args=args,
            train_dataset=prepared,
            eval_dataset=prepared,
            processing_class=self.tokenizer,
            recipe=recipe,
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        if place.adapter or held:
            transformers.Trainer._load_from_checkpoint(self.trainer, str(place.folder))

    def measured(self) -> dict[str, Any]:
        """What the run's own evaluation gives."""
        found = self.trainer.evaluate()
        metrics = {k.removeprefix("eval_"): v for k, v in found.items() if k.startswith("eval_")}
        metrics = {k: v for k, v in metrics.items() if k not in _QUIET}
        likelihood = self.settings.algo == "sft" and self.trainer.args.loss_type == "nll"
        if likelihood and "loss" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        return {
            "run": self.place.name,
            "algo": self.settings.algo,
            "rows": self.prepared.rows or len(self.rows),
            "of": self._of(),
            "tokens": self.prepared.tokens or None,
            "metrics": metrics,
        }

    def _of(self) -> str:
        data = self.settings.data
        where = data.path or data.name or data.source
        if self.every:
            return f"all of {where}"
        if data.eval_path:
            return str(data.eval_path)
        return f"{data.name}, {data.eval_split}" if data.eval_split else f"held out of {where}"


class _Compared:
    """Completions of the rows' prompts, judged: by their answers, by a reward model, against another model."""

    def __init__(
        self, evaluation: _Evaluation, many: int, new_tokens: int | None, temperature: float, seed: int
    ) -> None:
        from hydratune.data.format import format_rows
        from hydratune.rollout import Sampling
        from hydratune.samples import split_prompt

        settings, self._evaluation = evaluation.settings, evaluation
        head = evaluation.rows.take(many)
        formatted = format_rows(head, settings.data, where="eval", goal=evaluation.trainer_class.goal)
        pairs = [(row, split_prompt(row)) for row in formatted]
        self.rows = [row for row, pair in pairs if pair]
        self._prompts = [pair[0] for _, pair in pairs if pair]
        self._sampling = Sampling(new_tokens or settings.tracking.sample_tokens, temperature=temperature)
        self._seed, self._batch_size = seed, evaluation.trainer.args.per_device_eval_batch_size

    def report(self, judge: str | None, against: str | None, home: Path) -> dict[str, Any]:
        """Nothing where there is nothing to judge by.

        Raises:
            UserError: `against` without anything to judge by; a reward model that does not fit.
        """
        from hydratune.data.builtin import answered
        from hydratune.trained import Trained, load_speaker

        if judge is None and not any(map(answered, self.rows)):
            if against:
                why = "rows have no answers, and without a reward model nothing tells which completion is better"
                raise UserError(Violation("--against", against, why, "add --reward-model RUN"))
            return {}
        if not self.rows:
            return {}
        evaluation = self._evaluation
        trainer = evaluation.trainer
        tuned = Trained(
            evaluation.place, trainer.accelerator.unwrap_model(trainer.model), evaluation.tokenizer
        )
        if against is None and judge is not None and tuned.base_name is not None:
            against = BASE
        if against == BASE and tuned.base_name is None:
            fix = "name another run: --against RUN"
            raise UserError(Violation("--against", BASE, str(tuned.no_base), fix))
        with tuned.tuned() as model:
            mine = self._judged(model, tuned.tokenizer, judge)
        sampling = self._sampling
        found: dict[str, Any] = {
            "completions": {
                "count": len(self.rows),
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
            },
            **{name: mean(values) for name, values in mine.items()},
        }
        if against is None:
            return found
        other = tuned if against == BASE else load_speaker(against, home, key="--against")
        with other.base() if against == BASE else other.tuned() as model:
            theirs = self._judged(model, other.tokenizer, judge)
        name = f"base ({tuned.base_name})" if against == BASE else other.place.name
        found["against"] = {"name": name, **{key: mean(values) for key, values in theirs.items()}}
        if "reward" in mine:
            found["win_rate"] = win_rate(mine["reward"], theirs["reward"])
        return found

    def _judged(self, model: Any, tokenizer: Any, judge: str | None) -> dict[str, list[float]]:
        """By name a value for each completion that it applies to."""
        import torch

        from hydratune.completions import Completions
        from hydratune.data.builtin import answered, verify
        from hydratune.reward_models import RewardModel
        from hydratune.samples import Completer

        completer = Completer(tokenizer, self._sampling, batch_size=self._batch_size)
        generator = torch.Generator().manual_seed(self._seed)
        made = completer(model, self._prompts, generator=generator)
        pairs = [(row, text) for row, text in zip(self.rows, made.texts, strict=True) if answered(row)]
        found: dict[str, list[float]] = {}
        if pairs:
            found["verified_accuracy"] = [float(verify(row, text)) for row, text in pairs]
        if judge is not None:
            device = self._evaluation.trainer.args.device
            scorer = RewardModel(judge, policy_tokenizer=tokenizer, device=device, key="--reward-model")
            chat = any(isinstance(prompt, list) for prompt in self._prompts)
            stops = completer.settled(model, conversation=chat).stop_token_ids
            rows = [{**row, "prompt": prompt} for row, prompt in zip(self.rows, self._prompts, strict=True)]
            batch = Completions(rows, made.prompt_ids, made.ids, tokenizer, stops)
            found["reward"] = scorer(batch, Path(judge).name).tolist()
        return found


def mean(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, its standard error (of independent rows; None of one), and their number."""
    many = len(values)
    middle = sum(values) / many
    spread = sum((v - middle) ** 2 for v in values)
    error = math.sqrt(spread / (many - 1) / many) if many > 1 else None
    return {"mean": middle, "standard_error": error, "count": many}


def win_rate(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float | int | None]:
    """How often the first is better, a tie as half, row by row."""
    won = sum(a > b for a, b in zip(mine, theirs, strict=True))
    lost = sum(a < b for a, b in zip(mine, theirs, strict=True))
    scores = [(a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs, strict=True)]
    return {**mean(scores), "won": won, "lost": lost, "tied": len(mine) - won - lost}


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


def _with_error(name: str, found: dict[str, Any]) -> str:
    error = found["standard_error"]
    return _number(name, found["mean"]) + ("" if error is None else f" ± {_number(name, error)}")


def _show(console: Console, report: dict[str, Any]) -> None:
    tokens = f", {report['tokens']:,} tokens" if report["tokens"] else ""
    rows = [
        ("run", f"{report['run']} ({report['algo']})"),
        ("rows", f"{report['rows']:,}, {report['of']}{tokens}"),
    ]
    first = ("loss", "perplexity")
    metrics = {k: report["metrics"][k] for k in first if k in report["metrics"]} | report["metrics"]
    rows += [(_NAMES.get(k, k), _number(k, v)) for k, v in metrics.items() if isinstance(v, int | float)]
    made = report.get("completions")
    if made:
        how = "greedy" if not made["temperature"] else f"temperature {made['temperature']:g}"
        rows.append(("completions", f"{made['count']}, {how}, of up to {made['max_new_tokens']} tokens"))
    other = report.get("against") or {}
    for key in ("verified_accuracy", "reward"):
        if key in report:
            text = f"{_with_error(key, report[key])}, {report[key]['count']} rows"
            rows.append(
                (
                    _NAMES[key],
                    text + (f"; {other['name']}: {_with_error(key, other[key])}" if key in other else ""),
                )
            )
    if win := report.get("win_rate"):
        counts = f"{win['won']} won, {win['lost']} lost, {win['tied']} tied"
        rows.append(("win rate", f"{_with_error('win_rate', win)} against {other['name']}: {counts}"))
    terminal.facts(console, rows)
    if made or report.get("win_rate"):
        terminal.say(console, "± one standard error")
