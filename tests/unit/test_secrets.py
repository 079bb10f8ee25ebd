"""Tokens and passwords are hidden in records and on pages; nothing else is."""

from __future__ import annotations

import json

import pytest

from hydratune.command import settings_of, without_secrets
from hydratune.errors import UserError
from hydratune.secrets import hide_password, redact, redact_file, redact_override


def test_secrets_are_redacted_and_nothing_else():
    config = {
        "hub_token": "s", "WANDB_API_KEY": "s", "password": "s", "a": {"access_token": "s", "list": [{"secret": "s"}]},
        "eos_token": "</s>", "pad_token": "<pad>", "max_tokens": 5, "stop_token": "eos", "tokenizer": "byte",
        "storage": "postgresql://me:pw@host/db",
    }  # fmt: skip
    clean = redact(config)
    assert json.dumps(clean).count('"***"') == 5
    assert '"s"' not in json.dumps(clean) and clean["storage"] == "postgresql://me:***@host/db"
    assert clean["eos_token"] == "</s>" and clean["tokenizer"] == "byte" and clean["max_tokens"] == 5


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("trainer.hub_token=hf_x", "trainer.hub_token=***"),
        ("++model.api_key='a b'", "++model.api_key=***"),
        ("+trainer={hub_token: hf_x, max_steps: 5}", "+trainer={hub_token: ***, max_steps: 5}"),
        ("sweep.storage=postgresql://me:p@w/d@host/db", "sweep.storage=postgresql://me:***@host/db"),
        ("sweep.storage='mysql://me:p,w@host/db'", "sweep.storage='mysql://me:***@host/db'"),
        ("algo.stop_token=eos", "algo.stop_token=eos"),
        ("trainer.hub_token=null", "trainer.hub_token=null"),
        ("trainer.hub_token=NULL", "trainer.hub_token=NULL"),
        ("+model.init_kwargs.token=true", "+model.init_kwargs.token=true"),
        (
            "+model.init_kwargs.token='${trainer.hub_token}'",
            "+model.init_kwargs.token='${trainer.hub_token}'",
        ),
        ("trainer.hub_token='${oc.env:A,null}'", "trainer.hub_token='${oc.env:A,null}'"),
        ("trainer.hub_token='${oc.env:A,hf_x}'", "trainer.hub_token=***"),
        ("trainer.hub_token=true_hf", "trainer.hub_token=***"),
        ("data.max_tokens=5", "data.max_tokens=5"),
        ("algo.vllm_server_base_url=http://host:8000/v1", "algo.vllm_server_base_url=http://host:8000/v1"),
    ],
)
def test_a_word_of_a_command_line(word, shown):
    assert redact_override(word) == shown


SHOWN = {
    "yaml": "- lr=0.1\n- 'trainer.hub_token=''hf_x y'''\ncfg:\n  hub_token: hf_x\n  name: eos_token=a,hub_token=hf_x\n",
    "json": '{"arguments": ["lr=0.1", "trainer.hub_token=hf_x y"], "token": "hf_x"}',
    "sh": "#!/bin/sh\nexec python train.py lr=0.1 'trainer.hub_token=hf_x y' \"$@\"\n",
    "log": "lr=0.1 trainer.hub_token=hf_x, of mysql://me:hf_x@host/db\n",
    "torn": '{"torn": "lr=0.1", "token": "hf_x',
}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_file_as_it_is_shown(kind):
    shown = redact_file(SHOWN[kind], ".json" if kind == "torn" else f".{kind}")
    assert "hf_x" not in shown and " y'" not in shown and "lr=0.1" in shown and "***" in shown


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".yaml", "eos_token: </s>\nhub_token: null\n"), (".json", '{"a":1}'), (".sh", "exec a  'b'\n")],
)
def test_a_file_without_secrets_is_shown_as_it_is(suffix, text):
    assert redact_file(text, suffix) == text


def test_the_command_of_a_trial_is_recorded_without_and_run_with_its_secret(tmp_path):
    from hydratune.sweep.job import Command

    command = Command("train.py", ("trainer.hub_token=hf_x",), str(tmp_path))
    assert command.line({"lr": 0.1}) == "python train.py 'trainer.hub_token=***' lr=0.1"
    assert "trainer.hub_token=hf_x" in command.shell({}, {}).splitlines()[-1]
    assert hide_password("sqlite:///a.db") == "sqlite:///a.db"


@pytest.fixture
def environment(monkeypatch):
    """Variables that are set by what is tested, and taken back."""
    for name in ("HYDRATUNE_TRAINER_HUB_TOKEN", "HYDRATUNE_MODEL_INIT_KWARGS_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["+model.init_kwargs.token=true"], True),
        (["+model.init_kwargs.token=False"], False),
        (["+model.init_kwargs.token=NULL"], None),
        (["trainer.hub_token=hf_x", "+model.init_kwargs.token=${trainer.hub_token}"], "hf_x"),
        (["trainer.hub_token=hf_x", "+model.init_kwargs.token='${trainer.hub_token}'"], "hf_x"),
        (["+model.init_kwargs.token=1e5"], "1e5"),
        (["+model.init_kwargs.token=hf_x"], "hf_x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_typed_as_a_token_is_what_the_model_is_told(typed, told, environment):
    words = without_secrets(typed)
    assert settings_of(words).model.init_kwargs["token"] == told
    assert "hf_x" not in " ".join(words)


@pytest.mark.parametrize("value", ["'hf_x${trainer.run_name}'", "'${oc.env:NOWHERE,hf_x}'"])
def test_a_token_beside_an_interpolation_is_refused(value, environment):
    with pytest.raises(UserError, match="beside an interpolation") as error:
        without_secrets([f"trainer.hub_token={value}"])
    assert "hf_x" not in str(error.value)
