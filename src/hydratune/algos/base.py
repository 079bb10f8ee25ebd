"""What every algorithm shares: the arguments that all have, and a thin `transformers.Trainer`.

The trainer differs from its base in four ways: it keeps the recipe of its model, so that a pristine one can be built
again; its metrics are token-weighted sums kept on the device and fetched when logged; its counters are part of a
checkpoint; and a loss that is not finite ends the run with advice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from hydratune import adapters, attention
from hydratune.checkpoints import COUNTERS
from hydratune.errors import TrainingFailed, UserError, Violation
from hydratune.models import ModelRecipe, load_tokenizer, settle_tokenizer
from hydratune.settings import option


@dataclass
class BaseConfig(transformers.TrainingArguments):
    """Fields common to all algorithms, on top of `transformers.TrainingArguments`."""

    logging_steps: float = option(10, "Log every so many update steps; below 1, as a share of all steps.")
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations; null: when the memory estimate needs it."
    )  # type: ignore[assignment]
    bf16: bool | None = option(None, "bf16 autocast; null: on a GPU that supports it.")  # type: ignore[assignment]
    average_tokens_across_devices: bool = option(True, "Weight the loss by tokens over all devices.")
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Passed to from_pretrained untouched, for every fresh model."
    )
    trust_remote_code: bool = option(False, "Run code that a model's repository brings.")
    chat_template_path: str | None = option(
        None, "A .jinja file, or a tokenizer's directory or id, whose chat template is used."
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = (
                not self.use_cpu
                and not self.fp16
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported(including_emulation=False)
            )
        newer = "activation_checkpointing"  # its name since transformers 5.20; the older one warns there
        asked = (
            self.gradient_checkpointing
            if self.gradient_checkpointing is not None
            else getattr(self, newer, None)
        )
        self.auto_checkpointing = asked is None
        if hasattr(self, newer):
            self.gradient_checkpointing, self.activation_checkpointing = None, asked
        super().__post_init__()

    def use_checkpointing(self, on: bool) -> None:
        self.gradient_checkpointing = on
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = on
        self.auto_checkpointing = False


class Meter:
    """Weighted sums by name, on the device until `take` divides and fetches them all at once."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor, weight: torch.Tensor) -> None:
        pair = torch.stack((total.detach().double(), weight.detach().double()))
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, tuple[float, float]]:
        """(sum, weight) by name over all processes; empties the meter."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        pairs = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return dict(zip(names, map(tuple, pairs), strict=True))

    def state(self) -> dict[str, list[float]]:
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load(self, state: dict[str, list[float]], device: torch.device) -> None:
        self._sums = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in state.items()}


class BaseTrainer(transformers.Trainer):
    """`transformers.Trainer` with a model recipe, device-side metrics and counters that survive a resume.

    Args: as `transformers.Trainer`, and
        model: hub id, directory, or instance. Of an id or a directory the recipe is kept: `fresh_model()` and
            `hyperparameter_search` build pristine models from it.
        quantization_config: how the weights are loaded, for an id or directory.
        peft_config: a `peft.PeftConfig`; the model is wrapped in that adapter.
        tokenizer, config, model_init: the older names of `processing_class`, `args`, and a function that makes
            the model.

    Raises:
        UserError: arguments that cannot work together.
    """

    config_class: type[BaseConfig] = BaseConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: transformers.TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        quantization_config: Any = None,
        peft_config: Any = None,
        recipe: ModelRecipe | None = None,
        tokenizer: Any = None,
        config: Any = None,
        model_init: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = self._arguments(_one("args", args, "config", config), model)
        processing_class = _one("processing_class", processing_class, "tokenizer", tokenizer)
        self.recipe = recipe
        self._make_model = model_init
        if isinstance(model, str):
            self.recipe = ModelRecipe(
                name_or_path=model,
                init_kwargs=args.model_init_kwargs or {},
                quantization_config=quantization_config,
                peft_config=peft_config,
                attn_implementation=self._attention(args, model),
                seed=args.seed,
                trust_remote_code=args.trust_remote_code,
            )
        elif quantization_config is not None or (args.model_init_kwargs and recipe is None):
            raise UserError(
                Violation(
                    "model",
                    type(model).__name__,
                    "quantization_config and model_init_kwargs need a model that is loaded here",
                    "pass the model's id or directory, or load the instance with them yourself",
                )
            )
        if processing_class is None:
            source = self.recipe.name_or_path if self.recipe else getattr(model, "name_or_path", None)
            processing_class = load_tokenizer(str(source), trust_remote_code=args.trust_remote_code)
        settle_tokenizer(
            processing_class,
            chat_template_path=args.chat_template_path,
            eos_token=getattr(args, "eos_token", None),
            pad_token=getattr(args, "pad_token", None),
        )
        data_collator = data_collator or self.collator(args, processing_class)
        train_dataset, eval_dataset = self.prepare_data(args, processing_class, train_dataset, eval_dataset)
        if isinstance(model, str) or model is None:
            model = self.fresh_model()
        elif peft_config is not None and recipe is None:
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                model = adapters.wrap(model, peft_config)
        self.check_model(args, model)
        if args.auto_checkpointing:
            args.use_checkpointing(self._memory_needs_checkpointing(model, args))
        self.meters = {"train": Meter(), "eval": Meter()}
        self.num_tokens = 0
        self._window_start: float | None = None
        self._idle = 0.0
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = (
            True  # so that transformers counts the labels of the accumulated batch
        )

    # -- what an algorithm adds: its batches ------------------------------------------------------------------------

    def collator(self, args: Any, tokenizer: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no collator")

    def prepare_data(self, args: Any, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """Both data sets as the collator takes them; runs before a model is loaded."""
        raise NotImplementedError(f"{type(self).__name__} prepares no data")

    def check_model(self, args: Any, model: Any) -> None:
        """Raise UserError when this model cannot be trained with these arguments."""

    # -- model ---------------------------------------------------------------------------------------------------

    @classmethod
    def _arguments(cls, args: Any, model: Any) -> Any:
        if args is None:
            name = (
                model
                if isinstance(model, str)
                else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"
            )
            return cls.config_class(output_dir=f"{Path(name).name}-{cls.__name__.removesuffix('Trainer')}")
        if isinstance(args, cls.config_class):
            return args
        known = {f.name for f in fields(cls.config_class) if f.init}
        plain = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
        return cls.config_class(**plain)

    def _attention(self, args: Any, model: str) -> str | None:
        """The attention for a model that is loaded here, unless `model_init_kwargs` names one."""
        if "attn_implementation" in (args.model_init_kwargs or {}):
            return None
        attention.register()
        config = ModelRecipe(name_or_path=model, trust_remote_code=args.trust_remote_code).config()
        packed = getattr(args, "packing", False) or getattr(args, "padding_free", False)
        return attention.choose(args.device.type, packed=bool(packed), config=config)

    def _memory_needs_checkpointing(self, model: Any, args: Any) -> bool:
        if args.device.type != "cuda":
            return False
        from hydratune import memory

        return memory.model_needs_checkpointing(model, args)

    def fresh_model(self) -> Any:
        """A pristine model: from the recipe, or from the `model_init` that was given.

        Raises:
            UserError: the trainer was given an instance, of which no recipe is known.
        """
        if self._make_model is not None:
            return self._make_model()
        if self.recipe is None:
            raise UserError(
                Violation(
                    "model",
                    None,
                    "no fresh model can be built, because the trainer was given an instance or nothing",
                    "pass the model's id or directory (or model_init, a function that returns a new model)",
                )
            )
        return self.recipe.build()

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.hyperparameter_search`, with a fresh model for every trial."""
        self.fresh_model()  # fails here, with advice, rather than in the first trial
        self.model_init = lambda trial=None: self.fresh_model()  # type: ignore[assignment]
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            self.model_init = None  # type: ignore[assignment]

    # -- metrics -------------------------------------------------------------------------------------------------

    @property
    def meter(self) -> Meter:
        return self.meters["train" if self.model.training else "eval"]

    def stats_wanted(self) -> bool:
        """Whether this step's by-products (entropy, accuracy) will be logged: always in evaluation."""
        if not self.model.training or self.args.logging_strategy != "steps":
            return True
        step = self.state.global_step + 1
        return step % max(1, self.state.logging_steps) == 0 or (step == 1 and self.args.logging_first_step)

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _train_metrics(self) -> dict[str, float]:
        sums = self.meters["train"].take(self._sum_over_processes)
        tokens, _ = sums.pop("num_tokens", (0.0, 0.0))
        self.num_tokens += int(tokens)
        metrics = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
        metrics["num_tokens"] = self.num_tokens
        now = time.perf_counter()
        if self._window_start is not None and now - self._window_start > self._idle:
            metrics["tokens_per_second"] = tokens / (now - self._window_start - self._idle)
        self._window_start, self._idle = now, 0.0
        if self.args.device.type == "cuda":
            metrics |= _gpu_metrics(metrics.get("tokens_per_second"), self.model, self.args.world_size)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training = "loss" in logs
        if training:
            logs = {**logs, **self._train_metrics()}
        super().log(logs, start_time)
        loss = logs.get("loss", 0.0)
        if training and not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} at step {self.state.global_step}: lower lr, add trainer.warmup_steps, "
                "or tighten trainer.max_grad_norm"
            )

    def evaluation_loop(self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
                        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> Any:  # fmt: skip
        with self._not_training():
            self.meters["eval"] = Meter()
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            for name, (total, weight) in self.meters["eval"].take(self._sum_over_processes).items():
                value = total if name == "num_tokens" else total / weight if weight else math.nan
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time spent here does not count against tokens per second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._idle += time.perf_counter() - start

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            labels = inputs["labels"]
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, labels

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        self.num_tokens, self.meters["train"] = 0, Meter()
        if resume_from_checkpoint and (saved := Path(str(resume_from_checkpoint)) / COUNTERS).is_file():
            state = json.loads(saved.read_text())
            self.num_tokens = state["num_tokens"]
            self.meters["train"].load(state["window"], self.args.device)
        self._window_start, self._idle = time.perf_counter(), 0.0
        output = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._train_metrics()  # tokens of steps that were not logged count too
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._not_training():
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                state = {"num_tokens": self.num_tokens, "window": self.meters["train"].state()}
                (folder / COUNTERS).write_text(json.dumps(state))


def _one(name: str, value: Any, old: str, old_value: Any) -> Any:
    if value is not None and old_value is not None:
        raise UserError(
            Violation(name, None, f"given twice, as {name} and by its older name {old}", f"pass {name} alone")
        )
    return value if value is not None else old_value


_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "B200": 2250e12,
}


def _gpu_metrics(tokens_per_second: float | None, model: Any, devices: int) -> dict[str, float]:
    """Peak memory in GiB, and model FLOPs utilisation: 6 FLOPs per parameter and token over the dense bf16 peak."""
    metrics = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)
    if peak and tokens_per_second:
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        metrics["mfu"] = (6 * trained + 4 * frozen) * tokens_per_second / (peak * devices)
    return metrics
