"""An estimate of a run's peak memory before anything is loaded, and the smallest changes that would make it fit.

Counted per token and layer, in values: 4 f of the gated MLP, 2 h_kv of keys and values, and 8 h of norms, queries,
attention output and residual (h hidden, f intermediate size). That is the count of Korthikanti et al. (arXiv:2205.05198,
eq. 1) without the scores, which sdpa and flash attention do not keep, for a gated MLP and grouped keys. Under autocast the
products are 2 bytes wide, the norms stay 4, and each weight has a cast copy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hydratune.fused_head import chunk_rows

_ADAM_STATES = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 1,
    "sgd": 0,
}  # bytes a parameter
_HEADROOM = 0.9  # of a device's memory: the rest is the driver's and fragmentation


@dataclass(frozen=True)
class Load:
    """What determines the estimate; sizes in values, widths in bytes."""

    parameters: int
    trained: int
    trained_width: int
    width: int
    hidden: int
    intermediate: int
    kv: int
    layers: int
    vocabulary: int
    head_trained: bool
    batch: int
    accumulation: int
    length: int
    autocast: bool
    checkpointing: bool
    optimizer: str
    device: str
    quantization: str | None = None
    sequences: int = 1  # that a row has in the forward pass with gradients
    reference: bool = False  # a frozen copy of all weights beside the trained ones
    critic: bool = False  # a value model like the policy, trained with it


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory by part, in bytes; weights with those of a reference."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head

    def lines(self) -> list[str]:
        return [
            *(f"{name} {size(value)}" for name, value in asdict(self).items()),
            f"total {size(self.total)}",
        ]


@dataclass(frozen=True)
class Change:
    """A change that makes a run fit: what to type, and the estimate with it."""

    overrides: str
    estimate: MemoryEstimate


def size(number: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def load_of(
    model: Any,
    args: Any,
    *,
    width: int,
    length: int,
    device: str,
    quantization: str | None = None,
    sequences: int = 1,
    reference: bool = False,
    critic: bool = False,
) -> Load:
    """The load of a model (its outline will do, wrapped in its adapter) under training arguments.

    Args: see `Load`, and
        width: bytes of a weight of the base.
        length: tokens of the longest row or block.
    """
    config = model.config.get_text_config()
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    parameters = sum(p.numel() for p in model.parameters())
    heads, head = config.num_attention_heads, model.get_output_embeddings()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Load(
        parameters=parameters,
        trained=count,
        trained_width=width if count == parameters else 4,  # adapters are kept in fp32
        width=width,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size if head is not None else 0,
        head_trained=head is not None and head.weight.requires_grad,
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        length=length,
        autocast=bool(args.bf16 or args.fp16),
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        device=device,
        quantization=quantization,
        sequences=sequences,
        reference=reference,
        critic=critic,
    )


def estimate(load: Load) -> MemoryEstimate:
    """Peak memory of a training step."""
    base_width = {"4bit": 0.55, "8bit": 1.05}.get(load.quantization or "", load.width)  # scales included
    frozen = load.parameters - load.trained
    models = 2 if load.critic else 1
    weights = models * (frozen * base_width + load.trained * load.trained_width)
    if load.reference:
        weights += load.parameters * load.width
    tokens = load.batch * load.sequences * load.length
    low = load.autocast or load.width == 2
    product = 2 if low else 4
    layer = product * (4 * load.intermediate + 2 * load.kv) + (26 if low else 32) * load.hidden
    kept = load.layers * load.hidden * load.width + layer  # each layer's input, and one layer recomputed
    per_token = kept if load.checkpointing else load.layers * layer
    casts = 2 * load.parameters if load.autocast and load.width == 4 else 0
    import torch

    device = torch.device("cuda" if load.device == "cuda" else "cpu")
    rows = chunk_rows(tokens, load.vocabulary, device) if load.vocabulary else 0
    head = 2 * 4 * rows * load.vocabulary + 2 * tokens * load.hidden * product
    head += 4 * load.vocabulary * load.hidden if load.head_trained else 0
    states = _ADAM_STATES.get(load.optimizer, 2 * load.trained_width)
    return MemoryEstimate(
        weights=round(weights),
        gradients=models * load.trained * load.trained_width,
        optimizer=models * load.trained * states,
        activations=models * (tokens * per_token + casts),
        head=head,
    )


def smallest_changes(load: Load, available: int) -> list[Change]:
    """Single changes, and at last all of them, that make the run fit; the least intrusive first."""
    tries: list[tuple[str, Load]] = []
    if not load.checkpointing:
        tries.append(("trainer.gradient_checkpointing=true", replace(load, checkpointing=True)))
    batch = load.batch
    while batch % 2 == 0:
        batch //= 2
        smaller = replace(load, batch=batch, accumulation=load.accumulation * load.batch // batch)
        tries.append((f"batch_size={batch} accumulation={smaller.accumulation}", smaller))
    full = load.trained == load.parameters
    if load.reference:
        tries.append(("algo.precompute_ref_log_probs=true", replace(load, reference=False)))
    if full and load.device == "cuda":
        tries.append(("trainer.optim=adamw_bnb_8bit", replace(load, optimizer="adamw_bnb_8bit")))
    adapter = replace(
        load, trained=load.parameters // 100, trained_width=4, head_trained=False, reference=False
    )
    if full:
        tries.append(("peft=lora", adapter))
        least = replace(adapter, batch=1, accumulation=load.batch * load.accumulation, checkpointing=True)
        tries.append(
            (
                f"peft=lora trainer.gradient_checkpointing=true batch_size=1 accumulation={least.accumulation}",
                least,
            )
        )
    else:
        least = replace(load, batch=1, accumulation=load.batch * load.accumulation, checkpointing=True)
        tries.append(
            (f"trainer.gradient_checkpointing=true batch_size=1 accumulation={least.accumulation}", least)
        )
    fitting = [Change(text, made) for text, changed in tries if fits(made := estimate(changed), available)]
    single = [c for c in fitting if " trainer." not in c.overrides and "true batch" not in c.overrides]
    return single[:4] or fitting[:1]


def fits(made: MemoryEstimate, available: int) -> bool:
    return made.total <= _HEADROOM * available


def needs_checkpointing(load: Load, available: int) -> bool:
    """Whether recomputing activations turns a run that does not fit into one that does, or at least helps it."""
    return not load.checkpointing and not fits(estimate(load), available)


def model_needs_checkpointing(model: Any, args: Any) -> bool:
    """`gradient_checkpointing: null` for a model that is there, on the CUDA device that it will train on."""
    import torch

    width = next(model.parameters()).element_size()
    load = load_of(model, args, width=width, length=getattr(args, "max_length", None) or 1024, device="cuda")
    return needs_checkpointing(load, torch.cuda.get_device_properties(0).total_memory)
