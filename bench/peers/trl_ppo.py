"""TRL 1.9.2's PPO on the given settings, at its best for speed; prints one line of JSON (`common.measure`).

In the environment of setup_trl_ppo.sh:

    bench/peers/.venv-trl-ppo/bin/python bench/peers/trl_ppo.py FOLDER/settings.json
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from common import RULES, Clock, Generation, RuleModel, build, load_tokenizer, measure, reward_model, show
from datasets import Dataset
from settings import Settings
from transformers import PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def watch(generation: Generation) -> None:
    """Have TRL's rollout tell `generation` of its time and widths."""
    inner = ppo_trainer.batch_generation

    def batch_generation(model, queries, *args, **kwargs):
        with generation.timed():
            sequences, logits = inner(model, queries, *args, **kwargs)
        generation.widths.append(sequences.shape[1] - queries.shape[1])
        return sequences, logits

    ppo_trainer.batch_generation = batch_generation


def run(settings: Settings) -> dict:
    tokenizer = load_tokenizer(settings)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        sys.exit(
            "pad and EOS are one token: TRL's PPO would never train EOS; give the tokenizer a pad of its own"
        )
    policy = build(settings, tokenizer, "policy", settings.model, settings.seed)
    reward = reward_model(settings, tokenizer)
    if reward is None:
        reward = RuleModel(RULES[settings.reward], tokenizer, settings.rows)
    value = build(settings, tokenizer, "scalar", settings.value_model, settings.seed + 2)
    if len(settings.rows) < settings.batch:
        sys.exit(
            f"{len(settings.rows)} prompts, fewer than a batch of {settings.batch}: TRL's PPO would never end"
        )
    # nothing but ids: its collator makes a tensor of every column
    prompts = Dataset.from_dict({"input_ids": [row["prompt_ids"] for row in settings.rows]})
    clock, generation = Clock(), Generation()
    watch(generation)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder, total_episodes=settings.episodes, seed=settings.seed, use_cpu=settings.use_cpu,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            num_ppo_epochs=settings.num_ppo_epochs, num_mini_batches=settings.num_mini_batches,
            response_length=settings.response_length, temperature=settings.temperature,
            stop_token=settings.stop_token, missing_eos_penalty=settings.missing_eos_penalty,
            local_rollout_forward_batch_size=settings.local_rollout_forward_batch_size or settings.batch,
            learning_rate=settings.learning_rate, lr_scheduler_type=settings.lr_scheduler_type,
            max_grad_norm=settings.max_grad_norm, kl_coef=settings.kl_coef, kl_estimator=settings.kl_estimator,
            whiten_rewards=settings.whiten_rewards, cliprange=settings.cliprange,
            cliprange_value=settings.cliprange_value, vf_coef=settings.vf_coef, gamma=settings.gamma,
            lam=settings.lam, gradient_checkpointing=settings.gradient_checkpointing, bf16=settings.bf16,
            num_sample_generations=0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            **settings.extra,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=policy, ref_model=copy.deepcopy(policy), reward_model=reward,
            value_model=value, train_dataset=prompts, callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return measure("trl-ppo", settings, trainer, policy, clock, generation, steps=1)


if __name__ == "__main__":
    show(run(Settings.read(sys.argv[1])))
