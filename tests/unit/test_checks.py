"""Every rule of the checks: a run that is clean, and one that breaks each rule and is told why and what to do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from hydratune import checks, checks_model
from hydratune.checkpoints import COUNTERS
from hydratune.errors import UserError
from hydratune.models import ModelRecipe, byte_tokenizer
from hydratune.settings import DataSettings, ModelSettings, RunSettings, TrackingSettings

TINY = {
    "model_type": "qwen2", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
CPU = checks_model.DeviceFacts("cpu", "the CPU", bf16=True, fp16=False, total_bytes=2**34)
GPU = checks_model.DeviceFacts("cuda", "a GPU", bf16=True, fp16=True, total_bytes=2**34)


def settings(model=None, data=None, tracking=None, peft=None, options=None, **top) -> RunSettings:
    return RunSettings(
        algo="sft",
        algo_options=options or {},
        model=ModelSettings(**{"architecture": dict(TINY), "tokenizer": "byte"} | (model or {})),
        data=DataSettings(**data or {}),
        peft=peft,
        tracking=TrackingSettings(**tracking or {}),
        **{"output_dir": "", **top},
    )


def outline():
    return ModelRecipe(architecture=TINY).outline()


# what breaks a rule: settings, the key that must be named, and a word of the way out
ERRORS = {
    "no model": ({"model": {"architecture": None}}, "model.name_or_path", "model=tiny"),
    "no model type": ({"model": {"architecture": {"hidden_size": 8}}}, "model.architecture", "qwen2"),
    "no tokenizer": ({"model": {"tokenizer": None}}, "model.tokenizer", "byte"),
    "no file": ({"data": {"source": "local"}}, "data.path", "FILE.jsonl"),
    "no data set": ({"data": {"source": "hub"}}, "data.name", "OWNER/NAME"),
    "endless stream": ({"data": {"streaming": True}}, "data.streaming", "max_steps"),
    "endless block": ({"options": {"packing": True, "max_length": None}}, "algo.packing", "algo.max_length"),
    "too short": ({"options": {"max_length": 1}}, "algo.max_length", "2 or more"),
    "unprepared packing": (
        {"options": {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}}}, "algo.packing", "drop one",
    ),
    "inexact attention": (
        {"options": {"padding_free": True}, "model": {"attn_implementation": "mine"}}, "model.attn_implementation", "auto",
    ),
    "virtual tokens": ({"options": {"packing": True}, "peft": {"type": "prefix_tuning"}}, "algo.packing", "peft=lora"),
    "no completions": (
        {"options": {"completion_only_loss": True}, "data": {"format": "text"}}, "algo.completion_only_loss", "formatting_func",
    ),
    "no turns": ({"options": {"assistant_only_loss": True}, "data": {"format": "text"}}, "algo.assistant_only_loss", "messages"),
    "best of nothing": (
        {"options": {"load_best_model_at_end": True}, "data": {"eval_fraction": 0.0}},
        "trainer.load_best_model_at_end", "data.eval_path",
    ),
    "best not saved": (
        {"options": {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "no"}},
        "trainer.load_best_model_at_end", "save_strategy=epoch",
    ),
    "best between saves": (
        {"options": {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps",
                     "eval_steps": 30, "save_steps": 50}},
        "trainer.save_steps", "make it one",
    ),
    "quantised alone": ({"model": {"quantization": "4bit"}}, "model.quantization", "peft=qlora"),
    "no bitsandbytes": ({"model": {"quantization": "8bit"}, "peft": {"type": "lora"}}, "model.quantization", "hydratune[quant]"),
    "no optimizer": ({"options": {"optim": "adamw_bnb_8bit"}}, "trainer.optim", "bitsandbytes"),
    "no galore": ({"options": {"optim": "galore_adamw"}}, "trainer.optim", "galore-torch"),
    "no deepspeed": ({"options": {"deepspeed": {"a": 1}}}, "trainer.deepspeed", "pip install"),
    "one process": ({"options": {"fsdp": True}}, "trainer.fsdp", "accelerate launch"),
    "two precisions": ({"options": {"bf16": True, "fp16": True}}, "trainer.fp16", "keep one"),
    "no template": ({"model": {"chat_template_path": "none.jinja"}}, "model.chat_template_path", "jinja"),
    "no function": ({"data": {"formatting_func": "json.dumsp"}}, "data.formatting_func", "dump"),
    "no module": ({"data": {"formatting_func": "nowhere.at_all"}}, "data.formatting_func", "PYTHONPATH"),
    "their tracking": ({"options": {"report_to": ["wandb"]}}, "trainer.report_to", "tracking=wandb"),
    "unknown metric": ({"objective": "eval_los"}, "objective", "eval_loss"),
    "no evaluation": ({"objective": "eval_loss", "data": {"eval_fraction": 0.0}}, "objective", "logged"),
    "nothing to resume": ({"resume": "nowhere"}, "resume", "run's directory"),
}  # fmt: skip


def clean() -> RunSettings:
    return settings(
        options={"packing": True, "learning_rate": 1e-4, "eval_strategy": "epoch"}, objective="eval_loss"
    )


def test_a_clean_run_passes_every_rule():
    findings = checks.check_settings(clean())
    findings = findings.merge(checks_model.check_device(clean(), CPU))
    findings = findings.merge(checks_model.check_tokenizer(byte_tokenizer(), clean()))
    lora = {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}
    tight = replace(clean(), algo_options={"max_length": 512})
    findings = findings.merge(checks_model.check_model(outline(), lora, byte_tokenizer(), tight))
    assert findings == checks.Findings()
    findings.raise_if_any()


@pytest.mark.parametrize("name", ERRORS)
def test_a_broken_rule_names_key_and_way_out(name):
    given, key, way_out = ERRORS[name]
    findings = checks.check_settings(settings(**given))
    (violation,) = [v for v in findings.errors if v.key == key][:1] or [None]
    assert violation is not None, findings
    assert way_out in violation.fix and violation.why


def test_all_violations_come_at_once():
    findings = checks.check_settings(
        settings(data={"source": "hub"}, options={"max_length": 1, "fsdp": True})
    )
    with pytest.raises(UserError) as error:
        findings.raise_if_any()
    assert {v.key for v in error.value.violations} == {"data.name", "algo.max_length", "trainer.fsdp"}


@pytest.mark.parametrize(
    "given,word",
    [
        ({"data": {"eval_fraction": 0.0}, "options": {"eval_strategy": "epoch"}}, "nothing is evaluated"),
        ({"model": {"dtype": "float16"}}, "overflows"),
        ({"options": {"learning_rate": 5.0}}, "lr=5.0"),
    ],
)
def test_what_is_odd_but_works_is_a_warning(given, word):
    findings = checks.check_settings(settings(**given))
    assert not findings.errors
    assert [w for w in findings.warnings if word in w]


def test_directories_without_a_model(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    given = settings(model={"architecture": None, "name_or_path": str(tmp_path)})
    (violation,) = checks.check_settings(given).errors
    assert "readme.txt" in violation.why
    (tmp_path / "adapter_config.json").write_text("{}")
    (violation,) = checks.check_settings(given).errors
    assert "hydratune merge" in violation.fix


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    (violation,) = checks.check_settings(settings(output_dir=str(tmp_path / "file"))).errors
    assert violation.key == "output_dir"


def test_a_resume_of_another_run_shows_the_difference(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in checks.check_settings(settings(resume=str(tmp_path / "empty"))).errors[0].why
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    assert "no checkpoint" in checks.check_settings(settings(resume=str(tmp_path))).errors[0].why  # cut short
    (tmp_path / "checkpoints" / "checkpoint-3" / COUNTERS).write_text("{}")
    before = {"algo": {"name": "sft"}, "model": {"name_or_path": "other"}, "peft": {"type": "lora"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    now = {"algo": {"name": "sft"}, "model": {"name_or_path": "mine"}, "peft": None}
    findings = checks.check_settings(settings(resume=str(tmp_path), resolved=now))
    assert {v.key for v in findings.errors} == {"model.name_or_path", "peft.type"}
    same = checks.check_settings(settings(resume=str(tmp_path), resolved=json.loads(json.dumps(before))))
    assert not same.errors


@pytest.mark.parametrize(
    "given,device,key",
    [
        ({"options": {"tf32": True}}, CPU, "trainer.tf32"),
        ({"model": {"dtype": "float16"}}, CPU, "model.dtype"),
        ({"model": {"attn_implementation": "flash_attention_2"}}, CPU, "model.attn_implementation"),
        ({"model": {"attn_implementation": "flash_attention_2"}}, GPU, "model.attn_implementation"),
        ({"model": {"quantization": "4bit"}, "peft": {"type": "lora"}}, CPU, "model.quantization"),
    ],
)
def test_a_feature_that_the_device_lacks(given, device, key):
    (violation,) = checks_model.check_device(settings(**given), device).errors
    assert violation.key == key and violation.fix


def test_a_precision_that_the_device_lacks_is_one_warning():
    old_gpu = replace(GPU, bf16=False, name="an old GPU")
    findings = checks_model.check_device(settings(options={"bf16": True}), old_gpu)
    assert not findings.errors
    assert findings.warnings == ["trainer.bf16=true is not supported on an old GPU: training in fp32"]


def test_device_facts_are_of_this_machine():
    facts = checks_model.device_facts()
    assert facts.kind in ("cpu", "cuda") and facts.total_bytes > 2**28


def test_tokenizer_rules():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    small = settings(model={"architecture": TINY | {"vocab_size": 10}})
    first, second = checks_model.check_tokenizer(tokenizer, small).warnings
    assert "pad token" in first and "vocab_size" in second


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_modules_that_do_not_exist_list_those_that_do(key):
    findings = checks_model.check_model(
        outline(), {"type": "lora", key: ["q_porj"]}, byte_tokenizer(), settings()
    )
    (violation,) = findings.errors
    assert violation.key == f"peft.{key}" and "q_proj" in violation.fix and "all-linear" in violation.fix


@pytest.mark.parametrize("wanted", ["all-linear", ".*q_proj", ["mlp.up_proj"], None])
def test_modules_that_exist_in_any_spelling(wanted):
    assert not checks_model.check_model(
        outline(), {"type": "lora", "target_modules": wanted}, byte_tokenizer(), settings()
    ).errors


def test_model_sizes():
    big = settings(options={"max_length": 4096})
    findings = checks_model.check_model(outline(), {"type": "lora", "r": 64}, byte_tokenizer(), big)
    assert [w for w in findings.warnings if "4096" in w] and [
        w for w in findings.warnings if "peft.r=64" in w
    ]
    for algo in ("sft", "grpo"):  # which has no max_length
        findings = checks_model.check_model(outline(), None, byte_tokenizer(), replace(settings(), algo=algo))
        assert bool(findings.warnings) == (algo == "sft")
    small = ModelRecipe(architecture=TINY | {"vocab_size": 100}).outline()
    (violation,) = checks_model.check_model(small, None, byte_tokenizer(), settings()).errors
    assert violation.key == "model.tokenizer"


def test_a_stateful_model_is_not_packed():
    mamba = ModelRecipe(
        architecture={"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
    ).outline()
    (violation,) = checks_model.check_model(
        mamba, None, byte_tokenizer(), settings(options={"packing": True})
    ).errors
    assert "state" in violation.why


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_a_model_with_attention_of_its_own_is_not_packed(option):
    bloom = ModelRecipe(
        architecture={"model_type": "bloom", "hidden_size": 16, "n_head": 2, "n_layer": 1, "vocab_size": 300}
    ).outline()
    tokenizer = byte_tokenizer()
    assert not checks_model.check_model(bloom, None, tokenizer, settings()).errors
    (violation,) = checks_model.check_model(bloom, None, tokenizer, settings(options={option: True})).errors
    assert violation.key == f"algo.{option}" and "keep documents apart" in violation.why
    assert violation.fix == f"set algo.{option}=false"
