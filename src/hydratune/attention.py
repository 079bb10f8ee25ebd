"""Exact attention for packed and padding-free batches, and the choice of a backend.

A packed batch is one row of documents end to end, whose boundaries come with it as `cu_seq_lens_q` (see
`data/collate.py`). "hydratune_varlen" attends within each document: on a CPU with one sdpa call a document, on CUDA with
the FlashAttention-2 kernels inside torch (`torch.nn.attention.varlen`, torch ≥ 2.10). Padded batches and generation take
transformers' sdpa path. A part of a batch may also attend to what stands elsewhere in it, in front of its own tokens:
`key_index` then lists the keys of every part (see `data/collate_preference.py`).
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import is_flash_attn_2_available

NAME = "hydratune_varlen"
_EXACT = {
    "sdpa",
    "eager",
    "flex_attention",
    NAME,
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
}


def register() -> None:
    """Make "hydratune_varlen" known to transformers; may be called any number of times."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def exact_when_packed(name: str) -> bool:
    """Whether a backend keeps documents of a packed batch apart (transformers passes it their positions)."""
    return name.split("|")[-1].removeprefix("paged_") in _EXACT


def available(device: str) -> dict[str, bool]:
    """The backends by name, and whether this device ("cpu", "cuda", …) has them."""
    cuda = device == "cuda"
    return {
        "sdpa": True,
        "eager": True,
        "flex_attention": cuda,
        NAME: device in ("cpu", "cuda"),
        "flash_attention_2": cuda and is_flash_attn_2_available(),
    }


def fast_when_packed(name: str) -> bool:
    """Whether it is also fast, because it takes boundaries instead of a dense mask."""
    return name == NAME or "flash_attention" in name


def obeyed(model: Any) -> bool:
    """Whether a model attends with the backend that it is given; bloom, falcon and their like have attention of their own.

    Of those nobody has told whether their masks keep documents of one row apart; most do not.

    Args:
        model: or its outline, or its config, which does not tell the class of code from outside transformers.
    """
    if isinstance(model, torch.nn.Module) and getattr(model, "_supports_attention_backend", False):
        return True
    kind = _class_of(_config(model))
    if kind is None:
        return False
    # StableLM and BioGPT do not say so, and use the interface
    return kind._supports_attention_backend or hasattr(
        sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS"
    )


def _config(model: Any) -> Any:
    return model.config if isinstance(model, torch.nn.Module) else model


def _class_of(config: Any) -> Any:
    """The model class of a config of transformers' own; None of others."""
    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def choose(device: str, *, packed: bool, model: Any, shared: bool = False) -> str:
    """The fastest exact backend for a model on a device: what `attn_implementation: auto` means.

    Args:
        model: its outline, or its config.
        shared: batches share prompts (`key_index`), which only our own backend knows.
    """
    text = _config(model).get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "eager"  # sdpa cannot cap logits
    kind = model if isinstance(model, torch.nn.Module) else _class_of(model)
    if not getattr(kind, "_supports_sdpa", True):
        return "eager"
    if not packed or not obeyed(model):
        return "sdpa"
    ours = available(device)[NAME] and _full_attention(text)
    if available(device)["flash_attention_2"] and not (shared and ours):
        return "flash_attention_2"
    return NAME if ours else "sdpa"


def _full_attention(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for one row of full attention without padding, so that packed rows never get a dense T × T one; else sdpa's.

    Several rows need it where they are packed, and chunked or sliding attention always does.
    """
    config = kwargs.get("config")
    full = config is None or _full_attention(config.get_text_config())
    if attention_mask is None and q_length == kv_length and not args and batch_size == 1 and full:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def unmasked(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """A model's inputs with the word that no mask is needed, where that is so: a row with its documents' boundaries.

    Without a mask transformers asks in every forward pass whether positions restart, for which a GPU is waited for. A mask of
    four dimensions it passes on as it is, so that an empty one reaches `_attend`, which knows it.

    Args:
        config: of the model, which is to have our own attention. A mixture of experts may count tokens by the mask.
    """
    text = config.get_text_config()
    known = config._attn_implementation == NAME and _full_attention(text)
    ids = inputs["input_ids"]
    if not known or "cu_seq_lens_q" not in inputs or len(ids) > 1 or hasattr(text, "output_router_logits"):
        return inputs
    return {**inputs, "attention_mask": ids.new_empty((1, 1, 1, 0))}


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' interface: query [B, H, T, D], key and value [B, H_kv, T, D] → [B, T, H, D].

    Raises:
        ValueError: the layer has a sliding window or caps its logits; `choose` does not offer this backend then.
    """
    if kwargs.get("sliding_window") is not None or kwargs.get("softcap") is not None:
        raise ValueError(
            f"{NAME} has neither sliding windows nor capped logits: use sdpa, eager or flex_attention"
        )
    if attention_mask is not None and not attention_mask.numel():  # of `unmasked`
        attention_mask = None
    if torch.is_autocast_enabled(query.device.type):  # a rotary embedding in fp32 has made them fp32 again
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    boundaries = kwargs.get("cu_seq_lens_q")
    alone = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2] > 1
    if boundaries is None and alone:
        boundaries = _boundaries(kwargs.get("position_ids"), query.shape[2])
    if boundaries is None or not alone:
        assert kwargs.get("key_index") is None, "shared prompts need one row without padding"
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # the keys of each part end with its own tokens, so that causal is aligned to the lower right
    if (index := kwargs.get("key_index")) is not None:
        key, value = key.index_select(2, index), value.index_select(2, index)
    reach = boundaries if index is None else kwargs["cu_seq_lens_k"]
    if (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and _varlen() is not None
    ):
        longest = kwargs.get("max_length_q"), kwargs.get("max_length_k")
        return _torch_varlen(query, key, value, boundaries, reach, longest, scaling), None
    lengths, reaches = boundaries.diff().tolist(), reach.diff().tolist()
    # split and not slices: the backward of a slice fills a tensor of the whole length, for every document
    documents = zip(
        query.split(lengths, dim=2), key.split(reaches, dim=2), value.split(reaches, dim=2), strict=True
    )
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            _after(q, k),
            dropout_p=dropout,
            is_causal=q.shape[2] == k.shape[2],
            scale=scaling,
            enable_gqa=grouped,
        )
        for q, k, v in documents
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _after(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask of queries that are the last ones of the keys; None where they are all of them."""
    own, every = query.shape[2], key.shape[2]
    if own == every:
        return None
    return torch.ones(own, every, dtype=torch.bool, device=query.device).tril(every - own)


def _boundaries(position_ids: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Document boundaries from restarting positions, for callers that pass no `cu_seq_lens_q`."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[0] != 1:
        return None
    goes_on = F.pad(
        position_ids[0].diff() == 1, (1, 0), value=False
    )  # the first token starts one, wherever it counts from
    starts = (~goes_on).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([length])]).to(torch.int32) if len(starts) > 1 else None


def has_kernel() -> bool:
    """Whether this torch has FlashAttention's kernels for documents of different lengths."""
    return _varlen() is not None


@cache
def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    reach: torch.Tensor,
    longest: tuple[int | None, int | None],
    scaling: float | None,
) -> torch.Tensor:
    """`varlen_attn` over [T, H, D]; its arguments changed between torch 2.10 and 2.13, so its signature is asked.

    Args:
        boundaries, reach: of the parts' queries and of their keys, int32 [parts + 1].
        longest: the longest part in queries and in keys; None: found here, with a host sync.
    """
    attend = _varlen()
    known = inspect.signature(attend).parameters
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if scaling is not None:
        if "scale" in known:
            options["scale"] = scaling
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    most = [
        int(b.diff().max()) if n is None else n for b, n in zip((boundaries, reach), longest, strict=True)
    ]
    return attend(query, key, value, boundaries, reach, *most, **options)[None]
