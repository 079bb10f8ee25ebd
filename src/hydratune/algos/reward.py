"""Reward modelling: a score for a whole answer, from pairs of a chosen and a rejected one (Bradley–Terry).

The score is read at a sequence's last token, by its place and not by its token id, so that a pad token that is also the
end of a turn does no harm; and the head is applied there alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hydratune.algos.arguments import BaseConfig
from hydratune.algos.judge import RowTrainer
from hydratune.data.collate_preference import PreferenceCollator
from hydratune.data.pipeline import prepare_preference
from hydratune.data.table import to_dataset
from hydratune.data.tokenize_preference import PreferenceOptions, tokenize_preference
from hydratune.errors import UserError, Violation
from hydratune.losses import reward_loss
from hydratune.models import ModelRecipe
from hydratune.packing import layout_for
from hydratune.score import ScoreHead, score_head
from hydratune.settings import option

METRICS = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")


@dataclass
class RewardConfig(BaseConfig):
    """`transformers.TrainingArguments` plus the fields of reward modelling."""

    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    max_length: int | None = option(
        1024, "Longest prompt with answer in tokens; pairs with a longer one are left out; null: no limit."
    )
    disable_dropout: bool = option(True, "No dropout.")
    center_rewards_coefficient: float | None = option(
        None, "Weight of the squared sum of a pair's rewards, which draws them to zero (arXiv:2312.09244)."
    )
    padding_free: bool | None = option(
        None,
        "Lay a batch's sequences end to end, and compute a prompt once for both answers; "
        "null: where the attention keeps sequences apart.",
    )


class RewardTrainer(RowTrainer):
    """Reward modelling; the arguments are those of the ecosystem's reward trainers, in their order.

    Args: see `BaseTrainer`, and
        model: an id, a directory (of a causal LM too: a score head is put on it), or an instance with one label.
        train_dataset, eval_dataset: rows with chosen and rejected, plain or conversational, with or without prompt, and
            with a margin or without.

    Raises:
        UserError: the model has no score head with one label, or the data cannot work.
    """

    algo = "reward"
    config_class = RewardConfig
    task = "reward"
    goal = "preference"
    generates = False
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "margin")
    sequences_per_row = 2

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: RewardConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
        *,
        recipe: ModelRecipe | None = None,
        **older_names: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
            recipe=recipe,
            **older_names,
        )

    def make_ready(self, model: Any, args: Any, tokenizer: Any) -> None:
        head = score_head(model)
        if head is None or getattr(model.config, "num_labels", 1) != 1:
            found = f"{model.config.num_labels} labels" if head is not None else "no score head"
            raise UserError(
                Violation(
                    "model",
                    type(model).__name__,
                    f"has {found}, and a reward model gives one score",
                    "pass an id or directory, or load it with AutoModelForSequenceClassification and num_labels=1",
                )
            )
        super().make_ready(model, args, tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id  # without which it refuses batches

    def collator(self, args: Any, tokenizer: Any, model: Any) -> PreferenceCollator:
        return PreferenceCollator(layout_for(args, tokenizer, model))

    @classmethod
    def prepare_rows(
        cls, rows: Any, tokenizer: Any, args: Any, *, where: str, training: bool = True, **how: Any
    ) -> tuple[Any, Any]:
        return prepare_preference(rows, tokenizer, args, goal=cls.goal, where=where, drop_long=True, **how)

    def rows_of(self, batch: dict[str, Any]) -> int:
        return len(batch["pairs"]["lengths"]) // 2

    def score(self, model: nn.Module, layout: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Rewards of a layout's sequences, [S], in fp32, and the model's outputs."""
        inputs = self.inputs_of(layout, model)
        with ScoreHead(model, layout) as head:
            outputs = model(**inputs, use_cache=False)
        return head.scores.float(), outputs

    @torch.no_grad()
    def samples(self, rows: list[dict[str, Any]], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """The answers of pairs with their scores; nothing is generated. Pairs that are too long are left out."""
        options = PreferenceOptions("preference", self.args.max_length, drop_long=True)
        try:
            made, _ = tokenize_preference(to_dataset(rows), self.processing_class, options, where="samples")
        except UserError:  # none is left
            return []
        batch = self._prepare_inputs(self.data_collator([*made]))
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            chosen, rejected = self.score(self.model, batch["pairs"])[0].chunk(2)
        self.model.train(training)
        decode = self.processing_class.decode
        return [
            {
                "prompt": decode(row["prompt_ids"], skip_special_tokens=True),
                "chosen": decode(row["chosen_ids"], skip_special_tokens=True),
                "rejected": decode(row["rejected_ids"], skip_special_tokens=True),
                "score_chosen": round(better, 4),
                "score_rejected": round(worse, 4),
            }
            for row, better, worse in zip(made, chosen.tolist(), rejected.tolist(), strict=True)
        ]

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
            The scalar loss; with `return_outputs` also {"rewards": [B, 2], "labels": [B] of zeros}, the index of the
            chosen answer.
        """
        layout = inputs["pairs"]
        scores, outputs = self.score(model, layout)
        chosen, rejected = scores.chunk(2)
        losses = reward_loss(chosen, rejected, inputs.get("margin"), self.args.center_rewards_coefficient)
        total, pairs = losses.sum(), len(losses)
        tokens = layout["lengths"].sum()
        with torch.no_grad():
            difference = chosen - rejected
            self.meter.add("loss", total, pairs)
            self.meter.keep("loss", losses)
            self.meter.add("accuracy", (difference > 0).sum(), pairs)
            self.meter.keep("accuracy", difference > 0)
            self.meter.add("margin", difference.sum(), pairs)
            self.meter.add("mean_reward", scores.sum(), 2 * pairs)
            self.meter.most("max_reward", scores.max())
            self.meter.least("min_reward", scores.min())
            self.meter.add("num_tokens", tokens)
        loss = self.over_items(total, pairs, num_items_in_batch)
        loss = self.with_balance(loss, outputs, num_items_in_batch)
        if not return_outputs:
            return loss
        rewards = torch.stack((chosen, rejected), dim=1).detach()
        return loss, {"rewards": rewards, "labels": torch.zeros(pairs, device=rewards.device)}
