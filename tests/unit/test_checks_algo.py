"""Each rule of an algorithm: the case that it is there for, and its neighbour that is all right."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hydratune import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, UserError
from hydratune.checks_algo import RULES, Case
from hydratune.errors import Violation
from hydratune.models import ModelRecipe, byte_tokenizer


def found(algo: str, options: dict, **facts) -> tuple[list[str], list[str]]:
    """Keys of violations, and warnings."""
    problems = [p for rule in RULES[algo] for p in rule(Case(options, **facts))]
    return (
        [p.key for p in problems if isinstance(p, Violation)],
        [p for p in problems if isinstance(p, str)],
    )


WRONG = [
    ("dpo", {"beta": 0}, {}, "algo.beta"),
    ("kto", {"beta": -0.1}, {}, "algo.beta"),
    ("dpo", {"precompute_ref_batch_size": 0}, {}, "algo.precompute_ref_batch_size"),
    ("dpo", {"ref_model_sync_steps": 0}, {}, "algo.ref_model_sync_steps"),
    ("dpo", {"ref_model_mixup_alpha": 1.5}, {}, "algo.ref_model_mixup_alpha"),
    ("dpo", {"sync_ref_model": True}, {"adapter": True}, "algo.sync_ref_model"),
    ("kto", {"sync_ref_model": True, "precompute_ref_log_probs": True}, {}, "algo.sync_ref_model"),
    ("kto", {"precompute_ref_log_probs": True}, {"streaming": True}, "algo.precompute_ref_log_probs"),
    ("dpo", {"loss_type": "sigmoyd"}, {}, "algo.loss_type"),
    ("dpo", {"loss_type": []}, {}, "algo.loss_type"),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, {}, "algo.loss_weights"),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, {}, "algo.label_smoothing"),
    ("dpo", {"loss_type": "exo_pair"}, {}, "algo.label_smoothing"),
    ("dpo", {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, {}, "algo.f_divergence_type"),
    ("dpo", {"ld_alpha": 1.5}, {}, "algo.ld_alpha"),
    ("dpo", {"loss_type": ["aot"], "use_weighting": True}, {}, "algo.use_weighting"),
    ("dpo", {"loss_type": "aot_unpaired", "use_weighting": True}, {}, "algo.use_weighting"),
    ("kto", {"desirable_weight": 0.0}, {}, "algo.desirable_weight"),
    ("kto", {"max_prompt_length": 64, "max_length": 64}, {}, "algo.max_prompt_length"),
    ("kto", {"per_device_train_batch_size": 1}, {}, "batch_size"),
    ("kto", {"per_device_eval_batch_size": 1}, {"evaluates": True}, "trainer.per_device_eval_batch_size"),
    ("reward", {"center_rewards_coefficient": -0.1}, {}, "algo.center_rewards_coefficient"),
    ("reward", {"train_sampling_strategy": "group_by_length"}, {}, "trainer.train_sampling_strategy"),
    ("ppo", {"compile_layers": True}, {}, "algo.compile_layers"),
    ("grpo", {"compile_layers": True}, {}, "algo.compile_layers"),
]
RIGHT = [
    ("dpo", {}, {"adapter": True, "streaming": True, "evaluates": True}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "use_weighting": True}, {}),
    ("dpo", {"loss_type": "exo_pair", "label_smoothing": 1e-3}, {}),
    ("dpo", {"loss_type": "ipo", "f_divergence_type": "js_divergence"}, {}),
    ("kto", {"per_device_eval_batch_size": 1}, {}),
    ("kto", {"per_device_train_batch_size": 1, "loss_type": "apo_zero_unpaired"}, {}),
    ("kto", {"per_device_train_batch_size": 1, "precompute_ref_log_probs": True}, {}),
    ("kto", {"per_device_train_batch_size": 1}, {"pairs_given": True}),
    ("kto", {"max_prompt_length": 64, "max_length": None}, {}),
    ("reward", {"center_rewards_coefficient": 0.01}, {}),
]


@pytest.mark.parametrize("algo,options,facts,key", WRONG)
def test_each_rule_refuses_its_case(algo, options, facts, key):
    assert found(algo, options, **facts)[0] == [key]


@pytest.mark.parametrize("algo,options,facts", RIGHT)
def test_what_works_is_let_through(algo, options, facts):
    assert found(algo, options, **facts)[0] == []


@pytest.mark.parametrize(
    "algo,options,word",
    [
        ("dpo", {"label_smoothing": 0.1}, "no effect"),
        ("reward", {"router_aux_loss_coef": 0.1}, "no effect"),
    ],
)
def test_what_does_nothing_is_a_warning(algo, options, word):
    errors, warnings = found(algo, options)
    assert not errors and len(warnings) == 1 and word in warnings[0]


CLASSES = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


@pytest.mark.parametrize(
    "algo,options,key",
    [
        ("kto", {"per_device_train_batch_size": 1}, "per_device_train_batch_size"),
        ("dpo", {"loss_type": "exo_pair"}, "label_smoothing"),
        ("dpo", {"beta": 0.0}, "beta"),
        ("reward", {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    ],
)
def test_python_is_held_to_the_same_rules(algo, options, key, tmp_path):
    """Before any data is read or weight loaded, and by the names of its own."""
    trainer_class, config_class = CLASSES[algo]
    with pytest.raises(UserError) as raised:
        trainer_class(
            args=config_class(output_dir=str(tmp_path), report_to=[], use_cpu=True, **options),
            train_dataset=Dataset.from_list([{"nothing": 1}]),
            processing_class=byte_tokenizer(),
            recipe=ModelRecipe(architecture={"model_type": "qwen2"}),
        )
    assert [v.key for v in raised.value.violations] == [key]
    assert "algo." not in str(raised.value)


def test_python_is_warned_too(tmp_path, caplog):
    with pytest.raises(UserError), caplog.at_level("WARNING", "hydratune"):
        DPOTrainer(
            args=DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, label_smoothing=0.1),
            train_dataset=Dataset.from_list([{"nothing": 1}]), processing_class=byte_tokenizer(),
            recipe=ModelRecipe(architecture={"model_type": "qwen2"}),
        )  # fmt: skip
    assert "label_smoothing=0.1 has no effect on sigmoid" in caplog.text
