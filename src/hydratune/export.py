"""A trained model as one folder for plain transformers: merged safetensors, tokenizer, template, generation config, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hydratune.adapters import free_folder, load_adapter
from hydratune.card import write_card
from hydratune.models import load_tokenizer
from hydratune.samples import stop_tokens
from hydratune.tracking import quiet_libraries
from hydratune.trained import Place, load_whole


def export_model(place: Place, target: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Save a model so that `from_pretrained(target)` gives it back and `generate` ends its answers.

    Args:
        place: of `trained.find_model`.
        target: a directory that does not exist yet, or is empty.
        dtype: of the weights; None keeps what was saved, of a base what it has.

    Raises:
        UserError: the model or its base is not to be had, or `target` is taken.
    """
    quiet_libraries()
    target = free_folder(target)
    trust = bool(place.run and place.run.config.get("model.trust_remote_code"))
    if place.adapter:
        model = load_adapter(place.folder, dtype=dtype, trust_remote_code=trust).merge_and_unload()
    else:
        model = load_whole(str(place.folder), dtype, trust_remote_code=trust)
    tokenizer = load_tokenizer(str(place.folder), trust_remote_code=trust)
    _settle(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if place.run is not None and place.run.summary:
        write_card(target, place.run.path)
    return target


def _settle(model: Any, tokenizer: Any) -> None:
    """The tokens that pad and end what this tokenizer makes."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is None or not model.can_generate():
        return
    stops = stop_tokens(model, tokenizer, conversation=tokenizer.chat_template is not None)
    model.generation_config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
