"""From a command line and YAML files to `RunSettings`: Hydra composes, everything is checked here, all at once.

YAML files are plain. What may be set is what the dataclasses declare (`options.py` reads them without importing
torch), so a typo is refused wherever it stands: on the command line, behind `+`, or in a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydratune import algos
from hydratune.errors import UserError, Violation, nearest
from hydratune.options import (
    Option,
    adapter_types,
    choices_of,
    config_class,
    convert,
    describe,
    options_of,
)
from hydratune.secrets import untold
from hydratune.settings import DataSettings, ModelSettings, RunSettings, SweepSettings, TrackingSettings

# In YAML: ${by_adapter:${peft.type},1e-6,1e-5}, the first value without an adapter and the second with one.
OmegaConf.register_new_resolver(
    "by_adapter", lambda kind, full, adapted: adapted if kind else full, replace=True
)

SECTIONS = ("model", "data", "peft", "algo", "trainer", "tracking", "sweep")
SHORTCUTS = {
    "lr": Option("lr", "float | None", None, "learning rate", "train.yaml"),
    "seed": Option("seed", "int", 42, "random seed", "train.yaml"),
    "epochs": Option("epochs", "float | None", None, "passes over the data", "train.yaml"),
    "max_steps": Option("max_steps", "int | None", None, "update steps, instead of epochs", "train.yaml"),
    "batch_size": Option("batch_size", "int | None", None, "rows per device and step", "train.yaml"),
    "accumulation": Option("accumulation", "int | None", None, "batches per update step", "train.yaml"),
    "objective": Option(
        "objective",
        "str | list[str] | None",
        None,
        "metric that the run returns, as METRIC or METRIC:best or METRIC:mean3 (default: its last value)",
        "train.yaml",
    ),
    "run_name": Option("run_name", "str | None", None, "name of the run", "train.yaml"),
    "output_dir": Option("output_dir", "str | None", None, "put the run exactly here", "train.yaml"),
    "resume": Option("resume", "str | None", None, "run directory to go on with", "train.yaml"),
    "check": Option("check", "bool", False, "only the checks and the plan", "train.yaml"),
    "debug": Option("debug", "bool", False, "show tracebacks", "train.yaml"),
}
# shortcut → the field of TrainingArguments that it sets
FIELD_OF = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "seed": "seed",
    "run_name": "run_name",
    "resume": "resume_from_checkpoint",
}
_OF_THE_RUN = ("seed", "run_name", "resume")  # shortcuts that RunSettings holds itself

_POSITIVE: tuple[str, Callable[[Any], bool]] = ("above 0", lambda v: 0 < v < math.inf)
_NOT_NEGATIVE: tuple[str, Callable[[Any], bool]] = ("0 or more", lambda v: 0 <= v < math.inf)
_AT_LEAST_ONE: tuple[str, Callable[[Any], bool]] = ("1 or more", lambda v: v >= 1)
_SHARE: tuple[str, Callable[[Any], bool]] = ("from 0 up to, not including, 1", lambda v: 0 <= v < 1)
_STEPS: tuple[str, Callable[[Any], bool]] = (
    "1 or more, or -1 for as epochs say",
    lambda v: v == -1 or v >= 1,
)
_SEED: tuple[str, Callable[[Any], bool]] = ("from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
_RANGES = {
    **dict.fromkeys(
        ["lr", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "logging_steps"],
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(["save_steps", "dataloader_num_workers", "samples", "eval_delay"], _NOT_NEGATIVE),
    **dict.fromkeys(
        ["epochs", "num_train_epochs", "adam_epsilon", "lora_alpha", "eval_steps", "neftune_noise_alpha"],
        _POSITIVE,
    ),
    **dict.fromkeys(
        ["batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "accumulation"],
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(
        ["gradient_accumulation_steps", "size", "max_samples", "max_eval_samples", "max_length", "r"],
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(["num_proc", "dataset_num_proc", "pad_to_multiple_of", "sample_tokens"], _AT_LEAST_ONE),
    **dict.fromkeys(["n_trials", "max_failures", "trials_per_gpu"], _AT_LEAST_ONE),
    **dict.fromkeys(["timeout", "lease"], _POSITIVE),
    **dict.fromkeys(["gpus_per_trial", "max_retries"], _NOT_NEGATIVE),
    **dict.fromkeys(["eval_fraction", "lora_dropout", "adam_beta1", "adam_beta2"], _SHARE),
    "max_steps": _STEPS,
    **dict.fromkeys(["seed", "data_seed"], _SEED),
}


@dataclass
class _Found:
    """What one reading of a config gathers: where values come from, and what is wrong with them."""

    typed: set[str]  # keys set on the command line
    choices: dict[str, str]
    conf: Path | None
    violations: list[Violation] = field(default_factory=list)

    def add(self, key: str, value: Any, why: str, fix: str) -> None:
        self.violations.append(Violation(key, value, why + self._file_of(key), fix))

    def on_command_line(self, key: str) -> bool:
        return any(t == key or t.startswith(key + ".") for t in self.typed)

    def _file_of(self, key: str) -> str:
        """', in conf/trainer/x.yaml' for a value that does not come from the command line."""
        if self.conf is None or self.on_command_line(key) or any(key.startswith(t + ".") for t in self.typed):
            return ""
        candidates = [f"{g}/{c}.yaml" for g, c in self.choices.items() if c and "/" not in g] + ["train.yaml"]
        leaf = re.compile(rf"^\s*{re.escape(key.rpartition('.')[2])}\s*:", re.MULTILINE)
        own = sorted(candidates, key=lambda name: not name.startswith(key.split(".")[0] + "/"))
        for name in own:
            path = self.conf / name
            if path.is_file() and leaf.search(path.read_text(encoding="utf-8")):
                return f" (set in {self.conf.name}/{name})"
        return ""


def parse(
    cfg: DictConfig,
    *,
    command: str = "",
    began: float | None = None,
    output_dir: str = "",
    choices: dict[str, str] | None = None,
    overrides: Sequence[str] = (),
    conf: Path | None = None,
) -> RunSettings:
    """The composed config as checked, typed settings.

    Args:
        cfg: what Hydra composed, without its own `hydra` node.
        command: the command line as typed, for the records.
        began: when it was, in `time.perf_counter()`.
        output_dir: where the run writes.
        choices: the entry picked of each group.
        overrides: the command line's overrides; what they set wins over the same field set in a file.
        conf: the folder with the YAML files, to name the file of a wrong value.

    Raises:
        UserError: with every unknown key, wrong type, value out of range and contradiction.
    """
    chosen = {k: str(v) for k, v in (choices or {}).items() if "/" not in k}
    found = _Found({key_of(o) for o in overrides} - set(SECTIONS), chosen, conf)
    plain = _resolve(cfg)
    for key in plain.keys() - SHORTCUTS.keys() - set(SECTIONS):
        found.add(str(key), plain[key], "there is no such key", misspelt_top_level(str(key)))
    top = _values("", {k: plain[k] for k in SHORTCUTS if k in plain}, SHORTCUTS, found)
    parts = {name: _section(name, plain.get(name), found) for name in SECTIONS}

    model = _values("model", parts["model"], options_of("hydratune.settings:ModelSettings"), found)
    data = _values("data", parts["data"], options_of("hydratune.settings:DataSettings"), found)
    tracking = _values(
        "tracking", parts["tracking"], options_of("hydratune.settings:TrackingSettings"), found
    )
    sweep = _values("sweep", parts["sweep"], options_of("hydratune.settings:SweepSettings"), found)
    peft = _peft(parts["peft"], found)
    algo_name, algo_values, trainer_values = _algorithm(parts["algo"], parts["trainer"], found)
    of_run, algo_options = _merge(top, algo_values, trainer_values, found)
    _check_model(model, found)
    _check_data(data, found)
    if found.violations:
        raise UserError(found.violations)

    plain.pop("sweep", None)  # a trial's config is that of a run
    resolved = {**plain, **top, **of_run, "model": parts["model"] | model, "data": parts["data"] | data}
    resolved |= {
        "tracking": parts["tracking"] | tracking,
        "peft": peft,
        "algo": {"name": algo_name} | algo_values,
    }
    own = set(algo_values)
    resolved["algo"] |= {k: v for k, v in algo_options.items() if k in own}
    resolved["trainer"] = {k: v for k, v in algo_options.items() if k not in own}
    for shortcut, name in FIELD_OF.items():
        if name in algo_options:
            resolved[shortcut] = algo_options[name]
    resolved["output_dir"] = output_dir or top.get("output_dir")
    return RunSettings(
        algo=algo_name,
        algo_options=algo_options,
        model=ModelSettings(**model),
        data=DataSettings(**data),
        peft=peft,
        tracking=TrackingSettings(**tracking),
        sweep=SweepSettings(**sweep),
        output_dir=output_dir or top.get("output_dir") or "",
        seed=of_run.get("seed", 42),
        run_name=of_run.get("run_name"),
        objective=top.get("objective"),
        resume=of_run.get("resume"),
        check=top.get("check", False),
        debug=top.get("debug", False),
        choices=chosen,
        resolved=resolved,
        command=command,
        began=began,
    )


def key_of(override: str) -> str:
    """The key that an override sets: `++trainer.max_steps=5` → `trainer.max_steps`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0].strip()


def misspelt_top_level(key: str) -> str:
    """The way out for a top-level name that does not exist."""
    head, dot, tail = key.partition(".")
    if dot:
        near = nearest(head, SECTIONS)
        return (
            near.replace("'?", f".{tail}'?")
            if near.startswith("did")
            else f"groups of fields: {', '.join(SECTIONS)}"
        )
    for shortcut, name in FIELD_OF.items():
        if key == name:
            return f"set it as {shortcut}=… or trainer.{name}=…"
    if key in _training():
        return f"set it as trainer.{key}=…"
    for section, options in _declared_elsewhere().items():
        if key in options:
            return f"set it as {section}.{key}=…"
    return nearest(key, [*SHORTCUTS, *SECTIONS])


def _resolve(cfg: DictConfig) -> dict[str, Any]:
    try:
        own = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
        plain = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        why, key = str(error.msg or error).splitlines()[0], str(error.full_key or "config")
        why, fix = untold(key, why) or (why, "name a key that exists, or write the value itself")
        raise UserError(Violation(key, None, why, fix)) from error
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _section(name: str, value: Any, found: _Found) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    found.add(name, value, "is a group of fields, not a value", f"set its fields as {name}.FIELD=…")
    return {}


def _values(section: str, given: dict[str, Any], options: dict[str, Option], found: _Found) -> dict[str, Any]:
    """The given values of a section with their declared types; what does not fit is added to the violations."""
    result = {}
    for name, value in given.items():
        key = f"{section}.{name}" if section else str(name)
        option = options.get(str(name))
        if option is None:
            found.add(key, value, "there is no such field", _misspelt_field(section, str(name), options))
            continue
        if value == "???":
            found.add(key, value, "needs a value", f"set {key}=…, {describe(option.type)}")
            continue
        try:
            result[name] = convert(value, option.type)
        except ValueError as needed:
            choices = choices_of(option.type)
            near = nearest(str(value), choices) if choices and isinstance(value, str) else ""
            why = f"is not {needed}" if near[:3] != "did" else "is no value of this field"
            shown = "null" if value is None else value
            found.add(key, shown, why, near if near[:3] == "did" else _example(key, option, str(needed)))
            continue
        allowed = _RANGES.get(name)
        number = result[name]
        if (
            allowed
            and isinstance(number, int | float)
            and not isinstance(number, bool)
            and not allowed[1](number)
        ):
            found.add(key, value, "is out of range", f"give {allowed[0]}")
    return result


def _example(key: str, option: Option, needed: str) -> str:
    default = "1e-4" if key == "lr" else option.default
    if default is None or default == "":
        return f"give {needed}"
    return f"give {needed}, e.g. {key}={str(default).lower() if isinstance(default, bool) else default}"


def _misspelt_field(section: str, name: str, options: Iterable[str]) -> str:
    for other, known in _declared_elsewhere().items():
        if other != section and name in known:
            return f"it is set as {other}.{name}=…"
    if section != "trainer" and name in _training():
        return f"it is set as trainer.{name}=…"
    if name in SHORTCUTS:
        return f"it is set as {name}=…, without '{section}.'"
    return nearest(name, options)


def _training() -> dict[str, Option]:
    return options_of("transformers.training_args:TrainingArguments")


def _declared_elsewhere() -> dict[str, Iterable[str]]:
    algorithm = options_of("hydratune.algos.sft:SFTConfig").keys() - _training().keys()
    peft = options_of("peft.tuners.lora.config:LoraConfig").keys() - {"revision"}
    model, data, sweep = (options_of(f"hydratune.settings:{n}Settings") for n in ("Model", "Data", "Sweep"))
    return {"algo": algorithm, "model": model, "data": data, "peft": peft, "sweep": sweep}


def _peft(given: dict[str, Any], found: _Found) -> dict[str, Any] | None:
    kind = given.get("type")
    fields = {k: v for k, v in given.items() if k != "type"}
    if kind is None:
        for name, value in fields.items():
            found.add(f"peft.{name}", value, "no adapter is chosen", "choose one as well, e.g. peft=lora")
        return None
    if kind not in adapter_types():
        found.add(
            "peft.type", kind, "the installed peft has no such adapter", nearest(str(kind), adapter_types())
        )
        return None
    declared = config_class(f"peft.tuners.{kind}.config", "PeftConfig")
    assert declared is not None, kind
    return {"type": kind, **_values("peft", fields, options_of(declared), found)}


def _algorithm(
    algo: dict[str, Any], trainer: dict[str, Any], found: _Found
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name of the algorithm, its own values, and those of `TrainingArguments`."""
    name, known = str(algo.get("name") or ""), algos.names()
    if name not in known:
        found.add(
            "algo.name",
            algo.get("name"),
            "there is no such algorithm",
            f"choose one of: {', '.join(known)}",
        )
        return name, {}, {}
    declared = config_class(f"hydratune.algos.{name}", "BaseConfig")
    assert declared is not None, name
    options, training = options_of(declared), _training()
    own = {n: o for n, o in options.items() if n not in training or o.owner != "TrainingArguments"}
    everywhere = {n: options[n] for n in training}
    if "output_dir" in trainer:
        found.add(
            "trainer.output_dir",
            trainer["output_dir"],
            "the run's directory is set at the top",
            "set output_dir=DIR",
        )
    given = {k: v for k, v in algo.items() if k != "name"}
    return name, _values("algo", given, own, found), _values("trainer", trainer, everywhere, found)


def _merge(
    top: dict[str, Any], algo: dict[str, Any], trainer: dict[str, Any], found: _Found
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the run holds itself, and the algorithm's options: shortcut, `trainer.` and `algo.` name one field.

    What the command line sets wins over files; among files `algo.` and `trainer.` win over a shortcut.
    """
    shortcut_of = {v: k for k, v in FIELD_OF.items()}
    of_run: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name in [*dict.fromkeys([*FIELD_OF.values(), *trainer, *algo])]:
        shortcut = shortcut_of.get(name)
        candidates = {}
        if shortcut and top.get(shortcut) is not None:
            candidates[shortcut] = top[shortcut]
        candidates |= {
            f"{s}.{name}": values[name]
            for s, values in (("trainer", trainer), ("algo", algo))
            if name in values
        }
        if not candidates:
            continue
        typed = {k: v for k, v in candidates.items() if found.on_command_line(k)}
        judged = typed or {k: v for k, v in candidates.items() if "." in k}
        if len(judged) > 1 and any(v != next(iter(judged.values())) for v in judged.values()):
            (first, one), *_, (last, other) = judged.items()
            found.add(first, one, f"{last}={other} sets the same field to another value", "keep one of them")
        value = [*(typed or candidates).values()][-1]
        if shortcut in _OF_THE_RUN:
            of_run[shortcut] = value
        else:
            options[name] = value
    if top.get("batch_size") is not None:
        options.setdefault("per_device_eval_batch_size", options["per_device_train_batch_size"])
    return of_run, options


def _check_model(model: dict[str, Any], found: _Found) -> None:
    name, architecture = model.get("name_or_path"), model.get("architecture")
    if any(v.key.startswith("model.") for v in found.violations):
        return
    if not name and not architecture:
        found.add(
            "model.name_or_path",
            name,
            "no model is given",
            "set model.name_or_path=DIR or a hub id, or pick model=tiny",
        )
    if name and architecture:
        found.add(
            "model.name_or_path",
            name,
            "model.architecture is set too",
            "pick model=local with model.name_or_path=…",
        )
    if name and re.match(r"[./~]", name) and not Path(name).expanduser().is_dir():
        found.add(
            "model.name_or_path",
            name,
            f"there is no such directory (looked from {Path.cwd()})",
            "give an existing directory, or a hub id",
        )
    if architecture and not architecture.get("model_type"):
        found.add(
            "model.architecture", architecture, "needs model_type", "add model.architecture.model_type=qwen2"
        )


def _check_data(data: dict[str, Any], found: _Found) -> None:
    source = data.get("source", "builtin")
    if source == "local" and not data.get("path"):
        found.add(
            "data.path",
            data.get("path"),
            "local data needs a file",
            "set data.path=FILE.jsonl (or json, csv, parquet, a folder)",
        )
    if source == "hub" and not data.get("name"):
        found.add("data.name", data.get("name"), "hub data needs a name", "set data.name=OWNER/NAME")
    for key in ("path", "eval_path"):
        if data.get(key) and not Path(data[key]).expanduser().exists():
            found.add(
                f"data.{key}",
                data[key],
                f"there is no such file or folder (looked from {Path.cwd()})",
                "give an existing path",
            )
