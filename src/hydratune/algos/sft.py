"""Supervised fine-tuning: next-token loss on the labelled tokens of each row.

The loss is Σ −log p(label) over every labelled token of the accumulated, cross-device batch, divided by their number.
`dft` weights each token by its own probability (Dynamic Fine-Tuning, arXiv:2508.05629, eq. 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hydratune.algos.base import BaseConfig, BaseTrainer
from hydratune.settings import option


@dataclass
class SFTConfig(BaseConfig):
    """`transformers.TrainingArguments` plus the fields of supervised fine-tuning."""

    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.")
    dataset_text_field: str = option("text", "Column with the text of plain rows; a formatting_func's text is put there.")
    dataset_kwargs: dict[str, Any] | None = option(None, "{skip_prepare_dataset: true} takes the rows as already prepared.")
    dataset_num_proc: int | None = option(None, "Processes that tokenise.")
    eos_token: str | None = option(None, "Token that ends a text or completion; null: the tokenizer's.")
    pad_token: str | None = option(None, "Token used to pad; null: the tokenizer's, else its EOS.")
    max_length: int | None = option(1024, "Longest row in tokens; longer rows are truncated; null: no limit.")
    truncation_mode: Literal["keep_start", "keep_end"] = option("keep_start", "Which end of an over-long row is kept.")
    shuffle_dataset: bool = option(False, "Shuffle the training rows once before packing.")
    packing: bool = option(False, "Put several rows into one block of max_length tokens.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option(
        "bfd", "Best fit decreasing (over-long rows truncated, or split), or one stream cut into blocks."
    )
    padding_free: bool = option(False, "Lay a batch's rows end to end instead of padding them.")
    pad_to_multiple_of: int | None = option(None, "Round the length of a batch up to this.")
    eval_packing: bool | None = option(None, "Pack the evaluation rows; null: as packing says.")
    completion_only_loss: bool | None = option(
        None, "Train on completions only; null: yes when rows are prompt and completion."
    )
    assistant_only_loss: bool = option(False, "Train on the assistant's turns of a conversation only.")
    loss_type: Literal["nll", "dft"] = option("nll", "Negative log-likelihood, or dynamic fine-tuning.")
    activation_offloading: bool = option(False, "Keep activations in host memory between forward and backward.")
    router_aux_loss_coef: float | None = option(None, "Weight of a mixture-of-experts' balance loss; null: the model's.")
