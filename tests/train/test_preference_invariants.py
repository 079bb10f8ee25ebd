"""Preference training: settings that should not matter do not, and every reference is the one that is meant."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hydratune import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, UserError
from hydratune.algos.kto import with_fixed_pairs
from hydratune.data.builtin import arithmetic
from hydratune.models import ModelRecipe, byte_tokenizer

ARCHITECTURE = {
    "model_type": "qwen2", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
CLASSES = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=True)


def rows(algo: str, count: int = 64) -> Dataset:
    """Questions of different lengths, so that padding and packing differ."""
    made = arithmetic(count, 3, "unpaired" if algo == "kto" else "preference")
    for i, row in enumerate(made):
        row["prompt"][0]["content"] += " Think." * (i % 7)
    return Dataset.from_list(made).remove_columns("answer")


def fixed_pairs(count: int = 64) -> Dataset:
    """Token ids with mismatched completions of their own, so that how a batch is cut does not change the pairs."""
    options = KTOConfig(output_dir="unused", report_to=[], use_cpu=True)
    made, _ = KTOTrainer.prepare_rows(
        rows("kto", count), byte_tokenizer(), options, where="rows", cache=False
    )
    return with_fixed_pairs(made, seed=5)


def recipe(attention: str = "hydratune_varlen", peft_config=None, task: str = "causal_lm") -> ModelRecipe:
    from hydratune import attention as backends

    backends.register()
    return ModelRecipe(
        architecture=ARCHITECTURE, seed=1, attn_implementation=attention, peft_config=peft_config, task=task
    )


def trainer(
    algo: str, folder, *, data=None, model=None, attention="hydratune_varlen", peft_config=None, **options
):
    trainer_class, config_class = CLASSES[algo]
    defaults = {
        "output_dir": str(folder), "max_steps": 8, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "seed": 5, "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 8,
    }  # fmt: skip
    source = (
        {"model": model}
        if model is not None
        else {"recipe": recipe(attention, peft_config, trainer_class.task)}
    )
    return trainer_class(
        args=config_class(**defaults | options),
        train_dataset=rows(algo) if data is None else data,
        processing_class=byte_tokenizer(),
        **source,
    )


def trajectory(run, resume=None) -> dict[str, list[float]]:
    run.train(resume_from_checkpoint=resume)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    keys = {key for entry in logged for key in entry} - {"epoch", "tokens_per_second", "peak_memory_gib"}
    return {key: [float(e[key]) for e in logged if key in e] for key in keys}


def same(one: dict, other: dict, ignored: tuple[str, ...] = ()) -> None:
    assert one.keys() == other.keys()
    for key in one.keys() - {*ignored}:
        assert one[key] == pytest.approx(other[key], rel=1e-3, abs=2e-5), key


LOSSES = {
    "dpo": {}, "dpo sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "dpo weighted": {"use_weighting": True}, "dpo ipo": {"loss_type": "ipo"},
    "kto": {}, "kto apo": {"loss_type": "apo_zero_unpaired"}, "reward": {"center_rewards_coefficient": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("batch,accumulation", [(4, 2), (2, 4)])
def test_batch_times_accumulation_equals_one_batch(case, batch, accumulation, tmp_path):
    """KTO too: given its mismatched pairs, the KL is a mean over the whole accumulated batch."""
    algo, options = case.split()[0], LOSSES[case]
    data = fixed_pairs() if case == "kto" else rows(algo)
    options = options | {"train_sampling_strategy": "sequential"}
    whole = trajectory(trainer(algo, tmp_path / "a", data=data, **options))
    parts = trajectory(
        trainer(
            algo,
            tmp_path / "b",
            data=data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **options,
        )
    )
    same(whole, parts)


@pytest.mark.parametrize("case", LOSSES)
def test_shared_prompts_equal_padding(case, tmp_path):
    """One row with each prompt once, one row a sequence, and transformers' own attention give the same training."""
    algo, options = case.split()[0], LOSSES[case]
    shared = trainer(algo, tmp_path / "a", **options)
    assert shared.args.padding_free and shared.data_collator.layout.share_prompts
    padded = trainer(algo, tmp_path / "b", attention="sdpa", **options)
    assert not padded.args.padding_free
    one, other = trajectory(shared), trajectory(padded)
    same(one, other)
    assert min(one["grad_norm"]) > 0 and len(set(one["loss"])) > 5


def test_end_to_end_on_transformers_attention_equals_padding(tmp_path):
    """sdpa keeps sequences apart by their positions, with no prompt shared."""
    free = trainer("dpo", tmp_path / "a", attention="sdpa", padding_free=True)
    assert not free.data_collator.layout.share_prompts
    same(trajectory(free), trajectory(trainer("dpo", tmp_path / "b", attention="sdpa")))


@pytest.mark.parametrize("algo", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_references_equal_live_ones(algo, adapter, tmp_path):
    data = fixed_pairs() if algo == "kto" else rows(algo)
    peft_config = LORA if adapter else None
    live = trainer(algo, tmp_path / "a", data=data, peft_config=peft_config)
    kept = trainer(algo, tmp_path / "b", data=data, peft_config=peft_config, precompute_ref_log_probs=True)
    assert kept.reference is None and {*kept.REFERENCE_COLUMNS} <= {*kept.train_dataset.column_names}
    same(trajectory(live), trajectory(kept))


def test_precomputed_references_are_read_from_disk_the_second_time(tmp_path, monkeypatch):
    first = trainer("dpo", tmp_path / "a", precompute_ref_log_probs=True)
    monkeypatch.setattr(DPOTrainer, "judge_by_reference", None)  # any use would fail
    second = trainer("dpo", tmp_path / "b", precompute_ref_log_probs=True)
    assert second.train_dataset["ref_chosen_logps"][:] == first.train_dataset["ref_chosen_logps"][:]
    other = copy.deepcopy(ARCHITECTURE) | {"hidden_size": 16}
    with pytest.raises(TypeError):  # another model is computed anew
        DPOTrainer(
            args=DPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=True, report_to=[], use_cpu=True),
            train_dataset=rows("dpo"), processing_class=byte_tokenizer(), recipe=ModelRecipe(architecture=other),
        )  # fmt: skip


def test_kto_trains_on_batches_of_one_with_precomputed_references(tmp_path):
    run = trainer(
        "kto",
        tmp_path,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    assert max(trajectory(run)["kl"]) > 0


@pytest.mark.parametrize("algo", ["dpo", "kto", "reward"])
def test_a_resumed_run_equals_one_that_never_stopped(algo, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "num_train_epochs": 3,
        "max_steps": -1,
    }
    data = rows(algo, 30)
    whole = trajectory(trainer(algo, tmp_path / "a", data=data, **options))
    again = trainer(algo, tmp_path / "b", data=data, **options)
    resumed = trajectory(again, resume=str(tmp_path / "a" / "checkpoint-3"))
    same(whole, resumed)


def test_a_moving_reference_is_part_of_a_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "sync_ref_model": True, "ref_model_sync_steps": 2}
    whole = trajectory(trainer("dpo", tmp_path / "a", **options))
    still = trajectory(trainer("dpo", tmp_path / "c"))
    assert whole["loss"] != pytest.approx(still["loss"], abs=1e-3)  # it moved
    again = trainer("dpo", tmp_path / "b", **options)
    resumed = trajectory(again, resume=str(tmp_path / "a" / "checkpoint-5"))
    same(whole, resumed)


def test_an_adapter_that_the_model_brings_is_held_against_itself(tmp_path):
    """Its reference is the adapter as it was: rewards begin at 0 and the first loss is log 2."""
    model = get_peft_model(recipe().build(), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    run = trainer("dpo", tmp_path, model=model, learning_rate=2e-2)
    logged = trajectory(run)
    assert logged["loss"][0] == pytest.approx(0.6931, abs=1e-4) and min(logged["loss"]) < 0.69
    state = dict(run.model.named_parameters())
    assert all(torch.equal(state[n.replace(".default.", ".reference.")], p) for n, p in before.items())
    assert any(not torch.equal(state[n], p) for n, p in before.items())


@pytest.mark.parametrize("algo", ["dpo", "kto", "reward"])
def test_a_search_starts_every_trial_from_the_same_model(algo, tmp_path):
    """With lr 0 each trial's loss is that of the untouched model, whatever ran before it."""
    run = trainer(algo, tmp_path, max_steps=2, save_strategy="no")
    losses = []
    rates = iter([5e-2, 0.0, 5e-2, 0.0])

    def objective(metrics) -> float:
        losses.append([e["loss"] for e in run.state.log_history if "loss" in e])
        return 0.0

    run.eval_dataset = run.train_dataset
    run.args.eval_strategy = "no"
    run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": next(rates)},
        compute_objective=objective,
        n_trials=4,
        backend="optuna",
    )
    first = [found[0] for found in losses] or [None]
    assert len({*first}) == 1


def test_compute_metrics_sees_rewards(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"right": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    run = RewardTrainer(
        args=RewardConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True), compute_metrics=metrics,
        train_dataset=rows("reward"), eval_dataset=rows("reward", 20), processing_class=byte_tokenizer(),
        recipe=recipe(task="reward"),
    )  # fmt: skip
    measured = run.evaluate()
    assert seen["shapes"] == ((20, 2), (20,))
    assert measured["eval_right"] == pytest.approx(measured["eval_accuracy"])


@pytest.mark.parametrize("algo", ["dpo", "kto", "reward"])
def test_evaluation_does_not_depend_on_its_batch_size(algo, tmp_path):
    data = fixed_pairs() if algo == "kto" else rows(algo)
    run = trainer(algo, tmp_path, data=data)
    run.train()
    wide = run.evaluate(run.train_dataset)
    run.args.per_device_eval_batch_size = 3
    narrow = run.evaluate(run.train_dataset)
    timing = {k for k in wide if "runtime" in k or "per_second" in k}
    # KTO's reference point is a mean over a batch, clamped at 0
    kl = {"eval_kl", "eval_loss", "eval_rewards/accuracies"} if algo == "kto" else set()
    for key in wide.keys() - timing - kl:
        assert wide[key] == pytest.approx(narrow[key], rel=1e-4, abs=1e-6), key


def test_old_names_and_a_policy_as_its_own_reference(tmp_path):
    model = recipe().build()
    run = KTOTrainer(
        model=model, args=KTOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True), train_dataset=rows("kto"),
        tokenizer=byte_tokenizer(),
    )  # fmt: skip
    assert run.processing_class is not None and run.reference.kind == "frozen copy"
    with pytest.raises(UserError, match="the policy itself"):
        trainer_class, config_class = CLASSES["dpo"]
        trainer_class(
            model=model, ref_model=model, args=config_class(output_dir=str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=rows("dpo"), processing_class=byte_tokenizer(),
        )  # fmt: skip


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from test_preference_invariants import fixed_pairs, rows, trainer, trajectory
from hydratune.processes import leave_group
algo, folder, resume, options = sys.argv[1], sys.argv[2], sys.argv[3] or None, json.loads(sys.argv[4])
data = fixed_pairs() if algo == "kto" else rows(algo)
run = trainer(algo, folder, data=data, ddp_backend="gloo", **options)
found = trajectory(run, resume)
if run.args.process_index == 0:
    print("FOUND " + json.dumps(found))
del run
leave_group()
"""


def on_two_processes(folder: Path, algo: str, resume: str = "", **options) -> dict[str, list[float]]:
    folder.mkdir()
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(script),
    ]
    done = subprocess.run(
        [*command, algo, str(folder), resume, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])


@pytest.mark.parametrize("algo", ["dpo", "kto", "reward"])
def test_two_processes_equal_one(algo, tmp_path):
    """Batches of 4 on two processes (gloo) are one batch of 8: loss, gradient, KL and counters."""
    options = {"train_sampling_strategy": "sequential", "max_steps": 4}
    two = on_two_processes(tmp_path / "two", algo, per_device_train_batch_size=4, **options)
    data = fixed_pairs() if algo == "kto" else rows(algo)
    same(trajectory(trainer(algo, tmp_path / "one", data=data, **options)), two)


def test_two_processes_resume_in_the_order_of_a_later_epoch(tmp_path):
    options = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 12}
    whole = on_two_processes(tmp_path / "a", "kto", per_device_train_batch_size=4, **options)
    saved = str(tmp_path / "a" / "checkpoint-12")  # of 16 steps, in the second epoch
    same(whole, on_two_processes(tmp_path / "b", "kto", saved, per_device_train_batch_size=4, **options))
