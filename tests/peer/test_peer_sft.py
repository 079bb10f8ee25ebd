"""SFT against TRL 1.16, the oracle: same weights, rows, seed and settings give the same losses, step by step."""

from __future__ import annotations

import copy
import json

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL, the oracle, comes with the extra [bench]")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

from hydratune import SFTConfig, SFTTrainer  # noqa: E402
from hydratune.models import byte_tokenizer  # noqa: E402

pytestmark = pytest.mark.peer

STEPS = 20
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "max_length": 192,
    "save_strategy": "no",
    "report_to": [],
    "seed": 7,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def small_model(vocab_size: int, lora: bool):
    """A Qwen2 of two layers with random weights; with an adapter whose B is not zero, so that both halves learn."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def read(path, rows: int) -> Dataset:
    with path.open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line, _ in zip(lines, range(rows), strict=False)])


def conversations(shared_data, rows: int = 90) -> Dataset:
    return read(shared_data / "sft" / "capybara_like.jsonl", rows).select_columns(["messages"])


def prompt_completion(shared_data) -> Dataset:
    rows = read(shared_data / "math" / "gsm8k_train_2k.jsonl", 90)
    return rows.rename_columns({"question": "prompt", "answer": "completion"}).select_columns(
        ["prompt", "completion"]
    )


def plain_text(shared_data) -> Dataset:
    rows = read(shared_data / "math" / "gsm8k_train_2k.jsonl", 90)
    return Dataset.from_dict({"text": list(rows["question"])})


CASES = {
    "assistant_only": (conversations, {"assistant_only_loss": True}, False),
    "prompt_completion": (prompt_completion, {}, False),
    "plain_text": (plain_text, {}, False),
    "dft": (prompt_completion, {"loss_type": "dft"}, False),
    "padding_free": (prompt_completion, {"padding_free": True, "max_length": None}, False),
    "accumulation": (
        prompt_completion,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        False,
    ),
    "lora": (conversations, {"assistant_only_loss": True}, True),
}


def trajectory(trainer) -> tuple[list[float], list[float]]:
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [e["loss"] for e in history], [float(e["grad_norm"]) for e in history]


def both(rows: Dataset, options: dict, lora: bool, tmp_path, theirs_rows: Dataset | None = None):
    tokenizer = byte_tokenizer()
    model = small_model(len(tokenizer), lora)
    ours = SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(output_dir=str(tmp_path / "ours"), **COMMON | options),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
    )
    theirs = trl.SFTTrainer(
        model=copy.deepcopy(model),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "theirs"), gradient_checkpointing=False, **COMMON | options
        ),
        train_dataset=theirs_rows or rows,
        processing_class=copy.deepcopy(tokenizer),
    )
    return trajectory(ours), trajectory(theirs)


@pytest.mark.parametrize("case", CASES)
def test_same_losses_and_gradients_as_trl(case, shared_data, tmp_path):
    make_rows, options, lora = CASES[case]
    (ours, our_norms), (theirs, their_norms) = both(make_rows(shared_data), options, lora, tmp_path)
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert our_norms == pytest.approx(their_norms, rel=1e-3, abs=1e-4)
    if case != "dft":  # −p·log p rises at first where p is small
        assert ours[-1] < ours[0]


def test_bfd_packing_gives_trls_losses(shared_data, tmp_path):
    """TRL packs each 1000 rows for themselves, ours all rows at once: below 1000 rows both are the same best fit,
    though the order of equally full blocks may differ. So the blocks are compared as sets, and the trajectory is held
    against TRL's on our blocks."""
    rows = prompt_completion(shared_data)
    options = {
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": 1,
        "max_length": 640,
    }
    tokenizer = byte_tokenizer()
    model = small_model(len(tokenizer), lora=False)
    model.set_attn_implementation("eager")
    ours = SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(output_dir=str(tmp_path / "ours"), **COMMON | options),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
    )
    theirs = trl.SFTTrainer(
        model=copy.deepcopy(model),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "theirs"), gradient_checkpointing=False, **COMMON | options
        ),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
    )

    def documents(dataset):
        found = []
        for row in dataset:
            start = 0
            for length in row["seq_lengths"]:
                found.append(tuple(row["input_ids"][start : start + length]))
                start += length
        return sorted(found)

    assert documents(ours.train_dataset) == documents(theirs.train_dataset)
    assert len(ours.train_dataset) <= len(theirs.train_dataset)
    theirs.train_dataset = ours.train_dataset
    our_losses, their_losses = trajectory(ours)[0], trajectory(theirs)[0]
    assert len(our_losses) == STEPS
    assert our_losses == pytest.approx(their_losses, abs=1e-4)
