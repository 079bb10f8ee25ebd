"""Before anything starts: a wrong sweep is one message and exit code 2, `check=true` the plan; nothing is left behind."""

from __future__ import annotations

import pytest
from commands import entry

WRONG = {
    "an interval without an end": (["-m", "lr=interval(1e-5,1e-3)"], "sweep.n_trials"),
    "a grid of an interval": (["-m", "lr=interval(1e-5,1e-3)", "sweep.sampler=grid"], "needs finitely many values"),
    "no such sampler": (["-m", "lr=1e-3,2e-3", "sweep.sampler=tppe", "sweep.n_trials=2"], "did you mean 'tpe'"),
    "no such pruner": (["-m", "lr=1e-3,2e-3", "sweep.pruner=medain"], "did you mean 'median'"),
    "no such option": (["-m", "lr=1e-3,2e-3", "sweep.ntrials=2"], "did you mean 'n_trials'"),
    "no such kept search": (["-m", "sweep=sft_lroa"], "did you mean 'sft_lora'"),
    "no trials": (["-m", "lr=1e-3,2e-3", "sweep.n_trials=0"], "1 or more"),
    "sweep without -m": (["sweep=sft_lora"], "add -m"),
    "sweep field without -m": (["sweep.n_trials=3"], "add -m"),
    "nothing is searched": (["-m", "lr=1e-3"], "nothing is searched"),
    "objective is not logged": (["-m", "lr=1e-3,2e-3", "objective=eval_los"], "did you mean 'eval_loss'"),
    "objective without rows": (["-m", "lr=1e-3,2e-3", "objective=eval_loss", "data.eval_fraction=0"], "no evaluation rows"),
    "no such rule": (["-m", "lr=1e-3,2e-3", "objective=eval_loss:median"], "mean3"),
    "bound on nothing": (["-m", "lr=1e-3,2e-3", 'sweep.constraints=["memory <= 3"]'], "no such metric"),
    "bound that may not be known": (["-m", "lr=1e-3,2e-3", "data.source=local", "data.path=.",
        "sweep.constraints=[\"verified_accuracy >= 0.5\"]"], "no such metric"),
    "pruned on what comes last": (["-m", "lr=1e-3,2e-3", "sweep.pruner=median", "sweep.prune_on=verified_accuracy"], "no such metric"),
    "bound that is none": (["-m", "lr=1e-3,2e-3", "sweep.constraints=[loss]"], "METRIC <= NUMBER"),
    "pruning without evaluation": (["-m", "lr=1e-3,2e-3", "sweep.pruner=median", "trainer.eval_strategy=no"], "nothing is evaluated"),
    "pruning several": (["-m", "lr=1e-3,2e-3", "sweep.pruner=median", "objective=[eval_loss,loss]"], "several objectives"),
    "direction unknown": (["-m", "lr=1e-3,2e-3", "objective=num_tokens"], "sweep.direction"),
    "sqlite for two": (["-m", "lr=1e-3,2e-3", "sweep.workers=2", "sweep.storage=sqlite:///x.db"], "SQLite serves one worker"),
    "no such executor": (["-m", "lr=1e-3,2e-3", "sweep.executor=slurm"], "submitit"),
    "no such function": (["-m", "sweep.space_function=nosuch.fn", "sweep.n_trials=2"], "sweep.space_function"),
    "outside the space": (["-m", "lr=interval(1e-4,1e-3)", "sweep.n_trials=2", "sweep.enqueue=[{lr: 1}]"], "not in the space"),
    "a value that never works": (["-m", "peft=none,lora", "peft.r=4,8"], "no adapter is chosen"),
    "no number of workers": (["-m", "lr=1e-3,2e-3", "sweep.workers=many"], "sweep.workers"),
    "no worker": (["-m", "lr=1e-3,2e-3", "sweep.workers=0"], "1 or more"),
    "no such direction": (["-m", "lr=1e-3,2e-3", "sweep.direction=down"], "minimize or maximize"),
    "options of no executor": (["-m", "lr=1e-3,2e-3", "sweep.executor_options={partition: a}"], "the local executor has none"),
    "options of no pruner": (["-m", "lr=1e-3,2e-3", "sweep.pruner=median", "sweep.pruner_options={n: 3}"], "median takes"),
    "no such keep": (["-m", "lr=1e-3,2e-3", "sweep.keep=some"], "sweep.keep"),
    "paired is no list": (["-m", "lr=1e-3,2e-3", "sweep.paired={size: 3}"], "sweep.paired"),
    "a space of one value": (["-m", "lr=1e-3,2e-3", "sweep.space={seed: 3}"], "has one value"),
    "swept twice": (["-m", "lr=1e-3,2e-3", "sweep.paired={p: [{lr: 1}, {lr: 2}]}"], "swept by itself too"),
    "swept what has one value": (["-m", "lr=1e-3,2e-3", "sweep.n_trials=2,3"], "has one value"),
    "pruned by the opposite": (["-m", "lr=1e-3,2e-3", "sweep.pruner=median", "sweep.prune_on=mean_token_accuracy"], "better in the same direction"),
    "pruned by what is better the other way round": (["-m", "lr=1e-3,2e-3", "sweep.pruner=median", "objective=num_tokens",
        "sweep.direction=maximize", "sweep.prune_on=loss"], "better in the same direction"),
    "a direction that is a number": (["-m", "lr=1e-3,2e-3", "sweep.direction=3"], "minimize or maximize"),
    "directions of too many": (["-m", "lr=1e-3,2e-3", "sweep.direction=[minimize,maximize]"], "one for each objective"),
    "a pair named like a swept key": (["-m", "lr=1e-3,2e-3", "sweep.paired={lr: [{seed: 1}, {seed: 2}]}"], "name of a swept key"),
    "a pair named like a key of the space": (["-m", "sweep.space={p: '1,2'}", "sweep.paired={p: [{seed: 1}, {seed: 2}]}"], "name of a swept key"),
    "pairs that overlap": (["-m", "sweep.paired={p: [{lr: 1}, {lr: 2}], q: [{lr: 3}, {seed: 1}]}"], "in the pair p too"),
    "a misspelt key in a pair": (["-m", "peft=lora", "sweep.paired={p: [{peft.r: 8}, {peft.rr: 2}]}"], "peft.rr = 2: there is no such field (in sweep.paired)"),
    "no such key in a pair": (["-m", "sweep.paired={p: [{lrr: 8}, {lrr: 2}]}"], "did you mean 'lr'?"),
    "no such entry in a pair": (["-m", "sweep.paired={p: [{peft: lora}, {peft: lorra}]}"], "did you mean 'lora'?"),
    "no such value in a pair": (["-m", "sweep.paired={p: [{lr: 1e-3}, {lr: high}]}"], "give a number"),
    "a pair of what is given": (["-m", "lr=1e-3", "sweep.paired={p: [{lr: 1e-2}, {lr: 1e-4}]}"], "one value on the command line"),
    "a pair with the folder": (["-m", "sweep.paired={p: [{output_dir: a}, {output_dir: b}]}"], "output_dir is of the whole sweep"),
    "a searched field of the search": (["-m", "lr=1e-3,2e-3", "sweep.space={sweep.n_trials: [1, 2]}"], "sweep.n_trials is of the whole sweep"),
    "a searched folder": (["-m", "lr=1e-3,2e-3", "sweep.space={output_dir: [a, b]}"], "output_dir is of the whole sweep"),
    "a searched option of Hydra": (["-m", "lr=1e-3,2e-3", "sweep.space={hydra/launcher: [basic, joblib]}"], "hydra/launcher is of the whole sweep"),
    "a misspelt key of the space": (["-m", "sweep.space={trainer.weight_decy: [0, 1]}"], "did you mean 'weight_decay'?"),
    "an end that cannot be": (["-m", "sweep.space={lr: 'interval(-1, 1)'}", "sweep.n_trials=2"], "give 0 or more"),
    "a sampler's seed in words": (["-m", "lr=interval(1e-4,1e-3)", "sweep.n_trials=2", "sweep.sampler_options={seed: one}"], "sweep.sampler_options.seed"),
    "a sampler's seed in parts": (["-m", "lr=interval(1e-4,1e-3)", "sweep.n_trials=2", "sweep.sampler_options={seed: 1.5}"], "no whole number"),
    "backwards": (["-m", "lr=interval(1e-3,1e-4)", "sweep.n_trials=2"], "interval"),
}  # fmt: skip


@pytest.mark.parametrize("line, expected", WRONG.values(), ids=WRONG)
def test_a_wrong_sweep_is_one_clear_error(line, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert entry.main(line) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said and "→" in said
    assert said.count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_check_prints_the_plan_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert entry.main(["-m", "lr=1e-3,2e-3", "peft=none,lora", "check=true"]) == 0
    said = capsys.readouterr().err
    assert "trials" in said and " 4" in said and "choice: none, lora" in said
    assert not list(tmp_path.iterdir())
