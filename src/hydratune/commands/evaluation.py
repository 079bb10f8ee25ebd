"""What `hydratune eval` measures: the trainer of a run on rows, and completions judged against another model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hydratune import algos, attention, checks_model
from hydratune.adapters import base_of_adapter
from hydratune.algos.online_evaluation import EvaluatingTrainer
from hydratune.completions import Completions
from hydratune.data.builtin import answered, verify
from hydratune.data.format import format_rows
from hydratune.data.load import load
from hydratune.errors import UserError, Violation
from hydratune.models import load_tokenizer
from hydratune.reward_models import RewardModel
from hydratune.rollout import Sampling
from hydratune.run import arguments, recipe_of
from hydratune.samples import Completer, split_prompt
from hydratune.trained import BASE, Trained, find_writer, load_writer

_QUIET = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")


class Evaluation:
    """The trainer of a run, with the weights that it ended with, and the rows.

    Args:
        place: of the model.
        settings, every: of `command.read_run`.
        batch_size: in place of the run's.

    Raises:
        UserError: there are no such rows, they do not fit the algorithm, or a model is not to be had.
    """

    def __init__(self, place: Any, settings: Any, every: bool, batch_size: int | None) -> None:
        attention.register()
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
        self.rows: Any = train if every else held_out
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
        """What the run's own evaluation gives, with the standard errors of what is a mean over rows.

        `sampled` tells that it judged completions sampled as in training, as PPO and GRPO do.
        """
        found = self.trainer.evaluate()
        metrics = {k.removeprefix("eval_"): v for k, v in found.items() if k.startswith("eval_")}
        metrics = {k: v for k, v in metrics.items() if k not in _QUIET}
        likelihood = self.settings.algo == "sft" and self.trainer.args.loss_type == "nll"
        if likelihood and "loss" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        errors = {k: v for k, v in self.trainer.meters["eval"].standard_errors().items() if k in metrics}
        if "perplexity" in metrics and "loss" in errors:
            errors["perplexity"] = metrics["perplexity"] * errors["loss"]  # d exp(x) = exp(x) dx
        return {
            "run": self.place.name,
            "algo": self.settings.algo,
            "rows": self.prepared.rows or len(self.rows),
            "of": self._of(),
            "tokens": self.prepared.tokens or None,
            "sampled": issubclass(self.trainer_class, EvaluatingTrainer),
            "metrics": metrics,
            "standard_errors": errors,
        }

    def _of(self) -> str:
        data = self.settings.data
        where = data.path or data.name or data.source
        if self.every:
            return f"all of {where}"
        if data.eval_path:
            return str(data.eval_path)
        return f"{data.name}, {data.eval_split}" if data.eval_split else f"held out of {where}"


class Compared:
    """Completions of the rows' prompts, judged: by their answers, by a reward model, against another model."""

    def __init__(
        self, evaluation: Evaluation, many: int, new_tokens: int | None, temperature: float, seed: int
    ) -> None:
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
        other = (
            tuned
            if against == BASE
            else load_writer(find_writer(against, home, key="--against"), key="--against")
        )
        with other.base() if against == BASE else other.tuned() as model:
            theirs = self._judged(model, other.tokenizer, judge)
        name = f"base ({tuned.base_name})" if against == BASE else other.place.name
        found["against"] = {"name": name, **{key: mean(values) for key, values in theirs.items()}}
        if "reward" in mine:
            found["win_rate"] = win_rate(mine["reward"], theirs["reward"])
        return found

    def _judged(self, model: Any, tokenizer: Any, judge: str | None) -> dict[str, list[float]]:
        """By name a value for each completion that it applies to."""

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
