"""PPO and GRPO in the training loop: what should not matter does not, and what a run needs to go on is kept."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from hydratune import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from hydratune import attention as backends
from hydratune.data.builtin import arithmetic
from hydratune.models import ModelRecipe, byte_tokenizer
from hydratune.rl_losses import gae, whiten
from hydratune.score import score_head

ARCHITECTURE = {
    "model_type": "qwen2", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
CLASSES = {"ppo": (PPOTrainer, PPOConfig), "grpo": (GRPOTrainer, GRPOConfig)}
OWN = {
    "ppo": {"response_length": 12, "num_ppo_epochs": 2, "num_mini_batches": 2, "kl_coef": 0.1, "temperature": 0.9},
    "grpo": {"max_completion_length": 12, "num_generations": 4, "num_iterations": 2, "steps_per_generation": 4, "beta": 0.05},
}  # fmt: skip


def digits(completions, **_) -> list[float]:
    """A dense reward: the share of digits, so that every rollout teaches something."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ch.isdigit() for ch in t) / max(len(t), 1) for t in texts]


def rows(count: int = 32) -> Dataset:
    made = arithmetic(count, 3, "prompts")
    for i, row in enumerate(made):
        row["messages"][0]["content"] += " Think." * (i % 4)
    return Dataset.from_list(made)


def recipe(attention: str = "hydratune_varlen", **fields) -> ModelRecipe:
    backends.register()
    return ModelRecipe(architecture=ARCHITECTURE, seed=1, attn_implementation=attention, **fields)


def trainer(algo: str, folder, *, data=None, evaluation=None, attention="hydratune_varlen", peft_config=None, reward=digits,
            model=None, value_model=None, callbacks=None, tokenizer=None, **options):  # fmt: skip
    trainer_class, config_class = CLASSES[algo]
    defaults = {
        "output_dir": str(folder), "max_steps": 8, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "seed": 5, "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
    } | OWN[algo]  # fmt: skip
    if algo == "grpo" and "steps_per_generation" not in options:
        options["steps_per_generation"] = 2 * options.get("gradient_accumulation_steps", 1)
    source = (
        {"model": model, "peft_config": peft_config}
        if model is not None
        else {"recipe": recipe(attention, peft_config=peft_config)}
    )
    given = {"reward_model" if algo == "ppo" and not isinstance(reward, list) else "reward_funcs": reward}
    if value_model is not None:
        given["value_model"] = value_model
    return trainer_class(
        args=config_class(**defaults | options), train_dataset=rows() if data is None else data, eval_dataset=evaluation,
        processing_class=tokenizer or byte_tokenizer(), callbacks=callbacks, **source, **given,
    )  # fmt: skip


def trajectory(run, resume=None) -> dict[str, list[float]]:
    run.train(resume_from_checkpoint=resume)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    keys = {key for entry in logged for key in entry} - {
        "epoch",
        "tokens_per_second",
        "eps",
        "peak_memory_gib",
    }
    return {key: [float(e[key]) for e in logged if key in e] for key in keys}


def same(one: dict, other: dict, ignored: tuple[str, ...] = ()) -> None:
    assert one.keys() == other.keys()
    for key in one.keys() - {*ignored}:
        assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4), key


# ------------------------------------------------------------------ what should not matter


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_first_pass_is_on_policy(algo, tmp_path):
    """Ratios are 1 and nothing is clipped until the first update; after it they are not."""
    found = trajectory(trainer(algo, tmp_path))
    if algo == "ppo":
        assert found["val/ratio"][0] == pytest.approx(1, abs=1e-5)
        assert found["policy/approxkl_avg"][0] == pytest.approx(0, abs=1e-8)
        assert found["policy/clipfrac_avg"][0] == 0
        assert max(found["policy/approxkl_avg"][1:4]) > 1e-6
        # advantages are whitened, so that their mean over the rollout is 0
        assert found["objective/kl"][0] == pytest.approx(0, abs=1e-3)
    else:
        assert found["clip_ratio/region_mean"][0] == 0
        assert found["kl"][0] == pytest.approx(0, abs=1e-6) and max(found["kl"]) > 1e-5


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_an_init_that_changes_the_base_starts_at_the_reference(algo, tmp_path):
    """PiSSA: without the adapter the policy is another model; a resumed run is held against the same one."""
    made = [
        trainer(
            algo, tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2, temperature=1.0,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa"),
        ) for name in "ab"
    ]  # fmt: skip
    whole = trajectory(made[0])
    assert whole["objective/kl" if algo == "ppo" else "kl"][0] == pytest.approx(0, abs=1e-4)
    rest = trajectory(made[1], str(tmp_path / "a" / "checkpoint-2"))
    assert {*made[1].model.peft_config} == {"default", "reference"}  # and not the value model's
    same(
        {key: values[-1:] for key, values in whole.items()},
        {key: values[-1:] for key, values in rest.items()},
    )


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("batch,accumulation", [(4, 2), (2, 4)])
def test_batch_times_accumulation_equals_one_batch(algo, batch, accumulation, tmp_path):
    whole = trajectory(trainer(algo, tmp_path / "a"))
    parts = trainer(
        algo, tmp_path / "b", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    same(whole, trajectory(parts))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "cispo"])
def test_grpo_losses_do_not_depend_on_the_cut(loss_type, tmp_path):
    options = {"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else None, "max_steps": 4}
    whole = trajectory(trainer("grpo", tmp_path / "a", **options))
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    same(whole, trajectory(trainer("grpo", tmp_path / "b", **options)))


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_end_to_end_equals_padding(algo, tmp_path):
    free, padded = trainer(algo, tmp_path / "a"), trainer(algo, tmp_path / "b", attention="sdpa")
    assert free.args.padding_free and not padded.args.padding_free
    same(
        trajectory(free), trajectory(padded), ("val/clipfrac_avg", "policy/clipfrac_avg")
    )  # rounding decides


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("adapter,stop", [(False, 3), (False, 5), (False, 8), (True, 5)])
def test_a_resumed_run_equals_one_that_never_stopped(algo, adapter, stop, tmp_path):
    """Also in the midst of a rollout (steps 3 and 5 of 4 a rollout): policy, value model, KL coefficient and counters."""
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": 10, "logging_steps": 2}
    options |= {"peft_config": LORA if adapter else None}
    if algo == "ppo":
        options |= {"adaptive_kl": True, "adaptive_kl_horizon": 40, "missing_eos_penalty": 0.2}
    whole = trajectory(trainer(algo, tmp_path / "a", **options))
    again = trainer(algo, tmp_path / "b", **options)
    if algo == "ppo":  # what the checkpoint holds must win over what is there
        with torch.no_grad():
            score_head(again.value_model).weight.normal_()
    resumed = trajectory(again, resume=str(tmp_path / "a" / f"checkpoint-{stop}"))
    same(whole, resumed)
    assert whole["episode"][-1] == again.episode > 0


def test_resuming_with_another_batch_leaves_the_unfinished_rollout_out(tmp_path, caplog):
    trainer("ppo", tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=3).train()
    for options in ({"num_mini_batches": 4}, {"per_device_train_batch_size": 4}):
        again = trainer("ppo", tmp_path / "b", max_steps=6, **options)
        caplog.clear()
        with caplog.at_level("WARNING", "hydratune"):
            again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        assert (
            "the unfinished rollout of the checkpoint is left out" in caplog.text
            and again.state.global_step == 6
        )


def test_the_best_models_are_of_one_step(tmp_path):
    """What was best by the mean reward comes back whole: policy and value model."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 6,
    }
    run = trainer(
        "ppo", tmp_path, evaluation=rows(8), load_best_model_at_end=True, learning_rate=2e-2, **options
    )
    run.train()
    assert run.args.metric_for_best_model == "eval_reward"
    best = Path(run.state.best_model_checkpoint)
    evaluated = {e["step"]: e["eval_reward"] for e in run.state.log_history if "eval_reward" in e}
    assert evaluated[int(best.name.split("-")[1])] == max(evaluated.values())
    saved = AutoModelForSequenceClassification.from_pretrained(best / "value_model")
    assert torch.equal(saved.score.weight, score_head(run.value_model).weight)
    policy = AutoModelForCausalLM.from_pretrained(best)
    assert torch.equal(policy.model.norm.weight, run.model.model.norm.weight)


@pytest.mark.parametrize(
    "options", [{"lr_scheduler_type": "reduce_lr_on_plateau"}, {"save_strategy": "best"}]
)
def test_what_needs_a_metric_takes_the_reward(options, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4} | options
    trainer("grpo", tmp_path, evaluation=rows(4), **options).train()


def test_a_trial_rolls_out_by_its_own_options(tmp_path):
    run = trainer("ppo", tmp_path, evaluation=rows(4), max_steps=2)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((run.args.kl_coef, run.kl_coef, run.args.temperature, run.temperature))

    run.add_callback(Look())
    found = run.hyperparameter_search(
        hp_space=lambda trial: {
            "kl_coef": trial.suggest_categorical("kl_coef", [0.3, 0.7]),
            "temperature": trial.suggest_float("temperature", 0.5, 1.5),
        },
        n_trials=3, backend="optuna",
    )  # fmt: skip
    assert len(seen) == 6 and all(a == b and c == d for a, b, c, d in seen)
    assert 0 <= found.objective <= 1  # the mean reward
    ratios = [e["val/ratio"] for e in run.state.log_history if e.get("step") == 1 and "val/ratio" in e]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-5)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_search_after_training_starts_from_a_fresh_value_model(given, adapter, tmp_path):
    """And trains that one, not the one before it."""
    value = recipe(task="reward").build() if given else None
    run = trainer("ppo", tmp_path, evaluation=rows(4), max_steps=2, peft_config=adapter, value_model=value)
    whole = [{name: v.clone() for name, v in run.value_model.state_dict().items()}]
    run.train()

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            whole.append({name: v.clone() for name, v in run.value_model.state_dict().items()})

    run.add_callback(Look())
    run.hyperparameter_search(hp_space=lambda trial: {"learning_rate": 1e-3}, n_trials=2, backend="optuna")
    whole.append(run.value_model.state_dict())
    first, *began, last = whole
    assert len(began) == 2
    assert all(torch.equal(first[name], one[name]) for one in began for name in first)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_few_prompts_fill_large_rollouts(tmp_path):
    """Fewer rows than a rollout has completions: passes follow each other, nothing hangs."""
    run = trainer("ppo", tmp_path, data=rows(3), max_steps=-1, num_train_epochs=2)
    found = trajectory(run)
    # 2 × 3 prompts are fewer than one rollout takes
    assert len(found["loss"]) == run.args.steps_per_rollout and run.episode == 16
    longer = trainer("ppo", tmp_path, data=rows(3), max_steps=12)
    longer.train()
    assert longer.episode == 3 * 16


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_search_starts_every_trial_from_the_same_models(algo, tmp_path):
    run = trainer(algo, tmp_path, evaluation=rows(4), max_steps=2)
    rates, first = iter([5e-2, 0.0, 5e-2, 0.0]), []

    def judged(metrics) -> float:
        entry = next(e for e in run.state.log_history if "loss" in e)
        first.append((entry["loss"], entry["grad_norm"], entry["rewards/digits/mean"]))
        return metrics["eval_reward"]

    run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": next(rates)}, compute_objective=judged, n_trials=4, backend="optuna"
    )  # fmt: skip
    assert len({*first}) == 1


# ------------------------------------------------------------------ arithmetic


def test_ppo_loss_by_hand(tmp_path):
    """Log-probs and values from whole logits of each completion alone, GAE and both losses written out."""
    run = trainer(
        "ppo", tmp_path, num_mini_batches=1, missing_eos_penalty=0.3, whiten_rewards=True, attention="sdpa"
    )
    score_head(run.value_model).weight.data.normal_(std=0.3)
    run.state.max_steps = 8
    batches, tokens = run.get_batch_samples(iter([0, 1]), 1, run.args.device)
    episodes, args = run.episodes, run.args
    policy = run.model.eval()
    logps, values = [], []
    with torch.no_grad():
        for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True):
            ids = torch.tensor(np.concatenate((prompt, completion)))[None]
            logits = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / args.temperature
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
            states = run.value_model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
            values.append((states @ score_head(run.value_model).weight[0]).double())
    for i in range(len(episodes)):
        size = len(logps[i])
        torch.testing.assert_close(
            episodes.tensors["logps"][i, :size].double(), logps[i], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            episodes.tensors["values"][i, :size].double(), values[i], rtol=1e-4, atol=1e-4
        )
    texts = run.processing_class.batch_decode(episodes.completions, skip_special_tokens=True)
    scores = torch.tensor(digits(texts)) - 0.3 * (~episodes.stopped)
    rewards = torch.zeros(episodes.mask.shape)  # the policy is the reference still: no KL
    for i, completion in enumerate(episodes.completions):
        rewards[i, len(completion) - 1] = scores[i]
    rewards = whiten(rewards, episodes.mask, shift_mean=False)
    padded = episodes.padded([v.numpy() for v in values])
    advantages, returns = gae(rewards, padded, episodes.mask, args.gamma, args.lam)
    advantages = whiten(advantages, episodes.mask)
    mask = episodes.mask
    expected = (
        -advantages[mask].sum() + args.vf_coef * 0.5 * (padded - returns)[mask].square().sum()
    ) / mask.sum()
    assert int(tokens) == int(mask.sum())
    run.model.train()
    loss = run.compute_loss(run.model, batches[0], num_items_in_batch=tokens)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)


def test_truncated_completions_are_out_of_the_loss(tmp_path):
    """Their tokens give no gradient and do not count; all being cut, nothing moves."""
    run = trainer(
        "grpo", tmp_path, mask_truncated_completions=True, max_completion_length=2, max_steps=2, beta=0.0
    )
    before = copy.deepcopy(run.model.state_dict())
    found = trajectory(run)
    if found["completions/clipped_ratio"][0] == 1.0:
        assert found["grad_norm"] == [0.0, 0.0]
        assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    free = trainer("grpo", tmp_path / "b", max_completion_length=2, max_steps=2, beta=0.0)
    assert max(trajectory(free)["grad_norm"]) > 0


@pytest.mark.parametrize("stop_token", ["eos", None])
def test_one_stop_rule(stop_token, tmp_path):
    """A model that always says EOS: completions of that one token, or, without a stop, of all tokens there may be."""
    model = recipe().build()
    tokenizer = byte_tokenizer()
    with torch.no_grad():  # tied: the last state is drawn to EOS
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    bias = torch.zeros(259)
    bias[tokenizer.eos_token_id] = 50.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    run = trainer(
        "ppo", tmp_path, model=model, stop_token=stop_token, missing_eos_penalty=1.0 if stop_token else None
    )
    run.state.max_steps = 8
    run._roll_out()
    lengths = [len(c) for c in run.episodes.completions]
    assert set(lengths) == ({1} if stop_token else {12})
    assert bool(run.episodes.stopped.all()) == bool(stop_token)
    assert run.episodes.mask.sum() == sum(lengths)
    advantages = run.episodes.tensors["advantages"]
    assert advantages.shape == (16, lengths[0]) and bool(advantages.isfinite().all())


def test_an_update_that_goes_too_far_leaves_its_rollout(tmp_path):
    wild = trainer("ppo", tmp_path / "a", learning_rate=5e-2, target_kl=1e-3, total_episodes=48, max_steps=-1)
    tame = trainer("ppo", tmp_path / "b", learning_rate=5e-2, total_episodes=48, max_steps=-1)
    wild.train()
    tame.train()
    assert wild.episode == tame.episode == 48
    assert wild.state.global_step < tame.state.global_step == 3 * tame.args.steps_per_rollout


def test_one_gradient_norm_for_both_models(tmp_path):
    run = trainer("ppo", tmp_path, max_grad_norm=0.01, max_steps=1)
    seen = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            parameters = [*run.model.parameters(), *run.value_model.parameters()]
            seen.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(
                sum(float(p.grad.abs().sum()) for p in run.value_model.parameters() if p.grad is not None)
            )

    score_head(run.value_model).weight.data.normal_()
    run.add_callback(Norms())
    run.train()
    assert seen[0] == pytest.approx(0.01, rel=1e-3) and seen[1] == 0.0


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from test_online import rows, trainer, trajectory
from hydratune.processes import leave_group
algo, folder = sys.argv[1], sys.argv[2]
run = trainer(algo, folder, per_device_train_batch_size=4, ddp_backend="gloo", evaluation=rows(6), max_steps=6,
              **({{"whiten_rewards": True}} if algo == "ppo" else {{"scale_rewards": "batch"}}))
found = trajectory(run)
evaluated = run.evaluate()
digest = torch.stack([p.double().sum() for p in run.model.parameters()]).sum()
if algo == "ppo":
    digest = digest + torch.stack([p.double().sum() for p in run.value_model.parameters()]).sum()
both = run.accelerator.gather(digest[None]).tolist()
if run.args.process_index == 0:
    print("FOUND " + json.dumps({{"loss": found["loss"], "both": both, "episode": run.episode,
                                 "reward": evaluated["eval_reward"]}}))
del run
leave_group()
"""


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_two_processes_train_one_model(algo, tmp_path):
    """Each with rollouts of its own (gloo); weights stay equal, counters count both."""
    script = tmp_path / "run.py"
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
        [*command, algo, str(tmp_path / "out")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    assert found["both"][0] == found["both"][1] and np.isfinite(found["loss"]).all()
    assert found["episode"] == 2 * 2 * 8 and 0 <= found["reward"] <= 1
