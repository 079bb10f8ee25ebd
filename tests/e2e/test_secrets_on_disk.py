"""A token that is typed lies nowhere on disk; what is run again takes it from the environment, or asks for it."""

from __future__ import annotations

import pytest
import torch
from commands import entry, train

SECRET = "hf_aSecretThatNobodySees"
NAME = "HYDRATUNE_TRAINER_HUB_TOKEN"
TINY = ["tracking.samples=0", "data.size=32", "batch_size=8", "max_steps=2",
        "model.architecture.num_hidden_layers=1", "trainer.save_strategy=steps", "trainer.save_steps=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setenv(NAME, "")  # so that it is taken back
    monkeypatch.delenv(NAME)


def holding(folder) -> list[str]:
    """Files that hold the secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [str(path.relative_to(folder)) for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_leaves_no_token_and_asks_for_it_when_it_goes_on(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    typed = [*TINY, f"trainer.hub_token={SECRET}", f"+model.init_kwargs.token='{SECRET}'"]
    assert entry.main([*typed, f"output_dir={run}"]) == 0
    assert holding(run) == []
    for file in run.rglob("training_args.bin"):
        assert torch.load(file, weights_only=False).hub_token is None
    assert len([*run.rglob("training_args.bin")]) > 1

    monkeypatch.delenv(NAME)
    capsys.readouterr()
    assert entry.main([f"resume={run}", "max_steps=3"]) == 2
    said = capsys.readouterr().err
    assert "trainer.hub_token" in said and NAME in said and "HF_TOKEN" in said and "Traceback" not in said
    assert entry.main([f"resume={run}", "max_steps=3", "trainer.hub_token=null"]) == 0
    assert entry.main([f"resume={run}", "max_steps=4", f"trainer.hub_token={SECRET}"]) == 0
    assert holding(run) == []


def test_the_trials_of_a_sweep_have_the_token_and_leave_none(tmp_path):
    """Each is told it by the process that starts it; its script alone says what is missing."""
    study = tmp_path / "study"
    train(
        "-m",
        "lr=1e-3,2e-3",
        "tracking=none",
        *TINY,
        f"trainer.hub_token={SECRET}",
        f"output_dir={study}",
        cwd=tmp_path,
    )
    assert holding(study) == []
    script = (study / "0" / "command.sh").read_text()
    assert f"${{oc.env:{NAME}}}" in script
    train(f"resume={study}", cwd=tmp_path, code=2)
    train(f"resume={study}", "trainer.hub_token=null", "check=true", cwd=tmp_path, code=0)


def test_a_token_among_other_values_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert entry.main([f"model.init_kwargs={{token: {SECRET}, use_cache: false}}"]) == 2
    said = capsys.readouterr().err
    assert SECRET not in said and "${oc.env:NAME}" in said and not [*tmp_path.iterdir()]
