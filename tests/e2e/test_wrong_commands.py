"""Wrong command lines: exit code 2, one message with the key and the way out, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, command, entry

# command, what the message must hold: the key, and the way out
WRONG = [
    ("peft=lorra", "peft", "did you mean 'lora'?"),
    ("algo=kto2", "algo", "did you mean 'kto'?"),
    ("algo=kto batch_size=1", "batch_size", "algo.precompute_ref_log_probs=true"),
    (
        "algo=kto trainer.per_device_eval_batch_size=1",
        "trainer.per_device_eval_batch_size",
        "apo_zero_unpaired",
    ),
    ("algo=kto algo.beta=0", "algo.beta", "positive"),
    ("algo=kto algo.desirable_weight=-1", "algo.desirable_weight", "positive"),
    ("algo=kto algo.bata=1", "algo.bata", "did you mean 'beta'?"),
    ("algo=kto +algo.bata=1", "algo.bata", "did you mean 'beta'?"),
    ("algo=kto algo.loss_type=ktoo", "algo.loss_type", "did you mean 'kto'?"),
    ("algo=kto algo.max_prompt_length=2000", "algo.max_prompt_length", "algo.max_length=1024"),
    ("algo=kto peft=lora algo.sync_ref_model=true", "algo.sync_ref_model", "peft=none"),
    ("algo=kto algo.padding_free=7", "algo.padding_free", "true"),
    (
        "algo=dpo algo.sync_ref_model=true algo.precompute_ref_log_probs=true",
        "algo.sync_ref_model",
        "keep one",
    ),
    ("algo=dpo algo.loss_type=sigmod", "algo.loss_type", "did you mean 'sigmoid'?"),
    ("algo=dpo algo.loss_type=[sigmoid,sfft]", "algo.loss_type", "did you mean 'sft'?"),
    ("algo=dpo algo.loss_type=[sigmoid,sft] algo.loss_weights=[1]", "algo.loss_weights", "one for each"),
    ("algo=dpo algo.label_smoothing=0.5", "algo.label_smoothing", "below 0.5"),
    ("algo=dpo algo.loss_type=exo_pair", "algo.label_smoothing", "1e-3"),
    (
        "algo=dpo algo.loss_type=apo_zero algo.f_divergence_type=forward_kl",
        "algo.f_divergence_type",
        "sigmoid",
    ),
    ("algo=dpo algo.ld_alpha=2", "algo.ld_alpha", "0 to 1"),
    ("algo=dpo algo.ref_model_mixup_alpha=2", "algo.ref_model_mixup_alpha", "at most 1"),
    (
        "algo=dpo data.streaming=true max_steps=3 algo.precompute_ref_log_probs=true",
        "algo.precompute_ref_log_probs",
        "streaming",
    ),
    ("algo=dpo objective=eval_acuracy", "objective", "eval_rewards/accuracies"),
    ("algo=reward algo.center_rewards_coefficient=-1", "algo.center_rewards_coefficient", "0.01"),
    ("algo=reward objective=verified_accuracy", "objective", "eval_accuracy"),
    (
        "algo=dpo trainer.train_sampling_strategy=group_by_length",
        "trainer.train_sampling_strategy",
        "leave it out",
    ),
    ("algo=reward algo.packing=true", "algo.packing", "algo."),
    ("model=tinny", "model", "did you mean 'tiny'?"),
    ("data=arithmetics", "data", "did you mean 'arithmetic'?"),
    ("trainer=fsdpp", "trainer", "did you mean 'fsdp'?"),
    ("tracking=wandbb", "tracking", "did you mean 'wandb'?"),
    ("peft=null", "peft", "none"),
    ("model=null", "model", "tiny"),
    ("+peft=lora", "+peft", "leave out the +"),
    ("trainer=[default,fsdp]", "trainer", "known: "),
    ("lrr=1", "lrr", "did you mean 'lr'?"),
    ("+lrr=1", "lrr", "did you mean 'lr'?"),
    ("epoch=1", "epoch", "did you mean 'epochs'?"),
    ("learning_rate=1e-4", "learning_rate", "set it as lr=… or trainer.learning_rate=…"),
    ("weight_decay=0.1", "weight_decay", "set it as trainer.weight_decay=…"),
    ("packing=true", "packing", "set it as algo.packing=…"),
    ("name_or_path=x", "name_or_path", "set it as model.name_or_path=…"),
    ("trainr.max_steps=3", "trainr.max_steps", "did you mean 'trainer.max_steps'?"),
    ("lr==", "lr==", "one = between key and value"),
    ("lr", "lr", "KEY=VALUE"),
    ("peft.r=[8", "peft.r=[8", "quote special characters"),
    ("lr=1e-4,1e-5", "lr", "add -m"),
    ("lr=abc", "lr", "give a number"),
    ("lr=-1", "lr", "give 0 or more"),
    ("epochs=0", "epochs", "give above 0"),
    ("batch_size=0", "batch_size", "give 1 or more"),
    ("max_steps=1.5", "max_steps", "whole number"),
    ("seed=x", "seed", "whole number"),
    ("check=maybe", "check", "true or false"),
    ("lr=${nothing.here}", "lr", "name a key that exists"),
    ("trainer.max_grad_nrom=1", "trainer.max_grad_nrom", "did you mean 'max_grad_norm'?"),
    ("+trainer.max_grad_nrom=1", "trainer.max_grad_nrom", "did you mean 'max_grad_norm'?"),
    ("++trainer.max_grad_nrom=1", "trainer.max_grad_nrom", "did you mean 'max_grad_norm'?"),
    ("trainer.max_steps=abc", "trainer.max_steps", "whole number"),
    ("trainer.max_steps=null", "trainer.max_steps", "whole number"),
    ("trainer.optim=adamw_troch", "trainer.optim", "did you mean 'adamw_torch'?"),
    ("trainer.lr_scheduler_type=cosin", "trainer.lr_scheduler_type", "did you mean 'cosine'?"),
    ("trainer.packing=true", "trainer.packing", "set as algo.packing=…"),
    ("trainer.lr=1", "trainer.lr", "set as lr=…"),
    ("trainer.output_dir=x", "trainer.output_dir", "set output_dir=DIR"),
    ("algo.max_steps=3", "algo.max_steps", "set as trainer.max_steps=…"),
    ("algo.pakcing=true", "algo.pakcing", "did you mean 'packing'?"),
    ("+algo.pakcing=true", "algo.pakcing", "did you mean 'packing'?"),
    ("algo.loss_type=dff", "algo.loss_type", "did you mean 'dft'?"),
    ("algo.name=sftt", "algo.name", "sft"),
    ("algo.max_length=0", "algo.max_length", "give 1 or more"),
    ("peft.r=8", "peft.r", "peft=lora"),
    ("peft=lora peft.rank_patern={a:1}", "peft.rank_patern", "did you mean 'rank_pattern'?"),
    ("peft=lora peft.r=many", "peft.r", "whole number"),
    ("peft=lora peft.bias=non", "peft.bias", "did you mean 'none'?"),
    ("peft.type=lorra", "peft.type", "did you mean 'lora'?"),
    ("model.dtype=bfloat61", "model.dtype", "did you mean 'bfloat16'?"),
    ("model.quantization=4bits", "model.quantization", "did you mean '4bit'?"),
    ("model=local", "model.name_or_path", "set model.name_or_path=DIR"),
    ("model=tiny model.name_or_path=some/model", "model.name_or_path", "pick model=local"),
    ("model.name_or_path=./not/here", "model.name_or_path", "existing directory"),
    ("data=local", "data.path", "set data.path=FILE.jsonl"),
    ("data=hub", "data.name", "set data.name=OWNER/NAME"),
    ("data.path=not_here.jsonl", "data.path", "existing path"),
    ("data.columns=3", "data.columns", "a mapping {a: b}"),
    ("data.eval_fraction=2", "data.eval_fraction", "give from 0"),
    ("data.sauce=local", "data.sauce", "did you mean 'source'?"),
    ("tracking.wandb=onlin", "tracking.wandb", "did you mean 'online'?"),
    ("tracking.tags=a", "tracking.tags", "a list [a,b]"),
    ("lr=1e-4 trainer.learning_rate=2e-4", "lr", "keep one of them"),
    ("-m lr=1e-4,abc", "lr", "give a number"),
    ("-m peft=none,lorra", "peft", "did you mean 'lora'?"),
    ("-m lr=interval(-1,1)", "lr", "give 0 or more"),
    ("-m seed=1,2 trainer.max_grad_nrom=1", "trainer.max_grad_nrom", "did you mean 'max_grad_norm'?"),
    ("--multirum", "--multirum", "did you mean '--multirun'?"),
    ("--config-dir not_here", "--config-dir", "give an existing one"),
    ("--config-name not_here", "not_here", "check the name"),
    ("hydra/launcher=nowhere", "hydra/launcher/nowhere", "basic"),
    ("~trainer.optim", "trainer.optim", "--help"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each command starts in an empty folder, as from anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.mark.parametrize(("command", "key", "way_out"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_command(command, key, way_out, tmp_path, capsys):
    assert entry.main([*command.split(" "), *([] if "output_dir" in command else ["output_dir=run"])]) == 2
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1 and err.startswith("error: 1 problem")
    assert key in err and way_out in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "samples", "said"),
    [("many", 4, "no column answer with a whole number"), ("3", 0, "tracking.samples=0 makes none")],
)
def test_an_accuracy_that_nothing_verifies(answer, samples, said, tmp_path, capsys):
    """Whether rows have answers is known once they are read, before anything is trained."""
    rows = [{"prompt": f"{i}?", "completion": f"{i}", "answer": answer} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "data.path=rows.jsonl",
        "objective=verified_accuracy",
        f"tracking.samples={samples}",
        "output_dir=run",
    ]
    assert entry.main(command) == 2
    err = capsys.readouterr().err
    assert said in err and "objective=eval_loss" in err and not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once(capsys, tmp_path):
    assert entry.main(["peft=lorra", "lrr=1", "lr==", "trainer.max_steps=abc", "+algo.pakcing=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 5 problems")
    assert all(k in err for k in ("'lora'", "'lr'", "lr==", "trainer.max_steps", "'packing'"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_a_traceback_on_request(switch, capsys, monkeypatch):
    if switch == "environment":
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert entry.main(["lr=abc", *(["debug=true"] if switch == "argument" else [])]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "give a number" in err


def _fails_in_the_run(monkeypatch, error):
    import types

    def run(settings):
        raise error

    monkeypatch.setitem(sys.modules, "hydratune.run", types.SimpleNamespace(run=run))


def test_wrong_data_found_later_leaves_nothing(monkeypatch, tmp_path, capsys):
    from hydratune.errors import UserError, Violation

    _fails_in_the_run(
        monkeypatch, UserError(Violation("data.path", "x.jsonl", "row 3 has no messages", "remove it"))
    )
    assert entry.main([]) == 2
    assert capsys.readouterr().err.count("row 3 has no messages") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_stays(monkeypatch, tmp_path):
    from hydratune.errors import UserError, Violation

    (tmp_path / "run").mkdir()
    _fails_in_the_run(monkeypatch, UserError(Violation("data", None, "is wrong", "mend it")))
    assert entry.main(["output_dir=run"]) == 2
    assert (tmp_path / "run").is_dir()


def test_exit_codes(monkeypatch, capsys):
    from hydratune.errors import Interrupted, TrainingFailed

    _fails_in_the_run(monkeypatch, TrainingFailed("the loss is NaN: lower lr"))
    assert entry.main([]) == 3
    _fails_in_the_run(monkeypatch, Interrupted("resume with …"))
    assert entry.main([]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_plain_multirun_of_hydras_own_runs_each_value(monkeypatch, tmp_path):
    import types

    seen = []
    monkeypatch.setitem(
        sys.modules, "hydratune.run", types.SimpleNamespace(run=lambda s: seen.append(s) or 1.0)
    )
    line = [
        "-m",
        "hydra/sweeper=basic",
        "peft=lora",
        "peft.r=4,8",
        "trainer.weight_decay=0.1",
        "output_dir=study",
    ]
    assert entry.main(line) == 0
    assert [s.peft["r"] for s in seen] == [4, 8]
    assert [Path(s.output_dir).name for s in seen] == ["0", "1"]
    assert all(s.algo_options["weight_decay"] == 0.1 for s in seen)
    assert "peft.r=4,8" in seen[0].command


def test_a_run_gets_its_directory_and_command(monkeypatch, tmp_path):
    import types

    seen = []
    monkeypatch.setitem(sys.modules, "hydratune.run", types.SimpleNamespace(run=seen.append))
    assert entry.main(["run_name=my run", "trainer.weight_decay=0.1"]) == 0
    directory = Path(seen[0].output_dir)
    assert directory.parent.parent == tmp_path / "outputs" and directory.name.endswith("-my run")
    assert (directory / ".hydra" / "config.yaml").is_file() and not list(directory.glob("*.log"))
    assert seen[0].command == "python train.py 'run_name=my run' trainer.weight_decay=0.1"
    assert entry.main(["check=true", "output_dir=plan"]) == 0
    assert not (tmp_path / "plan").exists()


REAL = ["--help", "--cfg job", "lrr=1", "trainer.max_steps=abc", "-m lr=1e-4,abc", "peft=lorra"]


@pytest.mark.parametrize("command", REAL)
def test_real_process_answers_without_torch(command, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(ROOT / 'train.py')!r}, *{command.split()!r}]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == (0 if command.startswith("--") else 2), done.stderr
    assert "HEAVY []" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "kept"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, kept):
    """Told before torch is imported, which reads it then: trials and processes of a run inherit it."""
    code = (
        "import os, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    words = [sys.executable, "-c", code, *command("--help")[1:]]
    done = subprocess.run(words, capture_output=True, text=True, env={**clean, **given}, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{kept} False", done.stderr
