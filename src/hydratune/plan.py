"""What a run is going to do, shown before it does it: algorithm, rows, an example, steps, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from hydratune import memory, terminal
from hydratune.adapters import starts_as_nothing
from hydratune.amounts import amount
from hydratune.data.tokenize import render_example
from hydratune.data.tokenize_preference import render_preference
from hydratune.settings import RunSettings

_MOST_CHARACTERS = 1200


@dataclass
class Plan:
    """The facts of a run to come; memory in bytes."""

    facts: dict[str, str]
    example: list[tuple[str, bool]]
    steps: int
    tokens_per_epoch: int | None
    parameters: int
    trained_parameters: int
    estimate: memory.MemoryEstimate
    available: int
    changes: list[memory.Change]
    warnings: list[str]
    needs_checkpointing: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for W&B."""
        return {
            "facts": self.facts,
            "steps": self.steps,
            "tokens_per_epoch": self.tokens_per_epoch,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "estimated_peak_bytes": self.estimate.total,
        }


def make(
    settings: RunSettings,
    *,
    args: Any,
    tokenizer: Any,
    outline: Any,
    recipe: Any,
    trainer_class: Any,
    train: Any,
    reports: dict[str, Any],
    device: Any,
    warnings: list[str],
) -> Plan:
    """The plan of a run from what is known before its weights are loaded.

    Args:
        outline: the model on the meta device; it is given the recipe's adapter here.
        trainer_class: of the algorithm.
        train: the prepared training rows, or a stream of them.
        reports: split → `DataReport`.
        device: `checks.DeviceFacts`.
    """
    import torch

    from hydratune import adapters

    if recipe.peft_config is not None:
        with torch.device("meta"):
            outline = adapters.wrap(outline, recipe.peft_config)
    report = reports["train"]
    rows = len(train) if hasattr(train, "__len__") else None
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * device.world_size
    steps = trainer_class.steps_of(args, rows or 0, device.world_size)
    length = args.max_length if report.blocks or not report.longest else report.longest
    length = (length or 1024) + getattr(args, "new_tokens", 0)
    load = memory.load_of(
        outline, args, width=recipe.dtype.itemsize, length=length, device=device.kind,
        quantization=settings.model.quantization, sequences=trainer_class.sequences_per_row,
        reference=trainer_class.reference_kind(args, recipe.peft_config is not None) == "a frozen copy",
        **trainer_class.also_in_memory(args, outline, recipe, reports["eval"].rows if "eval" in reports else 0),
    )  # fmt: skip
    checkpointing = (
        args.auto_checkpointing
        and device.kind == "cuda"
        and memory.needs_checkpointing(load, device.total_bytes)
    )
    if checkpointing:
        load = memory.replace(load, checkpointing=True)
    made = memory.estimate(load)
    fits = memory.fits(made, device.total_bytes)
    share = load.trained / load.parameters
    facts = {
        "algorithm": settings.algo,
        "model": f"{settings.choices.get('model') or settings.model.name_or_path}, {amount(load.parameters)} parameters, "
        f"{amount(load.trained)} trainable ({share:.2%})",
        "adapter": (settings.peft or {}).get("type") or "none",
        "device": f"{device.name}, weights {str(recipe.dtype).removeprefix('torch.')}"
        + (", bf16 autocast" if args.bf16 else ", fp16 autocast" if args.fp16 else ""),
        "attention": recipe.attn_implementation,
    }
    if (kind := trainer_class.reference_kind(args, recipe.peft_config is not None)) is not None:
        own = recipe.peft_config is not None and not starts_as_nothing(recipe.peft_config)
        off = "the policy with its adapter off"
        facts["reference"] = "the adapter as it was" if own and kind == off else kind
    facts |= trainer_class.facts(args)
    for split, made_of in reports.items():
        facts[f"{split} rows"] = "\n".join(made_of.lines()) if made_of.rows else "a stream"
    facts["steps"] = (
        f"{steps:,} of {per_step} {'completions' if trainer_class.goal == 'prompts' else 'rows'} each, lr {args.learning_rate:g}, {args.lr_scheduler_type.value}"
    )
    facts["memory"] = f"about {memory.size(made.total)} at its peak ({', '.join(made.lines()[:-1])}); " + (
        f"fits {memory.size(device.total_bytes)}"
        if fits
        else f"does not fit {memory.size(device.total_bytes)}"
    )
    return Plan(
        facts=facts,
        example=(render_example if trainer_class.goal == "tokens" else render_preference)(
            next(iter(train)), tokenizer
        ),
        steps=steps,
        tokens_per_epoch=report.tokens or None,
        parameters=load.parameters,
        trained_parameters=load.trained,
        estimate=made,
        available=device.total_bytes,
        changes=[] if fits else memory.smallest_changes(load, device.total_bytes),
        warnings=[*warnings, *report.warnings],
        needs_checkpointing=checkpointing,
    )


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan: its facts, the first example with its trained tokens marked, and warnings.

    Without colour the trained tokens stand in ⟦ ⟧. On a pipe nothing is wrapped.
    """
    console = console or Console()
    colour = console.is_terminal and not console.no_color
    changes = [("would fit with", f"{c.overrides}  ({memory.size(c.estimate.total)})") for c in plan.changes]
    terminal.facts(console, [*plan.facts.items(), *changes])
    terminal.say(console, "")
    heading = "first row, trained tokens " + ("green" if colour else "in ⟦ ⟧")
    terminal.say(console, Text(heading, style="bold"))
    terminal.say(console, _example(plan, colour))
    for i, line in enumerate(plan.warnings):
        terminal.say(console, Text(("\n" if i == 0 else "") + f"warning: {line}", style="yellow"))
    terminal.say(console, "")


def _example(plan: Plan, colour: bool) -> Text:
    example = Text()
    left = _MOST_CHARACTERS
    for piece, trained in plan.example:
        shown = piece if len(piece) <= left else piece[:left] + f" … ({len(piece) - left:,} characters more)"
        shown = terminal.harmless(shown)
        if colour:
            example.append(shown, style="green" if trained else "dim")
        else:
            example.append(f"⟦{shown}⟧" if trained else shown)
        left -= len(piece)
        if left <= 0:
            break
    return example
