"""Rewards against TRL's GRPO: what functions are given, what None means, weights, and reward models behind a template."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hydratune.models import byte_tokenizer
from hydratune.rewards import Rewards

pytestmark = pytest.mark.peer

TOKENS = byte_tokenizer()
QUESTIONS = ["What is 1 + 1?", "Say hi.", "What is 20 + 22, and why?", "?"]
ANSWERS = ["2", "hi hi", "It is 42", "what"]
ROWS = [{"prompt": [{"role": "user", "content": q}], "tag": i} for i, q in enumerate(QUESTIONS)]


def encoded(texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(TOKENS(text)["input_ids"]) for text in texts]


def ours(sources: list, **options):
    asked = [
        TOKENS.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in ROWS
    ]
    made = Rewards(sources, policy_tokenizer=TOKENS, device="cpu", **options)
    return made(ROWS, encoded(asked), encoded([a + TOKENS.eos_token for a in ANSWERS]), trainer_state="state")


def theirs(monkeypatch, sources: list, tokenizers: list) -> torch.Tensor:
    """[B, R] of TRL's own method, on a trainer that has only what it asks for."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    monkeypatch.setattr(trl, "gather", lambda values: values)
    monkeypatch.setattr(trl, "profiling_context", lambda *_: nullcontext())

    class Bare(trl.GRPOTrainer):
        def __init__(self):
            self.accelerator = SimpleNamespace(device=torch.device("cpu"))
            self.reward_funcs, self.reward_processing_classes = sources, tokenizers
            self.reward_func_names = [str(i) for i in range(len(sources))]
            self.state, self.environments, self.chat_template_kwargs = "state", None, {}
            self.args = SimpleNamespace(past_index=-1, device=torch.device("cpu"))
            self.is_deepspeed_enabled, self._past = False, None

    calculate = trl.GRPOTrainer._calculate_rewards
    completions = [[{"role": "assistant", "content": a}] for a in ANSWERS]
    ids = [row.tolist() for row in encoded([a + TOKENS.eos_token for a in ANSWERS])]
    return getattr(calculate, "__wrapped__", calculate)(
        Bare(), ROWS, [r["prompt"] for r in ROWS], completions, ids
    )


def test_functions_are_called_and_mixed_alike(monkeypatch):
    seen: list[dict] = []

    def look(**given):
        seen.append(given)
        return [None, 2, 3.5, True]

    async def later(completions, **_):
        return [1.0] * len(completions)

    def second(completions, **_):
        return [-1.0, None, 0.5, 0.0]

    peer = theirs(monkeypatch, [look, second], [None, None])
    mine = ours([look, second, later], weights=[0.5, 2.0, 0.0])
    hooks = {"log_extra", "log_metric"}  # of TRL's own trainer
    assert seen[0].keys() - seen[1].keys() == hooks
    assert seen[1] == {k: v for k, v in seen[0].items() if k not in hooks}
    both = torch.stack([mine.each["look"], mine.each["second"]])
    assert torch.equal(both.nan_to_num(-9), peer.T.nan_to_num(-9))
    assert torch.equal(mine.total, (peer * torch.tensor([0.5, 2.0])).nansum(1))


def test_a_reward_model_with_its_own_template_scores_alike(monkeypatch):
    config = AutoConfig.for_model(
        "qwen2", vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1,
    )  # fmt: skip
    other = byte_tokenizer()
    other.eos_token, other.pad_token = "<|endoftext|>", "<|im_end|>"
    other.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    config.pad_token_id = other.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.score.weight.data.normal_()
    peer = theirs(monkeypatch, [model], [other])[:, 0]
    mine = ours([model], tokenizers=[other]).total
    assert peer.std() > 0.1
    assert torch.allclose(mine, peer, atol=1e-5)
