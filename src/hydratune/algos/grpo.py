"""Group-relative policy optimisation (arXiv:2402.03300) and its relatives: no value model, a completion's advantage is
its reward against that of the others of its prompt.

Rollouts are those of PPO. The losses (dapo, grpo, bnpo, dr_grpo, cispo; ratios of tokens or of sequences) are in
`rl_losses.py`; each is divided by what it counts over the whole accumulated, cross-device batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback

from hydratune.algos.online import OnlineTrainer
from hydratune.algos.online_config import OnlineConfig
from hydratune.episodes import Episodes
from hydratune.models import ModelRecipe
from hydratune.rewards import Scored
from hydratune.rl_losses import GrpoLoss, clip_fractions, group_advantages, grpo_divisor, grpo_loss
from hydratune.settings import option

METRICS = (
    "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio", "clip_ratio/low_mean", "clip_ratio/low_min",
    "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean", "kl", "entropy", "eps", "episode",
)  # fmt: skip
EVAL_METRICS = ("reward", "length", "stopped", "kl", "verified_accuracy")


@dataclass
class GRPOConfig(OnlineConfig):
    """`transformers.TrainingArguments` plus the fields of group-relative policy optimisation."""

    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    num_generations: int = option(8, "Completions of each prompt.")
    max_completion_length: int = option(512, "The longest completion in tokens.")
    beta: float = option(0.0, "Weight of the KL from the reference; 0: there is none.")
    num_iterations: int = option(1, "Passes over a rollout.")
    steps_per_generation: int | None = option(
        None, "Micro-batches of a rollout; null: as many as an update step accumulates."
    )
    epsilon: float = option(0.2, "How far a probability ratio may fall below 1.")
    epsilon_high: float | None = option(
        None, "How far it may rise above 1 (null: as far); of cispo the largest weight of a token, e.g. 5."
    )
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] = option(
        "dapo",
        "What the loss is divided by: tokens (dapo, bnpo), completions (grpo), a constant (dr_grpo); or CISPO.",
    )
    scale_rewards: Literal["group", "batch", "none"] | bool = option(
        "group", "Divide advantages by the spread of the group's rewards, the batch's, or not."
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Probability ratios of tokens, or of whole completions (GSPO, arXiv:2507.18071)."
    )
    mask_truncated_completions: bool = option(False, "Leave completions that were cut out of the loss.")
    log_completions: bool = option(False, "Keep completions of every rollout.")

    new_tokens_option = "algo.max_completion_length"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"

    @property
    def copies(self) -> int:
        return self.num_generations

    @property
    def per_rollout(self) -> int:
        return self.per_device_train_batch_size * (
            self.steps_per_generation or self.gradient_accumulation_steps
        )

    @property
    def passes(self) -> int:
        return self.num_iterations

    @property
    def new_tokens(self) -> int:
        return self.max_completion_length


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation; the arguments are those of the ecosystem's GRPO trainers, in their order.

    Args: see `OnlineTrainer`, and
        reward_funcs: functions, dotted paths, reward models; one or a list.
        reward_processing_classes: their tokenizers; None: their own.
    """

    algo = "grpo"
    config_class = GRPOConfig
    kl_option = "algo.beta"

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        ref_model: Any = None,
        quantization_config: Any = None,
        formatting_func: Any = None,
        recipe: ModelRecipe | None = None,
        **older_names: Any,
    ) -> None:
        super().__init__(
            model,
            ref_model,
            reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_tokenizers=reward_processing_classes,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=callbacks,
            peft_config=peft_config,
            quantization_config=quantization_config,
            formatting_func=formatting_func,
            recipe=recipe,
            **older_names,
        )

    @classmethod
    def reference_kind(cls, args: Any, adapter: bool) -> str | None:
        if not args.beta:
            return None
        return "the policy with its adapter off" if adapter else "a frozen copy"

    @classmethod
    def also_in_memory(cls, args: Any, outline: Any, recipe: Any, evaluated: int) -> dict[str, Any]:
        held = super().also_in_memory(args, outline, recipe, evaluated)
        counts = args.steps_per_generation is not None
        return {**held, "rollout": replace(held["rollout"], counts_batches=counts)}

    @property
    def needs_reference(self) -> bool:
        return bool(self.args.beta)

    @property
    def needs_old_logps(self) -> bool:  # type: ignore[override]
        """Of a rollout that is used up in one step the policy is what it was sampled from, which a server may not have."""
        return self.args.steps_per_rollout > 1 or self.args.vllm_server_base_url is not None

    def _keeps(self, number: int) -> bool:
        return self.args.log_completions or super()._keeps(number)

    @torch.no_grad()
    def finish(self, episodes: Episodes, scored: Scored) -> None:
        args, meter, rewards = self.args, self.meters["train"], scored.total
        if args.scale_rewards == "batch" and args.world_size > 1:
            whole, flat = group_advantages(self.accelerator.gather(rewards), args.num_generations, "batch")
            advantages = whole[args.process_index * len(rewards) :][: len(rewards)]
        else:
            advantages, flat = group_advantages(rewards, args.num_generations, args.scale_rewards)
        lengths = episodes.lengths.float()
        counted = episodes.stopped | (not args.mask_truncated_completions)
        episodes.tensors |= {
            "advantages": advantages * counted,
            "counted": counted,
            "tokens": lengths * counted,
        }
        many = len(rewards)
        groups = rewards.reshape(-1, args.num_generations)
        meter.add("reward", rewards.sum(), many)
        if args.num_generations > 1:
            meter.add("reward_std", groups.std(1).sum(), len(groups))
        meter.add("frac_reward_zero_std", flat * len(groups), len(groups))
        for name, values in scored.each.items():
            known = ~values.isnan()
            mean = values.nan_to_num(nan=0.0).sum() / known.sum().clamp(min=1)
            spread = torch.where(known, values.nan_to_num(nan=0.0) - mean, 0.0).square().sum()
            meter.add(f"rewards/{name}/std", (spread / (known.sum() - 1).clamp(min=1)).sqrt())

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What the loss is divided by (`grpo_divisor`), of the accumulated batch over all devices."""
        args, episodes = self.args, self.episodes
        assert episodes is not None
        index = torch.cat([batch["index"] for batch in batch_samples]).to(device)
        tokens = episodes.tensors["tokens"].index_select(0, index).sum()
        sequences = torch.full_like(tokens, len(index))
        items = grpo_divisor(args.loss_type, sequences, tokens, args.max_completion_length)
        if args.average_tokens_across_devices and args.world_size > 1:
            if args.loss_type == "bnpo":  # each device's own mean
                return items * args.world_size
            items = self.accelerator.reduce(items, reduction="sum")
        return items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch: its sum over what the loss type counts in the accumulated batch.

        Args:
            inputs: of `Episodes.batch`.
            num_items_in_batch: of `_get_num_items_in_batch`; None: of this batch.
        """
        args, layout = self.args, inputs["layout"]
        sequences = layout["sequences"]
        old = self.of("logps", inputs) if self.needs_old_logps else None
        ref_logps = self.of("ref_logps", inputs) if self.reference is not None else None
        advantages, counted = self.of("advantages", inputs), None
        tokens: Any = len(sequences)
        if args.mask_truncated_completions:
            counted = self.of("counted", inputs)[sequences]
            tokens = counted.sum()

        def losses(logps: torch.Tensor) -> GrpoLoss:
            reference = ref_logps
            if counted is not None:  # the others are without loss and without gradient
                logps = torch.where(counted, logps, logps.detach())
                reference = None if reference is None else torch.where(counted, reference, logps.detach())
            return grpo_loss(
                logps,
                old,
                advantages,
                sequences,
                ref_logps=reference,
                beta=args.beta,
                epsilon=args.epsilon,
                epsilon_high=args.epsilon_high,
                loss_type=args.loss_type,
                importance_sampling_level=args.importance_sampling_level,
                max_completion_length=args.max_completion_length,
            )

        by_token = args.importance_sampling_level == "token"
        stats = ("entropy",) if self.stats_wanted() else ()
        judged = self.judge(model, layout, stats, (lambda logps: losses(logps).total) if by_token else None)
        logps = judged.per_token
        found = losses(logps)
        total = found.total if judged.loss is None else judged.loss
        loss = self.over_items(total, found.divisor, num_items_in_batch)
        loss = self.with_balance(loss, judged.outputs, num_items_in_batch)
        many, meter = len(inputs["index"]), self.meter
        with torch.no_grad():
            meter.add(
                "loss", found.total, grpo_divisor(args.loss_type, many, tokens, args.max_completion_length)
            )
            clipped = clip_fractions(found.low, found.high, sequences if by_token else None, many)
            for name in ("low_mean", "high_mean", "region_mean"):
                meter.add(f"clip_ratio/{name}", clipped[name] * len(logps), len(logps))
            meter.least("clip_ratio/low_min", clipped["low_min"])
            meter.most("clip_ratio/high_max", clipped["high_max"])
            if found.kl is not None:
                meter.add("kl", found.kl.sum(), tokens)
            if judged.stats.entropy is not None:
                meter.add("entropy", judged.stats.entropy.sum(), len(logps))
        return (loss, {}) if return_outputs else loss

    def kl_of(self, metrics: dict[str, float]) -> float:
        return metrics.get("kl", 0.0)
