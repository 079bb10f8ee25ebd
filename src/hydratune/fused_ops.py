"""What a transformer's layer is made of, as one operation each: fewer passes over memory, and less kept for the backward pass.

Each is an autograd function whose gradient is written out. Differences from what autograd makes of the plain formulas:

- `rms_norm` keeps its input and one number a row, not the normalised states.
- `rotate` keeps nothing of what it rotates.
- `project` (linear layers of one input, each with its LoRA or without) casts the input once under autocast, sums the
  input's gradients in place, and keeps the input only if a weight's gradient needs it: a frozen weight's does not.
- `gated_mlp` keeps gate and up, and makes their product again in the backward pass.

Products run in the dtype that autocast has, else in the input's. Gradients can be taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Tensors = tuple[torch.Tensor | None, ...]


class Projection(NamedTuple):
    """x @ weightᵀ + bias + scale · (x @ downᵀ) @ upᵀ (LoRA, arXiv:2106.09685, eq. 3).

    weight [out, in], bias [out] or None; down [r, in] and up [out, r], or None for no adapter.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> Tensors:
        return self[:4]


@dataclass(frozen=True)
class Activation:
    """A gate's activation; and its gradient, from that of the result and the input, in the memory of the former."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_aten = torch.ops.aten
SILU = Activation(F.silu, lambda grad, x: _aten.silu_backward.grad_input(grad, x, grad_input=grad))
GELU_TANH = Activation(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda grad, x: _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
)


def _exact(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass in which autocast is off, and dtypes are its own."""

    def run(ctx: Any, *args: Any) -> Any:
        with torch.autocast(next(a for a in args if isinstance(a, torch.Tensor)).device.type, enabled=False):
            return function(ctx, *args)

    return run


# -- norm --------------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @_apart
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, shifted: bool) -> torch.Tensor:
        exact = _exact(x)
        scale = 1 + weight.to(exact) if shifted else weight
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.shifted = shifted
        even = x * inverse
        if shifted:
            return even.mul_(scale).to(x.dtype)
        even = even.to(x.dtype)
        return (
            even.mul_(scale) if torch.promote_types(even.dtype, scale.dtype) == even.dtype else even * scale
        )

    @staticmethod
    @once_differentiable
    @_apart
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        exact, own = _exact(x), x.dtype
        scale = weight.to(exact)
        if ctx.shifted:
            scale = scale + 1
        shape, many = x.shape, x.shape[-1]
        x, grad, inverse = (t.reshape(-1, t.shape[-1]).to(exact) for t in (x, grad, inverse))
        d_weight = None
        if ctx.needs_input_grad[1]:
            product = grad * x
            d_weight = (inverse.t() @ product).squeeze(0).to(weight.dtype)
            along = product @ scale[:, None]
            d_x = grad * scale
        else:
            d_x = grad * scale
            along = torch.einsum("nh,nh->n", d_x, x)[:, None]
        d_x.addcmul_(x, along.mul_(inverse.square()), value=-1 / many).mul_(inverse)
        return d_x.view(shape).to(own), d_weight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, shifted: bool = False) -> torch.Tensor:
    """weight · x / √(mean x² + eps) over the last dimension (arXiv:1910.07467, eq. 4), the mean in fp32.

    Args:
        x: [..., H]; weight: [H].
        shifted: weight + 1 in the place of the weight, and one rounding at the end (Gemma).

    Returns:
        [..., H], in the dtype of x; or wider, if the weight is.
    """
    return _RMSNorm.apply(x, weight, eps, shifted)


# -- rotary embedding --------------------------------------------------------------------------------------------


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    made = x * cos
    made[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    made[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return made


class _Rotate(torch.autograd.Function):
    @staticmethod
    @_apart
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    @_apart
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        # the rotation backwards: each half's sine is that of the other one
        return _rotated(grad, cos, sin.roll(sin.shape[-1] // 2, -1), -1).to(ctx.dtype), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x · cos + (−x₂, x₁) · sin, where x = (x₁, x₂) in halves (arXiv:2104.09864, eq. 34, as transformers lays it out).

    Args:
        x: [B, heads, T, D]; cos, sin: [B or 1, 1, T, D].
    """
    return _Rotate.apply(x, cos, sin)


# -- linear layers of one input ----------------------------------------------------------------------------------


def _into(total: torch.Tensor | None, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """total + one @ other, in the memory of the total if there is one."""
    return one @ other if total is None else total.addmm_(one, other)


def _forward(x: torch.Tensor, part: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N, in] → [N, out], and the adapter's inner states [N, r]."""
    made = F.linear(x, part.weight, part.bias)
    if part.down is None or part.up is None:
        return made, None
    inner = x @ part.down.t()
    return made.addmm_(inner, part.up.t(), alpha=part.scale), inner


def _to_inner(grad: torch.Tensor, part: Projection) -> torch.Tensor | None:
    """Gradient of the adapter's inner states."""
    return None if part.up is None else (grad @ part.up).mul_(part.scale)


def _to_input(
    grad: torch.Tensor, d_inner: torch.Tensor | None, part: Projection, d_x: torch.Tensor | None = None
) -> torch.Tensor:
    """The input's gradient so far, with this projection's share."""
    d_x = _into(d_x, grad, part.weight)
    return d_x if d_inner is None or part.down is None else _into(d_x, d_inner, part.down)


def _to_tensors(
    grad: torch.Tensor,
    d_inner: torch.Tensor | None,
    x: torch.Tensor | None,
    inner: torch.Tensor | None,
    part: Projection,
    needs: Sequence[bool],
) -> Tensors:
    """Gradients of a projection's four tensors, of those that need one.

    Args:
        grad: [N, out]; x: [N, in], None where no weight's gradient needs it.
    """
    return (
        grad.t() @ x if needs[0] else None,  # type: ignore[operator]
        grad.sum(0) if needs[1] else None,
        d_inner.t() @ x if needs[2] and d_inner is not None else None,  # type: ignore[operator]
        (grad.t() @ inner).mul_(part.scale) if needs[3] and inner is not None else None,
    )


def dtype_of_products(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _parts(
    tensors: Sequence[torch.Tensor | None], scales: Sequence[float], dtype: torch.dtype
) -> list[Projection]:
    cast = [None if t is None else t.to(dtype) for t in tensors]
    return [Projection._make((*cast[4 * i : 4 * i + 4], scale)) for i, scale in enumerate(scales)]


def _in_dtypes(gradients: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype | None]) -> Tensors:
    return tuple(None if g is None else g.to(d) for g, d in zip(gradients, dtypes, strict=True))


def _dtypes(tensors: Sequence[torch.Tensor | None]) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _needs_input(needs: Sequence[bool]) -> bool:
    """Whether a gradient of four tensors needs what they were multiplied with: of weight or `down`."""
    return any(needs[0::4]) or any(needs[2::4])


class _Project(torch.autograd.Function):
    @staticmethod
    @_apart
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dtype: torch.dtype,
        scales: tuple[float, ...],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.needs, ctx.scales = ctx.needs_input_grad[3:], scales
        ctx.dtypes, ctx.shape = _dtypes((x, *tensors)), x.shape
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        parts = _parts(tensors, scales, dtype)
        made = [_forward(rows, part) for part in parts]
        kept = [
            t
            for part, (_, inner) in zip(parts, made, strict=True)
            for t in (part.weight, part.down, part.up, inner)
        ]
        ctx.save_for_backward(rows if _needs_input(ctx.needs) else None, *kept)
        return tuple(out.view(*x.shape[:-1], -1) for out, _ in made)

    @staticmethod
    @once_differentiable
    @_apart
    def backward(ctx: Any, *grads: torch.Tensor) -> Tensors:  # type: ignore[override]
        x, *kept = ctx.saved_tensors
        d_x: torch.Tensor | None = None
        found: list[torch.Tensor | None] = []
        for i, (grad, scale) in enumerate(zip(grads, ctx.scales, strict=True)):
            weight, down, up, inner = kept[4 * i : 4 * i + 4]
            part, needs = Projection(weight, None, down, up, scale), ctx.needs[4 * i : 4 * i + 4]
            grad = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
            d_inner = _to_inner(grad, part)
            if ctx.needs_input_grad[0]:
                d_x = _to_input(grad, d_inner, part, d_x)
            found += _to_tensors(grad, d_inner, x, inner, part, needs)
        d_x = None if d_x is None else d_x.view(ctx.shape)
        d_x, *gradients = _in_dtypes((d_x, *found), ctx.dtypes)
        return d_x, None, None, *gradients


def project(x: torch.Tensor, parts: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """Linear layers of one input [..., in], to [..., out] each."""
    tensors = [t for part in parts for t in part.tensors]
    return _Project.apply(x, dtype_of_products(x), tuple(part.scale for part in parts), *tensors)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    @_apart
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dtype: torch.dtype,
        activation: Activation,
        scales: tuple[float, ...],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.needs, ctx.scales, ctx.activation = ctx.needs_input_grad[4:], scales, activation
        ctx.dtypes, ctx.shape = _dtypes((x, *tensors)), x.shape
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        parts = _parts(tensors, scales, dtype)
        (gate, inner_gate), (up, inner_up) = (_forward(rows, part) for part in parts[:2])
        made, inner_down = _forward(activation.forward(gate).mul_(up), parts[2])
        ctx.save_for_backward(
            rows if _needs_input(ctx.needs[:8]) else None, gate, up, inner_gate, inner_up, inner_down,
            *(t for part in parts for t in (part.weight, part.down, part.up)),
        )  # fmt: skip
        return made.view(x.shape)

    @staticmethod
    @once_differentiable
    @_apart
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:  # type: ignore[override]
        x, gate, up, *rest = ctx.saved_tensors
        inner, kept = rest[:3], rest[3:]
        parts = [
            Projection._make((kept[3 * i], None, *kept[3 * i + 1 : 3 * i + 3], scale))
            for i, scale in enumerate(ctx.scales)
        ]
        needs = [ctx.needs[4 * i : 4 * i + 4] for i in range(3)]
        grad = grad.reshape(-1, grad.shape[-1]).to(gate.dtype)
        opened = ctx.activation.forward(gate)
        product = opened * up if _needs_input(needs[2]) else None
        d_inner = _to_inner(grad, parts[2])
        of_down = _to_tensors(grad, d_inner, product, inner[2], parts[2], needs[2])
        del product  # before its gradient is there
        d_product = _to_input(grad, d_inner, parts[2])
        d_up = opened.mul_(d_product)
        d_gate = ctx.activation.backward(d_product.mul_(up), gate)
        d_x: torch.Tensor | None = None
        found: list[torch.Tensor | None] = []
        for i, of_part in enumerate((d_gate, d_up)):
            d_inner = _to_inner(of_part, parts[i])
            if ctx.needs_input_grad[0]:
                d_x = _to_input(of_part, d_inner, parts[i], d_x)
            found += _to_tensors(of_part, d_inner, x, inner[i], parts[i], needs[i])
        d_x = None if d_x is None else d_x.view(ctx.shape)
        d_x, *gradients = _in_dtypes((d_x, *found, *of_down), ctx.dtypes)
        return d_x, None, None, None, *gradients


def gated_mlp(
    x: torch.Tensor, gate: Projection, up: Projection, down: Projection, activation: Activation
) -> torch.Tensor:
    """down(activation(gate(x)) · up(x)) (arXiv:2002.05202, eq. 6), [..., H] → [..., H]."""
    parts = (gate, up, down)
    tensors = [t for part in parts for t in part.tensors]
    return _GatedMLP.apply(x, dtype_of_products(x), activation, tuple(part.scale for part in parts), *tensors)
