"""The arguments that all algorithms have, and how those that a trainer is given become its own."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hydratune import checks_algo
from hydratune.errors import UserError, Violation
from hydratune.settings import option

log = logging.getLogger("hydratune")


@dataclass
class BaseConfig(transformers.TrainingArguments):
    """Fields common to all algorithms, on top of `transformers.TrainingArguments`."""

    logging_steps: float = option(10, "Log every so many update steps; below 1, as a share of all steps.")
    logging_nan_inf_filter: bool = option(
        False,
        "Leave losses that are not finite out of the log; looks at each loss, so that a GPU is waited for.",
    )
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
    dataset_kwargs: dict[str, Any] | None = option(
        None, "{skip_prepare_dataset: true} takes the rows as already prepared."
    )
    dataset_num_proc: int | None = option(None, "Processes that tokenise.")
    eos_token: str | None = option(None, "Token that ends a text or completion; null: the tokenizer's.")
    pad_token: str | None = option(None, "Token used to pad; null: the tokenizer's, else its EOS.")
    pad_to_multiple_of: int | None = option(None, "Round the length of a batch up to this.")
    activation_offloading: bool = option(
        False, "Keep activations in host memory between forward and backward."
    )
    fused_layers: bool = option(
        True,
        "Norms, attention's projections and gated MLPs as one operation each, which takes less memory and time, where that gives "
        "what the model's own layers give; not with torch.compile, Liger's kernels, FSDP or DeepSpeed.",
    )
    compile_layers: bool = option(
        False,
        "Compile each layer of the model (regional torch.compile), which takes a minute or more at first.",
    )
    router_aux_loss_coef: float | None = option(
        None, "Weight of a mixture-of-experts' balance loss; null: the model's."
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
        free = self.accelerator_config is None
        super().__post_init__()
        if free and self.dataloader_pin_memory and not self.use_cpu and torch.cuda.is_available():
            self.accelerator_config.non_blocking = True  # batches are copied while the step before them runs

    def use_checkpointing(self, on: bool) -> None:
        self.gradient_checkpointing = on
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = on
        self.auto_checkpointing = False


def config_of(args: Any, config_class: type[Any], model: Any) -> Any:
    """A config of its own for a trainer, because what is settled there for one model must not bind the next.

    Args:
        args: such a config, plain `transformers.TrainingArguments`, or None for the defaults.
        model: names the output directory of the defaults.
    """
    if args is None:
        loaded = getattr(getattr(model, "config", None), "_name_or_path", "") or "model"
        name = model if isinstance(model, str) else loaded
        args = config_class(output_dir=f"{Path(name).name}-{config_class.__name__.removesuffix('Config')}")
    if isinstance(args, config_class):
        own = copy.copy(args)
    else:
        known = {f.name for f in fields(config_class) if f.init}
        own = config_class(
            **{f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
        )
    # torch's DataParallel would cut a batch that is one row, and the loss is not of one device's rows
    if own.n_gpu > 1:
        log.warning(
            "%d GPUs are here and the first is used: for all of them start with accelerate launch", own.n_gpu
        )
        own._n_gpu = 1
    return own


def check_options(algo: str, args: Any, **facts: bool) -> None:
    """The rules of `checks_algo` for those who come from Python, in the names of a config.

    Args:
        facts: of `checks_algo.Case`.

    Raises:
        UserError: a rule is broken.
    """
    case = checks_algo.Case(vars(args), **facts)
    problems = [p for rule in checks_algo.RULES.get(algo, []) for p in rule(case)]
    for line in (p for p in problems if isinstance(p, str)):
        log.warning(_plain(line))
    if wrong := [p for p in problems if isinstance(p, Violation)]:
        raise UserError(replace(v, key=_plain(v.key), why=_plain(v.why), fix=_plain(v.fix)) for v in wrong)


def _plain(text: str) -> str:
    """The command line's names of options as a config's."""
    text = re.sub(r"\b(algo|trainer)\.(?=[a-z])", "", text)
    return re.sub(r"(?<!_)\bbatch_size\b", "per_device_train_batch_size", text)


def once(name: str, value: Any, old: str, old_value: Any) -> Any:
    """An argument that has an older name too, given by one of the two.

    Raises:
        UserError: it is given by both.
    """
    if value is not None and old_value is not None:
        raise UserError(
            Violation(name, None, f"given twice, as {name} and by its older name {old}", f"pass {name} alone")
        )
    return value if value is not None else old_value
