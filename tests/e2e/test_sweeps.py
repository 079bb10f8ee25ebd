"""Sweeps through `python train.py -m`, as a user starts them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import ROOT, command, entry
from commands import train as run

from hydratune.sweep.executors import ForkExecutor
from hydratune.sweep.job import Command, pack

TINY = [
    "data.size=64",
    "batch_size=8",
    "tracking=none",
    "tracking.samples=0",
    "model.architecture.num_hidden_layers=1",
]
QUICK = [*TINY, "max_steps=4"]


def study(folder: Path) -> dict:
    return json.loads((folder / "study.json").read_text())


def objective(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["objective"]["value"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> tuple[Path, str]:
    """`-m lr=…,…`, run once: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("grid")
    done = run("-m", "lr=1e-3,2e-3", *QUICK, cwd=folder)
    (made,) = (folder / "outputs" / "sweeps").iterdir()
    return made, done.stdout + done.stderr


def test_two_values_are_two_trials_and_leave_a_whole_study(grid):
    folder, said = grid
    facts = study(folder)
    assert [(t["number"], t["state"], t["settings"]) for t in facts["trials"]] == [
        (0, "complete", {"lr": "0.001"}),
        (1, "complete", {"lr": "0.002"}),
    ]
    assert {"best.yaml", "best.sh", "trials.csv", "study.md", "report.html", "journal.log", "0", "1"} <= {
        p.name for p in folder.iterdir()
    }
    for trial in ("0", "1"):
        present = {p.name for p in (folder / trial).iterdir()}
        assert {"config.yaml", ".hydra", "metrics.jsonl", "summary.json", "train.log", "model", "checkpoints", "report.html",
                "curves.png", "command.sh", "console.log"} <= present  # fmt: skip
    assert "2 complete" in said and "best: trial 1" in said and "grid, in order" in said
    assert folder.name.startswith("sft-tiny-arithmetic-lr-")


def test_a_trial_is_a_single_run_of_its_command(grid, tmp_path):
    folder, _ = grid
    run("lr=1e-3", *QUICK, "output_dir=alone", cwd=tmp_path)
    assert objective(tmp_path / "alone") == objective(folder / "0")
    done = subprocess.run(
        ["sh", str(folder / "1" / "command.sh"), f"output_dir={tmp_path / 'script'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert objective(tmp_path / "script") == objective(folder / "1")


def test_the_best_settings_are_a_config_and_a_script(grid, tmp_path):
    folder, _ = grid
    run("--config-dir", str(folder), "--config-name", "best", "output_dir=config", cwd=tmp_path)
    done = subprocess.run(
        ["sh", str(folder / "best.sh"), f"output_dir={tmp_path / 'script'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    best = min(t["values"][0] for t in study(folder)["trials"])
    assert objective(tmp_path / "config") == objective(tmp_path / "script") == best


def hydratune(*words: str, cwd: Path, code: int = 0) -> str:
    line = [sys.executable, "-c", "from hydratune.cli import app; app()", "sweep", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_small_commands_of_a_study(grid, tmp_path):
    folder, _ = grid
    home = folder.parents[2]
    assert f"{folder.name}: 2 complete · best eval_loss" in hydratune("status", cwd=home)
    shown = hydratune("status", folder.name, cwd=home)
    assert "★" in shown and "0.002" in shown
    assert hydratune("best", str(folder), cwd=tmp_path).strip().endswith("lr=0.002")
    hydratune(
        "rerun", folder.name, "--trial", "0", "max_steps=1", f"output_dir={tmp_path / 'again'}", cwd=home
    )
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["steps"] == 1
    assert "2 trials are there already" in hydratune("resume", folder.name, cwd=home)
    assert "did you mean" in hydratune("status", folder.name + "x", cwd=home, code=2)
    assert "give one of: 0, 1" in hydratune("rerun", folder.name, "--trial", "9", cwd=home, code=2)


def test_the_dashboard_serves_the_study_with_notes(grid):
    import urllib.request

    pytest.importorskip("dash", reason="needs the extra [dashboard]")
    folder, _ = grid
    line = [
        sys.executable,
        "-c",
        "from hydratune.cli import app; app()",
        "sweep",
        "dashboard",
        str(folder),
        "--port",
        "0",
        "--no-open",
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[0]
            assert address.endswith("/dashboard/studies/1")
            with urllib.request.urlopen(address.replace("/dashboard/", "/api/"), timeout=20) as answer:
                trials = json.load(answer)["trials"]
        finally:
            process.terminate()
    assert [t["state"] for t in trials] == ["Complete", "Complete"]
    assert all(str(folder / str(t["number"])) in t["note"]["body"] for t in trials)


def test_a_search_can_start_from_the_best_of_another(grid, tmp_path):
    folder, _ = grid
    run(
        "-m",
        "--config-dir",
        str(folder),
        "--config-name",
        "best",
        "seed=1,2",
        "output_dir=more",
        cwd=tmp_path,
    )
    facts = study(tmp_path / "more")
    assert [t["state"] for t in facts["trials"]] == ["complete"] * 2
    config = yaml.safe_load((tmp_path / "more" / "0" / "config.yaml").read_text())
    assert (config["lr"], config["seed"], config["max_steps"]) == (0.002, 1, 4)


def test_the_same_command_finds_its_study_done_and_a_name_goes_on_with_it(grid):
    folder, _ = grid
    home = folder.parents[2]
    before = (folder / "0" / "summary.json").stat().st_mtime_ns
    said = run("-m", "lr=1e-3,2e-3", *QUICK, cwd=home).stderr
    assert "2 trials are there already" in said
    run(f"resume={folder.name}", cwd=home)
    run(f"resume={folder}", cwd=home)
    assert (folder / "0" / "summary.json").stat().st_mtime_ns == before
    assert len(list(folder.parent.iterdir())) == 1


def test_a_changed_space_under_the_same_name_is_refused(grid):
    folder, _ = grid
    command_before = (folder / "command.json").read_text()
    done = run("-m", "lr=1e-3,3e-3", *QUICK, f"output_dir={folder}", cwd=folder, code=2)
    assert (folder / "command.json").read_text() == command_before
    done2 = run("-m", "lr=1e-3,3e-3", *QUICK, f"output_dir={folder}", "sweep.name=other", cwd=folder, code=2)
    assert "trials of another study" in done2.stderr
    assert "was choice: 0.001, 0.002, is choice: 0.001, 0.003" in done.stderr


def test_every_trial_starts_from_the_pristine_model(tmp_path):
    """With lr=0 the saved model is the one that the trial started from; dirty trials run before it and between."""
    run("-m", "trainer.weight_decay=0.1,0", "lr=1e-2,0", *QUICK, "output_dir=study", cwd=tmp_path)
    run("lr=0", *QUICK, "output_dir=alone", cwd=tmp_path)
    hashes = [weights(tmp_path / "study" / str(i)) for i in range(4)]
    assert hashes[1] == hashes[3] == weights(tmp_path / "alone")
    assert len(set(hashes)) == 3  # the trained ones differ from it, and from each other


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_search_over_groups_with_pruning_and_two_workers(tmp_path):
    line = [
        "-m",
        "lr=tag(log,interval(1e-4,1e-2))",
        "peft=none,lora",
        "sweep.n_trials=5",
        "sweep.workers=2",
        "sweep.pruner=median",
    ]
    evaluated = [
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "sweep.pruner_options.n_startup_trials=2",
    ]
    run(*line, *evaluated, *QUICK, "output_dir=study", cwd=tmp_path)
    facts = study(tmp_path / "study")
    assert len(facts["trials"]) == 5 and facts["sampler"] == "tpe"
    for t in facts["trials"]:
        assert t["state"] in ("complete", "pruned")
        status = json.loads((tmp_path / "study" / str(t["number"]) / "summary.json").read_text())["status"]
        assert status == {"complete": "completed", "pruned": "pruned"}[t["state"]]
    assert len({t["settings"]["lr"] for t in facts["trials"]}) == 5


def test_pruning_saves_steps_and_finds_the_same_best_trial(tmp_path):
    """Eight learning rates in an order that has good ones first, so that there is something to compare with."""
    rates = "lr=3e-3,2e-3,1e-5,1e-4,1e-6,5e-3,1e-7,3e-5"
    shared = [
        "-m",
        rates,
        *TINY,
        "max_steps=12",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
        "trainer.save_strategy=no",
        "trainer.logging_steps=2",
    ]
    run(*shared, "output_dir=all", cwd=tmp_path)
    pruning = [
        "sweep.pruner=median",
        "sweep.pruner_options.n_startup_trials=2",
        "sweep.pruner_options.n_warmup_steps=2",
    ]
    run(*shared, *pruning, "output_dir=pruned", cwd=tmp_path)

    def steps(name: str) -> int:
        return sum(json.loads(p.read_text())["steps"] for p in (tmp_path / name).glob("[0-9]*/summary.json"))

    assert study(tmp_path / "pruned")["front"] == study(tmp_path / "all")["front"]
    assert steps("pruned") < 0.8 * steps("all") == 0.8 * 8 * 12


def test_kill_9_of_everything_and_the_trial_resumes_from_its_checkpoint(tmp_path):
    line = ["-m", "lr=1e-3,2e-3", *TINY, "max_steps=300", "trainer.save_strategy=steps", "trainer.save_steps=10",
            "trainer.logging_steps=5", "output_dir=study"]  # fmt: skip
    process = subprocess.Popen(
        command(*line), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(
        lambda: list((tmp_path / "study" / "0" / "checkpoints").glob("checkpoint-*/hydratune_counters.json"))
    )
    process.kill()  # its children die with it
    process.wait()
    assert (tmp_path / "study" / "0" / "result.json").exists() is False
    run(*line, cwd=tmp_path)
    facts = study(tmp_path / "study")
    assert [(t["state"], t["attempts"]) for t in facts["trials"]] == [("complete", 2), ("complete", 1)]
    steps = [
        json.loads(x)["step"] for x in (tmp_path / "study" / "0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    run(
        *[o for o in line if o not in ("-m", "lr=1e-3,2e-3", "output_dir=study")],
        "lr=1e-3",
        "output_dir=alone",
        cwd=tmp_path,
    )
    assert objective(tmp_path / "alone") == pytest.approx(objective(tmp_path / "study" / "0"), abs=1e-5)


def test_ctrl_c_saves_and_the_study_goes_on_by_its_folder(tmp_path):
    line = ["-m", "lr=1e-3,2e-3", *TINY, "max_steps=400", "trainer.logging_steps=5", "output_dir=study"]
    process = subprocess.Popen(
        command(*line), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (tmp_path / "study" / "0" / "metrics.jsonl").is_file())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "resume=study" in said and "Traceback" not in said
    assert list((tmp_path / "study" / "0" / "checkpoints").glob("checkpoint-*"))
    run("resume=study", cwd=tmp_path)
    assert [(t["state"], t["attempts"]) for t in study(tmp_path / "study")["trials"]] == [
        ("complete", 2),
        ("complete", 1),
    ]


def wait_for(happened, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def test_data_that_no_trial_could_use_is_refused_before_the_first(tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "x"}]}\n{"messages": []}\n'
    )
    done = run("-m", "lr=1e-3,2e-3", *QUICK, "data.path=bad.jsonl", "output_dir=study", cwd=tmp_path, code=2)
    assert "bad.jsonl" in done.stderr and "trial 0 starts" not in done.stderr
    assert not (tmp_path / "study" / "0").exists()


def test_a_sweep_of_which_nothing_completes_ends_with_3(tmp_path):
    done = run("-m", "lr=1e30,1e32", *TINY, "max_steps=30", "trainer.logging_steps=1", "trainer.max_grad_norm=0", "output_dir=study",
               cwd=tmp_path, code=3)  # fmt: skip
    assert "no trial of study has completed" in done.stderr and "the loss is" in done.stderr
    assert {t["state"] for t in study(tmp_path / "study")["trials"]} == {"diverged"}


def test_a_bad_combination_fails_alone(tmp_path):
    """A block length of null cannot be packed: one point of four cannot work, the others do."""
    run("-m", "algo.max_length=64,null", "algo.packing=false,true", *QUICK, "output_dir=study", cwd=tmp_path)
    trials = study(tmp_path / "study")["trials"]
    assert [t["state"] for t in trials] == ["complete", "complete", "complete", "invalid"]
    assert "max_length" in trials[3]["reason"]


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "sweeps").glob("*.yaml")])
def test_every_kept_search_runs_on_the_embedded_default(name, tmp_path):
    run("-m", f"sweep={name}", "sweep.n_trials=2", *QUICK, "output_dir=study", cwd=tmp_path)
    facts = study(tmp_path / "study")
    assert {t["state"] for t in facts["trials"]} <= {"complete", "pruned"} and len(facts["trials"]) == 2
    assert set(facts["space"]) == set(
        yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())["space"]
    ) - {"batch_size"}  # QUICK sets it


def test_the_wandb_sweep_file_names_what_can_be_set():
    files = [*(ROOT / "sweeps" / "wandb").glob("*.yaml")]
    assert files
    for path in files:
        given = yaml.safe_load(path.read_text())
        assert given["command"][:2] == ["python", "train.py"] and given["command"][-1] == "${args_no_hyphens}"
        first = [f"{key}={(p.get('values') or [p.get('min')])[0]}" for key, p in given["parameters"].items()]
        assert entry.main([*given["command"][2:-1], *first, "--cfg", "job"]) == 0


def test_the_warm_process_holds_data_and_weights_and_is_fit_to_be_forked(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRATUNE_CACHE", str(tmp_path / "cache"))
    task = Command(str(ROOT / "train.py"), tuple(QUICK), str(tmp_path), warm_with=(tuple(QUICK),))
    executor = ForkExecutor(pack(task))
    try:
        report = executor.warm_up()
    finally:
        executor.close()
    assert report == {"threads": 1, "error": "", "cuda": False}


def test_help_lists_the_kept_searches(capsys):
    assert entry.main(["--help"]) == 0
    assert "sft_lora" in capsys.readouterr().out


def test_values_with_colons_and_spaces_arrive_as_they_are(tmp_path):
    run("-m", "run_name=a:b,'c d'", *QUICK, "max_steps=1", "output_dir=study", cwd=tmp_path)
    names = [
        yaml.safe_load((tmp_path / "study" / str(i) / "config.yaml").read_text())["run_name"]
        for i in range(2)
    ]
    assert names == ["a:b", "c d"]


def test_a_first_point_that_cannot_work_does_not_refuse_the_others(tmp_path):
    run(
        "-m",
        "peft=lora",
        "peft.target_modules=[nope],all-linear",
        *QUICK,
        "max_steps=1",
        "output_dir=study",
        cwd=tmp_path,
    )
    assert [t["state"] for t in study(tmp_path / "study")["trials"]] == ["invalid", "complete"]


def test_data_that_comes_in_pairs_is_read_ahead_and_judged(tmp_path):
    for name in ("a b", "it's"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 16)
    (tmp_path / "broken.jsonl").write_text("no row\n")
    line = ["-m", "batch_size=8", "tracking=none", "tracking.samples=0", "max_steps=1"]

    def pairs(*files: str) -> str:
        return f"sweep.paired={{d: [{', '.join(f'{{data.path: {name}, lr: 1e-3}}' for name in files)}]}}"

    done = run(*line, pairs("broken.jsonl", "./broken.jsonl"), "output_dir=bad", cwd=tmp_path, code=2)
    assert "broken.jsonl line 1" in done.stderr and not (tmp_path / "bad" / "0").exists()
    names = ("broken.jsonl", "'a b.jsonl'", '"it\'s.jsonl"')
    done = run(*line, pairs(*names), "output_dir=study", cwd=tmp_path)
    assert [t["state"] for t in study(tmp_path / "study")["trials"]] == ["invalid", "complete", "complete"]
    assert "could not read ahead" not in done.stderr


def test_a_conditional_space_by_a_function(tmp_path):
    (tmp_path / "my_space.py").write_text(
        "def space(trial):\n"
        "    peft = trial.suggest_categorical('peft', ['none', 'lora'])\n"
        "    return {'peft': peft} | ({'peft.r': trial.suggest_int('peft.r', 2, 8)} if peft == 'lora' else {})\n"
    )
    line = [
        "-m",
        "lr=tag(log,interval(1e-4,1e-2))",
        "sweep.space_function=my_space.space",
        "sweep.n_trials=4",
        "seed=1",
    ]
    run(*line, "sweep.sampler=random", *QUICK, "max_steps=1", "output_dir=study", cwd=tmp_path)
    settings = [t["settings"] for t in study(tmp_path / "study")["trials"]]
    assert {s["peft"] for s in settings} == {"none", "lora"}
    assert all(("peft.r" in s) == (s["peft"] == "lora") for s in settings)


def test_a_trial_of_two_processes_is_pruned_in_both(tmp_path):
    """torchrun with gloo: rank 0 asks the study, both ranks stop; a prefix that cannot start fails with its last line."""
    prefix = (
        f"sweep.launch_prefix={Path(sys.executable).parent / 'torchrun'} --nproc_per_node 2".replace(
            "=", "='", 1
        )
        + "'"
    )
    line = [
        "-m",
        "lr=1e-3,2e-3,1e-7",
        *TINY,
        "max_steps=6",
        "trainer.ddp_backend=gloo",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
    ]
    run(
        *line,
        "sweep.pruner=median",
        "sweep.pruner_options.n_startup_trials=2",
        prefix,
        "output_dir=study",
        cwd=tmp_path,
    )
    assert [t["state"] for t in study(tmp_path / "study")["trials"]] == ["complete", "complete", "pruned"]
    alone = json.loads((tmp_path / "study" / "0" / "summary.json").read_text())
    assert alone["tokens"] > 1.5 * 6 * 8 * 40  # both processes' rows

    run(
        "-m",
        "lr=1e-3,2e-3",
        *QUICK,
        "sweep.launch_prefix='sh -c \"echo no such launcher; exit 1\"'",
        "output_dir=other",
        cwd=tmp_path,
        code=3,
    )
    trials = study(tmp_path / "other")["trials"]
    assert [(t["state"], t["attempts"]) for t in trials] == [("failed", 1)] * 2
    assert all("no such launcher" in t["reason"] for t in trials)


def test_two_commands_share_one_study(tmp_path):
    line = ["-m", "lr=1e-3,2e-3,3e-3,4e-3", *QUICK, "output_dir=study"]
    both = [
        subprocess.Popen(
            command(*line),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for _ in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    trials = study(tmp_path / "study")["trials"]
    assert [t["settings"]["lr"] for t in trials] == ["0.001", "0.002", "0.003", "0.004"]
    assert [(t["state"], t["attempts"]) for t in trials] == [("complete", 1)] * 4
