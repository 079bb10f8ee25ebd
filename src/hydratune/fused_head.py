"""The LM head and the cross-entropy as one operation, so that logits of all tokens never exist.

Only labelled positions are projected, in chunks where their logits would be large; the gradients of the hidden states
and of the weight are made in the forward pass while a chunk's logits are at hand (three products in all, two with a
frozen head, one without gradients). Products run in the input's dtype, sums and softmax in fp32.

`FusedHead` puts this inside a model's own forward: for that time the head module takes hidden states and gives back the
loss. Wrappers that watch a forward pass (data parallel, sharding) so see every parameter take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hydratune.losses import token_loss

IGNORED = -100
_CPU_LOGIT_BYTES = (
    64 * 2**20
)  # larger blocks of logits fall out of the cache, smaller ones re-read the weight too often
_GPU_LOGIT_BYTES = 2 * 2**30
_GPU_LEAST_ROWS = 4096
_PROBE, _LOUD = 8, 40.0  # tokens, and the spread of their logits, of `is_exact`


@dataclass
class Stats:
    """By-products over the labelled tokens, scalars on the device; entropy (nats) and hits only when asked for."""

    count: torch.Tensor
    entropy_sum: torch.Tensor | None = None
    correct: torch.Tensor | None = None


def select(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that predict a labelled token, and those tokens.

    Args:
        hidden: [B, S, H]; of S > T only the last T belong to `labels` (virtual tokens of an adapter come first).
        labels: unshifted, [B, T], -100 outside the loss.

    Returns:
        rows [N, H] and targets [N].
    """
    length = labels.shape[1]
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    positions = (shifted != IGNORED).nonzero().squeeze(1)
    rows = hidden[:, -length:].reshape(-1, hidden.shape[-1])
    return rows.index_select(0, positions), shifted.index_select(0, positions)


def rows_at(states: torch.Tensor, length: int, positions: torch.Tensor) -> torch.Tensor:
    """[R, S, …] → [N, …]: the states at positions in the last `length` of S, flattened over R."""
    return states[:, -length:].flatten(0, 1).index_select(0, positions)


def chunk_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """How many rows are projected at a time: all when their fp32 logits fit the budget of the device."""
    if device.type == "cpu":
        return max(1, min(rows, _CPU_LOGIT_BYTES // (4 * vocabulary)))
    return max(1, min(rows, max(_GPU_LEAST_ROWS, _GPU_LOGIT_BYTES // (4 * vocabulary))))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss sum of rows @ weightᵀ + bias against targets, with gradients made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        loss_type: str,
        want_stats: bool,
        want_gradients: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        want_rows, want_weight, want_bias = (want_gradients and need for need in ctx.needs_input_grad[:3])
        d_rows = torch.empty_like(rows) if want_rows else None
        d_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if want_bias and bias is not None else None
        loss, entropy, correct = (torch.zeros((), dtype=exact, device=rows.device) for _ in range(3))
        for start in range(0, len(rows), chunk):
            part, wanted = rows[start : start + chunk], targets[start : start + chunk, None]
            logits = project(part, weight, bias, softcap, exact)
            norm = logits.logsumexp(dim=-1, keepdim=True)
            logps = logits.gather(1, wanted) - norm
            loss += token_loss(logps, loss_type).sum()
            if want_stats:
                correct += (logits.argmax(dim=-1, keepdim=True) == wanted).sum()
                entropy += (norm.squeeze(1) - (torch.softmax(logits, dim=-1) * logits).sum(-1)).sum()
            if not (want_rows or want_weight or want_bias):
                continue
            slope = 1 - (logits / softcap).square() if softcap is not None else None
            d_logits = logits.sub_(norm).exp_()  # softmax, in the memory of the logits
            d_logits.scatter_add_(1, wanted, torch.full_like(logps, -1.0))
            if loss_type == "dft":
                d_logits.mul_(logps.exp())
            if slope is not None:
                d_logits.mul_(slope)
            low = d_logits.to(rows.dtype)
            if d_rows is not None:
                torch.mm(low, weight, out=d_rows[start : start + chunk])
            if d_weight is not None:
                if d_weight.dtype == low.dtype:
                    d_weight.addmm_(low.t(), part)
                else:
                    d_weight += low.t() @ part
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.mark_non_differentiable(entropy, correct)
        ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss, entropy, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        scaled = [  # in the loss's precision: 1/3 rounded to bf16 would be off by as much as a whole rounding
            None if saved is None else (saved.to(grad.dtype) * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def linear_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    loss_type: str = "nll",
    want_stats: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Σ loss(log softmax(rows @ weightᵀ + bias)[target]) without keeping logits.

    Args:
        rows: hidden states [N, H]; weight: [V, H]; targets: token ids [N]; bias: [V] or None.
        softcap: logits become softcap·tanh(logits / softcap) first (Gemma 2, arXiv:2408.00118).
        loss_type: see `losses.token_loss`.
        want_stats: entropy and top-1 hits too.
        chunk: rows projected at a time; None: as `chunk_rows` says.

    Returns:
        The summed loss, a scalar in fp32 (fp64 of fp64), differentiable once in rows, weight and bias; and `Stats`.
        Of no rows the loss is 0 and all gradients are zero.
    """
    rows, weight, bias = in_one_dtype(rows, weight, bias)
    count = torch.tensor(len(rows), device=rows.device)
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        loss, entropy, correct = _LinearCrossEntropy.apply(
            rows, weight, bias, targets, softcap, loss_type, want_stats, torch.is_grad_enabled(), chunk
        )
    return loss, Stats(count, entropy, correct) if want_stats else Stats(count)


def project(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    exact: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [N, V] in the dtype `exact`, where wanted in the memory of `out`."""
    if out is None:
        logits = F.linear(rows, weight, bias).to(exact)
    elif rows.dtype == exact:
        logits = torch.mm(rows, weight.t(), out=out)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = out.copy_(F.linear(rows, weight, bias))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def in_one_dtype(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As autocast has it, else the weight's."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return rows.to(weight.dtype), weight, bias


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, loss_type: str, want_stats: bool
) -> tuple[torch.Tensor, Stats]:
    """The same from logits [N, V] that are there already: for heads that are not a plain linear layer."""
    every = torch.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), dim=-1)
    loss = token_loss(every.gather(1, targets[:, None]), loss_type).sum()
    stats = Stats(torch.tensor(len(targets), device=logits.device))
    if want_stats:
        with torch.no_grad():
            stats.entropy_sum = -(every.exp() * every).sum()
            stats.correct = (every.argmax(dim=-1) == targets).sum()
    return loss, stats


def base_of(model: nn.Module) -> Any:
    """The causal LM inside wrappers and adapters."""
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class Replaced:
    """While it is open, a module's forward is our own; `self._project` is the module's."""

    def __init__(self, module: nn.Module) -> None:
        self._head: Any = module

    def __enter__(self) -> Any:
        self._own = self._head.__dict__.get("forward")  # a hook library may have put one there
        self._project = self._head.forward
        self._head.forward = self._forward
        return self

    def __exit__(self, *exc: object) -> None:
        if self._own is None:
            del self._head.forward
        else:
            self._head.forward = self._own

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


class Head(Replaced):
    """The head of a causal LM, taking hidden states and giving what is made of some of them."""

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        super().__init__(base.get_output_embeddings())
        config = base.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    def _linear(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """The rows as the head's weight and bias shall see them, when the head is a plain linear layer."""
        head = self._head
        if type(head) is not nn.Linear or self._own is not None:
            return None
        if self._scale == 1.0:
            return rows, head.weight, head.bias
        return rows * self._scale, head.weight, None if head.bias is None else head.bias * self._scale

    def _logits(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self._project(rows, *args, **kwargs) * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


class FusedHead(Head):
    """`with FusedHead(model, labels) as head: model(**batch)`, then `head.loss_sum` and `head.stats`.

    While it is open the model's forward computes no logits: its head turns hidden states [B, S, H] into the summed loss,
    which stands as [1, 1, 1] where the output has its logits. Capped and scaled logits (Gemma 2; Cohere, Granite) and
    heads with an adapter, a trained copy or quantised weights are handled.

    Args:
        model: a causal LM, wrapped in an adapter or a parallel wrapper or not.
        labels: unshifted, [B, T], -100 outside the loss.
        loss_type, want_stats: as for `linear_cross_entropy`.
    """

    loss_sum: torch.Tensor
    stats: Stats

    def __init__(
        self, model: nn.Module, labels: torch.Tensor, loss_type: str = "nll", want_stats: bool = False
    ) -> None:
        super().__init__(model)
        self._labels, self._loss_type, self._want_stats = labels, loss_type, want_stats

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows, targets = select(hidden, self._labels)
        if plain := self._linear(rows):
            rows, weight, bias = plain
            self.loss_sum, self.stats = linear_cross_entropy(
                rows, weight, targets, bias,
                softcap=self._softcap, loss_type=self._loss_type, want_stats=self._want_stats,
            )  # fmt: skip
        else:
            logits = self._logits(rows, *args, **kwargs)
            self.loss_sum, self.stats = cross_entropy(logits, targets, self._loss_type, self._want_stats)
        return self.loss_sum.reshape(1, 1, 1)


@torch.no_grad()
def is_exact(model: nn.Module) -> bool:
    """Whether `FusedHead` gives the loss of the model's own logits, tried on a few tokens.

    A model may do to its logits what no name in its config tells: scale, cap, shift. So both are computed, with the
    head's input scaled up until a cap would show, and with the least likely tokens as labels, whose loss a wrong
    scale changes most. Random states and the training mode stay as they were.

    Args:
        model: as for `FusedHead`.

    Returns:
        Also false for a model that cannot be run on token ids alone.
    """
    head = base_of(model).get_output_embeddings()
    device = next(model.parameters()).device
    ids = torch.arange(1, 1 + _PROBE, device=device)[None] % max(2, len(head.weight))
    training, gain = model.training, 1.0

    def louder(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0] * gain, *given[1:])

    hook = head.register_forward_pre_hook(louder)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            spread = model(input_ids=ids, use_cache=False).logits.float().std().item()
            gain = _LOUD / spread if spread > 0 else 1.0
            logits = model(input_ids=ids, use_cache=False).logits.float()
            labels = torch.cat((ids[:, :1], logits[:, -_PROBE:-1].argmin(-1)), dim=1)
            rows, targets = select(logits, labels)
            with FusedHead(model, labels) as fused:
                model(input_ids=ids, use_cache=False)
    except Exception:  # of many kinds: this model wants other inputs, or its head is no plain module
        return False
    finally:
        model.train(training)
        hook.remove()
    expected = F.cross_entropy(rows, targets, reduction="sum")
    return bool((fused.loss_sum.float() - expected).abs() <= 0.02 * expected.abs() + 0.05)
