"""PPO and GRPO: the models and rewards that they may be given, evaluation, samples, and what is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_online import LORA, digits, recipe, rows, trainer, trajectory
from transformers import AutoModelForSequenceClassification

from hydratune import PPOConfig, PPOTrainer, UserError
from hydratune import attention as backends
from hydratune.errors import TrainingFailed
from hydratune.models import byte_tokenizer
from hydratune.score import score_head

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


def test_a_value_model_that_is_used_otherwise_is_copied(tmp_path):
    reward = recipe(task="reward").build()
    run = trainer("ppo", tmp_path, reward=reward, value_model=reward, max_steps=2)
    before = copy.deepcopy(reward.state_dict())
    run.train()
    assert all(torch.equal(before[name], value) for name, value in reward.state_dict().items())


def test_an_adapted_value_model_keeps_its_base_and_comes_back(tmp_path):
    value = get_peft_model(
        recipe(task="reward").build(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    )
    run = trainer("ppo", tmp_path / "a", value_model=value, save_strategy="steps", save_steps=2, max_steps=2)
    frozen = {n: p.clone() for n, p in value.named_parameters() if not p.requires_grad}
    run.train()
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in value.named_parameters() if n in frozen)
    trained = {n: p.clone() for n, p in value.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in value.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    run._load_from_checkpoint(str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(p, trained[n]) for n, p in value.named_parameters() if n in trained)


def test_rewards_of_arguments_and_of_options_are_added_up(tmp_path):
    judge = recipe(task="reward").build()
    judge.config.pad_token_id = 257
    judge.save_pretrained(tmp_path / "judge")
    byte_tokenizer().save_pretrained(tmp_path / "judge")
    args = PPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, reward_model=str(tmp_path / "judge")
    )
    run = PPOTrainer(args, byte_tokenizer(), recipe().build(), reward_funcs=digits, train_dataset=rows())
    assert run.rewards.names == ("judge", "digits")


def test_a_scheduler_that_does_not_know_the_value_model_is_refused(tmp_path):
    model = recipe().build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = PPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, response_length=4)
    given = {"train_dataset": rows(), "reward_model": digits}
    with pytest.raises(UserError, match="no parameters of the value model"):
        PPOTrainer(args, byte_tokenizer(), model, optimizers=(optimizer, schedule), **given)
    run = PPOTrainer(args, byte_tokenizer(), model, optimizers=(optimizer, None), **given)
    before = score_head(run.value_model).weight.clone()
    run.train()
    assert not torch.equal(before, score_head(run.value_model).weight)


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


def test_answers_that_are_no_whole_numbers_are_not_verified(tmp_path):
    data = Dataset.from_list([{"prompt": "7 or 8?", "answer": "blue"}, {"prompt": "9?", "answer": "4.5"}] * 4)
    run = trainer("grpo", tmp_path, data=data, evaluation=data, max_steps=1)
    assert "eval_verified_accuracy" not in run.evaluate()
    mixed = Dataset.from_list([{"prompt": "7 or 8?", "answer": "8"}, {"prompt": "9?", "answer": "4.5"}] * 4)
    assert "eval_verified_accuracy" in trainer("grpo", tmp_path, data=data, evaluation=mixed).evaluate()


def test_a_templates_end_of_turn_stops_too(tmp_path):
    """A chat template may end turns with another token than the tokenizer's EOS."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token  # and turns still end with the other one
    run = trainer("ppo", tmp_path, tokenizer=tokenizer)
    assert {end, tokenizer.eos_token_id} <= {*run.stop_tokens}
    plain = trainer("ppo", tmp_path, data=Dataset.from_list([{"prompt": "a"}]))
    assert plain.stop_tokens == (byte_tokenizer().eos_token_id,)
    with pytest.raises(UserError, match="is no token"):
        trainer("ppo", tmp_path, stop_token_id=9999)


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


# ------------------------------------------------------------------ prediction, several evaluation sets, searches, resuming


def test_predictions_are_completions(tmp_path):
    run = trainer("grpo", tmp_path, max_steps=1)
    raw = rows(5)
    found = run.predict(raw)
    assert found.predictions.shape[0] == 5 and found.predictions.shape[1] <= 12
    ends = [len(row) - (row == -100).sum() for row in found.predictions]
    assert found.metrics["test_length"] == pytest.approx(np.mean(ends))
    texts = [
        run.processing_class.decode(row[:n], skip_special_tokens=True)
        for row, n in zip(found.predictions, ends, strict=True)
    ]
    assert found.metrics["test_reward"] == pytest.approx(np.mean(digits(texts)))


@pytest.mark.parametrize("options", [{"load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_the_best_of_several_evaluation_sets_is_by_their_mean_reward(options, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2} | options
    sets = {"few": rows(4), "more": rows(12)}
    run = trainer("grpo", tmp_path, evaluation=sets, max_steps=4, learning_rate=2e-2, **options)
    run.train()
    means = {e["step"]: e["eval_reward"] for e in run.state.log_history if "eval_reward" in e}
    assert len(means) == 2 and run.state.best_metric == max(means.values())
    found = run.evaluate()
    expected = (4 * found["eval_few_reward"] + 12 * found["eval_more_reward"]) / 16
    assert found["eval_reward"] == pytest.approx(expected)


def test_a_trial_has_its_own_weights_of_rewards_and_its_own_stop(tmp_path):
    """What is made of options once must be made again when a trial changes them."""
    run = trainer("ppo", tmp_path, reward=[digits, constant], evaluation=rows(4), max_steps=1)
    seen = []
    finish = run.finish

    def look(episodes, scored):
        made = sum(w * each for w, each in zip(run.args.reward_weights, scored.each.values(), strict=True))
        seen.append(bool(torch.allclose(scored.total, made)))
        ends = [
            int(c[-1]) for c, stopped in zip(episodes.completions, episodes.stopped, strict=True) if stopped
        ]
        seen.append(all(end == run.args.stop_token_id for end in ends))
        seen.append(run.rewards.stop_tokens == (run.args.stop_token_id,))
        return finish(episodes, scored)

    run.finish = look
    weights, stops = iter([[1.0, 0.0], [0.5, 2.0]]), iter([65, 66])
    run.hyperparameter_search(
        hp_space=lambda trial: {"reward_weights": next(weights), "stop_token_id": next(stops)},
        n_trials=2, backend="optuna",
    )  # fmt: skip
    assert len(seen) == 6 and all(seen)
    run.args.reward_weights = [1.0]
    with pytest.raises(UserError, match="1 weights for 2 rewards"):
        run.train()


def test_prepared_rows_need_their_prompts(tmp_path):
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(UserError, match=r"train_dataset: skip_prepare_dataset .* have no prompt_ids"):
        trainer("grpo", tmp_path, **skip)
    ready = Dataset.from_list([{"prompt_ids": [1, 2, 3]}] * 8)
    trainer("grpo", tmp_path, data=ready, max_steps=1, **skip).train()


@pytest.mark.parametrize("before,now", [("grpo", "ppo"), ("ppo", "grpo")])
def test_another_algorithms_checkpoint_is_refused(before, now, tmp_path):
    trainer(before, tmp_path / "a", save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(UserError, match=f"is a checkpoint of {before}, which {now} cannot go on from"):
        trainer(now, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
