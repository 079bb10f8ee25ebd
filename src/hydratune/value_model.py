"""The value model of PPO: a backbone with one number a token, made of whatever is at hand."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hydratune import adapters
from hydratune.errors import UserError, Violation
from hydratune.fused_head import base_of
from hydratune.models import ModelRecipe
from hydratune.score import score_head

log = logging.getLogger("hydratune")
_SAVED = "model.safetensors"


def build_value_model(
    given: Any, *, policy: Any, recipe: ModelRecipe | None, reward_model: Any, peft_config: Any, args: Any
) -> Any:
    """A trainable value model.

    Args:
        given: an instance (of a causal LM too: a score head is put on its backbone), a directory or hub id, or None.
        policy: as it starts; recipe: of it, if there is one.
        reward_model: one that reads the policy's tokens, from whose weights the value model starts; or None.
        peft_config: of the policy's adapter; the value model gets one like it, and its head is trained whole.

    Raises:
        UserError: a model with another number of labels.
    """
    dtype = torch.float32 if args.fp16 or args.bf16 else next(base_of(policy).parameters()).dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    attention = policy.config._attn_implementation
    if isinstance(given, str):
        source = ModelRecipe(
            name_or_path=given, task="reward", dtype=dtype, attn_implementation=attention, seed=args.seed,
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        trained = any("SequenceClassification" in name for name in source.config().architectures or ())
        model = source.build()
        if not trained:
            _no_opinion(model)
    elif given is not None:
        model = given if score_head(given) is not None else with_score_head(given)
    elif reward_model is not None:
        log.info("no value model was given: it starts from the reward model's weights")
        model = copy.deepcopy(reward_model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    elif recipe is not None:
        log.info("no value model was given: it starts from the policy's weights, with a new head")
        model = replace(recipe, task="reward", peft_config=None).build()
        _no_opinion(model)
    else:
        log.info("no value model was given: it starts from the policy's weights, with a new head")
        plain = copy.deepcopy(policy)
        model = with_score_head(plain.unload() if hasattr(plain, "peft_config") else plain)
    labels = getattr(model.config, "num_labels", 1)
    if labels != 1:
        why = f"has {labels} labels, and a value is one number"
        raise UserError(
            Violation("value_model", type(model).__name__, why, "load it with num_labels=1, or leave it out")
        )
    if getattr(model, "is_quantized", False) is False:
        model = model.to(dtype)
    model.requires_grad_(True).set_attn_implementation(attention)
    if peft_config is not None and not hasattr(model, "peft_config"):
        own = copy.deepcopy(peft_config)
        own.task_type = "SEQ_CLS"
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            model = adapters.wrap(model, own)
    return model


def with_score_head(model: Any) -> Any:
    """A sequence-classification model with one label on the backbone of a causal LM, whose weights it takes over."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        made = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        why = f"there is no {config.model_type} with a score head in transformers"
        raise UserError(Violation("value_model", type(model).__name__, why, "give another one")) from error
    backbone = getattr(made, made.base_model_prefix)
    backbone.load_state_dict(getattr(model, model.base_model_prefix).state_dict())
    _no_opinion(made)
    return made.to(model.device)


def _no_opinion(model: nn.Module) -> None:
    """A new head gives 0 everywhere, so that advantages begin as returns and not as noise."""
    head = score_head(model)
    if head is None:
        why = "its sequence-classification form has no linear score head"
        raise UserError(
            Violation("value_model", type(model).__name__, why, "give a decoder, e.g. Qwen2 or Llama")
        )
    for parameter in head.parameters():
        nn.init.zeros_(parameter)


def save(model: Any, folder: Path) -> None:
    """Whole weights in one file, or the adapter with the head, as `from_pretrained` reads them."""
    model.save_pretrained(folder, max_shard_size="10000GB")


def load(model: Any, folder: Path) -> None:
    """Weights of `save` into a model like the one that was saved."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict
        from peft.utils import load_peft_weights

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    from safetensors.torch import load_model

    load_model(model, str(folder / _SAVED))
