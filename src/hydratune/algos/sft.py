"""Supervised fine-tuning: next-token loss on the labelled tokens of each row.

The loss is Σ −log p(label) over every labelled token of the accumulated, cross-device batch, divided by their number.
`dft` weights each token by its own probability (Dynamic Fine-Tuning, arXiv:2508.05629, eq. 9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hydratune.algos.arguments import BaseConfig
from hydratune.algos.base import BaseTrainer
from hydratune.attention import unmasked
from hydratune.data.collate import SFTCollator
from hydratune.data.pipeline import prepare
from hydratune.fused_head import FusedHead, Stats, by_document, cross_entropy, select
from hydratune.losses import token_loss
from hydratune.models import ModelRecipe
from hydratune.packing import settle_padding
from hydratune.settings import option

_SHORT = 64  # tokens, on a CPU: docs/log.md tells what was measured
METRICS = ("entropy", "mean_token_accuracy")


@dataclass
class SFTConfig(BaseConfig):
    """`transformers.TrainingArguments` plus the fields of supervised fine-tuning."""

    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.")
    dataset_text_field: str = option(
        "text", "Column with the text of plain rows; a formatting_func's text is put there."
    )
    max_length: int | None = option(1024, "Longest row in tokens; longer rows are truncated; null: no limit.")
    truncation_mode: Literal["keep_start", "keep_end"] = option(
        "keep_start", "Which end of an over-long row is kept."
    )
    shuffle_dataset: bool = option(False, "Shuffle the training rows once before packing.")
    packing: bool = option(False, "Put several rows into one block of max_length tokens.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option(
        "bfd", "Best fit decreasing (over-long rows truncated, or split), or one stream cut into blocks."
    )
    padding_free: bool | None = option(
        None,
        "Lay a batch's rows end to end instead of padding them; null: where the attention keeps rows apart.",
    )
    eval_packing: bool | None = option(None, "Pack the evaluation rows; null: as packing says.")
    completion_only_loss: bool | None = option(
        None, "Train on completions only; null: yes when rows are prompt and completion."
    )
    assistant_only_loss: bool = option(False, "Train on the assistant's turns of a conversation only.")
    loss_type: Literal["nll", "dft"] = option("nll", "Negative log-likelihood, or dynamic fine-tuning.")


class SFTTrainer(BaseTrainer):
    """Supervised fine-tuning; the arguments are those of the ecosystem's SFT trainers, in their order.

    Args: see `BaseTrainer`, and
        train_dataset, eval_dataset: text, messages, prompt and completion, or tokenised rows; formatted, tokenised
            and packed here unless `dataset_kwargs={"skip_prepare_dataset": True}`.
        formatting_func: row → text, messages, or {"prompt", "completion"}; the first stage.

    Raises:
        UserError: the data or the arguments cannot work; every reason is named.
    """

    algo = "sft"
    config_class = SFTConfig
    columns = ("input_ids", "labels", "seq_lengths", "completion_mask", "assistant_masks")
    data_collator: Any
    _settled: bool | None = None  # whether padding_free was left to us

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        *,
        recipe: ModelRecipe | None = None,
        **older_names: Any,
    ) -> None:
        # what a user computes from logits may count on a row of them for each row
        self._needs_rows = not (compute_loss_func is compute_metrics is preprocess_logits_for_metrics is None)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
            recipe=recipe,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            formatting_func=formatting_func,
            **older_names,
        )

    def collator(self, args: Any, tokenizer: Any, model: Any) -> SFTCollator:
        short = _SHORT if self._settled and args.device.type == "cpu" else 0
        return SFTCollator(tokenizer.pad_token_id, args.padding_free, args.pad_to_multiple_of, short)

    @classmethod
    def prepare_rows(
        cls, rows: Any, tokenizer: Any, args: Any, *, where: str, training: bool = True, **how: Any
    ) -> tuple[Any, Any]:
        packing = args.packing if training or args.eval_packing is None else args.eval_packing
        return prepare(rows, tokenizer, args, packing=packing, where=where, **how)

    def make_ready(self, model: Any, args: Any, tokenizer: Any) -> None:
        if self._settled is None:  # of a later fresh model it is settled already
            self._settled = args.padding_free is None
        # NEFTune's noise is scaled by the length of a row
        if self._settled and (self._needs_rows or args.neftune_noise_alpha):
            args.padding_free = False
        settle_padding(args, model)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in transformers; padded unless `padding_free` was asked for, so that predictions have a row for each row."""
        collator = self.data_collator
        if self._settled and isinstance(collator, SFTCollator):
            self.data_collator = replace(collator, padding_free=False)
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            self.data_collator = collator

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch: its token losses over all labelled tokens of the accumulated batch.

        Args:
            inputs: the collator's batch (`data/collate.py`); labels [B, T], -100 outside the loss.
            num_items_in_batch: labelled tokens over accumulation and devices; None: those of this batch.

        Returns:
            The scalar loss, with the model's outputs (and their full logits) if `return_outputs`.
        """
        batch = unmasked({**inputs, "use_cache": False}, self.model.config)
        labels, labelled = batch.pop("labels"), batch.pop("labelled", None)
        if type(self.data_collator) is not SFTCollator:  # one around it may have changed the labels
            labelled = None
        if self.balances_experts:
            batch["output_router_logits"] = True
        whole = return_outputs or self.compute_loss_func is not None or self.label_smoother is not None
        if whole or not self.head_is_fused(model):
            outputs = model(**batch)
            loss_sum, stats = self._from_logits(outputs, labels, num_items_in_batch)
        else:
            with FusedHead(model, labels, self.args.loss_type, self.stats_wanted(), labelled) as head:
                outputs = model(**batch)
            loss_sum, stats = head.loss_sum, head.stats
        count = stats.count
        meter = self.meter
        meter.add("loss", loss_sum, count)
        if not self.model.training and self.compute_loss_func is None and self.label_smoother is None:
            losses = token_loss(stats.logps, self.args.loss_type)
            meter.keep("loss", *by_document(losses, labels, inputs.get("cu_seq_lens_q")))
        if stats.entropy_sum is not None:
            meter.add("entropy", stats.entropy_sum, count)
            meter.add("mean_token_accuracy", stats.correct, count)
        seen = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else torch.full_like(count, labels.numel())
        )
        meter.add("num_tokens", seen, torch.ones_like(seen))

        loss = self.over_items(loss_sum, count, num_items_in_batch)
        loss = self.with_balance(loss, outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _from_logits(self, outputs: Any, labels: torch.Tensor, num_items: Any) -> tuple[torch.Tensor, Stats]:
        """Summed loss of all logits: for metrics on them, a loss function of the user's, or label smoothing."""
        rows, targets = select(outputs.logits, labels)
        loss_sum, stats = cross_entropy(rows, targets, self.args.loss_type, self.stats_wanted())
        weight = stats.count if num_items is None else torch.as_tensor(num_items, device=rows.device)
        if self.compute_loss_func is not None:
            loss_sum = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items) * weight
        elif self.label_smoother is not None and self.args.loss_type == "nll":
            rate = self.label_smoother.epsilon
            even = (
                -torch.log_softmax(rows.float(), dim=-1).mean(-1).sum()
            )  # cross-entropy against the uniform choice
            loss_sum = (1 - rate) * loss_sum + rate * even
        return loss_sum, stats
