"""Proximal policy optimisation (arXiv:1707.06347) of completions, with a value model (arXiv:1909.08593).

The reward of a token is −kl_coef · KL from the reference, that of the last one also the completion's score. Advantages
are those of GAE, whitened over the rollout. All means are over real tokens of the accumulated, cross-device batch. Policy
and value model are separate models with one optimizer and one gradient norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback

from hydratune import memory
from hydratune import value_model as values_of
from hydratune.algos.online import OnlineTrainer
from hydratune.algos.online_config import OnlineConfig
from hydratune.compiling import make_quick
from hydratune.episodes import Episodes
from hydratune.errors import UserError, Violation
from hydratune.models import ModelRecipe
from hydratune.reference import on_host, without_dropout
from hydratune.reward_models import reward_outline
from hydratune.rewards import Scored
from hydratune.rl_losses import (
    AdaptiveKL,
    gae,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)
from hydratune.score import ValueHead
from hydratune.settings import option

METRICS = (
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
    "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "eps", "episode", "kl_coef",
    "completions/mean_length", "completions/clipped_ratio",
)  # fmt: skip
EVAL_METRICS = ("reward", "length", "stopped", "kl", "verified_accuracy")
_FOLDER = "value_model"  # beside the policy's weights


@dataclass
class PPOConfig(OnlineConfig):
    """`transformers.TrainingArguments` plus the fields of proximal policy optimisation."""

    learning_rate: float = option(3e-6, "Peak learning rate of AdamW.")
    value_learning_rate: float | None = option(None, "That of the value model; null: the same.")
    total_episodes: int | None = option(None, "Completions in all; null: from epochs or steps.")
    num_ppo_epochs: int = option(4, "Passes over a rollout.")
    num_mini_batches: int = option(
        1, "Update steps of a pass; a rollout has batch × accumulation × this many completions."
    )
    response_length: int = option(53, "The longest completion in tokens.")
    temperature: float = option(0.7, "Divides the logits, in sampling and in training.")
    stop_token: Literal["eos"] | None = option(
        "eos", "A completion ends with the tokenizer's EOS; null: with algo.stop_token_id, or never."
    )
    stop_token_id: int | None = option(None, "A token id that ends completions, in the place of EOS.")
    missing_eos_penalty: float | None = option(None, "Taken off the score of a completion that was cut.")
    reward_model: str | None = option(
        None,
        "A directory or hub id of a reward model (algo=reward trains one); algo.reward_funcs come on top.",
    )
    value_model: str | None = option(
        None, "A directory or hub id the value model starts from; null: the reward model, else the policy."
    )
    kl_coef: float = option(0.05, "Weight of the KL from the reference in the reward.")
    kl_estimator: Literal["k1", "k3"] = option(
        "k1", "Of the KL: the log-ratio, or one that is never negative."
    )
    adaptive_kl: bool = option(False, "Let algo.kl_coef follow the KL (arXiv:1909.08593, section 2.2).")
    adaptive_kl_target: float = option(6.0, "KL in nats a completion that it aims at.")
    adaptive_kl_horizon: int = option(10_000, "Episodes in which a KL far off changes it by a fifth.")
    target_kl: float | None = option(
        None,
        "Leave a rollout once an update has gone this far from it (approx-KL, nats a token); null: never.",
    )
    cliprange: float = option(0.2, "How far a token's probability ratio may go from 1.")
    cliprange_value: float = option(0.2, "How far a value may go from that of the rollout.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    gamma: float = option(1.0, "Discount a token.")
    lam: float = option(0.95, "λ of generalised advantage estimation.")
    whiten_rewards: bool = option(False, "Scale rewards to unit variance first.")

    new_tokens_option = "algo.response_length"

    @property
    def sources(self) -> list[Any]:
        return [*([] if self.reward_model is None else [self.reward_model]), *super().sources]

    @property
    def per_rollout(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def passes(self) -> int:
        return self.num_ppo_epochs

    @property
    def new_tokens(self) -> int:
        return self.response_length


class PPOTrainer(OnlineTrainer):
    """Proximal policy optimisation; the arguments are those of the ecosystem's PPO trainers, in their order.

    Args: see `OnlineTrainer`, and
        reward_model: an instance, directory or hub id of a sequence-classification model with one label, or a function.
        value_model: an instance, directory or hub id; None: one is built from the reward model, or from the policy.
        data_collator: not needed, prompts are laid out here.
        reward_funcs: further rewards: functions, dotted paths, reward models.
        reward_processing_classes: tokenizers of the rewards, the reward model's first; None: their own.
        policy, ref_policy: the older names of `model` and `ref_model`.
    """

    algo = "ppo"
    config_class = PPOConfig
    entropy_metric = "policy/entropy_avg"

    def __init__(
        self,
        args: Any = None,
        processing_class: Any = None,
        model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        quantization_config: Any = None,
        formatting_func: Any = None,
        policy: Any = None,
        ref_policy: Any = None,
        recipe: ModelRecipe | None = None,
        **older_names: Any,
    ) -> None:
        asked = args if args is not None else older_names.get("config")
        first = getattr(asked, "reward_model", None) if reward_model is None else reward_model
        more = getattr(asked, "reward_funcs", None) if reward_funcs is None else reward_funcs
        sources = [
            source
            for source in (first, *(more if isinstance(more, list | tuple) else [more]))
            if source is not None
        ]
        super().__init__(
            policy if model is None else model,
            ref_policy if ref_model is None else ref_model,
            sources or None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_tokenizers=reward_processing_classes,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=callbacks,
            peft_config=peft_config,
            quantization_config=quantization_config,
            formatting_func=formatting_func,
            recipe=recipe,
            **older_names,
        )
        args = self.args
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            why = "two models are trained at once, which sharding engines do not do here"
            raise UserError(
                Violation("trainer.fsdp", True, why, "train without FSDP and DeepSpeed, e.g. with peft=lora")
            )
        adapter = self.recipe.peft_config if self.recipe is not None else peft_config
        shared = self.rewards.same_tokens
        value_model = args.value_model if value_model is None else value_model
        self._build_value_model = partial(  # from a policy as it starts; trials do so too
            values_of.build_value_model,
            value_model,
            recipe=self.recipe,
            reward_model=self.rewards.models[shared[0]] if shared else None,
            peft_config=adapter,
            args=args,
            tokens=len(self.processing_class),
        )
        self.value_model = self._build_value_model(policy=self.model, others=self._other_models())
        # one that is given as an instance is trained in place, and cannot be built again
        kept = value_model is not None and not isinstance(value_model, str)
        kept &= self.recipe is not None or self._make_model is not None  # else there is no search
        self._first_value = on_host(self.value_model) if kept else None
        optimizer, scheduler = optimizers
        if scheduler is not None:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and id(p) not in known for p in self.value_model.parameters()):
                why = "the scheduler's optimizer has no parameters of the value model, and none can be added any more"
                fix = "pass value_model= and put its parameters into the optimizer, or leave the scheduler to the trainer"
                raise UserError(Violation("optimizers", None, why, fix))
        self._make_value_ready()

    def _other_models(self) -> list[Any]:
        """Those that must not be trained as the value model."""
        return [*self.rewards.models.values(), self.model, self.reference.model if self.reference else None]

    def _make_value_ready(self) -> None:
        model = self.value_model
        model.config.pad_token_id = self.processing_class.pad_token_id
        if self.args.disable_dropout:
            without_dropout(model)
        if self.args.gradient_checkpointing:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable()
        make_quick(model, self.args)
        self.value_model = self.accelerator.prepare_model(model.train())

    @classmethod
    def reference_kind(cls, args: Any, adapter: bool) -> str | None:
        return "the policy with its adapter off" if adapter else "a frozen copy"

    @classmethod
    def also_in_memory(cls, args: Any, outline: Any, recipe: Any, evaluated: int) -> dict[str, Any]:
        held = super().also_in_memory(args, outline, recipe, evaluated)
        width = 4 if args.bf16 or args.fp16 else recipe.dtype.itemsize
        if source := args.value_model or args.reward_model:
            model, _ = reward_outline(source, args.trust_remote_code)
            critic = memory.shape_of(model, width)
        else:  # of the policy's weights, quantised if they are
            critic = memory.shape_of(outline, 1 if recipe.quantization_config else width, head=False)
        return {**held, "critic": critic}

    @classmethod
    def steps_of(cls, args: Any, rows: int, world_size: int) -> int:
        if args.total_episodes is None:
            return super().steps_of(args, rows, world_size)
        return math.ceil(args.total_episodes / (args.per_rollout * world_size)) * args.steps_per_rollout

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        if self.args.stop_token_id is not None:
            return (self.args.stop_token_id,)
        return super().stop_tokens if self.args.stop_token == "eos" else ()

    @classmethod
    def check_rows(cls, args: Any, config: Any, rows: dict[str, Any], sources: Any = None) -> None:
        size, stop = config.get_text_config().vocab_size, args.stop_token_id
        if stop is not None and not 0 <= stop < size:
            why = f"is no token: the vocabulary has {size:,}"
            raise UserError(
                Violation("algo.stop_token_id", stop, why, "give an id below that, or leave it out")
            )
        super().check_rows(args, config, rows, sources)

    # -- value model ---------------------------------------------------------------------------------------------

    def value_of(self, layout: dict[str, Any]) -> torch.Tensor:
        """Values of the states before each token, [N], fp32."""
        with ValueHead(self.value_model, layout) as head:
            self.value_model(**self.inputs_of(layout, self.value_model), use_cache=False)
        return head.values.float()

    def create_optimizer(self, model: Any = None) -> Any:
        """One optimizer for both models."""
        optimizer = super().create_optimizer(model)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        decayed = set(self.get_decay_parameter_names(self.value_model))
        for decays in (True, False):
            parameters = [
                p
                for name, p in self.value_model.named_parameters()
                if p.requires_grad and id(p) not in known and (name in decayed) == decays
            ]
            if parameters:
                rate = self.args.value_learning_rate or self.args.learning_rate
                decay = self.args.weight_decay if decays else 0.0
                optimizer.add_param_group({"params": parameters, "weight_decay": decay, "lr": rate})
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        parameters = [*model.parameters(), *self.value_model.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def after_step(self, control: Any) -> None:
        self.value_model.zero_grad()
        if self.args.target_kl is not None:
            drift, count = self._sum_over_processes(self._drift).tolist()
            self._drift.zero_()
            if drift > self.args.target_kl * count:
                self.used = self.args.steps_per_rollout  # what is left of the rollout is passed over
        wanted = self.args.total_episodes
        if wanted is not None and self.episode >= wanted and self.used >= self.args.steps_per_rollout:
            control.should_training_stop = True  # sooner than planned where rollouts were left early

    # -- rollouts ------------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        super()._start_over()
        args = self.args
        self.kl_coef = args.kl_coef
        self.kl_control = (
            AdaptiveKL(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
            if args.adaptive_kl
            else None
        )
        self._drift = torch.zeros(2, device=args.device)
        if hasattr(self, "value_model"):
            self.value_model.zero_grad()

    @torch.no_grad()
    def finish(self, episodes: Episodes, scored: Scored) -> None:
        args, found, mask, meter = self.args, episodes.tensors, episodes.mask, self.meters["train"]
        self.value_model.eval()
        found["values"] = self.scored(episodes, self.value_of)
        self.value_model.train()
        scores = scored.total
        if args.missing_eos_penalty is not None:
            scores = torch.where(episodes.stopped, scores, scores - args.missing_eos_penalty)
        kl = torch.where(mask, kl_estimate(found["logps"], found["ref_logps"], args.kl_estimator), 0.0)
        rewards = token_rewards(scores, kl, mask, self.kl_coef)
        if args.whiten_rewards:
            rewards = self._whitened(rewards, mask, shift_mean=False)
        advantages, found["returns"] = gae(rewards, found["values"], mask, args.gamma, args.lam)
        found["advantages"] = self._whitened(advantages, mask)
        many, summed = len(episodes), kl.sum()
        penalty = -self.kl_coef * summed
        meter.add("objective/kl", summed, many)
        meter.add("objective/entropy", -(found["logps"] * mask).sum(), many)
        meter.add("objective/non_score_reward", penalty, many)
        meter.add("objective/scores", scores.sum(), many)
        meter.add("objective/rlhf_reward", penalty + scores.sum(), many)
        meter.add("val/num_eos_tokens", episodes.stopped.sum())
        meter.add("kl_coef", torch.full_like(summed, self.kl_coef))
        if self.kl_control is not None:
            mean = self._sum_over_processes(summed) / (many * args.world_size)
            self.kl_coef = self.kl_control.update(mean.item(), many * args.world_size)

    def _whitened(self, values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
        """Over the rollouts of all processes."""
        if self.args.world_size == 1:
            return whiten(values, mask, shift_mean)
        parts = [self.accelerator.pad_across_processes(t, dim=1) for t in (values, mask)]
        whole = whiten(self.accelerator.gather(parts[0]), self.accelerator.gather(parts[1]), shift_mean)
        start = self.args.process_index * len(values)
        return whole[start : start + len(values), : values.shape[1]]

    # -- loss ----------------------------------------------------------------------------------------------------

    def rows_of(self, batch: dict[str, Any]) -> int:
        """Tokens, over which the loss is a mean."""
        return len(batch["layout"]["targets"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch: its tokens' losses over all tokens of the accumulated batch.

        Args:
            inputs: of `Episodes.batch`.
            num_items_in_batch: tokens of completions over accumulation and devices; None: those of this batch.
        """
        args, layout = self.args, inputs["layout"]
        old, advantages = self.of("logps", inputs), self.of("advantages", inputs)

        def policy_loss(logps: torch.Tensor) -> torch.Tensor:
            return ppo_policy_loss(logps, old, advantages, args.cliprange)[0].sum()

        judged = self.judge(model, layout, ("entropy",) if self.stats_wanted() else (), policy_loss)
        logps, policy = judged.per_token, judged.loss
        assert policy is not None
        value, value_clipped = ppo_value_loss(
            self.value_of(layout), self.of("values", inputs), self.of("returns", inputs), args.cliprange_value
        )
        tokens = len(logps)
        total = policy + args.vf_coef * value.sum()
        loss = self.over_items(total, tokens, num_items_in_batch)
        loss = self.with_balance(loss, judged.outputs, num_items_in_batch)
        with torch.no_grad():
            change = logps - old
            ratio, drift = change.exp(), change.square().sum() / 2
            clipped = ppo_policy_loss(logps, old, advantages, args.cliprange)[1]
            if args.target_kl is not None:
                self._drift += torch.stack((drift, torch.full_like(drift, tokens)))
            for name, values in (
                ("loss", total), ("policy/approxkl_avg", drift), ("policy/clipfrac_avg", clipped.sum()),
                ("loss/policy_avg", policy), ("loss/value_avg", value.sum()),
                ("val/clipfrac_avg", value_clipped.sum()), ("val/ratio", ratio.sum()),
                ("val/ratio_var", (ratio - 1).square().sum()),
            ):  # fmt: skip
                self.meter.add(name, values, tokens)
            if judged.stats.entropy is not None:
                self.meter.add("policy/entropy_avg", judged.stats.entropy.sum(), tokens)
        return (loss, {}) if return_outputs else loss

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        made = super().derived(metrics)
        if "val/ratio_var" in metrics:  # so far about 1
            made["val/ratio_var"] = max(0.0, metrics["val/ratio_var"] - (metrics["val/ratio"] - 1) ** 2)
        return made

    def kl_of(self, metrics: dict[str, float]) -> float:
        return metrics.get("objective/kl", 0.0) / max(metrics.get("completions/mean_length", 1.0), 1.0)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir) / _FOLDER
        values_of.save(self.accelerator.unwrap_model(self.value_model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        if hasattr(policy, "peft_config"):
            load = (
                policy.load_adapter
            )  # by transformers, for every folder with an adapter: not the value model's
            policy.load_adapter = lambda path, name, **how: name == _FOLDER or load(path, name, **how)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            vars(policy).pop("load_adapter", None)
        values_of.load(
            self.accelerator.unwrap_model(self.value_model), Path(resume_from_checkpoint) / _FOLDER
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        folder = Path(str(self.state.best_model_checkpoint)) / _FOLDER
        if folder.is_dir():
            values_of.load(self.accelerator.unwrap_model(self.value_model), folder)

    def state_of_rollouts(self) -> dict[str, Any]:
        return {**super().state_of_rollouts(), "kl_coef": self.kl_coef}

    def load_state_of_rollouts(self, state: dict[str, Any]) -> None:
        super().load_state_of_rollouts(state)
        self.kl_coef = state["kl_coef"]
        if self.kl_control is not None:
            self.kl_control.load_state_dict({"coef": self.kl_coef})

    # -- search --------------------------------------------------------------------------------------------------

    def _ready_model(self, trial: Any = None) -> Any:
        """A trial's fresh policy, with a fresh value model."""
        model = super()._ready_model(trial)
        if self._first_value is not None:
            self.accelerator.unwrap_model(self.value_model).load_state_dict(self._first_value)
        else:
            self.value_model = None  # before there is another one
            self.value_model = self._build_value_model(policy=model, others=self._other_models())
            self._make_value_ready()
        return model
