"""An estimate of a run's peak memory before anything is loaded, and the smallest changes that would make it fit.

Counted per token and layer, in values: 2 f of the gated MLP, 2 h_kv of keys and values, and 6 h of norms, queries and
attention output (h hidden, f intermediate size), where MLPs and attention are fused, 8 h where MLPs alone are; else 4 f, 2 h_kv and 8 h, which is the count of
Korthikanti et al. (arXiv:2205.05198, eq. 1) without the scores, which sdpa and flash attention do not keep, for a gated MLP and
grouped keys. Under autocast the products are 2 bytes wide, the norms and the residual of fp32 weights stay 4, and each such
weight has a cast copy.

An online run rolls out before it trains, when there are no gradients and no activations, so that the larger of the two
counts: sampling (keys and values, logits), or scoring (one layer's values of a forward pass without gradients).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from hydratune.columns import ROOM
from hydratune.compiling import fuses
from hydratune.fused_layers import known_parts
from hydratune.vocabulary import chunk_bytes

_ADAM_STATES = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 1,
    "sgd": 0,
}  # bytes a parameter
_HEADROOM = 0.9  # of a device's memory: the rest is the driver's and fragmentation


@dataclass(frozen=True)
class Shape:
    """A model beside the policy; sizes in values, width of a weight in bytes."""

    parameters: int
    hidden: int
    intermediate: int
    kv: int
    layers: int
    width: int


@dataclass(frozen=True)
class Rollout:
    """How completions are sampled and scored on a device.

    Attributes:
        completions: of a rollout, or of an evaluation that has more.
        at_once: of them sampled, and scored, in one batch.
        new: tokens of the longest completion; new_option: what says so.
        most: tokens of a forward pass that scores.
        scores: the policy or its reference reads them once more, for log-probs.
        sorts: sampling sorts the logits (top-p).
        elsewhere: a server samples.
        copies: completions that have a prompt in common and are trained on as one sequence, where a batch holds all.
        counts_batches: its size is a number of micro-batches, so that another batch size makes another rollout.
    """

    completions: int
    at_once: int
    new: int
    new_option: str
    most: int
    scores: bool = True
    sorts: bool = False
    elsewhere: bool = False
    copies: int = 1
    counts_batches: bool = False


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
    critic: Shape | None = None  # a value model, trained with the policy and like it
    judges: tuple[Shape, ...] = ()  # reward models
    rollout: Rollout | None = None  # of an online run; `length` is then that of a prompt with its completion
    fused: bool = False  # MLPs are
    fused_attention: bool = False  # is too


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory by part, in bytes; weights with those of reference, value and reward models.

    `rollout` is there before gradients, activations and head are, and counts in their place where it is larger.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    rollout: int = 0

    @property
    def total(self) -> int:
        step = self.gradients + self.activations + self.head
        return self.weights + self.optimizer + max(step, self.rollout)

    def lines(self) -> list[str]:
        parts = ("weights", "optimizer", "gradients", "activations", "head")
        made = [f"{name} {size(getattr(self, name))}" for name in parts]
        if self.rollout:
            made.append(f"in a rollout instead of the last three {size(self.rollout)}")
        return [*made, f"total {size(self.total)}"]


@dataclass(frozen=True)
class Change:
    """A change that makes a run fit: what to type, and the estimate with it."""

    overrides: str
    estimate: MemoryEstimate


def size(number: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def shape_of(model: Any, width: int, *, head: bool = True) -> Shape:
    """The shape of a model, of which its outline will do.

    Args:
        width: bytes of a weight.
        head: count its LM head, if that is not its embedding too.
    """
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    if not head and not config.tie_word_embeddings and model.get_output_embeddings() is not None:
        parameters -= config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=parameters,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        layers=config.num_hidden_layers,
        width=width,
    )


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
    critic: Shape | None = None,
    judges: tuple[Shape, ...] = (),
    rollout: Rollout | None = None,
) -> Load:
    """The load of a model (its outline will do, wrapped in its adapter) under training arguments.

    Args: see `Load`, and
        width: bytes of a weight of the base.
        length: tokens of the longest row or block.
    """
    config = model.config.get_text_config()
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    own, head = shape_of(model, width), model.get_output_embeddings()
    trained_width = width if count == own.parameters else 4  # adapters are kept in fp32
    autocast = bool(args.bf16 or args.fp16)
    # 4-bit layers are of another kind; and a forward pass of two dtypes goes the layers' own way
    fused = quantization is None and fuses(args) and (autocast or trained_width == width)
    mlps, attention = known_parts(model) if fused else (False, False)
    return Load(
        parameters=own.parameters,
        trained=count,
        trained_width=trained_width,
        width=width,
        hidden=own.hidden,
        intermediate=own.intermediate,
        kv=own.kv,
        layers=own.layers,
        vocabulary=config.vocab_size if head is not None else 0,
        head_trained=head is not None and head.weight.requires_grad,
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        length=length,
        autocast=autocast,
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        device=device,
        quantization=quantization,
        sequences=sequences,
        reference=reference,
        critic=critic,
        judges=judges,
        rollout=rollout,
        fused=mlps,
        fused_attention=attention,
    )


def estimate(load: Load) -> MemoryEstimate:
    """Peak memory of a training step, or of the rollout before it."""
    base_width = {"4bit": 0.55, "8bit": 1.05}.get(load.quantization or "", load.width)  # scales included
    states = _ADAM_STATES.get(load.optimizer, 2 * load.trained_width)
    weights = (load.parameters - load.trained) * base_width + load.trained * load.trained_width
    gradients, optimizer = load.trained * load.trained_width, load.trained * states
    if load.reference:
        weights += load.parameters * load.width
    weights += sum(judge.parameters * judge.width for judge in load.judges)
    low = load.autocast or load.width == 2
    product = 2 if low else 4
    tokens = _trained_tokens(load)
    activations = _activations(load, load, tokens)
    beside = 0  # of the value model, whose forward pass comes when the policy's logits are gone
    if load.critic is not None:
        # with an adapter it has one like the policy's, on a frozen base
        trained = load.critic.parameters if load.trained == load.parameters else load.trained
        weights += (load.critic.parameters - trained) * load.critic.width + trained * load.trained_width
        gradients += trained * load.trained_width
        optimizer += trained * states
        beside = _activations(load, load.critic, tokens)
        activations += beside
    projected = tokens if load.rollout is None else load.batch * load.rollout.new
    logits = _blocks(load, projected, trained=load.head_trained)
    head = max(0, logits - beside) + 2 * projected * load.hidden * product
    head += 4 * load.vocabulary * load.hidden if load.head_trained else 0
    return MemoryEstimate(
        weights=round(weights),
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        head=head,
        rollout=0
        if load.rollout is None
        else max(_sampling(load, load.rollout), _scoring(load, load.rollout)),
    )


def _trained_tokens(load: Load) -> int:
    """Of a forward pass with gradients."""
    rollout = load.rollout
    if rollout is None or rollout.copies == 1 or load.batch % rollout.copies:
        return load.batch * load.sequences * load.length
    prompts = load.batch // rollout.copies * (load.length - rollout.new)
    return prompts + load.batch * rollout.new


def _activations(load: Load, shape: Load | Shape, tokens: int) -> int:
    """What a forward pass keeps for its backward pass."""
    low = load.autocast or shape.width == 2
    mixed = load.autocast and shape.width == 4
    gated = (2 if low else 4) * shape.intermediate
    if load.fused_attention:
        states = 22 if mixed else 12 if low else 24
    else:
        states = 36 if mixed else 26 if low else 32
    layer = (2 if load.fused else 4) * gated + (4 if low else 8) * shape.kv + states * shape.hidden
    # each layer's input, and one layer recomputed; of fused layers one's gated states are made again in any case
    kept = shape.layers * shape.hidden * shape.width + layer if load.checkpointing else shape.layers * layer
    casts = 2 * shape.parameters if mixed else 0
    return tokens * (kept + 2 * load.fused * gated) + casts


def _blocks(load: Load, rows: int, *, trained: bool) -> int:
    """Bytes of the logits that exist at a time."""
    import torch

    if not load.vocabulary:
        return 0
    device = torch.device("cuda" if load.device == "cuda" else "cpu")
    dtype = torch.bfloat16 if load.autocast or load.width == 2 else torch.float32
    return chunk_bytes(rows, load.vocabulary, device, dtype, trained)


def _passing(load: Load, shape: Load | Shape, *, adapter: bool = False) -> int:
    """Bytes a token of one layer in a forward pass without gradients: gate, up, their product, and four states."""
    product = 2 if load.autocast or shape.width == 2 else 4
    wide = 4 if adapter else 3  # an adapter's share is added to what it adapts
    return product * (wide * shape.intermediate + 4 * shape.hidden)


def _sampling(load: Load, rollout: Rollout) -> int:
    """The larger of reading the prompts and of the last steps."""
    if rollout.elsewhere:
        return 0
    product = 2 if load.autocast or load.width == 2 else 4
    many, prompt = min(rollout.at_once, rollout.completions), load.length - rollout.new
    column = load.layers * 2 * load.kv * product  # keys and values of a token
    prompts = many * prompt  # read once for all completions of a prompt, but an evaluation has one of each
    adapter = load.trained < load.parameters
    reading = prompts * (column + _passing(load, load, adapter=adapter))
    laid_out = prompts * column + many * (prompt + min(rollout.new, ROOM)) * column
    # logits as they come and in fp32, over the temperature, as weights; sorted and summed up in fp64
    logits = many * load.vocabulary * (product + 12 + 16 * rollout.sorts)
    growing = many * (load.length + ROOM) * column // load.layers  # of one layer, made anew
    casts = 2 * load.vocabulary * load.hidden if load.autocast and load.width == 4 else 0
    stepping = many * (load.length + ROOM // 2) * column + max(logits, growing) + casts
    return max(reading, laid_out, stepping)


def _scoring(load: Load, rollout: Rollout) -> int:
    """The largest forward pass without gradients: of the policy or its reference, of the value or a reward model."""
    product = 2 if load.autocast or load.width == 2 else 4
    tokens = min(rollout.most, min(rollout.at_once, rollout.completions) * load.length)
    rows = tokens * rollout.new // load.length
    head = _blocks(load, rows, trained=False) + (tokens + rows) * load.hidden * product
    judged = min(rollout.most, rollout.completions * load.length)
    adapter = load.trained < load.parameters
    own: list[Load | Shape] = [load] if rollout.scores else []
    own += [load.critic] if load.critic is not None else []
    passes = [head * rollout.scores, *(tokens * _passing(load, shape, adapter=adapter) for shape in own)]
    return max([*passes, *(judged * _passing(load, judge) for judge in load.judges)])


def smallest_changes(load: Load, available: int) -> list[Change]:
    """Single changes, or else all of them together, that make the run fit; the least intrusive first."""
    singles: list[tuple[str, Load]] = []
    if not load.checkpointing:
        singles.append(("trainer.gradient_checkpointing=true", replace(load, checkpointing=True)))
    if load.rollout is not None:
        at_once = min(load.rollout.at_once, load.rollout.completions)
        while at_once > 1:
            at_once = ceil(at_once / 2)
            fewer = replace(load, rollout=replace(load.rollout, at_once=at_once))
            singles.append((f"algo.local_rollout_forward_batch_size={at_once}", fewer))
            if fits(estimate(fewer), available):
                break
    batch = load.batch
    cuts = load.rollout is None or not load.rollout.counts_batches
    while cuts and batch % 2 == 0:
        batch //= 2
        smaller = replace(load, batch=batch, accumulation=load.accumulation * load.batch // batch)
        singles.append((f"batch_size={batch} accumulation={smaller.accumulation}", smaller))
    full = load.trained == load.parameters
    if load.reference and load.rollout is None:
        singles.append(("algo.precompute_ref_log_probs=true", replace(load, reference=False)))
    if full and load.device == "cuda":
        singles.append(("trainer.optim=adamw_bnb_8bit", replace(load, optimizer="adamw_bnb_8bit")))
    one_dtype = load.autocast or load.width == 4  # else its layers go their own way
    adapter = replace(
        load, trained=load.parameters // 100, trained_width=4, head_trained=False, reference=False,
        fused=load.fused and one_dtype, fused_attention=load.fused_attention and one_dtype,
    )  # fmt: skip
    if full:
        singles.append(("peft=lora", adapter))
    if load.rollout is not None and (half := load.rollout.new // 2) >= 16:
        shorter = replace(
            load, length=load.length - half, rollout=replace(load.rollout, new=load.rollout.new - half)
        )
        singles.append((f"{load.rollout.new_option}={load.rollout.new - half}", shorter))
    least = replace(adapter if full else load, checkpointing=True)
    typed = ["peft=lora"] if full else []
    typed += ["trainer.gradient_checkpointing=true"]
    if cuts:
        least = replace(least, batch=1, accumulation=load.batch * load.accumulation)
        typed.append(f"batch_size=1 accumulation={least.accumulation}")
    if load.rollout is not None:
        least = replace(least, rollout=replace(load.rollout, at_once=1))
        typed.append("algo.local_rollout_forward_batch_size=1")
    together = [(" ".join(typed), least)]
    for tries in (singles, together):
        fitting = [
            Change(text, made) for text, changed in tries if fits(made := estimate(changed), available)
        ]
        if fitting:
            return fitting[:4]
    return []


def fits(made: MemoryEstimate, available: int) -> bool:
    return made.total <= _HEADROOM * available


def needs_checkpointing(load: Load, available: int) -> bool:
    """Whether recomputing activations turns a run that does not fit into one that does, or at least helps it."""
    return not load.checkpointing and not fits(estimate(load), available)


def model_needs_checkpointing(model: Any, args: Any) -> bool:
    """`gradient_checkpointing: null` for a model that is there: whether the CUDA device needs it; a CPU never."""
    import torch

    if args.device.type != "cuda":
        return False
    width = next(model.parameters()).element_size()
    load = load_of(model, args, width=width, length=getattr(args, "max_length", None) or 1024, device="cuda")
    return needs_checkpointing(load, torch.cuda.get_device_properties(0).total_memory)
