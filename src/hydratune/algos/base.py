"""What every algorithm shares: a thin `transformers.Trainer`.

The trainer differs from its base in four ways: it keeps the recipe of its model, so that a pristine one can be built
again; its metrics are token-weighted sums kept on the device and fetched when logged; its counters are part of a
checkpoint; and a loss that is not finite ends the run with advice.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from datasets import IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from hydratune import adapters, attention
from hydratune.algos.arguments import BaseConfig, check_options, config_of, once
from hydratune.checkpoints import COUNTERS
from hydratune.compiling import make_quick
from hydratune.errors import TrainingFailed, UserError, Violation
from hydratune.fused_head import base_of, is_exact
from hydratune.memory import model_needs_checkpointing
from hydratune.meter import Meter, device_metrics
from hydratune.models import ModelRecipe, load_tokenizer, settle_tokenizer
from hydratune.packing import packs
from hydratune.secrets import unsaved

log = logging.getLogger("hydratune")


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

    algo: str = ""  # its name, under which `checks_algo` has its rules
    config_class: type[BaseConfig] = BaseConfig
    task: str = "causal_lm"  # the head of the model: `models.ModelRecipe.task`
    goal: str = "tokens"  # what its rows are: `data.format.format_rows`
    columns: tuple[str, ...] = ()  # of prepared rows, as the collator takes them
    sequences_per_row: int = 1  # that a row has in the forward pass with gradients
    _facts: dict[str, bool] = {}  # noqa: RUF012  of `checks_algo.Case`
    generates: bool = True  # whether its samples are completions of its own

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
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._formatting_func = formatting_func
        args = config_of(once("args", args, "config", config), self.config_class, model)
        processing_class = once("processing_class", processing_class, "tokenizer", tokenizer)
        self.recipe = recipe
        self._make_model = model_init
        self._peft_config, self._seed = peft_config, args.seed
        adapter = peft_config is not None or hasattr(model, "peft_config")
        self._facts = self._facts | {
            "adapter": adapter,
            "streaming": isinstance(train_dataset, IterableDataset),
            "evaluates": eval_dataset is not None,
            "pairs_given": "kl_completion_ids" in (getattr(train_dataset, "column_names", None) or ()),
        }
        check_options(self.algo, args, **self._facts)
        if isinstance(model, str):
            self.recipe = ModelRecipe(
                name_or_path=model,
                init_kwargs=args.model_init_kwargs or {},
                quantization_config=quantization_config,
                peft_config=peft_config,
                attn_implementation=self._attention(args, model),
                seed=args.seed,
                trust_remote_code=args.trust_remote_code,
                task=self.task,
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
            eos_token=args.eos_token,
            pad_token=args.pad_token,
        )
        train_dataset, eval_dataset = self.prepare_data(args, processing_class, train_dataset, eval_dataset)
        if isinstance(model, str) or model is None:
            model = self.fresh_model()
        elif peft_config is not None and recipe is None:
            model = self._wrapped(model, args.seed)
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        rows = {"train_dataset": train_dataset, **evaluated}
        config_of_model = model.config  # type: ignore[union-attr]
        self._check_rows(
            args, config_of_model, {name: part for name, part in rows.items() if part is not None}
        )
        self._settle(model, args, processing_class)
        data_collator = data_collator or self.collator(args, processing_class, model)
        if args.auto_checkpointing:
            args.use_checkpointing(model_needs_checkpointing(model, args))
        self.meters = {"train": Meter(), "eval": Meter()}
        self.num_tokens = 0
        self._window_start: float | None = None
        self._idle = 0.0
        self._fused_heads: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # of models that were tried
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
        if self.args.router_aux_loss_coef is None:
            self.args.router_aux_loss_coef = getattr(self.model.config, "router_aux_loss_coef", None)
        self.balances_experts = bool(self.args.router_aux_loss_coef) and hasattr(
            self.model.config, "output_router_logits"
        )

    # -- what an algorithm adds: its batches ------------------------------------------------------------------------

    def collator(self, args: Any, tokenizer: Any, model: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no collator")

    @classmethod
    def prepare_rows(
        cls, rows: Any, tokenizer: Any, args: Any, *, where: str, training: bool = True, **how: Any
    ) -> tuple[Any, Any]:
        """Rows as the collator takes them, and what became of them (`DataReport`).

        Args:
            rows: raw or canonical.
            where: name of the rows in messages.
            training: whether they are trained on; else they are evaluated.
            how: settings, formatting_func, cache: see `data.pipeline`.
        """
        raise NotImplementedError(f"{cls.__name__} prepares no data")

    def prepare_data(self, args: Any, tokenizer: Any, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """Both data sets as the collator takes them; runs before a model is loaded."""
        if train is None:
            raise UserError(
                Violation("train_dataset", None, "there is nothing to train on", "pass the training rows")
            )
        if isinstance(train, IterableDataset):
            if args.max_steps <= 0:
                raise UserError(
                    Violation(
                        "max_steps", args.max_steps, "streaming data has no known length", "set max_steps"
                    )
                )
            args.accelerator_config = copy.copy(args.accelerator_config)
            args.accelerator_config.dispatch_batches = False  # batches differ in shape between processes
        func: dict[str, Any] = {"formatting_func": self._formatting_func}

        def ready(rows: Any, where: str) -> Any:
            return self.prepare_rows(rows, tokenizer, args, where=where, training=False, **func)[0]

        train, report = self.prepare_rows(train, tokenizer, args, where="train_dataset", **func)
        for line in report.warnings:
            log.warning(line)
        if isinstance(evaluation, dict):
            return train, {name: ready(rows, f"eval_dataset[{name}]") for name, rows in evaluation.items()}
        return train, None if evaluation is None else ready(evaluation, "eval_dataset")

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns]

    @classmethod
    def reference_kind(cls, args: Any, adapter: bool) -> str | None:
        """What the policy is held against, in words for the plan; "a frozen copy" takes the memory of one."""
        return None

    @classmethod
    def check_rows(cls, args: Any, config: Any, rows: dict[str, Any]) -> None:
        """Hold prepared rows against the model's config, before there are weights.

        Raises:
            UserError: they do not fit.
        """

    @classmethod
    def check_services(cls, args: Any, config: Any, adapter: Any) -> None:
        """Ask other programs that a run needs, before there are weights.

        Args:
            config: of the model; adapter: the `peft.PeftConfig`, if there is one.

        Raises:
            UserError: one does not answer, or cannot serve this run.
        """

    def _check_rows(self, args: Any, config: Any, rows: dict[str, Any]) -> None:
        self.check_rows(args, config, rows)

    @classmethod
    def also_in_memory(cls, args: Any, outline: Any, recipe: Any, evaluated: int) -> dict[str, Any]:
        """What a run holds besides its policy and a reference, as arguments of `memory.load_of`.

        Args:
            outline: of the policy; recipe: of it.
            evaluated: evaluation rows.
        """
        return {}

    @classmethod
    def facts(cls, args: Any) -> dict[str, str]:
        """Further lines of the plan."""
        return {}

    @classmethod
    def steps_of(cls, args: Any, rows: int, world_size: int) -> int:
        """Update steps of a run."""
        if args.max_steps > 0:
            return args.max_steps
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
        return math.ceil(math.ceil(rows / per_step) * args.num_train_epochs)

    def make_ready(self, model: Any, args: Any, tokenizer: Any) -> None:
        """Settle what depends on the model, in the model or in the arguments; of every fresh model too.

        Raises:
            UserError: this model cannot be trained with these arguments.
        """

    # -- model ---------------------------------------------------------------------------------------------------

    def _attention(self, args: Any, model: str) -> str | None:
        """The attention for a model that is loaded here, unless `model_init_kwargs` names one."""
        if "attn_implementation" in (args.model_init_kwargs or {}):
            return None
        attention.register()
        config = ModelRecipe(name_or_path=model, trust_remote_code=args.trust_remote_code).config()
        return attention.choose(
            args.device.type, packed=packs(args), model=config, shared=self.goal != "tokens"
        )

    def fresh_model(self) -> Any:
        """A pristine model: from the recipe, or from the `model_init` that was given.

        Raises:
            UserError: the trainer was given an instance, of which no recipe is known.
        """
        if self._make_model is not None:
            model = self._make_model()
            return model if self._peft_config is None else self._wrapped(model, self._seed)
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
        self.model_init = self._ready_model  # type: ignore[assignment]
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            self.model_init = None  # type: ignore[assignment]

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:  # which may have set options
            check_options(self.algo, self.args, **self._facts)

    def _ready_model(self, trial: Any = None) -> Any:
        model = self.fresh_model()
        self._settle(model, self.args, self.processing_class)
        return model

    def _settle(self, model: Any, args: Any, tokenizer: Any) -> None:
        self.make_ready(model, args, tokenizer)
        make_quick(model, args)

    def _wrapped(self, model: Any, seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return adapters.wrap(model, self._peft_config)

    # -- loss ------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        offload = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        with offload if self.args.activation_offloading else nullcontext():
            return super().training_step(*args, **kwargs)

    def head_is_fused(self, model: Any) -> bool:
        """Whether the loss may be computed inside the head; held against each model's own logits once."""
        base = base_of(model)
        if base not in self._fused_heads:
            self._fused_heads[base] = is_exact(model)
            if not self._fused_heads[base]:
                log.warning(
                    "%s transforms its logits in a way of its own: the loss is computed from all of them",
                    type(model).__name__,
                )
        return self._fused_heads[base]

    def over_items(self, total: torch.Tensor, count: Any, num_items: Any) -> torch.Tensor:
        """A summed loss as the share of this micro-batch in the mean over the accumulated, cross-device batch.

        Args:
            count: items of the micro-batch.
            num_items: those of the accumulated batch, over devices too; None: `count`.
        """
        items = count if num_items is None else num_items
        loss = total / (
            items.to(total.device).clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1)
        )
        if num_items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients over processes
        return loss

    def with_balance(self, loss: torch.Tensor, outputs: Any, num_items: Any) -> torch.Tensor:
        """The loss with that of a mixture of experts' balance, which is a mean over micro-batches."""
        if not self.balances_experts:
            return loss
        if getattr(outputs, "aux_loss", None) is None:  # of an evaluation, or of a model for scores
            return loss
        aux = outputs.aux_loss.to(loss.device)
        self.meter.add("aux_loss", aux)
        parts = self.current_gradient_accumulation_steps if num_items is not None else 1
        return loss + self.args.router_aux_loss_coef * aux / parts

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
        sums = self.meters["train"].take(self._sum_over_processes, self.accelerator.gather)
        tokens, _ = sums.pop("num_tokens", (0.0, 0.0))
        self.num_tokens += int(tokens)
        metrics = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
        metrics |= self.derived(metrics)
        metrics["num_tokens"] = self.num_tokens
        now = time.perf_counter()
        if self._window_start is not None and (spent := now - self._window_start - self._idle) > 0:
            metrics["tokens_per_second"] = tokens / spent
            metrics |= self.rates(spent)
        self._window_start, self._idle = now, 0.0
        speed, args = metrics.get("tokens_per_second"), self.args
        return metrics | device_metrics(args.device.type, speed, self.model, args.world_size)

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics that are made of others, once these are divided."""
        return {}

    def rates(self, seconds: float) -> dict[str, float]:
        """Metrics per second of training, of the window that is logged."""
        return {}

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
            self.meters["eval"] = Meter(by_row=True)
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            sums = self.meters["eval"].take(self._sum_over_processes, self.accelerator.gather)
            means = {
                name: total if name == "num_tokens" else total / weight
                for name, (total, weight) in sums.items()
                if weight > 0
            }
            for name, value in (means | self.derived(means)).items():
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

    def samples(self, rows: list[dict[str, Any]], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """What the model makes of canonical rows, to be shown: one dict a row, of the prompt and texts beside it."""
        from hydratune.samples import complete

        return complete(self.model, self.processing_class, rows, max_new_tokens=max_new_tokens)

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

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with unsaved(self.args):  # training_args.bin is their pickle
            super()._save(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._not_training():
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                state = {"num_tokens": self.num_tokens, "window": self.meters["train"].state()}
                (folder / COUNTERS).write_text(json.dumps(state))
