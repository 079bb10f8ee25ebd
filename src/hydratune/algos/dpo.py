"""Direct preference optimisation (arXiv:2305.18290) and its relatives, on pairs of a chosen and a rejected completion.

The loss is a mean over pairs of a function of two log-ratios (`losses.dpo_loss` has them all), or a weighted sum of
several. `aot` and `aot_unpaired` compare sorted values of a micro-batch, all others do not depend on how a batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from hydratune.algos.judge import Judged, by_sequence
from hydratune.algos.policy import PolicyConfig, PolicyTrainer
from hydratune.data.collate_preference import PreferenceCollator
from hydratune.data.pipeline import prepare_preference
from hydratune.losses import DPO_LOSSES, dpo_loss
from hydratune.packing import layout_for
from hydratune.settings import option

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip


@dataclass
class DPOConfig(PolicyConfig):
    """`transformers.TrainingArguments` plus the fields of direct preference optimisation."""

    loss_type: (
        Literal[
            "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
        ]
        | list[str]
    ) = option("sigmoid", "The loss, or a list of losses that are added.")  # fmt: skip
    loss_weights: list[float] | None = option(None, "Weights of several losses; null: 1 each.")
    label_smoothing: float = option(
        0.0, "Share of pairs that are taken to be labelled the wrong way round (robust, exo_pair, aot)."
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl", "Divergence from the reference that the reward stands for (arXiv:2309.16240)."
    )
    f_alpha_divergence_coef: float = option(0.5, "α of alpha_divergence.")
    ld_alpha: float | None = option(
        None, "Weight of the tokens by which the longer completion is longer (LD-DPO, arXiv:2409.06411)."
    )
    use_weighting: bool = option(
        False, "Weigh pairs by how likely the policy is to write them (WPO, arXiv:2406.11827)."
    )
    discopop_tau: float = option(0.05, "Temperature of discopop.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        self.loss_weights = list(self.loss_weights or [1.0] * len(self.loss_type))
        wrong = [name for name in self.loss_type if name not in DPO_LOSSES]
        if wrong or len(self.loss_weights) != len(self.loss_type):
            why = (
                f"there is no {wrong[0]!r}" if wrong else f"{len(self.loss_type)} losses need as many weights"
            )
            raise ValueError(f"loss_type: {why}; choose among {', '.join(DPO_LOSSES)}")


class DPOTrainer(PolicyTrainer):
    """Direct preference optimisation; see `PolicyTrainer` for the arguments.

    Args:
        train_dataset, eval_dataset: rows with chosen and rejected, plain or conversational, with or without prompt.
    """

    algo = "dpo"
    config_class = DPOConfig
    goal = "preference"
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    sequences_per_row = 2
    REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")

    def collator(self, args: Any, tokenizer: Any, model: Any) -> PreferenceCollator:
        return PreferenceCollator(layout_for(args, tokenizer, model))

    @classmethod
    def prepare_rows(
        cls, rows: Any, tokenizer: Any, args: Any, *, where: str, training: bool = True, **how: Any
    ) -> tuple[Any, Any]:
        return prepare_preference(rows, tokenizer, args, goal=cls.goal, where=where, **how)

    def rows_of(self, batch: dict[str, Any]) -> int:
        return len(batch["pairs"]["lengths"]) // 2

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """With `sft` among the losses each batch is told the chosen tokens of the accumulated batch, its divisor."""
        batches, rows = super().get_batch_samples(*args)
        if "sft" in self.args.loss_type and batches:
            tokens = torch.stack([self._chosen_tokens(b["pairs"]) for b in batches]).sum()
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                tokens = self.accelerator.reduce(tokens, reduction="sum")
            for batch in batches:
                batch["chosen_tokens"] = tokens
        return batches, rows

    def _chosen_tokens(self, layout: dict[str, Any]) -> torch.Tensor:
        return (layout["sequences"] < len(layout["lengths"]) // 2).sum()

    def summed(self, per_token: torch.Tensor, layout: dict[str, Any]) -> torch.Tensor:
        """Sums over the completions; with `ld_alpha` tokens past the shorter completion's end weigh less."""
        if self.args.ld_alpha is not None:
            tokens = by_sequence(torch.ones_like(per_token), layout)
            shorter = torch.minimum(*tokens.chunk(2)).repeat(2)
            past = layout["ordinals"] >= shorter[layout["sequences"]]
            per_token = torch.where(past, self.args.ld_alpha * per_token, per_token)
        return by_sequence(per_token, layout)

    def reference_columns(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        chosen, rejected = self.judge_by_reference(batch["pairs"]).chunk(2)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def reference_key(self) -> list[Any]:
        return [*super().reference_key(), self.args.ld_alpha]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch: its pairs' losses over all pairs of the accumulated batch.

        Args:
            inputs: of `PreferenceCollator`.
            num_items_in_batch: pairs over accumulation and devices; None: those of this batch.

        Returns:
            The scalar loss; with `return_outputs` also {"rewards": [B, 2], "labels": [B] of ones}.
        """
        args, layout = self.args, inputs["pairs"]
        if "ref_chosen_logps" in inputs:
            reference = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        else:  # first, while there are no activations of the policy
            reference = self.judge_by_reference(layout)
        judged = self.judge(model, layout, self._wanted())
        chosen, rejected = (judged.logps - reference).chunk(2)
        tokens = by_sequence(torch.ones_like(judged.per_token), layout)
        pairs = len(chosen)
        losses = self._losses(chosen, rejected, judged.logps, tokens)
        if "sft" in args.loss_type:
            weight = args.loss_weights[args.loss_type.index("sft")]
            divisor = inputs.get("chosen_tokens", tokens[:pairs].sum())
            rows = pairs if num_items_in_batch is None else num_items_in_batch
            # over tokens, and not over pairs as all else: so scaled that dividing by the pairs gives that
            nll = -by_sequence(judged.per_token, layout)[:pairs].sum() * rows / divisor
            losses = losses + weight * nll / pairs
        if args.use_weighting:
            losses = losses * self._likelihood(judged, layout, tokens)
        total = losses.sum()
        self.meter.add("loss", total, pairs)
        self.meter.keep("loss", losses)
        loss = self.over_items(total, pairs, num_items_in_batch)
        loss = self.with_balance(loss, judged.outputs, num_items_in_batch)
        rewards = args.beta * torch.stack((chosen, rejected), dim=1).detach()
        self._count(judged, layout, rewards)
        if not return_outputs:
            return loss
        return loss, {"rewards": rewards, "labels": torch.ones(pairs, device=rewards.device)}

    def _wanted(self) -> tuple[str, ...]:
        logged = ("entropy", "mean_logit", "correct") if self.stats_wanted() else ()
        return (*logged, "log_sum_square") if self.args.use_weighting else logged

    def _losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, logps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of all losses but `sft`, [B], from log-ratios [B], log π [2B] and token counts [2B]."""
        args = self.args
        losses = torch.zeros_like(chosen)
        policy_chosen, policy_rejected = logps.chunk(2)
        for name, weight in zip(args.loss_type, args.loss_weights, strict=True):
            if name != "sft":
                losses = losses + weight * dpo_loss(
                    chosen,
                    rejected,
                    loss_type=name,
                    beta=args.beta,
                    label_smoothing=args.label_smoothing,
                    divergence=args.f_divergence_type,
                    divergence_alpha=args.f_alpha_divergence_coef,
                    discopop_tau=args.discopop_tau,
                    chosen_lengths=tokens[: len(chosen)],
                    rejected_lengths=tokens[len(chosen) :],
                    policy_margins=policy_chosen - policy_rejected,
                )
        return losses

    def _likelihood(self, judged: Judged, layout: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        """WPO's weight of each pair (arXiv:2406.11827, eq. 2): the product over both completions of the mean likelihood
        of a token, held against that of a token drawn from the policy, exp(mean(log p − log Σ p²))."""
        assert judged.stats.log_sum_square is not None
        aligned = judged.per_token.detach() - judged.stats.log_sum_square
        mean = by_sequence(aligned, layout) / tokens.clamp(min=1)
        return mean.exp().reshape(2, -1).prod(0)

    def _count(self, judged: Judged, layout: dict[str, Any], rewards: torch.Tensor) -> None:
        self.count_tokens(layout, judged)
        pairs = len(rewards)
        margins = rewards[:, 0] - rewards[:, 1]
        self.meter.add("rewards/accuracies", (margins > 0).sum(), pairs)
        self.meter.keep("rewards/accuracies", margins > 0)
        self.meter.add("rewards/margins", margins.sum(), pairs)
        for column, name in enumerate(("chosen", "rejected")):
            self.meter.add(f"rewards/{name}", rewards[:, column].sum(), pairs)
            self.meter.add(f"logps/{name}", judged.logps.chunk(2)[column].sum(), pairs)
        if judged.stats.mean_logit is not None and judged.stats.correct is not None:
            of_chosen = layout["sequences"] < len(rewards)
            for name, mask in (("chosen", of_chosen), ("rejected", ~of_chosen)):
                self.meter.add(f"logits/{name}", (judged.stats.mean_logit * mask).sum(), mask.sum())
            self.meter.add("mean_token_accuracy", (judged.stats.correct & of_chosen).sum(), of_chosen.sum())
