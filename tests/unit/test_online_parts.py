"""The parts of online RL: prompts of any rows, passes over them, the buffer of a rollout, warnings, and the rules of options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from hydratune import GRPOConfig, PPOConfig, PPOTrainer, UserError
from hydratune.checks_algo import RULES, Case
from hydratune.data.collate_preference import Layout
from hydratune.data.format import format_rows
from hydratune.data.pipeline import prepare_prompts
from hydratune.data.sampling import in_passes
from hydratune.episodes import Episodes
from hydratune.errors import Violation
from hydratune.models import byte_tokenizer
from hydratune.settings import DataSettings
from hydratune.watch import Watch

USER = [{"role": "user", "content": "2+2?"}]
ANSWER = {"role": "assistant", "content": "4"}


def formatted(row: dict, **settings) -> dict:
    (made,) = format_rows(
        Dataset.from_list([row]), DataSettings(**settings), where="rows", goal="prompts"
    ).to_list()
    return made


@pytest.mark.parametrize(
    "row,prompt",
    [
        ({"prompt": "2+2?"}, "2+2?"),
        ({"prompt": USER}, USER),
        ({"prompt": USER, "completion": [ANSWER]}, USER),
        ({"messages": [*USER, ANSWER]}, USER),
        ({"messages": [*USER, ANSWER, *USER]}, [*USER, ANSWER, *USER]),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, USER),
        ({"prompt": USER, "chosen": [ANSWER], "rejected": [ANSWER]}, USER),
        ({"chosen": [*USER, ANSWER], "rejected": [*USER, {**ANSWER, "content": "5"}]}, USER),
        ({"instruction": "2+2?", "output": "4"}, USER),
    ],
)
def test_what_is_asked(row, prompt):
    made = formatted({**row, "answer": 4, "difficulty": "easy", "tests": ["a", "b"]})
    assert made["prompt"] == prompt
    assert (made["answer"], made["difficulty"], made["tests"]) == ("4", "easy", ["a", "b"])
    assert {*made} == {"prompt", "answer", "difficulty", "tests"}


def test_a_system_prompt_comes_before():
    made = formatted({"prompt": "2+2?"}, system_prompt="Count.")
    assert made["prompt"] == [{"role": "system", "content": "Count."}, *USER]


@pytest.mark.parametrize(
    "row,said",
    [
        ({"prompt": ""}, "column prompt: is empty"),
        ({"prompt": None}, "column prompt"),
        ({"prompt": []}, "column prompt: is an empty list"),
        ({"messages": [ANSWER]}, "column messages"),
        ({"prompt_ids": [0.5]}, "not a list of whole numbers"),
        ({"nothing": 1}, "prompt needs prompt"),
    ],
)
def test_rows_that_ask_nothing_are_told(row, said):
    with pytest.raises(UserError, match=said):
        formatted(row)


def prepared(rows: list[dict], **options):
    args = PPOConfig(output_dir="unused", report_to=[], use_cpu=True, **options)
    return prepare_prompts(Dataset.from_list(rows), byte_tokenizer(), args, where="rows", cache=False)


def test_prompts_end_where_the_answer_begins_and_long_ones_are_counted():
    tokenizer = byte_tokenizer()
    made, report = prepared(
        [{"prompt": USER, "tag": 1}, {"prompt": [{"role": "user", "content": "x" * 90}], "tag": 2}]
    )
    expected = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=True)
    expected = expected["input_ids"] if hasattr(expected, "keys") else expected
    assert made[0]["prompt_ids"] == list(expected) and made["tag"][:] == [1, 2] and report.rows == 2
    short, report = prepared([{"prompt": "ab"}, {"prompt": "x" * 90}], max_prompt_length=10)
    assert len(short) == 1 and report.dropped == {"longer than max_prompt_length": 1} and report.longest == 2
    with pytest.raises(UserError, match="no prompt is left"):
        prepared([{"prompt": "abc"}], max_prompt_length=2)
    with pytest.raises(UserError, match=r"row 2, column prompt_ids: holds a token id that is none"):
        prepared([{"prompt_ids": [1]}, {"prompt_ids": [999]}])
    stream = Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset()
    with pytest.raises(UserError, match="is a stream"):
        args = PPOConfig(output_dir="unused", report_to=[], use_cpu=True)
        prepare_prompts(stream, byte_tokenizer(), args, where="rows")


def test_passes_hold_every_row_once_whatever_the_batch():
    whole = in_passes(7, 0, 28, seed=3)
    for k in range(4):
        assert sorted(whole[7 * k : 7 * k + 7]) == list(range(7))
    assert not np.array_equal(whole[:7], whole[7:14])
    parts = [in_passes(7, i, i + 5, seed=3) for i in range(0, 25, 5)]
    assert np.array_equal(np.concatenate(parts), whole[:25])
    assert in_passes(3, 2, 9, seed=0, shuffled=False).tolist() == [2, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_values_of_tokens_find_their_tokens(padding_free, shared):
    """Whatever the layout, a target's value is that of its completion and its place; here both name the token itself."""
    prompts = [np.array([1, 2]), np.array([3])]
    completions = [np.array([10, 11, 12]), np.array([20]), np.array([30, 31]), np.array([40, 41, 42, 43])]
    episodes = Episodes(
        [prompts[0], prompts[0], prompts[1], prompts[1]], completions, torch.zeros(4, dtype=torch.bool)
    )
    episodes.tensors["ids"] = episodes.padded(completions)
    episodes.tensors["number"] = torch.arange(4.0)
    layout = Layout(0, padding_free=padding_free, share_prompts=shared)
    batch = episodes.batch(np.array([[2, 3], [0, 1]]), layout)
    assert torch.equal(episodes.of("ids", batch).long(), batch["layout"]["targets"])
    by_sequence = episodes.of("number", batch)[batch["layout"]["sequences"]]
    assert torch.equal(by_sequence.long(), batch["layout"]["targets"] // 10 - 1)
    assert episodes.mask.sum() == 10 and episodes.lengths.tolist() == [3, 1, 2, 4]
    again = Episodes.from_state(episodes.state(), torch.device("cpu"))
    assert torch.equal(again.tensors["ids"], episodes.tensors["ids"])
    assert all(np.array_equal(a, b) for a, b in zip(again.completions, completions, strict=True))
    scored = episodes.scored([np.array([3, 0]), np.array([1, 2])], layout, lambda given: given["targets"])
    assert torch.equal(scored, episodes.tensors["ids"])


def test_warnings_name_the_cause_once(caplog):
    watch = Watch("algo.kl_coef")
    with caplog.at_level("WARNING", "hydratune"):
        watch.look(1, entropy=2.0, kl=0.3)
        assert not caplog.records
        watch.look(2, equal_rewards=0.0)
        watch.look(3, kl=4.0, entropy=1.0)
        watch.look(4, kl=9.0, entropy=0.01, equal_rewards=0.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "rewarded 0" in lines[0] and "KL" in lines[1] and "fallen from 2.00 to 0.010" in lines[2]
    assert "raise algo.kl_coef" in lines[1]


def keys(algo: str, options: dict, **facts) -> list[str]:
    problems = [p for rule in RULES[algo] for p in rule(Case(options, rewards_given=True, **facts))]
    return [p.key for p in problems if isinstance(p, Violation)]


@pytest.mark.parametrize(
    "algo,options,facts,key",
    [
        ("ppo", {"temperature": 0.0}, {}, "algo.temperature"),
        ("grpo", {"top_p": 0.0}, {}, "algo.top_p"),
        ("ppo", {"min_p": 2.0}, {}, "algo.min_p"),
        ("ppo", {"response_length": 0}, {}, "algo.response_length"),
        ("grpo", {"max_completion_length": 0}, {}, "algo.max_completion_length"),
        ("ppo", {}, {"streaming": True}, "data.streaming"),
        ("ppo", {"num_ppo_epochs": 0}, {}, "algo.num_ppo_epochs"),
        ("ppo", {"gamma": 1.5}, {}, "algo.gamma"),
        ("ppo", {"lam": -0.1}, {}, "algo.lam"),
        ("ppo", {"kl_coef": -1.0}, {}, "algo.kl_coef"),
        ("ppo", {"adaptive_kl": True, "kl_coef": 0.0}, {}, "algo.adaptive_kl"),
        ("ppo", {"stop_token": None, "missing_eos_penalty": 1.0}, {}, "algo.missing_eos_penalty"),
        ("ppo", {"total_episodes": 10, "max_steps": 5}, {}, "max_steps"),
        ("grpo", {"num_generations": 1}, {}, "algo.num_generations"),
        ("grpo", {"num_generations": 3, "per_device_train_batch_size": 8}, {}, "algo.num_generations"),
        ("grpo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, {}, "algo.steps_per_generation"),
        ("grpo", {"beta": -0.1}, {}, "algo.beta"),
        ("grpo", {"loss_type": "cispo"}, {}, "algo.epsilon_high"),
        ("grpo", {"scale_rewards": "groups"}, {}, "algo.scale_rewards"),
        ("grpo", {"epsilon": 0.0}, {}, "algo.epsilon"),
    ],
)  # fmt: skip
def test_each_rule_refuses_its_case(algo, options, facts, key):
    assert keys(algo, options, **facts) == [key]


@pytest.mark.parametrize(
    "algo,options",
    [
        ("ppo", {}),
        ("ppo", {"stop_token": None, "stop_token_id": 3, "missing_eos_penalty": 1.0}),
        ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("grpo", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        ("grpo", {"scale_rewards": False}),
    ],
)
def test_what_works_is_let_through(algo, options):
    assert keys(algo, options) == []


def test_configs_settle_what_is_written_in_two_ways():
    common = {"output_dir": "unused", "report_to": [], "use_cpu": True}
    assert GRPOConfig(**common, scale_rewards=False).scale_rewards == "none"
    assert GRPOConfig(**common, scale_rewards=True).scale_rewards == "group"
    assert PPOConfig(**common, reward_funcs="my.fn").sources == ["my.fn"]
    best = PPOConfig(**common, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    assert (best.metric_for_best_model, best.greater_is_better) == ("eval_reward", True)
    args = PPOConfig(
        **common, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_mini_batches=3
    )
    assert (args.per_rollout, args.steps_per_rollout) == (24, 12)
    assert PPOTrainer.steps_of(args, 48, 1) == 3 * 2 * 12
    args.total_episodes = 50
    assert PPOTrainer.steps_of(args, 48, 1) == 3 * 12
