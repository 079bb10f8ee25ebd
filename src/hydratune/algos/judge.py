"""What algorithms share that judge whole completions: batches that are layouts, log-probs, and a reference.

Batches are layouts (`data/collate_preference.py`); a completion's log-probs come from inside the head, so that logits of
all tokens never exist.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from hydratune.algos.base import BaseTrainer
from hydratune.attention import unmasked
from hydratune.compiling import make_quick
from hydratune.fused_head import LogpsHead, base_of, rows_at
from hydratune.logps import Loss, logps_of
from hydratune.models import ModelRecipe
from hydratune.modes import still
from hydratune.packing import settle_padding
from hydratune.reference import Reference, without_dropout
from hydratune.vocabulary import TokenStats

_OF_THE_MODEL = (
    "input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "key_index",
)  # fmt: skip


@dataclass
class Judged:
    """Log-probs of a layout's completions.

    Attributes:
        per_token: [N], of the layout's targets.
        logps: [S], of sequences: sums over their tokens.
        stats: by-products of each token.
        outputs: of the model.
        loss: the summed loss, where one was given; then the log-probs have no gradient.
    """

    per_token: torch.Tensor
    logps: torch.Tensor
    stats: TokenStats
    outputs: Any
    loss: torch.Tensor | None = None


class RowTrainer(BaseTrainer):
    """A trainer whose batches are layouts, and whose loss is a mean over rows, not over tokens."""

    def inputs_of(self, layout: dict[str, Any], model: Any) -> dict[str, Any]:
        """What a model takes of a layout."""
        given = {name: layout[name] for name in _OF_THE_MODEL if name in layout}
        inputs = unmasked(given, base_of(model).config)
        if self.balances_experts and torch.is_grad_enabled():
            inputs["output_router_logits"] = True
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Rows (not labels) of the accumulated batch, over all devices."""
        rows = torch.full((), sum(map(self.rows_of, batch_samples)), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            rows = self.accelerator.reduce(rows, reduction="sum")
        return rows

    def rows_of(self, batch: dict[str, Any]) -> int:
        raise NotImplementedError

    def make_ready(self, model: Any, args: Any, tokenizer: Any) -> None:
        settle_padding(args, model)
        if args.disable_dropout:
            without_dropout(model)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Predictions are rewards, explicit or implicit."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["rewards"], outputs["labels"]


class JudgingTrainer(RowTrainer):
    """A trainer with a policy, and mostly with a reference."""

    reference: Reference | None = None
    _brings_adapter = False  # the policy's adapter, if there is one, was not made here
    temperature = 1.0  # under which the policy's log-probs are taken, and the reference's

    # -- reference -----------------------------------------------------------------------------------------------

    def _load_reference(self, name: str | None) -> Any:
        own = self.recipe
        assert own is not None or name is not None
        recipe = ModelRecipe(
            name_or_path=name or own.name_or_path,  # type: ignore[union-attr]
            architecture=None if name else own.architecture,  # type: ignore[union-attr]
            init_kwargs=self.args.ref_model_init_kwargs or {},
            dtype=next(self.model.parameters()).dtype,
            attn_implementation=self.model.config._attn_implementation,
            seed=own.seed if own else self.args.seed,
            trust_remote_code=self.args.trust_remote_code,
        )
        return recipe.build()

    def _loaded(self, given: Any) -> Any:
        """A reference that is named, or loaded in a way of its own; batches are laid out for the policy's attention."""
        if isinstance(given, str) or (given is None and self.args.ref_model_init_kwargs and self.recipe):
            given = self._load_reference(given)
        if given is not None:
            given.set_attn_implementation(self.model.config._attn_implementation)
            make_quick(given, self.args)
        return given

    def _hold(self, policy: Any, given: Any = None) -> None:
        """Hold the policy to a reference from now on."""
        self.reference = Reference(policy, given, ours=not self._brings_adapter)
        if self.reference.model is not None:
            self.reference.model = self.accelerator.prepare_model(self.reference.model, evaluation_mode=True)

    # -- log-probs -----------------------------------------------------------------------------------------------

    def judge(
        self, model: Any, layout: dict[str, Any], stats: Collection[str] = (), loss: Loss | None = None
    ) -> Judged:
        """One forward pass over a layout.

        Args:
            stats: which of `logps.STATS` are wanted.
            loss: of the log-probs, whose gradients are then made in this pass; see `logps.token_losses`.
        """
        inputs = self.inputs_of(layout, model)
        length, positions, targets = inputs["input_ids"].shape[1], layout["positions"], layout["targets"]
        if self.head_is_fused(model):
            with LogpsHead(model, length, positions, targets, stats, self.temperature, loss) as head:
                outputs = model(**inputs, use_cache=False)
            per_token, made, total = head.logps, head.stats, head.loss
        else:
            outputs = model(**inputs, use_cache=False)
            logits = rows_at(outputs.logits, length, positions)
            per_token, made = logps_of(logits / self.temperature, targets, stats)
            total = None
            if loss is not None:
                total, per_token = loss(per_token), per_token.detach()
        return Judged(per_token, self.summed(per_token, layout), made, outputs, total)

    def summed(self, per_token: torch.Tensor, layout: dict[str, Any]) -> torch.Tensor:
        """log π of each sequence, [S], from those of its tokens, [N]."""
        return by_sequence(per_token, layout)

    def judge_by_reference(self, layout: dict[str, Any]) -> torch.Tensor:
        """log π_ref of each sequence, [S]."""
        return self._under_reference(layout).logps

    def tokens_by_reference(self, layout: dict[str, Any]) -> torch.Tensor:
        """log π_ref of each token, [N]."""
        return self._under_reference(layout).per_token

    def _under_reference(self, layout: dict[str, Any]) -> Judged:
        assert self.reference is not None
        policy = self.accelerator.unwrap_model(self.model)
        with still(self.model), self.reference.of(policy) as model, self.accelerator.autocast():
            return self.judge(model, layout)


def by_sequence(values: torch.Tensor, layout: dict[str, Any]) -> torch.Tensor:
    """Sums over the completion tokens of each sequence: [N] → [S]."""
    sums = values.new_zeros(len(layout["lengths"]))
    return sums.index_add(0, layout["sequences"], values)
