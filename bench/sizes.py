"""Models by size: real architectures with random weights."""

from __future__ import annotations

from typing import Any


def _small(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _small(2, 64),
    "small": _small(4, 128),
    "wide": _small(4, 256),
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config(size: str, tokenizer: Any, **more: Any) -> Any:
    """The `transformers` config; a size that has no vocabulary of its own takes the tokenizer's."""
    from transformers import AutoConfig

    own = {"vocab_size": len(tokenizer), **SIZES[size]}
    if len(tokenizer) > own["vocab_size"]:
        raise SystemExit(
            f"{size} has {own['vocab_size']} tokens, the tokenizer {len(tokenizer)}: give another --tokenizer"
        )
    return AutoConfig.for_model(**own, pad_token_id=tokenizer.pad_token_id, **more)
