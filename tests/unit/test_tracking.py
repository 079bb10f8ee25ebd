"""What a run records: secrets stay out, metrics survive a resume, W&B never stands in the way."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from hydratune.progress import ProgressCallback, amount, duration, final_table
from hydratune.settings import DataSettings, ModelSettings, RunSettings, TrackingSettings
from hydratune.tracking import (
    PhaseClock,
    RunTracker,
    collect_summary,
    keep_until,
    read_metrics,
    write_config,
    write_summary,
)


def settings(out, **tracking) -> RunSettings:
    return RunSettings(
        algo="sft", algo_options={}, model=ModelSettings(), data=DataSettings(), peft=None,
        tracking=TrackingSettings(**tracking), output_dir=str(out), run_name="probe",
        choices={"model": "tiny", "data": "arithmetic", "peft": "none"},
        resolved={"lr": 0.001, "trainer": {"hub_token": "hf_secret", "max_steps": 5}},
    )  # fmt: skip


def state(step: int, **fields):
    return SimpleNamespace(
        **{"global_step": step, "epoch": step / 10, "is_world_process_zero": True, "max_steps": 10} | fields
    )


def test_metrics_are_flushed_and_valid_json(tmp_path):
    tracker = RunTracker(settings(tmp_path, wandb="disabled"), tmp_path, PhaseClock())
    callback = tracker.callback()
    callback.on_log(None, state(1), None, {"loss": 2.0, "learning_rate": 1e-3})
    callback.on_log(None, state(2), None, {"loss": float("nan")})
    callback.on_log(None, state(3, is_world_process_zero=False), None, {"loss": 1.0})
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["learning_rate"]) == (1, 2.0, 1e-3)
    assert second["loss"] is None
    assert first["time"] >= 0 and first["epoch"] == 0.1


def test_a_resume_drops_what_it_will_record_again(tmp_path):
    lines = [{"step": s, "loss": float(s)} for s in (1, 2, 3, 4)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    keep_until(path, 2)
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2]


def test_summary_has_final_and_best(tmp_path):
    clock = PhaseClock()
    with clock.phase("training"):
        time.sleep(0.01)
    events = [
        {"step": 1, "eval_loss": 2.0},
        {"step": 2, "eval_loss": 1.0},
        {"step": 3, "eval_loss": 1.5, "loss": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    trainer = SimpleNamespace(num_tokens=100, state=state(3))
    summary = collect_summary(settings(tmp_path), tmp_path, clock, status="completed", trainer=trainer)
    write_summary(tmp_path, summary)
    loaded = json.loads((tmp_path / "summary.json").read_text())
    assert loaded["objective"] == {"name": "eval_loss", "value": 1.5}
    assert loaded["metrics"]["best"]["eval_loss"] == 1.0
    assert loaded["steps"] == 3 and loaded["tokens"] == 100 and loaded["tokens_per_second"] > 0
    assert loaded["versions"]["torch"] and loaded["peak_memory"]["bytes"] > 0


def test_an_evaluation_that_was_not_finite_has_no_final_value_but_a_best_one(tmp_path):
    events = [
        {"step": 1, "eval_loss": 1.0, "eval_rewards/accuracies": 0.9},
        {"step": 2, "eval_loss": None, "eval_rewards/accuracies": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    metrics = collect_summary(settings(tmp_path), tmp_path, PhaseClock(), status="completed")["metrics"]
    assert metrics["final"] == {"eval_rewards/accuracies": 0.5}
    assert metrics["best"] == {"eval_loss": 1.0, "eval_rewards/accuracies": 0.9}


def test_config_is_written_without_secrets(tmp_path):
    write_config(tmp_path, settings(tmp_path).resolved)
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text and "max_steps: 5" in text


def records(folder, last: bytes = b"") -> bytes:
    """What W&B's own process has written, once that is `last`, too: on a busy machine it may go on after the run's end."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 60
    while last not in path.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    return path.read_bytes()


@pytest.mark.timeout(180)
def test_an_offline_wandb_run_is_really_there(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["train.py", "lr=0.5", "trainer.hub_token=hf_secret"])
    tracker = RunTracker(settings(tmp_path, tags=["mine"], group="family"), tmp_path, PhaseClock())
    tracker.start({"plan": {"steps": 5}})
    tracker.callback().on_log(None, state(1), None, {"loss": 1.25})
    tracker.samples([{"prompt": "2+2?", "completion": "4", "reference": "4"}])
    tracker.finish("completed", {"status": "completed", "steps": 1})
    said = capfd.readouterr().err
    assert len(re.findall("wandb sync", said)) == 1, said
    raw = records(tmp_path, last=b"1.25")
    for expected in (b"probe", b"family", b"mine", b"arithmetic", b"1.25", b"max_steps"):
        assert expected in raw, expected
    assert sys.argv[-1] == "trainer.hub_token=hf_secret"
    for file in tmp_path.glob("wandb/**/*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes(), file
    assert json.loads((tmp_path / "samples.jsonl").read_text())["completion"] == "4"


@pytest.mark.timeout(240)
def test_an_unreachable_wandb_neither_hangs_nor_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("hydratune.tracking._SECONDS_TO_CONNECT", 3)
    tracker = RunTracker(settings(tmp_path, wandb="auto"), tmp_path, PhaseClock())
    tracker.start()
    tracker.callback().on_log(None, state(1), None, {"loss": 1.0})
    tracker.finish("completed", {"status": "completed"})
    assert "recorded offline" in capfd.readouterr().err
    assert records(tmp_path)


def test_disabled_tracking_writes_no_wandb(tmp_path):
    tracker = RunTracker(settings(tmp_path, wandb="disabled"), tmp_path, PhaseClock())
    tracker.start()
    tracker.finish("completed", {})
    assert not (tmp_path / "wandb").exists()


def test_plain_lines_when_piped():
    out = io.StringIO()
    progress = ProgressCallback(Console(file=out, force_terminal=False, width=200))
    progress.on_train_begin(None, state(0), None)
    progress.on_step_end(None, state(5), None)
    progress.on_log(None, state(5), None, {"loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 3210.0})
    progress.on_log(None, state(5), None, {"eval_loss": 1.25})
    progress.on_log(None, state(10), None, {"train_runtime": 3.0})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 5/10 · loss 1.5000 · lr 1.0e-04 · 3.2k tok/s · ") and lines[0].endswith(
        "left"
    )
    assert lines[1:] == ["step 5/10 · eval loss 1.2500"]
    assert "\x1b" not in out.getvalue()


def test_a_bar_on_a_terminal_and_no_colour_when_asked():
    out = io.StringIO()
    progress = ProgressCallback(
        Console(file=out, force_terminal=True, width=120, _environ={"NO_COLOR": "1", "TERM": "xterm"})
    )
    progress.on_train_begin(None, state(0), None)
    progress.on_log(None, state(5), None, {"loss": 1.5})
    progress.on_train_end(None, state(10), None)
    assert "loss 1.5000" in out.getvalue()
    assert not re.search(r"\x1b\[3[0-7]m", out.getvalue())


def test_numbers_read_well():
    assert [duration(s) for s in (7, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    assert [amount(n) for n in (950, 3210, 41000, 1.3e6)] == ["950", "3.2k", "41k", "1.3M"]


def test_final_table_lacks_nothing_it_does_not_have(tmp_path):
    out = io.StringIO()
    summary = {
        "metrics": {"final": {"loss": 0.5}, "best": {"loss": 0.25}}, "seconds": {}, "tokens_per_second": None, "steps": 3,
        "tokens": 0, "peak_memory": {"bytes": 2**30, "kind": "host"},
    }  # fmt: skip
    final_table(summary, tmp_path, Console(file=out, width=200))
    assert "0.5000  (best 0.2500)" in out.getvalue() and "report.html" in out.getvalue()


def test_a_trial_is_filed_under_its_study_in_wandb(tmp_path, monkeypatch):
    import wandb

    from hydratune.sweep.trial import CurrentTrial, TrialSpec

    spec = TrialSpec(
        "my study",
        "x",
        7,
        7,
        1,
        str(tmp_path),
        {"lr": 2e-5, "peft": "lora"},
        ["eval_loss"],
        ["minimize"],
        sampler="tpe",
        uid="ab12",
    )
    seen: dict = {}
    monkeypatch.setattr(
        wandb, "init", lambda **given: seen.update(given) or SimpleNamespace(dir=str(tmp_path / "files"))
    )
    RunTracker(
        settings(tmp_path, wandb="offline", tags=["mine"]),
        tmp_path,
        PhaseClock(),
        filed=CurrentTrial(spec).wandb(),
    ).start()
    assert (seen["group"], seen["job_type"], seen["id"], seen["resume"]) == (
        "my study",
        "trial",
        "my-study-ab12-7",
        "allow",
    )
    assert seen["name"] == "007 lr=2e-05 peft=lora"
    assert (
        seen["config"]["sweep"] == {"study": "my study", "trial": 7}
        and seen["config"]["params"]["lr"] == 2e-5
    )
    assert {"mine", "sampler:tpe"} <= set(seen["tags"])
