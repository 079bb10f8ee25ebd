"""Whether and how sequences are laid end to end in one row, which depends on the model as much as on the settings."""

from __future__ import annotations

from typing import Any

from hydratune import attention
from hydratune.data.collate_preference import Layout
from hydratune.errors import UserError, Violation


def packs(args: Any) -> bool:
    """Whether batches are one row end to end where the attention allows it."""
    return bool(getattr(args, "packing", False)) or getattr(args, "padding_free", False) is not False


def settle_padding(args: Any, model: Any) -> None:
    """`padding_free: null` becomes what is exact and fast for this model.

    Raises:
        UserError: it is asked for, or rows are packed, and sequences of this model would see each other; or the model cannot
            have our own attention, which is asked for.
    """
    name, config = model.config._attn_implementation, model.config.get_text_config()
    layers = {
        *(getattr(config, "layer_types", None) or []),
        *(getattr(config, "layers_block_type", None) or []),
    }
    carries_state = any("attention" not in kind or "linear" in kind for kind in layers)
    virtual = any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values())
    obeyed = attention.obeyed(model)
    if name == attention.NAME and not obeyed:
        raise UserError(
            Violation(
                "model.attn_implementation",
                name,
                f"{config.model_type} has attention of its own",
                "use model.attn_implementation=auto",
            )
        )
    apart = obeyed and not (carries_state or virtual)
    asked = next((option for option in ("packing", "padding_free") if getattr(args, option, None)), None)
    if asked and not (apart and attention.exact_when_packed(name)):
        who = "virtual tokens" if virtual else f"{config.model_type} with the attention {name}"
        raise UserError(
            Violation(
                f"algo.{asked}",
                True,
                f"{who} would let sequences see each other",
                "use model.attn_implementation=auto, or leave it out" if apart else "leave it out",
            )
        )
    if args.padding_free is None:
        args.padding_free = apart and attention.fast_when_packed(name) and _has_kernel(args, model)


def _has_kernel(args: Any, model: Any) -> bool:
    """Whether a GPU has one kernel for all documents: in half precision and without dropout; else each would be a call."""
    if getattr(getattr(args, "device", None), "type", "cpu") != "cuda":
        return True
    half = args.bf16 or args.fp16 or model.dtype.itemsize == 2
    return bool(half and attention.has_kernel() and not getattr(model.config, "attention_dropout", 0))


def layout_for(args: Any, tokenizer: Any, model: Any) -> Layout:
    """The layout of preference batches for a model, once `settle_padding` has run.

    Prompts are shared where our own attention keeps branches apart; not under a mixture of experts' balance loss, which
    would count a shared prompt's tokens once.
    """
    config = model.config
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", None)
    balanced = bool(coefficient) and hasattr(config, "output_router_logits")
    shares = config._attn_implementation == attention.NAME and not balanced
    return Layout(tokenizer.pad_token_id, bool(args.padding_free), shares, args.pad_to_multiple_of)
