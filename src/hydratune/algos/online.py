"""What PPO and GRPO share: rollouts that feed the ordinary training loop, their rewards, checkpoints and evaluation.

A rollout is B completions a process. It is passed over one or several times, in update steps of batch × accumulation
completions; a step that finds it used up makes the next. What a rollout is depends on the seed, its number and the
weights alone, and an unfinished one is part of a checkpoint, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hydratune import attention, memory
from hydratune.algos.online_config import OnlineConfig
from hydratune.algos.online_sampling import SamplingTrainer
from hydratune.data.pipeline import prepare_prompts
from hydratune.data.sampling import in_passes
from hydratune.episodes import Episodes
from hydratune.errors import UserError, Violation
from hydratune.modes import still
from hydratune.packing import layout_for
from hydratune.reward_models import micro_batches, reward_outline
from hydratune.reward_sources import check_sources, is_path_of_function
from hydratune.rewards import Rewards, Scored
from hydratune.rowfile import append_rows
from hydratune.samples import rewarded
from hydratune.watch import Watch

log = logging.getLogger("hydratune")
_TOKENS_AT_ONCE = 16384  # of a forward pass that scores
_STATE = "rollout-{}.pt"  # of a checkpoint, one for each process


class OnlineTrainer(SamplingTrainer):
    """A trainer on completions of its own policy; see `BaseTrainer`.

    Args:
        ref_model: hub id, directory or instance; None: the policy as it starts.
        sources: of rewards; None: those that `args` names.
        reward_tokenizers: one for each source, None for a model's own; see `rewards.Rewards`.

    Raises:
        UserError: arguments that cannot work together.
    """

    goal = "prompts"
    config_class: type[OnlineConfig] = OnlineConfig
    needs_old_logps = True  # those of the policy that a rollout was sampled from
    entropy_metric, kl_option = "entropy", "algo.kl_coef"  # that warnings look at, and advise

    def __init__(
        self,
        model: Any,
        ref_model: Any,
        sources: Any,
        *,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_tokenizers: Any = None,
        **rest: Any,
    ) -> None:
        self._sources = sources
        self._facts = {"rewards_given": sources is not None}
        super().__init__(model, args, None, train_dataset, eval_dataset, **rest)
        args = self.args
        self.rewards = Rewards(
            args.sources if sources is None else sources,
            policy_tokenizer=self.processing_class,
            device=args.device,
            weights=args.reward_weights,
            tokenizers=reward_tokenizers,
            token_budget=_TOKENS_AT_ONCE,
            trust_remote_code=args.trust_remote_code,
        )
        self._set_server()
        self._brings_adapter = self.recipe is None and rest.get("peft_config") is None
        if self.needs_reference:
            self._set_reference(ref_model)
        self._max_steps_given = args.max_steps
        self._start_over()
        self.add_callback(_Online(self))

    def _start_over(self) -> None:
        """The state before training, by the arguments as they are now."""
        args = self.args
        args.max_steps = self._max_steps_given
        args.max_steps = self.steps_of(args, len(self.train_dataset), args.world_size)
        self.rewards.weigh(args.reward_weights)
        self.episodes: Episodes | None = None
        self.rollouts = 0  # that were made
        self.used = 0  # update steps of the last one
        self.episode = 0  # completions, on all devices
        self._episodes_logged = 0
        self._watch = Watch(self.kl_option)

    # -- data ----------------------------------------------------------------------------------------------------

    @classmethod
    def prepare_rows(
        cls, rows: Any, tokenizer: Any, args: Any, *, where: str, training: bool = True, **how: Any
    ) -> tuple[Any, Any]:
        return prepare_prompts(rows, tokenizer, args, where=where, **how)

    @classmethod
    def check_rows(cls, args: Any, config: Any, rows: dict[str, Any], sources: Any = None) -> None:
        columns = [set(part.column_names) for part in rows.values()]
        found = check_sources(
            args.sources if sources is None else sources,
            columns=set.intersection(*columns) - {"prompt_ids"},
            weights=args.reward_weights,
        )
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        for where, part in rows.items():
            lengths = [len(ids) for ids in part["prompt_ids"]]
            longest = max(lengths)
            if context is not None and longest >= context:
                row = lengths.index(longest) + 1
                why = f"a prompt of {longest} tokens leaves no room in the model's context of {context}"
                found.append(
                    Violation(
                        f"{where} row {row}", None, why, f"algo.max_prompt_length={context - 1} or less"
                    )
                )
        if found:
            raise UserError(found)

    def _check_rows(self, args: Any, config: Any, rows: dict[str, Any]) -> None:
        self.check_rows(args, config, rows, self._sources)

    def collator(self, args: Any, tokenizer: Any, model: Any) -> Any:
        self._layout = layout_for(args, tokenizer, model)
        return list

    @classmethod
    def steps_of(cls, args: Any, rows: int, world_size: int) -> int:
        if args.max_steps > 0:
            return args.max_steps
        prompts = args.per_rollout // args.copies * world_size
        return math.ceil(rows * args.num_train_epochs / prompts) * args.steps_per_rollout

    @classmethod
    def also_in_memory(cls, args: Any, outline: Any, recipe: Any, evaluated: int) -> dict[str, Any]:
        named = [s for s in args.sources if not is_path_of_function(s)]
        judges = [memory.shape_of(*reward_outline(s, args.trust_remote_code)) for s in named]
        rollout = memory.Rollout(
            completions=max(args.per_rollout, evaluated),
            at_once=args.local_rollout_forward_batch_size,
            new=args.new_tokens,
            new_option=args.new_tokens_option,
            most=_TOKENS_AT_ONCE,
            scores=cls.reference_kind(args, False) is not None
            or args.steps_per_rollout > 1
            or args.vllm_server_base_url is not None,
            sorts=args.top_p < 1,
            elsewhere=args.vllm_server_base_url is not None,
            copies=args.copies if recipe.attn_implementation == attention.NAME else 1,
        )
        return {"judges": tuple(judges), "rollout": rollout}

    @classmethod
    def facts(cls, args: Any) -> dict[str, str]:
        passes = (
            f"passed over {args.passes} times in {args.steps_per_rollout} steps"
            if args.passes > 1
            else "used once"
        )
        of = f" in groups of {args.copies}" if args.copies > 1 else ""
        made = (
            f"{args.per_rollout:,} completions{of} of up to {args.new_tokens} tokens on each device, {passes}"
        )
        if args.vllm_server_base_url is not None:
            made += f", sampled by the vLLM server at {args.vllm_server_base_url}"
        return {"rewards": ", ".join(args.sources) or "correct (the built-in verifier)", "rollout": made}

    def get_train_dataloader(self) -> DataLoader:
        """Counts micro-batches; what they hold is made in `get_batch_samples`."""
        args = self.args
        prompts = args.per_rollout // args.copies * args.world_size
        # every prompt comes once, at least
        steps = math.ceil(len(self.train_dataset) / prompts) * args.steps_per_rollout
        return DataLoader(range(steps * args.gradient_accumulation_steps), collate_fn=list)  # type: ignore[arg-type]

    # -- models --------------------------------------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:
        return True

    def _set_reference(self, given: Any) -> None:
        if given is not None and given is self.model:
            why = "is the policy itself, and would be trained"
            raise UserError(Violation("ref_model", "model", why, "leave it out"))
        self._hold(self.model, self._loaded(given))

    def _ready_model(self, trial: Any = None) -> Any:
        model = super()._ready_model(trial)
        if self.reference is not None and self.reference.kind != "given":
            self.reference.model = None  # before there is another copy
            self._hold(model)
        return model

    # -- rollouts ------------------------------------------------------------------------------------------------

    def _complete(
        self, rows: list[dict[str, Any]], copies: int, seed: tuple[int, ...]
    ) -> tuple[Episodes, list[dict[str, Any]], Scored, Any]:
        """Completions of rows with their rewards.

        Returns:
            Them, the row of each, the rewards, and the log-probs that were found on the way, if any.
        """
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        )
        prompts = [row["prompt_ids"] for row in rows]
        made = self._generate(prompts, copies, generator)
        repeated = [row for row in rows for _ in range(copies)]
        arrays = [np.asarray(row["prompt_ids"]) for row in repeated]
        stopped = torch.from_numpy(made.stopped).to(self.args.device)
        episodes = Episodes(arrays, made.ids, stopped)
        self.rewards.stop_tokens = self.stop_tokens  # a trial may have another
        scored = self.rewards(repeated, arrays, made.ids, trainer_state=self.state)
        return episodes, repeated, scored, made.logps

    def _roll_out(self) -> None:
        args, number = self.args, self.rollouts
        prompts = args.per_rollout // args.copies
        start = (number * args.world_size + args.process_index) * prompts
        shuffled = str(args.train_sampling_strategy) != "sequential"
        seed = args.seed if args.data_seed is None else args.data_seed
        numbers = in_passes(len(self.train_dataset), start, start + prompts, seed=seed, shuffled=shuffled)
        rows = [self.train_dataset[int(i)] for i in numbers]
        seeds = (args.seed, number, args.process_index)
        self.send_weights()
        episodes, _, scored, logps = self._complete(rows, args.copies, seeds)
        self.rollouts, self.used = number + 1, 0
        self.episode += len(episodes) * args.world_size
        self.episodes = episodes
        if self.needs_old_logps:
            episodes.tensors["logps"] = self._old_logps(episodes, logps)
            if self._server is not None and logps is not None:
                gap = (episodes.tensors["logps"] - episodes.padded(logps)).abs().sum()
                self.meters["train"].add("completions/logp_gap", gap, episodes.lengths.sum())
        if self.reference is not None:
            episodes.tensors["ref_logps"] = self.scored(episodes, self.tokens_by_reference)
        self.finish(episodes, scored)
        lengths = episodes.lengths
        meter = self.meters["train"]
        tokens = lengths.sum() + sum(map(len, episodes.prompts))
        meter.add("num_tokens", tokens)
        meter.add("completions/mean_length", lengths.sum(), len(lengths))
        meter.least("completions/min_length", lengths.min())
        meter.most("completions/max_length", lengths.max())
        meter.add("completions/clipped_ratio", (~episodes.stopped).sum(), len(lengths))
        for name, values in scored.each.items():
            known = ~values.isnan()
            meter.add(f"rewards/{name}/mean", values.nan_to_num(nan=0.0).sum(), known.sum())
        meter.least("rewards/lowest", scored.total.min())
        meter.most("rewards/highest", scored.total.max())
        self._keep_some(episodes, scored)

    @torch.no_grad()
    def scored(self, episodes: Episodes, score: Any) -> torch.Tensor:
        """What a function gives for the tokens, [B, T], in forward passes of bounded size."""
        lengths = [len(p) + len(c) for p, c in zip(episodes.prompts, episodes.completions, strict=True)]
        parts = micro_batches(lengths, _TOKENS_AT_ONCE, padded=not self._layout.padding_free)
        most = self.args.local_rollout_forward_batch_size
        cut = [np.asarray(part[i : i + most]) for part in parts for i in range(0, len(part), most)]
        with still(self.model), self.accelerator.autocast():
            return episodes.scored(cut, self._layout, score)

    def finish(self, episodes: Episodes, scored: Scored) -> None:
        """Put what the loss needs into `episodes.tensors`, and what the rollout tells into the meter."""
        raise NotImplementedError

    def _keep_some(self, episodes: Episodes, scored: Scored) -> None:
        if not self.is_world_process_zero() or not self._keeps(self.rollouts - 1):
            return
        shown = rewarded(self.processing_class, episodes, scored.total, scored.each, self.state.global_step)
        told = [c for c in self.callback_handler.callbacks if hasattr(c, "on_generations")]
        for callback in told:
            callback.on_generations(shown)
        if not told:
            append_rows(Path(self.args.output_dir) / "generations.jsonl", shown)

    def _keeps(self, number: int) -> bool:
        """Whether completions of this rollout are kept."""
        times = self.args.num_sample_generations
        whole = max(1, self.state.max_steps // self.args.steps_per_rollout)
        return times > 0 and number % max(1, math.ceil(whole / times)) == 0

    # -- batches -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an update step, of a new rollout where the last one is used up."""
        for _ in itertools.islice(epoch_iterator, num_batches):
            pass
        if self.episodes is None or self.used >= self.args.steps_per_rollout:
            self._roll_out()
        batches = self._batches_of(self.used)
        self.used += 1
        return batches, self._get_num_items_in_batch(batches, device)

    def _batches_of(self, step: int) -> list[dict[str, Any]]:
        args, episodes = self.args, self.episodes
        assert episodes is not None
        size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        # groups stay whole in a step if they can, and share their prompt in a micro-batch if they fit it
        together = 1 if size * accumulated % args.copies else args.copies
        whole = 1 if size % together else together
        number, step = divmod(step, args.steps_per_rollout // args.passes)
        seed = (args.seed, self.rollouts, number, args.process_index)
        order = np.random.default_rng(seed).permutation(len(episodes) // together)
        taken = np.arange(len(episodes)).reshape(-1, together)[order].reshape(-1)
        parts = taken[step * size * accumulated :][: size * accumulated].reshape(accumulated, -1, whole)
        return [episodes.batch(part, self._layout) for part in parts]

    def after_step(self, control: Any) -> None:
        """What follows an update step."""

    def of(self, name: str, batch: dict[str, Any]) -> torch.Tensor:
        """Values of the rollout for a batch; see `Episodes.of`."""
        assert self.episodes is not None
        return self.episodes.of(name, batch)

    # -- metrics -------------------------------------------------------------------------------------------------

    def rates(self, seconds: float) -> dict[str, float]:
        made, self._episodes_logged = self.episode - self._episodes_logged, self.episode
        return {"eps": made / seconds}

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        return {"episode": self.episode}

    def _train_metrics(self) -> dict[str, float]:
        metrics = super()._train_metrics()
        lowest, highest = metrics.pop("rewards/lowest", None), metrics.pop("rewards/highest", None)
        self._watch.look(
            self.state.global_step,
            equal_rewards=highest if lowest == highest else None,
            kl=self.kl_of(metrics),
            entropy=metrics.get(self.entropy_metric),
            gap=metrics.get("completions/logp_gap", 0.0),
        )
        return metrics

    def kl_of(self, metrics: dict[str, float]) -> float:
        """The KL from the reference, nats a token."""
        raise NotImplementedError

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:  # which may have set what rollouts go by
            self._start_over()
            if self.needs_reference and self.reference is None:
                self._set_reference(None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._start_over()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def state_of_rollouts(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and optimizer."""
        whole = self.episodes is None or self.used >= self.args.steps_per_rollout
        return {
            "algo": self.algo,
            "rollouts": self.rollouts,
            "used": self.used,
            "episode": self.episode,
            "episodes": None if whole else self.episodes.state(),  # type: ignore[union-attr]
            "entropy": self._watch.first_entropy,
            "shape": self._shape,
        }

    @property
    def _shape(self) -> list[int]:
        """What an unfinished rollout must have in common with the arguments."""
        args = self.args
        counts = (
            args.per_rollout,
            args.copies,
            args.steps_per_rollout,
            self.reference is not None,
            self.needs_old_logps,
        )
        return [int(count) for count in counts]

    def load_state_of_rollouts(self, state: dict[str, Any]) -> None:
        self.rollouts, self.used, self.episode = state["rollouts"], state["used"], state["episode"]
        self._episodes_logged, self._watch.first_entropy = self.episode, state["entropy"]
        kept = state["episodes"]
        if kept is not None and state["shape"] != self._shape:
            log.warning(
                "the arguments have changed since: the unfinished rollout of the checkpoint is left out"
            )
            kept = None
        self.episodes = None if kept is None else Episodes.from_state(kept, self.args.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_of_rollouts(), folder / _STATE.format(self.args.process_index))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = Path(resume_from_checkpoint) / _STATE.format(self.args.process_index)
        if not saved.is_file():
            why = f"holds no {saved.name}, the state of this process's rollouts"
            fix = "resume with as many processes as before, and a checkpoint of this algorithm"
            raise UserError(Violation("resume", resume_from_checkpoint, why, fix))
        state = torch.load(saved, map_location="cpu", weights_only=True)
        if state["algo"] != self.algo:
            why = f"is a checkpoint of {state['algo']}, which {self.algo} cannot go on from"
            fix = f"resume with {state['algo']}, or start from its weights as the model"
            raise UserError(Violation("resume", resume_from_checkpoint, why, fix))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_state_of_rollouts(state)


class _Online(TrainerCallback):
    """What an online trainer does at the end of every update step."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step(control)
