"""Every shipped YAML composes and parses; what is declared may be set, nothing else; all violations at once."""

from __future__ import annotations

import pytest
from commands import ROOT, entry
from hydra import compose, initialize_config_dir

from hydratune.config import SHORTCUTS, parse
from hydratune.errors import UserError
from hydratune.options import adapter_types, config_class, convert, options_of

CONF = ROOT / "conf"
ENTRIES = sorted(f"{p.parent.name}={p.stem}" for p in CONF.glob("*/*.yaml"))


def settings(*overrides, conf=CONF):
    overrides = entry.rewrite(list(overrides))
    entry._register_resolvers({})
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        cfg = compose("train", overrides=overrides, return_hydra_config=True)
    return parse(cfg, choices=dict(cfg.hydra.runtime.choices), overrides=overrides, conf=conf)


def problems(*overrides, conf=CONF):
    with pytest.raises(UserError) as caught:
        settings(*overrides, conf=conf)
    return {v.key: f"{v.why} {v.fix}" for v in caught.value.violations}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_shipped_entry_composes_and_parses(entry, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    needed = {
        "model=local": ["model.name_or_path=some/model"],
        "data=local": [f"data.path={tmp_path / 'rows.jsonl'}"],
        "data=hub": ["data.name=some/rows"],
    }
    got = settings(entry, *needed.get(entry, []))
    group, _, name = entry.partition("=")
    assert got.choices[group] == name
    assert got.resolved


def test_the_default_is_tiny_with_its_own_learning_rate():
    got = settings()
    assert got.algo == "sft" and got.peft is None and got.seed == 42
    assert got.model.tokenizer == "byte" and got.model.architecture["model_type"] == "qwen2"
    assert got.algo_options["learning_rate"] == 1e-3
    assert "weight_decay" not in got.algo_options  # unset fields stay with the class


def test_command_line_wins_over_files_by_either_name():
    assert settings("lr=3e-4").algo_options["learning_rate"] == 3e-4
    assert settings("trainer.learning_rate=4e-4").algo_options["learning_rate"] == 4e-4
    assert settings("algo.learning_rate=5e-4").algo_options["learning_rate"] == 5e-4
    assert settings("trainer=fast_check", "max_steps=9").algo_options["max_steps"] == 9
    assert "learning_rate" not in settings("lr=null").algo_options


def test_shortcuts():
    got = settings(
        "epochs=2",
        "max_steps=7",
        "batch_size=3",
        "accumulation=4",
        "seed=5",
        "run_name=x",
        "objective=eval_loss",
    )
    options = got.algo_options
    assert (options["num_train_epochs"], options["max_steps"]) == (2, 7)
    assert options["per_device_train_batch_size"] == options["per_device_eval_batch_size"] == 3
    assert options["gradient_accumulation_steps"] == 4
    assert (got.seed, got.run_name, got.objective) == (5, "x", "eval_loss")
    assert (
        settings("batch_size=3", "trainer.per_device_eval_batch_size=1").algo_options[
            "per_device_eval_batch_size"
        ]
        == 1
    )
    assert settings("trainer.seed=9").seed == 9
    declared = {
        k for k in (CONF / "train.yaml").read_text().split() if k.endswith(":") and k[:-1] in SHORTCUTS
    }
    assert {k[:-1] for k in declared} == set(SHORTCUTS)


def test_two_values_for_one_field_are_refused():
    assert "trainer.learning_rate=0.0002" in problems("lr=1e-4", "trainer.learning_rate=2e-4")["lr"]
    assert (
        "algo.logging_steps"
        in problems("trainer.logging_steps=1", "algo.logging_steps=2")["trainer.logging_steps"]
    )
    assert settings("lr=1e-4", "trainer.learning_rate=1e-4").algo_options["learning_rate"] == 1e-4


def test_types_are_converted_as_declared():
    got = settings(
        "trainer.learning_rate='1e-4'", "trainer.fp16=yes", "trainer.fsdp=true", "algo.max_length=null"
    )
    assert got.algo_options["learning_rate"] == 1e-4
    assert got.algo_options["fp16"] is True and got.algo_options["fsdp"] is True
    assert got.algo_options["max_length"] is None


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, "int", 3), (3.0, "int", 3), ("3", "float", 3.0), (5, "str", "5"), ("off", "bool", False),
        (None, "int | None", None), ([1, 2], "Optional[Union[list[int], int]]", [1, 2]), (1, "Union[List[int], int]", 1),
        (False, "Literal['no', 'steps']", "no"), ("pissa_niter_16", "bool | Literal['pissa_niter_[number of iters]']", "pissa_niter_16"),
        (True, "str | bool", True), ({"a": 1}, "SomeClass | None", {"a": 1}), ({"a": 1}, "dict[str, str]", {"a": "1"}),
    ],
)  # fmt: skip
def test_convert(value, kind, expected):
    got = convert(value, kind)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("abc", "int"), (1.5, "int"), (True, "int"), ("abc", "float"), (True, "float"), ("maybe", "bool"), (2, "bool"),
     (None, "int"), ([1], "str"), ("x", "list[str]"), (["x"], "list[int]"), ("b", "Literal['a']"), (1, "dict"), (float("nan"), "int")],
)  # fmt: skip
def test_convert_refuses(value, kind):
    with pytest.raises(ValueError, match=r"."):
        convert(value, kind)


def test_all_violations_come_at_once():
    found = problems(
        "trainer.max_grad_nrom=1",
        "+algo.lenght=3",
        "trainer.max_steps=abc",
        "peft=lora",
        "peft.rank=4",
        "++data.pth=x",
    )
    assert set(found) == {
        "trainer.max_grad_nrom",
        "algo.lenght",
        "trainer.max_steps",
        "peft.rank",
        "data.pth",
    }
    assert "'max_grad_norm'" in found["trainer.max_grad_nrom"]
    assert "'path'" in found["data.pth"]


def test_a_typo_in_a_file_names_the_file(tmp_path):
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "trainer" / "mine.yaml").write_text("max_grad_nrom: 1\nsave_strategy: epochh\n")
    (conf / "model" / "mine.yaml").write_text("name_or_pth: x\nname_or_path: y\n")
    found = problems("trainer=mine", "model=mine", conf=conf)
    assert "'max_grad_norm'" in found["trainer.max_grad_nrom"]
    assert "conf/trainer/mine.yaml" in found["trainer.max_grad_nrom"]
    assert "'epoch'" in found["trainer.save_strategy"]
    assert "'name_or_path'" in found["model.name_or_pth"]


def test_declarations_read_from_source_are_those_of_the_classes():
    import dataclasses

    from transformers import TrainingArguments

    fields = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert set(options_of("transformers.training_args:TrainingArguments")) == fields
    from hydratune.algos.sft import SFTConfig

    read = options_of("hydratune.algos.sft:SFTConfig")
    declared = {f.name: f for f in dataclasses.fields(SFTConfig) if f.init}
    assert set(read) == set(declared)
    assert all(o.default == declared[n].default for n, o in read.items() if o.default is not None)


def test_every_adapter_of_peft_can_be_chosen():
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(k.value).lower() for k in PEFT_TYPE_TO_CONFIG_MAPPING}
    for kind in adapter_types():
        if kind in known:
            assert "inference_mode" in options_of(config_class(f"peft.tuners.{kind}.config", "PeftConfig"))
            assert settings(f"peft.type={kind}").peft == {"type": kind}


def test_naming_a_model_or_file_picks_its_entry(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    got = settings("model.name_or_path=some/model", f"data.path={tmp_path / 'rows.jsonl'}")
    assert (got.choices["model"], got.choices["data"], got.data.source) == ("local", "local", "local")
    assert got.model.architecture is None and "learning_rate" not in got.algo_options


def test_qlora_asks_for_a_quantised_base():
    got = settings("peft=qlora", "model=qwen2.5_0.5b", "peft.r=4")
    assert (
        got.model.quantization == "4bit" and got.peft["r"] == 4 and got.algo_options["learning_rate"] == 2e-4
    )
    assert settings("peft=qlora", "model.quantization=null").model.quantization is None


def test_values_out_of_range():
    assert set(problems("seed=-1", "epochs=0", "batch_size=0", "max_steps=0", "data.eval_fraction=1", "lr=nan")) == {
        "seed", "epochs", "batch_size", "max_steps", "data.eval_fraction", "lr"
    }  # fmt: skip
