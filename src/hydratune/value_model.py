"""The value model of PPO: a backbone with one number a token, made of whatever is at hand."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from hydratune import adapters
from hydratune.errors import UserError, Violation
from hydratune.fused_head import base_of
from hydratune.models import ModelRecipe
from hydratune.reward_sources import model_home
from hydratune.score import score_head

log = logging.getLogger("hydratune")
_SAVED = "model.safetensors"


def build_value_model(
    given: Any,
    *,
    policy: Any,
    recipe: ModelRecipe | None,
    reward_model: Any,
    peft_config: Any,
    args: Any,
    others: list[Any],
    tokens: int,
) -> Any:
    """A trainable value model.

    Args:
        given: an instance (of a causal LM too: a score head is put on its backbone), a directory or hub id, or None.
        policy: as it starts; recipe: of it, if there is one.
        reward_model: one that reads the policy's tokens, from whose weights the value model starts; or None.
        peft_config: of the policy's adapter; the value model gets one like it, and its head is trained whole.
        others: models that are used otherwise; one of them is copied, because it must not be trained.
        tokens: of the policy's tokenizer.

    Raises:
        UserError: a model without a score head for one number, or with another vocabulary.
    """
    dtype = torch.float32 if args.fp16 or args.bf16 else next(base_of(policy).parameters()).dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    attention = policy.config._attn_implementation
    if isinstance(given, str):
        given = _home(given)
        source = ModelRecipe(
            name_or_path=given, task="reward", dtype=dtype, attn_implementation=attention, seed=args.seed,
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        trained = any("SequenceClassification" in name for name in source.config().architectures or ())
        saved = AutoConfig.from_pretrained(given, trust_remote_code=args.trust_remote_code)
        if trained and saved.num_labels != 1:
            raise _unfit(given, f"has {saved.num_labels} labels, and a value is one number")
        model = source.build()
        if not trained:
            _no_opinion(model)
    elif given is not None:
        if any(given is other for other in others):
            log.info("the value model is used otherwise too: a copy of it is trained")
            given = copy.deepcopy(given)
        model = given if score_head(given) is not None else with_score_head(given)
    elif reward_model is not None:
        log.info("no value model was given: it starts from the reward model's weights")
        model = copy.deepcopy(reward_model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    elif recipe is not None:
        log.info("no value model was given: it starts from the policy's weights, with a new head")
        try:
            model = replace(recipe, task="reward", peft_config=None).build()
        except ValueError as error:
            raise _unfit(policy.config.model_type, "has no form with a score head in transformers") from error
        _no_opinion(model)
    else:
        log.info("no value model was given: it starts from the policy's weights, with a new head")
        plain = copy.deepcopy(policy)
        model = with_score_head(plain.merge_and_unload() if hasattr(plain, "peft_config") else plain)
        if hasattr(policy, "peft_config"):
            peft_config = policy.peft_config[policy.active_adapter]
    labels = getattr(model.config, "num_labels", 1)
    if score_head(model) is None:
        raise _unfit(type(model).__name__, "has no linear score head over its states")
    size = model.get_input_embeddings().weight.shape[0]
    if size < tokens:
        raise _unfit(
            type(model).__name__, f"embeds {size:,} tokens, and the policy's tokenizer has {tokens:,}"
        )
    if labels != 1:
        raise _unfit(type(model).__name__, f"has {labels} labels, and a value is one number")
    if getattr(model, "is_quantized", False) is False:
        model = model.to(dtype)
    model.set_attn_implementation(attention)
    if not hasattr(model, "peft_config"):  # whose base stays as it is
        model.requires_grad_(True)
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
        raise _unfit(config.model_type, "has no form with a score head in transformers") from error
    backbone = getattr(made, made.base_model_prefix)
    backbone.load_state_dict(getattr(model, model.base_model_prefix).state_dict())
    _no_opinion(made)
    return made.to(model.device)


def _no_opinion(model: nn.Module) -> None:
    """A new head gives 0 everywhere, so that advantages begin as returns and not as noise."""
    head = score_head(model)
    if head is None:
        raise _unfit(type(model).__name__, "has no linear score head over its states")
    for parameter in head.parameters():
        nn.init.zeros_(parameter)


def _home(given: str) -> str:
    """The directory that holds the model, given that or its run; a hub id as it is."""
    path = Path(given).expanduser()
    if not path.is_dir():
        return given
    home = model_home(path)
    if home is None:
        raise _unfit(given, "the directory holds no config.json")
    if (home / "adapter_config.json").is_file():
        raise _unfit(given, f"is an adapter; merge it first: hydratune merge {given} MERGED")
    return str(home)


def _unfit(what: str, why: str) -> UserError:
    fix = (
        "give a decoder with one label (algo=reward trains one) and the policy's vocabulary, or leave it out"
    )
    return UserError(Violation("algo.value_model", what, why, fix))


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
