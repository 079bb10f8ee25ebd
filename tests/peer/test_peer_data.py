"""Token ids and labels of real rows against TRL's preparation of the same rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hydratune.data.pipeline import prepare

pytestmark = pytest.mark.peer
trl = pytest.importorskip("trl")

DEFAULTS = {
    "dataset_text_field": "text",
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "eos_token": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing": False,
    "packing_strategy": "bfd",
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "seed": 42,
}


def rows_of(file, count):
    with file.open(encoding="utf-8") as stream:
        return [json.loads(next(stream)) for _ in range(count)]


def conversations(shared):
    return rows_of(shared / "sft" / "capybara_like.jsonl", 60) + rows_of(
        shared / "sft" / "task_dialogs.jsonl", 20
    )


def pairs(shared):
    return [{k: r[k] for k in ("prompt", "completion")} for r in rows_of(shared / "kto" / "kto_en.jsonl", 80)]


def plain_pairs(shared):
    rows = rows_of(shared / "math" / "gsm8k_train_2k.jsonl", 80)
    return [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in rows]


def texts(shared):
    rows = rows_of(shared / "math" / "gsm8k_train_2k.jsonl", 80)
    return [{"text": r["question"] + " " + r["answer"]} for r in rows]


def from_trl(rows, tokenizer, tmp_path, **options):
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_config(small),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer.train_dataset


def ours(rows, tokenizer, **options):
    args = SimpleNamespace(**{**DEFAULTS, **options})
    return prepare(
        Dataset.from_list(rows), tokenizer, args, packing=args.packing, where="train", cache=False
    )[0]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (conversations, {"assistant_only_loss": True}),
        (conversations, {"assistant_only_loss": True, "max_length": 200, "truncation_mode": "keep_end"}),
        (conversations, {}),
        (pairs, {}),
        (pairs, {"max_length": 128}),
        (pairs, {"assistant_only_loss": True}),
        (pairs, {"completion_only_loss": False}),
        (plain_pairs, {}),
        (texts, {}),
    ],
    ids=[
        "assistant",
        "assistant-end",
        "chat",
        "pairs",
        "pairs-128",
        "pairs-assistant",
        "pairs-all",
        "plain-pairs",
        "text",
    ],
)
def test_ids_and_labels_equal_those_of_trl(shared_data, marked_tokenizer, tmp_path, make, options):
    rows = make(shared_data)
    theirs, mine = (
        from_trl(rows, marked_tokenizer, tmp_path, **options),
        ours(rows, marked_tokenizer, **options),
    )
    assert theirs["input_ids"][:] == mine["input_ids"][:]
    assert theirs["labels"][:] == mine["labels"][:]
    assert len(mine) > 10


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_blocks_hold_the_documents_that_trl_packs(shared_data, marked_tokenizer, tmp_path, strategy):
    options = {"packing": True, "packing_strategy": strategy, "max_length": 512}
    rows = conversations(shared_data)
    theirs, mine = (
        from_trl(rows, marked_tokenizer, tmp_path, **options),
        ours(rows, marked_tokenizer, **options),
    )

    def documents(data):
        found = []
        for row in data:
            start = 0
            for length in row["seq_lengths"]:
                found.append(
                    (
                        tuple(row["input_ids"][start : start + length]),
                        tuple(row["labels"][start : start + length]),
                    )
                )
                start += length
        return sorted(found)

    assert documents(theirs) == documents(mine)
    assert len(mine) <= len(theirs)
