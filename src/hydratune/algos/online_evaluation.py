"""Evaluation of an online trainer: completions of held-out prompts, their rewards, and how far the policy has gone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from hydratune.algos.judge import JudgingTrainer
from hydratune.data.builtin import answered, verifiable, verify
from hydratune.errors import UserError, Violation
from hydratune.meter import Meter


class EvaluatingTrainer(JudgingTrainer):
    """The part of `OnlineTrainer` that evaluates, and searches by what it finds."""

    rewards: Any

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        if rows is None:
            raise UserError(
                Violation("eval_dataset", None, "there is nothing to evaluate", "pass the evaluation rows")
            )
        if "prompt_ids" not in rows.column_names:
            rows = self.prepare_rows(
                rows, self.processing_class, self.args, where="eval_dataset", training=False
            )[0]
        return DataLoader(rows, self.args.eval_batch_size, collate_fn=list)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; of several data sets also the mean reward over all their rows."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(parts, dict):
            rewards = [
                (metrics[f"{metric_key_prefix}_{name}_reward"], len(part)) for name, part in parts.items()
            ]
            mean = sum(reward * rows for reward, rows in rewards) / sum(rows for _, rows in rewards)
            metrics[f"{metric_key_prefix}_reward"] = mean
            self.log({f"{metric_key_prefix}_reward": mean})
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """One completion of each prompt, sampled as in training with numbers that are the same every time.

        Predictions, where they are asked for: token ids of the completions, [N, T], -100 behind their end.
        Metrics: reward, rewards/<name>, length, stopped; kl (nats a token) where there is a reference;
        verified_accuracy of rows with an answer.
        """
        rows, device = dataloader.dataset, self.args.device
        own = [rows[i] for i in range(self.args.process_index, len(rows), self.args.world_size)]  # type: ignore[arg-type, index]
        names = ["reward", *(f"rewards/{name}" for name in self.rewards.names), "length", "stopped"]
        names += ["kl"] if self.reference is not None else []
        answers = rows["answer"] if "answer" in rows.column_names else []  # type: ignore[attr-defined, index]
        verified = any(map(verifiable, answers))
        names += ["verified_accuracy"] if verified else []
        # the same names on every process, also where one has no such row, or none at all
        sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in names}

        def add(name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
            known = ~values.isnan()
            weights = known.double() if weights is None else weights.double()
            totals = values.nan_to_num(nan=0.0).double()
            self.meters["eval"].keep(name, totals.reshape(len(totals), -1).sum(1), weights)
            sums[name] += torch.stack((totals.sum(), weights.sum()))

        self.meters["eval"] = Meter(by_row=True)
        made: list[np.ndarray] = []
        with self._not_training():
            self.send_weights()
            if own:
                episodes, repeated, scored, logps = self._complete(
                    own, 1, (self.args.seed, 0, self.args.process_index)
                )
                made = episodes.completions
                add("reward", scored.total)
                for name, values in scored.each.items():
                    add(f"rewards/{name}", values)
                add("length", episodes.lengths.float())
                add("stopped", episodes.stopped.float())
                if self.reference is not None:
                    by_reference = self.scored(episodes, self.tokens_by_reference)
                    add("kl", self._old_logps(episodes, logps) - by_reference, episodes.lengths)
                if verified:
                    texts = self.processing_class.batch_decode(episodes.completions, skip_special_tokens=True)
                    right = [
                        float(verify(row, text)) if answered(row) else math.nan
                        for row, text in zip(repeated, texts, strict=True)
                    ]
                    add("verified_accuracy", torch.tensor(right, device=device))
            table = self._sum_over_processes(torch.stack([sums[name] for name in names])).tolist()
        metrics = {
            f"{metric_key_prefix}_{name}": total / count
            for name, (total, count) in zip(names, table, strict=True)
            if count
        }
        predictions = None if prediction_loss_only else self._in_order(made, len(rows))  # type: ignore[arg-type]
        return EvalLoopOutput(predictions=predictions, label_ids=None, metrics=metrics, num_samples=len(rows))

    def _in_order(self, own: list[np.ndarray], rows: int) -> np.ndarray:
        """Completions of all rows, of which this process has every world_size-th."""
        start, step = self.args.process_index, self.args.world_size
        numbered = [*zip(range(start, rows, step), own, strict=True)]
        if step > 1:
            numbered = gather_object(numbered)
        table = np.full((rows, max(len(ids) for _, ids in numbered)), -100, dtype=np.int64)
        for row, ids in numbered:
            table[row, : len(ids)] = ids
        return table

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, n_trials: int = 20,
                              direction: Any = None, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        """As `BaseTrainer.hyperparameter_search`; by the mean reward unless `compute_objective` says otherwise."""
        if compute_objective is None:
            compute_objective, direction = _mean_reward, direction or "maximize"
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", *args, **kwargs
        )

    def send_weights(self) -> None:
        """Have what samples use the policy as it is."""
        raise NotImplementedError

    def _complete(self, rows: list[dict[str, Any]], copies: int, seed: tuple[int, ...]) -> Any:
        """Completions of rows with their rewards."""
        raise NotImplementedError

    def _old_logps(self, episodes: Any, found: Any) -> torch.Tensor:
        """log π of the tokens, [B, T]."""
        raise NotImplementedError

    def scored(self, episodes: Any, score: Any) -> torch.Tensor:
        """What a function gives for the tokens, [B, T]."""
        raise NotImplementedError


def _mean_reward(metrics: dict[str, float]) -> float:
    return metrics["eval_reward"]
