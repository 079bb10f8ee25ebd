"""Every rule that a run must pass before anything heavy is loaded, one small function each, all told at once.

Here are the rules on values alone, which answer in milliseconds; those on the device, the tokenizer and the model are in
`checks_model.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydratune import checks_algo
from hydratune.checkpoints import last_checkpoint
from hydratune.errors import UserError, Violation, nearest
from hydratune.functions import resolve
from hydratune.objective import FACTS, named
from hydratune.options import constant
from hydratune.settings import RunSettings

Problem = Violation | str  # a violation ends the run, a text is a warning


@dataclass
class Findings:
    """What the checks found."""

    errors: list[Violation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def merge(self, other: Findings) -> Findings:
        return Findings(self.errors + other.errors, self.warnings + other.warnings)

    def raise_if_any(self) -> None:
        if self.errors:
            raise UserError(self.errors)


def collect(rules: list[Callable[..., Iterator[Problem]]], *facts: Any) -> Findings:
    found = Findings()
    for rule in rules:
        for problem in rule(*facts):
            (found.warnings if isinstance(problem, str) else found.errors).append(problem)  # type: ignore[arg-type]
    return found


def check_settings(settings: RunSettings) -> Findings:
    """The rules on values alone."""
    case = checks_algo.Case(
        settings.algo_options, bool(settings.peft), settings.data.streaming, evaluates(settings)
    )
    return collect(_SETTINGS_RULES, settings).merge(collect(checks_algo.RULES.get(settings.algo, []), case))


def evaluates(settings: RunSettings) -> bool:
    """Whether there will be evaluation rows."""
    data = settings.data
    return bool(
        data.eval_path
        or data.eval_split
        or (data.eval_fraction and (not data.streaming or data.max_eval_samples))
    )


# ------------------------------------------------------------------ values alone


def packs(settings: RunSettings) -> str | None:
    return next((name for name in ("packing", "padding_free") if settings.algo_options.get(name)), None)


def _model_is_named(settings: RunSettings) -> Iterator[Problem]:
    model = settings.model
    if not model.name_or_path and not model.architecture:
        yield Violation(
            "model.name_or_path",
            None,
            "no model is given",
            "set model.name_or_path=DIR or a hub id, or pick model=tiny",
        )
    if model.architecture is not None and not model.architecture.get("model_type"):
        yield Violation(
            "model.architecture", None, "names no model_type", "add model.architecture.model_type, e.g. qwen2"
        )
    if model.architecture is not None and not model.tokenizer:
        yield Violation(
            "model.tokenizer",
            None,
            "a model with random weights has no tokenizer of its own",
            "set model.tokenizer=byte, or a directory",
        )


def _model_directory_holds_a_model(settings: RunSettings) -> Iterator[Problem]:
    folder = Path(settings.model.name_or_path or "").expanduser()
    if not settings.model.name_or_path or not folder.is_dir() or (folder / "config.json").is_file():
        return
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    if (folder / "adapter_config.json").is_file():
        fix = f"merge the adapter first: hydratune merge {folder} MERGED, then model.name_or_path=MERGED"
    else:
        fix = "give the folder that save_pretrained wrote"
    yield Violation(
        "model.name_or_path", str(folder), f"the directory holds no config.json (found: {found})", fix
    )


def _data_is_named(settings: RunSettings) -> Iterator[Problem]:
    data = settings.data
    if data.source == "local" and not data.path:
        yield Violation("data.path", None, "no file or folder is given", "set data.path=FILE.jsonl")
    if data.source == "hub" and not data.name:
        yield Violation("data.name", None, "no data set is given", "set data.name=OWNER/NAME")


def _streaming_has_an_end(settings: RunSettings) -> Iterator[Problem]:
    if settings.data.streaming and settings.algo_options.get("max_steps", -1) <= 0:
        yield Violation("data.streaming", True, "a stream has no known length", "set max_steps=…")


def _packing_has_a_length(settings: RunSettings) -> Iterator[Problem]:
    options = settings.algo_options
    if options.get("packing") and "max_length" in options and options["max_length"] is None:
        yield Violation(
            "algo.packing",
            True,
            "algo.max_length is null, and a block needs a length",
            "set algo.max_length, or algo.packing=false",
        )
    if options.get("max_length") is not None and options.get("max_length", 2) < 2:
        yield Violation(
            "algo.max_length", options["max_length"], "leaves no token to predict", "give 2 or more, or null"
        )
    if options.get("packing") and (options.get("dataset_kwargs") or {}).get("skip_prepare_dataset"):
        yield Violation(
            "algo.packing",
            True,
            "skip_prepare_dataset leaves rows as they are, unpacked",
            "drop one of the two",
        )


def _packing_is_exact(settings: RunSettings) -> Iterator[Problem]:
    name, kind = settings.model.attn_implementation, packs(settings)
    known = ("auto", "sdpa", "eager", "flex_attention", "hydratune_varlen")
    if kind and name not in known and "flash_attention" not in name:
        yield Violation(
            "model.attn_implementation",
            name,
            f"is not known to keep documents apart, which algo.{kind} needs",
            "set it to auto",
        )


def _adapter_fits_packing(settings: RunSettings) -> Iterator[Problem]:
    kind = (settings.peft or {}).get("type")
    if kind in ("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "cpt") and (
        packing := packs(settings)
    ):
        yield Violation(
            f"algo.{packing}",
            True,
            f"{kind} puts its tokens before a row, not before each packed document",
            "turn it off, or use peft=lora",
        )


def _loss_fits_rows(settings: RunSettings) -> Iterator[Problem]:
    options, form = settings.algo_options, settings.data.format
    if settings.data.formatting_func:
        return  # its rows are judged when they are there
    if options.get("completion_only_loss") and form in ("text", "messages", "sharegpt"):
        yield Violation(
            "algo.completion_only_loss",
            True,
            f"data.format={form} has no prompt and completion",
            "give prompt/completion rows (a data.formatting_func may return them), or drop the flag",
        )
    if options.get("assistant_only_loss") and form == "text":
        yield Violation(
            "algo.assistant_only_loss",
            True,
            "data.format=text has no assistant's turns",
            "give messages, or drop the flag",
        )


def _evaluation_has_rows(settings: RunSettings) -> Iterator[Problem]:
    if evaluates(settings):
        return
    options = settings.algo_options
    for key in ("load_best_model_at_end", "metric_for_best_model"):
        if options.get(key):
            yield Violation(
                f"trainer.{key}",
                options[key],
                "there are no evaluation rows",
                "set data.eval_path, data.eval_split or data.eval_fraction",
            )
    if str(options.get("eval_strategy", "no")) != "no":
        yield "there are no evaluation rows (data.eval_fraction=0): nothing is evaluated"


def _best_model_matches(settings: RunSettings) -> Iterator[Problem]:
    options = settings.algo_options
    evaluation, saving = str(options.get("eval_strategy", "no")), str(options.get("save_strategy", "steps"))
    if not options.get("load_best_model_at_end") or saving == "best":
        return
    if evaluation != saving:
        yield Violation(
            "trainer.load_best_model_at_end",
            True,
            f"evaluation is by {evaluation}, saving by {saving}",
            f"set trainer.save_strategy={evaluation}",
        )
    elif evaluation == "steps":
        every = options.get("eval_steps") or options.get("logging_steps") or 10
        ratio = options.get("save_steps", 500) / every
        if abs(ratio - round(ratio)) > 1e-6:
            yield Violation(
                "trainer.save_steps",
                options.get("save_steps", 500),
                f"is no multiple of trainer.eval_steps={every}, so the best step may not be saved",
                "make it one",
            )


def _quantisation_has_an_adapter(settings: RunSettings) -> Iterator[Problem]:
    kind = settings.model.quantization
    if kind and not settings.peft:
        yield Violation(
            "model.quantization",
            kind,
            "quantised weights cannot be trained themselves",
            "add an adapter: peft=qlora",
        )
    if kind and find_spec("bitsandbytes") is None:
        yield Violation(
            "model.quantization",
            kind,
            "the package bitsandbytes is not installed",
            'pip install "hydratune[quant]"',
        )


_OPTIMIZER_PACKAGES = (
    (r"bnb|8bit|paged|ademamix|lion", "bitsandbytes"), (r"galore", "galore_torch"), (r"lomo", "lomo_optim"), (r"grokadamw", "grokadamw"),
    (r"anyprecision", "torchdistx"),
    (r"schedule_free", "schedulefree"), (r"apollo", "apollo_torch"), (r"stable_adamw", "optimi"), (r"torch_4bit|torch_8bit", "torchao"),
)  # fmt: skip


def _optimizer_is_installed(settings: RunSettings) -> Iterator[Problem]:
    optim = str(settings.algo_options.get("optim", "adamw_torch_fused"))
    package = next((p for pattern, p in reversed(_OPTIMIZER_PACKAGES) if re.search(pattern, optim)), None)
    if package and find_spec(package) is None:
        yield Violation(
            "trainer.optim",
            optim,
            f"the package {package} is not installed",
            f"pip install {package.replace('_', '-')}, or leave trainer.optim out",
        )


def _distribution_is_there(settings: RunSettings) -> Iterator[Problem]:
    options = settings.algo_options
    if options.get("deepspeed") and find_spec("deepspeed") is None:
        yield Violation(
            "trainer.deepspeed", None, "the package deepspeed is not installed", "pip install deepspeed"
        )
    if options.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Violation(
            "trainer.fsdp",
            options["fsdp"],
            "there is one process, nothing can be sharded",
            "start it with: accelerate launch train.py …",
        )


def _precision_is_one(settings: RunSettings) -> Iterator[Problem]:
    options = settings.algo_options
    if options.get("bf16") and options.get("fp16"):
        yield Violation("trainer.fp16", True, "trainer.bf16 is on too", "keep one of them")
    if settings.model.dtype == "float16" and not settings.peft:
        yield "model.dtype=float16 with full fine-tuning overflows easily; auto keeps fp32 master weights"


def _template_exists(settings: RunSettings) -> Iterator[Problem]:
    for key, path in (
        ("model", settings.model.chat_template_path),
        ("algo", settings.algo_options.get("chat_template_path")),
    ):
        if (
            path
            and (path.endswith((".jinja", ".j2")) or re.match(r"[./~]", path))
            and not Path(path).expanduser().exists()
        ):
            yield Violation(
                f"{key}.chat_template_path",
                path,
                "there is no such file",
                "give an existing .jinja file, or a tokenizer",
            )


def _function_can_be_found(settings: RunSettings) -> Iterator[Problem]:
    if settings.data.formatting_func:
        try:
            resolve(settings.data.formatting_func)
        except UserError as error:
            yield from error.violations


def _tracking_is_ours(settings: RunSettings) -> Iterator[Problem]:
    for key in ("report_to", "disable_tqdm"):
        if settings.algo_options.get(key):
            yield Violation(
                f"trainer.{key}",
                settings.algo_options[key],
                "tracking and progress are the run's own",
                "use tracking=wandb, offline or none",
            )


def _output_is_a_directory(settings: RunSettings) -> Iterator[Problem]:
    if settings.output_dir and Path(settings.output_dir).is_file():
        yield Violation("output_dir", settings.output_dir, "is a file", "name a directory")


def _learning_rate_is_sane(settings: RunSettings) -> Iterator[Problem]:
    rate = settings.algo_options.get("learning_rate", 0.0)
    if rate > 0.1:
        yield f"lr={rate} is far above what AdamW takes; 1e-5 to 1e-3 is usual"


_LOGGED = ("loss", "num_tokens")  # by every algorithm; its module's METRICS are its own
_LOGGED_IN_TRAINING = (
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "train_loss",
    "train_runtime",
    "peak_memory_gib",
    "mfu",
)


def _objective_is_logged(settings: RunSettings) -> Iterator[Problem]:
    try:
        objectives = named(settings.objective)
    except ValueError as error:
        yield Violation(
            "objective", settings.objective, str(error), "write METRIC, METRIC:best or METRIC:mean3"
        )
        return
    known = loggable(settings)
    for name in [o.metric for o in objectives if o.metric not in known]:
        no_rows = name.startswith("eval_") and not evaluates(settings)
        why = "there are no evaluation rows" if no_rows else "no such metric is logged"
        yield Violation("objective", name, why, f"{nearest(name, known)} (logged: {', '.join(known)})")


def loggable(settings: RunSettings) -> list[str]:
    """Every metric that a run with these settings logs, and the facts of its summary."""
    logged = [*_LOGGED, *(constant(f"hydratune.algos.{settings.algo}", "METRICS") or ())]
    module = f"hydratune.algos.{settings.algo}"
    evaluation = (
        [f"eval_{m}" for m in constant(module, "EVAL_METRICS") or logged] if evaluates(settings) else []
    )
    generates = evaluates(settings) and settings.algo != "reward"  # whether rows have an answer is seen later
    verified = ["verified_accuracy"] if generates else []
    return [*dict.fromkeys([*logged, *_LOGGED_IN_TRAINING, *evaluation, *verified, *FACTS])]


def _resume_goes_on_with_the_same(settings: RunSettings) -> Iterator[Problem]:
    if not settings.resume:
        return
    import yaml

    folder = Path(settings.resume).expanduser()
    run = folder.parent.parent if folder.name.startswith("checkpoint-") else folder
    if not folder.is_dir():
        yield Violation("resume", settings.resume, "there is no such directory", "give a run's directory")
        return
    if not folder.name.startswith("checkpoint-") and not last_checkpoint(folder):
        yield Violation(
            "resume",
            settings.resume,
            "holds no checkpoint",
            "start the run anew; trainer.save_steps says how often one is kept",
        )
        return
    saved = run / "config.yaml"
    before = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    for section, key in (
        ("algo", "name"),
        ("model", "name_or_path"),
        ("model", "architecture"),
        ("peft", "type"),
    ):
        old, new = ((c.get(section) or {}).get(key) for c in (before, settings.resolved))
        if before and old != new:
            yield Violation(
                f"{section}.{key}",
                str(new),
                f"the run in {run} had {old}",
                "leave it as it was, or start a new run",
            )


_SETTINGS_RULES = [
    _model_is_named, _model_directory_holds_a_model, _data_is_named, _streaming_has_an_end, _packing_has_a_length,
    _packing_is_exact, _adapter_fits_packing, _loss_fits_rows, _evaluation_has_rows, _best_model_matches,
    _quantisation_has_an_adapter, _optimizer_is_installed, _distribution_is_there, _precision_is_one, _template_exists,
    _function_can_be_found, _tracking_is_ours, _output_is_a_directory, _learning_rate_is_sane, _objective_is_logged,
    _resume_goes_on_with_the_same,
]  # fmt: skip
