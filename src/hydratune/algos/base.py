"""What every algorithm shares: the arguments that all have, and a thin `transformers.Trainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from hydratune.settings import option


@dataclass
class BaseConfig(transformers.TrainingArguments):
    """Fields common to all algorithms, on top of `transformers.TrainingArguments`."""

    logging_steps: float = option(10, "Log every so many update steps; below 1, as a share of all steps.")
    gradient_checkpointing: bool | None = option(None, "Recompute activations; null: when the memory estimate needs it.")  # type: ignore[assignment]
    bf16: bool | None = option(None, "bf16 autocast; null: where the device supports it.")  # type: ignore[assignment]
    average_tokens_across_devices: bool = option(True, "Weight the loss by tokens over all devices.")
    model_init_kwargs: dict[str, Any] | None = option(None, "Passed to from_pretrained untouched, for every fresh model.")
    trust_remote_code: bool = option(False, "Run code that a model's repository brings.")
    chat_template_path: str | None = option(None, "A .jinja file, or a tokenizer's directory or id, whose chat template is used.")


class BaseTrainer(transformers.Trainer):
    """Shared trainer."""
