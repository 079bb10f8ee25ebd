"""TRL's GRPO (the version of the project's environment) on the given settings, at its best for speed on one process.

Generates with transformers; prints one line of JSON (`common.measure`). In the project's environment:

    python bench/peers/trl_grpo.py FOLDER/settings.json
"""

from __future__ import annotations

import sys
import tempfile

from common import RULES, Clock, Generation, build, load_tokenizer, measure, reward_model, show
from datasets import Dataset
from settings import Settings
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer


def watch(trainer: GRPOTrainer, generation: Generation) -> None:
    """Have TRL's rollout tell `generation` of its time and widths."""
    inner = trainer._generate_single_turn

    def generate(*args, **kwargs):
        with generation.timed():
            result = inner(*args, **kwargs)
        generation.widths.append(max(map(len, result[0])))
        return result

    trainer._generate_single_turn = generate


def prompts(settings: Settings, tokenizer) -> Dataset:
    """The prompts as text, for GRPO takes no ids.

    Raises:
        ValueError: the text of a prompt is not tokenised back to its ids.
    """
    texts = [tokenizer.decode(row["prompt_ids"], skip_special_tokens=False) for row in settings.rows]
    for text, row in zip(texts, settings.rows, strict=True):
        if tokenizer(text)["input_ids"] != list(row["prompt_ids"]):
            raise ValueError(f"the text of this prompt is not tokenised to the same ids again: {text!r}")
    return Dataset.from_list(
        [{"prompt": t, "answer": r.get("answer")} for t, r in zip(texts, settings.rows, strict=True)]
    )


def run(settings: Settings) -> dict:
    if settings.stop_token != "eos" or settings.missing_eos_penalty is not None:
        sys.exit(
            "TRL's GRPO always stops at EOS and has no missing_eos_penalty: leave both at their defaults"
        )
    tokenizer = load_tokenizer(settings)
    reward, rule = reward_model(settings, tokenizer), RULES.get(settings.reward)

    def by_rule(completions, answer, **ignored):
        return [rule(a, c) for a, c in zip(answer, completions, strict=True)]

    clock, generation = Clock(), Generation()
    with tempfile.TemporaryDirectory() as folder:
        path = settings.model
        if (
            path is None
        ):  # it loads its reference model by the policy's name, so weights must lie in a directory
            path = f"{folder}/policy"
            build(settings, tokenizer, "policy", None, settings.seed).save_pretrained(path)
        policy = build(settings, tokenizer, "policy", path, settings.seed)
        args = GRPOConfig(
            output_dir=folder, max_steps=settings.optimizer_steps, seed=settings.seed, use_cpu=settings.use_cpu,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.mini_batch // settings.micro_batch,
            steps_per_generation=settings.batch // settings.micro_batch, num_iterations=settings.num_ppo_epochs,
            num_generations=settings.num_generations, max_completion_length=settings.response_length,
            temperature=settings.temperature, learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type, max_grad_norm=settings.max_grad_norm,
            beta=settings.kl_coef, epsilon=settings.cliprange, loss_type=settings.loss_type,
            scale_rewards=settings.scale_rewards, gradient_checkpointing=settings.gradient_checkpointing,
            bf16=settings.bf16, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            **settings.extra,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=policy, args=args, reward_funcs=by_rule if reward is None else reward,
            reward_processing_classes=None if reward is None else tokenizer,
            train_dataset=prompts(settings, tokenizer), processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        watch(trainer, generation)
        steps = settings.optimizer_steps // settings.rollouts
        return measure("trl-grpo", settings, trainer, policy, clock, generation, steps)


if __name__ == "__main__":
    show(run(Settings.read(sys.argv[1])))
