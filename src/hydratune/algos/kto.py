"""Kahneman–Tversky optimisation (arXiv:2402.01306), on completions that are labelled desirable or not.

A completion's implicit reward is held against a reference point, the KL from the reference policy, which is estimated on
mismatched pairs: prompts with other rows' completions. We estimate it once an update step, over all micro-batches and
devices, where the peers do for each micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch.utils.data import SequentialSampler

from hydratune.algos.judge import Judged
from hydratune.algos.policy import PolicyConfig, PolicyTrainer
from hydratune.data.collate_preference import UnpairedCollator
from hydratune.data.pipeline import prepare_preference
from hydratune.data.sampling import BothClassesSampler, other_rows
from hydratune.errors import UserError, Violation
from hydratune.losses import kto_loss
from hydratune.modes import still
from hydratune.packing import layout_for
from hydratune.settings import option

METRICS = (
    "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "logits/chosen",
    "logits/rejected", "entropy",
)  # fmt: skip
_RANGE = (1.0, 4 / 3)  # of w₊n₊ / (w₋n₋), the paper's advice (section 4.2)


@dataclass
class KTOConfig(PolicyConfig):
    """`transformers.TrainingArguments` plus the fields of Kahneman–Tversky optimisation."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "KTO, or APO-zero (arXiv:2408.06266), whose reference point is 0."
    )
    desirable_weight: float = option(1.0, "Weight of desirable rows, against unequal numbers.")
    undesirable_weight: float = option(1.0, "Weight of undesirable rows.")
    max_prompt_length: int | None = option(None, "Longest prompt in tokens; null: no limit of its own.")
    max_completion_length: int | None = option(
        None, "Longest completion in tokens; null: no limit of its own."
    )

    @property
    def estimates_kl(self) -> bool:
        return self.loss_type == "kto"


class KTOTrainer(PolicyTrainer):
    """Kahneman–Tversky optimisation; see `PolicyTrainer` for the arguments.

    Args:
        train_dataset, eval_dataset: rows with completion and label, with or without prompt, plain or conversational;
            or pairs of chosen and rejected, which are taken apart.
    """

    algo = "kto"
    config_class = KTOConfig
    goal = "unpaired"
    columns = ("prompt_ids", "completion_ids", "label", "kl_completion_ids", "ref_logps", "ref_kl_logps")

    @property
    def REFERENCE_COLUMNS(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ref_logps", "ref_kl_logps") if self.args.estimates_kl else ("ref_logps",)

    def collator(self, args: Any, tokenizer: Any, model: Any) -> UnpairedCollator:
        return UnpairedCollator(layout_for(args, tokenizer, model), args.estimates_kl, args.max_length)

    @classmethod
    def prepare_rows(
        cls, rows: Any, tokenizer: Any, args: Any, *, where: str, training: bool = True, **how: Any
    ) -> tuple[Any, Any]:
        made, report = prepare_preference(rows, tokenizer, args, goal=cls.goal, where=where, **how)
        if not isinstance(made, datasets.Dataset) or not report.rows:
            return made, report
        if training:
            _check_classes(report, args, where)
        if (
            args.estimates_kl
            and args.precompute_ref_log_probs
            and "kl_completion_ids" not in made.column_names
        ):
            _check_partners(report.rows, where)
        return made, report

    def prepare_data(self, args: Any, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, Any]:
        train, evaluation = super().prepare_data(args, tokenizer, train, evaluation)
        for rows in (train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])):
            known = {*(getattr(rows, "column_names", None) or ())}
            if "ref_kl_logps" in known and "kl_completion_ids" not in known:
                why = "nobody knows of which mismatched completions they are"
                raise UserError(
                    Violation("column ref_kl_logps", None, why, "give kl_completion_ids beside it")
                )
        return train, evaluation

    def _with_reference(self, rows: Any, identity: str) -> Any:
        """Precomputed log-probs of mismatched pairs need pairs that stay: they are made over all rows."""
        known = getattr(rows, "column_names", None) or ()
        if self.args.estimates_kl and not {"kl_completion_ids", "ref_kl_logps"} & {*known}:
            rows = with_fixed_pairs(rows, self.args.seed)
        return super()._with_reference(rows, identity)

    def rows_of(self, batch: dict[str, Any]) -> int:
        return len(batch["desirable"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Both classes in every batch, as far as the data has them."""
        rows = train_dataset if train_dataset is not None else self.train_dataset
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(rows, datasets.Dataset) or isinstance(sampler, SequentialSampler | None):
            return sampler
        labels = rows.with_format("arrow")["label"].to_numpy(zero_copy_only=False)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BothClassesSampler(labels, self._train_batch_size, seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """The batches of an update step, each with the KL over all of them."""
        batches, rows = super().get_batch_samples(*args)
        if batches and self.args.estimates_kl:
            batches = [self._prepare_inputs(batch) for batch in batches]
            self._estimate_kl(batches)
        return batches, rows

    @torch.no_grad()
    def _estimate_kl(self, batches: list[dict[str, Any]]) -> None:
        """Put `kl` into batches (the same into all), and `ref_logps` where the same pass gives them.

        kl = max(0, mean over mismatched pairs of log π(y′|x) − log π_ref(y′|x)), section 4 of the paper. Batches of one
        row have no such pair; where there is none at all, kl is 0.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            if "mismatched" not in batch:
                continue
            with still(self.model), self.accelerator.autocast():
                policy = self.judge(self.model, batch["mismatched"]).logps
            if "ref_kl_logps" in batch:
                reference = batch["ref_kl_logps"]
            elif "both" in batch:
                batch["ref_logps"], reference = self.judge_by_reference(batch["both"]).chunk(2)
            else:
                reference = self.judge_by_reference(batch["mismatched"])
            difference = (policy - reference).double().sum()
            sums += torch.stack((difference, torch.full_like(difference, len(policy))))
        total, count = self._sum_over_processes(sums)
        kl = (total / count.clamp(min=1)).clamp(min=0).float()
        for batch in batches:
            batch["kl"] = kl

    def reference_columns(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if not self.args.estimates_kl:
            return {"ref_logps": self.judge_by_reference(batch["completions"])}
        if "both" in batch:
            own, other = self.judge_by_reference(batch["both"]).chunk(2)
        else:
            own, other = (self.judge_by_reference(batch[name]) for name in ("completions", "mismatched"))
        return {"ref_logps": own, "ref_kl_logps": other}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch: its rows' losses over all rows of the accumulated batch.

        Args:
            inputs: of `UnpairedCollator`.
            num_items_in_batch: rows over accumulation and devices; None: those of this batch.

        Returns:
            The scalar loss; with `return_outputs` also {"rewards": [B], "labels": [B], bool}.
        """
        args, layout, desirable = self.args, inputs["completions"], inputs["desirable"]
        if args.estimates_kl and "kl" not in inputs:  # in evaluation
            self._estimate_kl([inputs])
        kl = inputs["kl"] if args.estimates_kl else torch.zeros((), device=desirable.device)
        reference = inputs["ref_logps"] if "ref_logps" in inputs else self.judge_by_reference(layout)
        judged = self.judge(model, layout, ("entropy", "mean_logit") if self.stats_wanted() else ())
        ratios = judged.logps - reference
        losses = kto_loss(
            ratios,
            desirable,
            kl,
            beta=args.beta,
            loss_type=args.loss_type,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )
        total, rows = losses.sum(), len(losses)
        self.meter.add("loss", total, rows)
        self.meter.keep("loss", losses)
        if args.estimates_kl:
            self.meter.add("kl", kl * rows, rows)
        rewards = args.beta * ratios.detach()
        above = rewards > args.beta * kl  # where the loss has its middle
        self.meter.add("rewards/accuracies", (above == desirable).sum(), rows)
        self.meter.keep("rewards/accuracies", above == desirable)
        self._count(judged, layout, rewards, desirable)
        loss = self.over_items(total, rows, num_items_in_batch)
        loss = self.with_balance(loss, judged.outputs, num_items_in_batch)
        return (loss, {"rewards": rewards, "labels": desirable}) if return_outputs else loss

    def _count(
        self, judged: Judged, layout: dict[str, Any], rewards: torch.Tensor, desirable: torch.Tensor
    ) -> None:
        self.count_tokens(layout, judged)
        for name, mask in (("chosen", desirable), ("rejected", ~desirable)):
            self.meter.add(f"rewards/{name}", (rewards * mask).sum(), mask.sum())
            self.meter.add(f"logps/{name}", (judged.logps * mask).sum(), mask.sum())
            if judged.stats.mean_logit is not None:
                tokens = mask[layout["sequences"]]
                self.meter.add(f"logits/{name}", (judged.stats.mean_logit * tokens).sum(), tokens.sum())

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            return {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}
        return {}


def _check_classes(report: Any, args: Any, where: str) -> None:
    """
    Raises:
        UserError: all rows are of one class.
    """
    desirable, undesirable = report.desirable, report.rows - report.desirable
    if not desirable or not undesirable:
        kind = "undesirable" if not desirable else "desirable"
        why = f"all {report.rows:,} rows are {kind}, and KTO learns from the difference"
        raise UserError(Violation(f"{where}, column label", None, why, "give rows of both labels"))
    ratio = args.desirable_weight * desirable / (args.undesirable_weight * undesirable)
    low, high = _RANGE
    if not 0.99 * low <= ratio <= 1.01 * high:
        up = [args.undesirable_weight * undesirable / desirable * bound for bound in _RANGE]
        down = [args.desirable_weight * desirable / undesirable / bound for bound in reversed(_RANGE)]
        report.warnings.append(
            f"{desirable:,} desirable and {undesirable:,} undesirable rows weigh {ratio:.2f} to 1; the paper advises 1 to "
            f"1.33: algo.desirable_weight between {up[0]:.2f} and {up[1]:.2f}, or algo.undesirable_weight between "
            f"{down[0]:.2f} and {down[1]:.2f}"
        )


def _check_partners(rows: int, where: str) -> None:
    if rows < 2:
        why = "there is one row, and a mismatched pair needs two"
        fix = "give more rows, or algo.loss_type=apo_zero_unpaired"
        raise UserError(Violation(where, None, why, fix))


def with_fixed_pairs(rows: Any, seed: int) -> Any:
    """Each row with another row's completion, so that the reference's log-probs of mismatched pairs can be kept too."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    _check_partners(len(rows), "algo.precompute_ref_log_probs")
    table = rows.with_format("arrow")[:]
    prompts = [np.asarray(p).tobytes() for p in table["prompt_ids"].to_pylist()]
    completions = table["completion_ids"].combine_chunks()
    return rows.add_column("kl_completion_ids", completions.take(other_rows(prompts, seed)).to_pylist())
