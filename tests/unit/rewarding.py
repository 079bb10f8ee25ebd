"""A policy's rows and answers, tokenizers and tiny reward models, for the tests of rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast

from hydratune import attention
from hydratune.errors import TrainingFailed, UserError
from hydratune.models import byte_tokenizer
from hydratune.rewards import Rewards, check_sources

ARCHITECTURE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TOKENS = byte_tokenizer()
QUESTIONS = ["What is 1 + 1?", "Say hi.", "What is 20 + 22, and why is it so?", "?", "Name a colour, please."]
ANSWERS = ["2", "hi hi", "It is 42", "what", "Blue is one of them"]


def tree(kind: str = "reward", *, labels: int = 1, seed: int = 0, attn: str = "sdpa", **fields):
    attention.register()
    auto = AutoModelForCausalLM if kind == "causal_lm" else AutoModelForSequenceClassification
    config = AutoConfig.for_model("qwen2", num_labels=labels, **ARCHITECTURE | fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn)
        if kind == "reward":
            model.score.weight.data.normal_(std=1.0)  # so that scores differ by more than rounding
    return model.eval()


def other_tokenizer(*, template: bool = True):
    """The same bytes under other ids, other special tokens, and another chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = Fast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    if template:
        made.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    return made


def plain_rows() -> list[dict]:
    return [{"prompt": q, "tag": i} for i, q in enumerate(QUESTIONS)]


def chat_rows() -> list[dict]:
    return [{"prompt": [{"role": "user", "content": q}], "tag": i} for i, q in enumerate(QUESTIONS)]


def ids_of(rows: list[dict], answers: list[str] = ANSWERS) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and finished completions in the policy's tokens."""
    prompts = [
        row["prompt"]
        if isinstance(row["prompt"], str)
        else TOKENS.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    encode = lambda texts: [np.asarray(TOKENS(t)["input_ids"], dtype=np.int32) for t in texts]  # noqa: E731
    return encode(prompts), encode([a + TOKENS.eos_token for a in answers])


def rewards(*sources, **options) -> Rewards:
    return Rewards(sources, policy_tokenizer=TOKENS, device="cpu", **options)


def judge(made: Rewards, rows: list[dict] | None = None, **also):
    rows = chat_rows() if rows is None else rows
    return made(rows, *ids_of(rows), **also)


@torch.no_grad()
def alone(model, ids: list) -> torch.Tensor:
    """The model's own scores of sequences, each in a batch of its own."""
    return torch.stack(
        [model(input_ids=torch.as_tensor(np.asarray(i))[None].long()).logits[0, 0] for i in ids]
    )


def joined(rows: list[dict]) -> list[np.ndarray]:
    """What a model with the policy's tokens reads: in ChatML a line break follows the end of a turn."""
    after = [[] if isinstance(row["prompt"], str) else TOKENS("\n")["input_ids"] for row in rows]
    return [np.concatenate(parts) for parts in zip(*ids_of(rows), after, strict=True)]


def wrong(*sources, columns=("prompt",), **options) -> str:
    found = check_sources(sources, columns=columns, **options)
    assert len(found) == 1, found
    return str(found[0])


def fails(source, error=TrainingFailed, rows=None, **options) -> str:
    made = rewards(source, **options)
    with pytest.raises(error) as caught:
        judge(made, rows)
    if error is UserError:
        assert len(caught.value.violations) == 1
    return str(caught.value)
