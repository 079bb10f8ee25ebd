"""What DPO and KTO share: a policy that learns from given rows, held to a reference that may stay, move, or be precomputed.

Losses are means over the rows of the accumulated, cross-device batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from hydratune.algos.arguments import BaseConfig
from hydratune.algos.judge import Judged, JudgingTrainer
from hydratune.data.cache import cached, rows_fingerprint
from hydratune.errors import UserError, Violation
from hydratune.models import ModelRecipe
from hydratune.reference import Reference, on_host
from hydratune.rowfile import append_rows
from hydratune.samples import greedy
from hydratune.settings import option

_SHOWN, _NEW_TOKENS = 4, 64  # evaluation prompts that are completed, and how far
_REFERENCE = "reference.pt"  # of a checkpoint, where the reference moves


@dataclass
class PolicyConfig(BaseConfig):
    """`BaseConfig` plus what DPO and KTO have in common."""

    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    beta: float = option(0.1, "How strongly the policy is held to the reference.")
    max_length: int | None = option(1024, "Longest prompt with completion in tokens; null: no limit.")
    truncation_mode: Literal["keep_start", "keep_end"] = option(
        "keep_start", "What is cut of an over-long row: the completion's end, or the prompt's start."
    )
    padding_free: bool | None = option(
        None,
        "Lay a batch's sequences end to end, and compute a prompt once for all its completions; "
        "null: where the attention keeps sequences apart.",
    )
    disable_dropout: bool = option(True, "No dropout in the policy and in the reference.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probs once, before training, and keep them on disk."
    )
    precompute_ref_batch_size: int | None = option(None, "Rows at a time then; null: as in training.")
    ref_model_init_kwargs: dict[str, Any] | None = option(
        None, "Passed to from_pretrained for a reference that is loaded, e.g. {dtype: bfloat16}."
    )
    sync_ref_model: bool = option(False, "Let the reference follow the policy (TR-DPO, arXiv:2404.09656).")
    ref_model_mixup_alpha: float = option(0.6, "The policy's share in the reference at a synchronisation.")
    ref_model_sync_steps: int = option(512, "Update steps between synchronisations.")
    generate_during_eval: bool = option(
        False,
        "Complete four evaluation prompts with policy and reference at every evaluation (generations.jsonl).",
    )


class PolicyTrainer(JudgingTrainer):
    """A trainer with a policy and a reference; see `BaseTrainer`.

    Args:
        ref_model: the reference: hub id, directory or instance; None: the policy as it starts. With an adapter that is
            made here it is the policy with that adapter off, with one that the model brings the adapter as it was.

    Raises:
        UserError: arguments that cannot work together.
    """

    config_class: type[PolicyConfig] = PolicyConfig
    REFERENCE_COLUMNS: tuple[str, ...] = ()  # of precomputed log-probs
    _precomputed_for: str | None = None  # the fingerprint of the policy that was the reference

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        formatting_func: Any = None,
        *,
        recipe: ModelRecipe | None = None,
        **older_names: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            formatting_func=formatting_func,
            recipe=recipe,
            **older_names,
        )
        self._brings_adapter = self.recipe is None and peft_config is None  # if there is one
        self._set_reference(ref_model)

    # -- model ---------------------------------------------------------------------------------------------------

    @classmethod
    def reference_kind(cls, args: Any, adapter: bool) -> str | None:
        if args.precompute_ref_log_probs:
            return "the policy as it starts, its log-probs computed before training"
        return "the policy with its adapter off" if adapter else "a frozen copy"

    def _set_reference(self, given: Any) -> None:
        args = self.args
        self._check_reference(given)
        given = self._loaded(given)
        if args.precompute_ref_log_probs:
            self._precompute(Reference(self.model, given, ours=not self._brings_adapter, lasting=False))
            return
        self._hold(self.model, given)
        if args.sync_ref_model:
            self.add_callback(_Follow(self))

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.sync_ref_model and self.reference is not None and self.reference.kind == "given":
            self._first_reference = on_host(self._moving_reference())
        return super().hyperparameter_search(*args, **kwargs)

    def _ready_model(self, trial: Any = None) -> Any:
        """A trial's fresh policy, and the reference as it is before training."""
        model = super()._ready_model(trial)
        if self.reference is None:  # its log-probs stand in the rows
            if self._precomputed_for not in (None, Reference(model, lasting=False).fingerprint(model)):
                why = "a trial's fresh model is not the one whose log-probs were computed"
                fix = "let model_init give the same weights every time, or do without"
                raise UserError(Violation("precompute_ref_log_probs", True, why, fix))
            return model
        if self.reference.model is None:
            self._hold(model)
        elif self.reference.kind == "frozen copy":
            self._moving_reference().load_state_dict(model.state_dict())
        elif self.args.sync_ref_model:
            self._moving_reference().load_state_dict(self._first_reference)
        return model

    def _moving_reference(self) -> Any:
        assert self.reference is not None
        return self.accelerator.unwrap_model(self.reference.model)

    def _check_reference(self, given: Any) -> None:
        args, wrong = self.args, []
        adapter = hasattr(self.model, "peft_config")
        if args.sync_ref_model and adapter:
            why = "the reference is the policy with its adapter off"
            wrong.append(Violation("algo.sync_ref_model", True, why, "train without an adapter"))
        if given is not None and given is self.model:
            wrong.append(
                Violation("ref_model", "model", "is the policy itself, and would be trained", "leave it out")
            )
        if (
            args.ref_model_init_kwargs
            and not isinstance(given, str)
            and (given is not None or self.recipe is None)
        ):
            what = (
                "the reference is given as an instance"
                if given is not None
                else "the policy is no id or directory"
            )
            fix = "pass the id or directory of ref_model, or leave them out"
            wrong.append(
                Violation(
                    "ref_model_init_kwargs",
                    args.ref_model_init_kwargs,
                    f"{what}, so that none is loaded",
                    fix,
                )
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.is_fsdp_enabled and args.sync_ref_model:
            why = "a reference that follows a sharded policy cannot be saved here"
            wrong.append(Violation("algo.sync_ref_model", True, why, "leave it out, or train without FSDP"))
        if sharded and (args.precompute_ref_log_probs or (self.is_deepspeed_enabled and not adapter)):
            what = "precompute_ref_log_probs" if args.precompute_ref_log_probs else "ref_model"
            wrong.append(
                Violation(
                    f"algo.{what}",
                    True,
                    "a reference is not sharded by DeepSpeed here",
                    "use peft=lora, or FSDP",
                )
            )
        if wrong:
            raise UserError(wrong)

    # -- log-probs -----------------------------------------------------------------------------------------------

    def reference_columns(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`REFERENCE_COLUMNS` of a batch, [B] each."""
        raise NotImplementedError

    def _precompute(self, reference: Reference) -> None:
        """Fill `REFERENCE_COLUMNS` of all rows."""
        if reference.model is not None:
            reference.model.to(self.args.device)
        self.reference = reference
        identity = reference.fingerprint(self.model)
        self._precomputed_for = identity if reference.model is None else None
        rows, evaluation = self.train_dataset, self.eval_dataset  # type: ignore[has-type]
        self.train_dataset = self._with_reference(rows, identity)
        if isinstance(evaluation, dict):
            self.eval_dataset = {name: self._with_reference(r, identity) for name, r in evaluation.items()}
        elif evaluation is not None:
            self.eval_dataset = self._with_reference(evaluation, identity)
        self.reference = None

    def _with_reference(self, rows: Any, identity: str) -> Any:
        if not isinstance(rows, Dataset):
            why = "rows of a stream are not there before training"
            raise UserError(
                Violation("algo.precompute_ref_log_probs", True, why, "drop it, or do not stream")
            )
        if set(self.REFERENCE_COLUMNS) <= set(rows.column_names):
            return rows

        def build() -> tuple[Dataset, dict[str, Any]]:
            size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
            loader = self.accelerator.prepare(DataLoader(rows, size, collate_fn=self.data_collator))
            training = self.model.training
            self.model.eval()
            found: dict[str, list[torch.Tensor]] = {}
            try:
                for batch in loader:
                    made = self.reference_columns(self._prepare_inputs(batch))
                    for name, values in self.accelerator.gather_for_metrics(made).items():
                        found.setdefault(name, []).append(values)
            finally:
                self.model.train(training)
            made_rows = rows
            for name, parts in found.items():
                made_rows = made_rows.add_column(name, torch.cat(parts).float().cpu().numpy()[: len(rows)])
            return made_rows, {}

        key = {
            "rows": rows_fingerprint(rows),
            "reference": identity,
            "columns": self.REFERENCE_COLUMNS,
            "how": self.reference_key(),
        }
        return cached(key, build, agreed=self._all_agree)[0]

    def _all_agree(self, yes: bool) -> bool:
        """Whether it is so in every process."""
        count = torch.full((), int(yes), device=self.args.device)
        return int(self.accelerator.reduce(count, reduction="sum")) == self.accelerator.num_processes

    def reference_key(self) -> list[Any]:
        """What else decides the precomputed log-probs."""
        return [str(self.args.bf16), str(self.args.fp16), self.args.max_length]

    # -- batches -------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self.args.generate_during_eval and self.is_world_process_zero():
            rows = self._generations([row for row, _ in zip(dataloader.dataset, range(_SHOWN), strict=False)])
            told = [c for c in self.callback_handler.callbacks if hasattr(c, "on_generations")]
            for callback in told:
                callback.on_generations(rows)
            if not told:
                append_rows(Path(self.args.output_dir) / "generations.jsonl", rows)
        return output

    def _generations(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What policy and reference make of the first evaluation prompts; a precomputed reference is not there."""
        tokenizer, policy = self.processing_class, self.accelerator.unwrap_model(self.model)
        ids = [list(row["prompt_ids"]) for row in rows if len(row["prompt_ids"])]
        if not ids:
            return []
        made = {"policy": greedy(policy, tokenizer, ids, max_new_tokens=_NEW_TOKENS)}
        if self.reference is not None:
            with self.reference.of(policy) as model:
                made["reference"] = greedy(
                    self.accelerator.unwrap_model(model), tokenizer, ids, max_new_tokens=_NEW_TOKENS
                )
        prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            {
                "step": self.state.global_step,
                "prompt": prompt,
                **{who: texts[i] for who, texts in made.items()},
            }
            for i, prompt in enumerate(prompts)
        ]

    def count_tokens(self, layout: dict[str, Any], judged: Judged) -> None:
        """The metrics that do not depend on the loss: tokens, and the entropy where it was asked for."""
        tokens = layout["lengths"].sum()
        self.meter.add("num_tokens", tokens)
        if judged.stats.entropy is not None:
            self.meter.add("entropy", judged.stats.entropy.sum(), len(judged.per_token))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.sync_ref_model and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._moving_reference().state_dict(), folder / _REFERENCE)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = Path(resume_from_checkpoint) / _REFERENCE
        if self.args.sync_ref_model and saved.is_file():
            state = torch.load(saved, map_location=self.args.device, weights_only=True)
            self._moving_reference().load_state_dict(state)


class _Follow(TrainerCallback):
    """Lets the reference follow the policy every so many steps."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            unwrap = self.trainer.accelerator.unwrap_model
            reference = self.trainer.reference
            assert reference is not None
            reference.follow(unwrap(self.trainer.model), args.ref_model_mixup_alpha)
