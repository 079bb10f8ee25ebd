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
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hydratune import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, UserError
from hydratune import attention as backends
from hydratune.data.builtin import arithmetic
from hydratune.errors import TrainingFailed
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
    source = {"model": model} if model is not None else {"recipe": recipe(attention, peft_config=peft_config)}
    given = {"reward_model": reward} if algo == "ppo" else {"reward_funcs": reward}
    if value_model is not None:
        given["value_model"] = value_model
    return trainer_class(
        args=config_class(**defaults | options), train_dataset=rows() if data is None else data, eval_dataset=evaluation,
        processing_class=tokenizer or byte_tokenizer(), callbacks=callbacks, **source, **given,
    )  # fmt: skip


def trajectory(run, resume=None) -> dict[str, list[float]]:
    run.train(resume_from_checkpoint=resume)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    keys = {key for entry in logged for key in entry} - {"epoch", "tokens_per_second", "eps"}
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
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_resumed_run_equals_one_that_never_stopped(algo, adapter, stop, tmp_path):
    """Also in the midst of a rollout (steps 3 and 5 of 4 a rollout): policy, value model, KL coefficient and counters."""
    if adapter and stop != 5:
        pytest.skip("an adapter is resumed once")
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


def test_few_prompts_fill_large_rollouts(tmp_path):
    """Fewer rows than a rollout has completions: passes follow each other, nothing hangs."""
    run = trainer("ppo", tmp_path, data=rows(3), max_steps=-1, num_train_epochs=2)
    found = trajectory(run)
    assert len(found["loss"]) == 2 * run.args.steps_per_rollout and run.episode == 2 * 16


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


# ------------------------------------------------------------------ models


def test_a_value_model_is_made_of_whatever_is_there(tmp_path, caplog):
    reward = recipe(task="reward").build()
    backends.register()
    with caplog.at_level("INFO", "hydratune"):
        of_reward = trainer("ppo", tmp_path, reward=reward)
    assert "starts from the reward model" in caplog.text
    assert torch.equal(score_head(of_reward.value_model).weight, score_head(reward).weight)
    assert of_reward.value_model is not reward
    of_policy = trainer("ppo", tmp_path)
    assert not score_head(of_policy.value_model).weight.any()
    causal = recipe().build()
    of_causal = trainer("ppo", tmp_path, value_model=causal)
    mine, its = of_causal.value_model.model.state_dict(), causal.model.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    of_instance = trainer("ppo", tmp_path, model=recipe().build())
    its = of_instance.model.model.state_dict()
    assert all(torch.equal(v, its[n]) for n, v in of_instance.value_model.model.state_dict().items())
    with pytest.raises(UserError, match="labels"):
        two = AutoModelForSequenceClassification.from_config(recipe().config())
        trainer("ppo", tmp_path, value_model=two)


def test_old_names_are_understood(tmp_path):
    run = PPOTrainer(
        config=PPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, response_length=4), tokenizer=byte_tokenizer(),
        policy=recipe().build(), ref_policy=recipe().build(), reward_funcs=[digits], train_dataset=rows(),
    )  # fmt: skip
    assert run.reference.kind == "given" and run.value_model is not None


def test_with_an_adapter_there_is_one_base(tmp_path):
    run = trainer("ppo", tmp_path, peft_config=LORA)
    assert run.reference.kind == "adapter off" and run.reference.model is None
    frozen = [n for n, p in run.value_model.named_parameters() if not p.requires_grad]
    assert frozen and any("score" in n and p.requires_grad for n, p in run.value_model.named_parameters())
    before = {n: p.clone() for n, p in run.value_model.named_parameters()}
    run.train()
    moved = {n for n, p in run.value_model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not moved & {*frozen}


def test_checkpoints_and_models_hold_the_value_model(tmp_path):
    run = trainer("ppo", tmp_path / "a", save_strategy="steps", save_steps=4, max_steps=4)
    run.train()
    run.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "a" / "checkpoint-4", tmp_path / "model"):
        saved = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
        assert torch.equal(saved.score.weight, score_head(run.value_model).weight)


# ------------------------------------------------------------------ evaluation, samples, bad input


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_evaluation_gives_rewards_and_the_same_ones_twice(algo, tmp_path):
    run = trainer(algo, tmp_path, evaluation=rows(10), max_steps=2)
    run.train()
    one, other = run.evaluate(), run.evaluate()
    assert {
        "eval_reward",
        "eval_rewards/digits",
        "eval_length",
        "eval_kl",
        "eval_verified_accuracy",
    } <= one.keys()
    assert one["eval_reward"] == other["eval_reward"] and 0 <= one["eval_reward"] <= 1
    assert one["eval_length"] <= 12


def test_completions_are_kept_with_their_rewards(tmp_path):
    trainer("grpo", tmp_path, num_sample_generations=2, max_steps=16).train()
    kept = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in kept}) == 2 and len(kept) == 8
    assert {"step", "prompt", "completion", "reward"} <= {*kept[0]}
    assert all(row["reward"] == pytest.approx(digits([row["completion"]])[0]) for row in kept)


def constant(completions, **_) -> list[float]:
    return [1.0] * len(completions)


def test_equal_rewards_are_told(tmp_path, caplog):
    with caplog.at_level("WARNING", "hydratune"):
        trainer("grpo", tmp_path, reward=constant, max_steps=2).train()
    assert caplog.text.count("every completion was rewarded 1") == 1


def broken(completions, **_) -> list[float]:
    raise KeyError("gone")


def test_a_reward_that_fails_is_one_clear_error(tmp_path):
    with pytest.raises(TrainingFailed, match="broken failed on 16 rows"):
        trainer("grpo", tmp_path, reward=broken).train()


def test_prompts_that_leave_no_room_are_told_before_training(tmp_path):
    data = Dataset.from_list([{"prompt": "short"}, {"prompt": "x" * 400}])
    with pytest.raises(UserError, match=r"train_dataset row 2: a prompt of 400 tokens leaves no room"):
        trainer("ppo", tmp_path, data=data)
    run = trainer("ppo", tmp_path, data=data, max_prompt_length=100)
    assert len(run.train_dataset) == 1


def test_without_any_reward_the_accepted_ones_are_listed(tmp_path):
    with pytest.raises(UserError, match="the rows have no column answer") as raised:
        trainer("ppo", tmp_path, data=Dataset.from_list([{"prompt": "a"}]), reward=None)
    assert "algo=reward" in str(raised.value)


def test_a_causal_lm_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match="score head"):
        trainer("ppo", tmp_path, reward=recipe().build())


def test_a_tokenizer_without_pad_pads_with_what_ends(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    found = trajectory(trainer("ppo", tmp_path, tokenizer=tokenizer, max_steps=2))
    assert np.isfinite(found["loss"]).all()


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from test_online import rows, trainer, trajectory
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
