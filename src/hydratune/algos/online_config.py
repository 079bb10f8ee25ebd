"""The options that PPO and GRPO have in common, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydratune.algos.arguments import BaseConfig
from hydratune.settings import option


@dataclass
class OnlineConfig(BaseConfig):
    """`BaseConfig` plus what PPO and GRPO have in common."""

    reward_funcs: list[str] | None = option(
        None,
        "Rewards: dotted paths of functions, directories or hub ids of reward models, or correct (the built-in verifier); "
        "null: correct, for rows with an answer.",
    )
    reward_weights: list[float] | None = option(None, "A weight for each reward; null: 1 each.")
    max_prompt_length: int | None = option(None, "Prompts of more tokens are left out; null: none is.")
    temperature: float = option(1.0, "Divides the logits, in sampling and in training.")
    top_k: int | None = option(None, "Sample among the k likeliest tokens; null: all.")
    top_p: float = option(1.0, "Sample among the likeliest tokens of this total probability.")
    min_p: float | None = option(
        None, "Sample among tokens at least this share as likely as the likeliest; null: all."
    )
    local_rollout_forward_batch_size: int = option(64, "Completions at a time in generation and in scoring.")
    disable_dropout: bool = option(True, "No dropout in any model.")
    padding_free: bool | None = option(
        None, "Lay a batch's completions end to end; null: where the attention keeps them apart."
    )
    ref_model_init_kwargs: dict[str, Any] | None = option(
        None, "Passed to from_pretrained for a reference that is loaded, e.g. {dtype: bfloat16}."
    )
    vllm_server_base_url: str | None = option(
        None, "Sample on this vLLM server, e.g. http://127.0.0.1:8000; null: here, with the policy itself."
    )
    vllm_server_folder: str | None = option(
        None,
        "Where the server reads the policy's weights, under the same path as here; null: the output directory.",
    )
    vllm_server_timeout: float = option(240.0, "Seconds that a request to the server may take.")
    num_sample_generations: int = option(
        10,
        "How often in training four completions are kept with their rewards (generations.jsonl, W&B); 0: never.",
    )

    new_tokens_option = ""  # that `new_tokens` comes from

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        needs = (
            self.load_best_model_at_end
            or str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) == "reduce_lr_on_plateau"
            or str(getattr(self.save_strategy, "value", self.save_strategy)) == "best"
        )
        # there is no loss of an evaluation
        if needs and getattr(self, "metric_for_best_model", None) in (None, "loss", "eval_loss"):
            self.metric_for_best_model, self.greater_is_better = "eval_reward", True

    @property
    def sources(self) -> list[Any]:
        """Where rewards come from, as the options name it."""
        return list(self.reward_funcs or ())

    # -- what an algorithm says ----------------------------------------------------------------------------------

    @property
    def copies(self) -> int:
        """Completions of each prompt in a rollout."""
        return 1

    @property
    def per_rollout(self) -> int:
        """Completions of a rollout on each device, B."""
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """How often a rollout is trained on."""
        raise NotImplementedError

    @property
    def new_tokens(self) -> int:
        """The longest completion."""
        raise NotImplementedError

    @property
    def steps_per_rollout(self) -> int:
        """Update steps."""
        return (
            self.passes
            * self.per_rollout
            // (self.per_device_train_batch_size * self.gradient_accumulation_steps)
        )
