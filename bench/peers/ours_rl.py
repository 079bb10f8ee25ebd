"""Our PPO or GRPO on the settings that the peers are given; prints one line of JSON (`common.measure`).

In the project's environment:

    python bench/peers/ours_rl.py ppo FOLDER/settings.json
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from common import RULES, Clock, Generation, load_tokenizer, measure, show
from datasets import Dataset
from settings import Settings
from transformers import PrinterCallback

from hydratune import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from hydratune.algos import online_sampling


def watch(generation: Generation) -> None:
    """Have our rollout tell `generation` of its time and widths."""
    inner = online_sampling.generate

    def generate(*args, **kwargs):
        with generation.timed():
            made = inner(*args, **kwargs)
        generation.widths.append(max(map(len, made.ids)))
        return made

    online_sampling.generate = generate


def prompts(settings: Settings, tokenizer) -> Dataset:
    """The prompts as ids, and as text for the reward's sake, as TRL's GRPO has them."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "prompt": tokenizer.decode(row["prompt_ids"]),
                "answer": row.get("answer"),
            }
            for row in settings.rows
        ]
    )


def shared(settings: Settings, folder: str) -> dict[str, Any]:
    """Options that both configs have.

    An update step of ours has batch × accumulation completions, which are the settings' micro-batches of a mini-batch.
    """
    return {
        "output_dir": folder,
        "max_steps": settings.optimizer_steps,
        "seed": settings.seed,
        "use_cpu": settings.use_cpu,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.mini_batch // settings.micro_batch,
        "local_rollout_forward_batch_size": settings.local_rollout_forward_batch_size or settings.batch,
        "temperature": settings.temperature,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": settings.bf16,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "num_sample_generations": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def make_ppo(settings: Settings, folder: str, reward: Any, **given: Any) -> PPOTrainer:
    # our rollout is num_mini_batches times batch × accumulation: the settings' batch again
    args = PPOConfig(
        **shared(settings, folder), num_ppo_epochs=settings.num_ppo_epochs, num_mini_batches=settings.num_mini_batches,
        response_length=settings.response_length, stop_token=settings.stop_token,
        missing_eos_penalty=settings.missing_eos_penalty, kl_coef=settings.kl_coef,
        kl_estimator=settings.kl_estimator, whiten_rewards=settings.whiten_rewards, cliprange=settings.cliprange,
        cliprange_value=settings.cliprange_value, vf_coef=settings.vf_coef, gamma=settings.gamma, lam=settings.lam,
    )  # fmt: skip
    assert args.per_rollout == settings.batch
    return PPOTrainer(
        args=args, model=settings.model, reward_model=reward, value_model=settings.value_model, **given
    )


def make_grpo(settings: Settings, folder: str, reward: Any, **given: Any) -> GRPOTrainer:
    args = GRPOConfig(
        **shared(settings, folder), steps_per_generation=settings.batch // settings.micro_batch,
        num_iterations=settings.num_ppo_epochs, num_generations=settings.num_generations,
        max_completion_length=settings.response_length, beta=settings.kl_coef, epsilon=settings.cliprange,
        loss_type=settings.loss_type, scale_rewards=settings.scale_rewards,
    )  # fmt: skip
    assert args.per_rollout == settings.batch
    return GRPOTrainer(settings.model, reward, args, **given)


def run(algo: str, settings: Settings) -> dict:
    if settings.model is None or (algo == "ppo" and settings.value_model is None):
        sys.exit("ours reads its models from directories: give model, and for PPO value_model")
    tokenizer = load_tokenizer(settings)
    rule = RULES.get(settings.reward)

    def by_rule(completions, answer):
        return [rule(a, c) for a, c in zip(answer, completions, strict=True)]

    clock, generation = Clock(), Generation()
    watch(generation)
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"ppo": make_ppo, "grpo": make_grpo}[algo](
            settings, folder, settings.reward if rule is None else by_rule, callbacks=[clock],
            train_dataset=prompts(settings, tokenizer), processing_class=tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        assert next(trainer.model.parameters()).dtype == torch.float32
        assert trainer.args.steps_per_rollout * settings.rollouts == settings.optimizer_steps
        steps = trainer.args.steps_per_rollout
        return measure(f"ours-{algo}", settings, trainer, trainer.model, clock, generation, steps)


if __name__ == "__main__":
    show(run(sys.argv[1], Settings.read(sys.argv[2])))
