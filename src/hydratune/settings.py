"""The settings of one run as plain dataclasses: each option declared once, with type, default and help.

`option(default, help)` keeps the help text beside the declaration; the command line's schema, its checks and the
option tables in the docs are derived from here. No heavy import: this is read before anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any = None, help: str = "", *, factory: Callable[[], Any] | None = None) -> Any:
    """A dataclass field with its help text in the metadata, as transformers' argument classes have it."""
    if factory is not None:
        return field(default_factory=factory, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelSettings:
    """`model.*`: which weights, or which architecture with random weights, and how they are loaded."""

    name_or_path: str | None = option(
        None, "Hub id or local directory of the model; null with `architecture`."
    )
    architecture: dict[str, Any] | None = option(
        None, "Config fields (with model_type) of a model made with random weights instead of loaded ones."
    )
    tokenizer: str | None = option(
        None, "Hub id or directory of the tokenizer; 'byte' is the built-in one; null: the model's."
    )
    init_kwargs: dict[str, Any] = option(factory=dict, help="Passed to from_pretrained untouched.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Dtype of the weights. auto: fp32 master weights, or a bf16 frozen base with peft where bf16 is supported.",
    )
    attn_implementation: str = option(
        "auto", "auto picks the fastest exact one present; else a name that transformers knows."
    )
    quantization: Literal["4bit", "8bit"] | None = option(None, "Load the base quantised by bitsandbytes.")
    trust_remote_code: bool = option(False, "Run code that the model's repository brings.")
    chat_template_path: str | None = option(
        None, "A .jinja file, or a tokenizer's directory or id, whose chat template is used."
    )


@dataclass
class DataSettings:
    """`data.*`: where rows come from, what they look like, and which of them are used."""

    source: Literal["builtin", "local", "hub"] = option(
        "builtin", "Generated from a seed, read from `path`, or from the hub."
    )
    name: str | None = option(None, "Hub id of the data set, or the name of a built-in one.")
    subset: str | None = option(None, "Configuration name of a hub data set.")
    path: str | None = option(None, "A jsonl, json, csv or parquet file, or a folder of them.")
    split: str = option("train", "Split of a hub data set that is trained on.")
    eval_path: str | None = option(None, "File or folder with the rows that are evaluated on.")
    eval_split: str | None = option(None, "Split of a hub data set that is evaluated on.")
    eval_fraction: float = option(
        0.05, "Share of the training rows held out when there is no evaluation data; 0 for none."
    )
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized", "preference", "unpaired"
    ] = option("auto", "The shape of a row; auto finds it from the columns.")  # fmt: skip
    columns: dict[str, str] = option(
        factory=dict, help="Our column name: the file's, e.g. {messages: dialog}."
    )
    formatting_func: str | None = option(
        None, "Dotted path of a function from a row to text, messages or prompt/completion."
    )
    system_prompt: str | None = option(None, "System message put before conversations that have none.")
    max_samples: int | None = option(None, "Use at most this many training rows (after shuffling by `seed`).")
    max_eval_samples: int | None = option(None, "Use at most this many evaluation rows.")
    seed: int | None = option(None, "Seed of generation, sampling and the split; null: the run's seed.")
    size: int = option(2048, "Rows to generate for a built-in data set.")
    distinct: bool = option(
        False, "No question of a built-in data set twice, so that the held-out ones are new to the model."
    )
    streaming: bool = option(False, "Read rows as they are needed (needs max_steps).")
    num_proc: int | None = option(None, "Processes for formatting and tokenising.")
    cache: bool = option(True, "Keep tokenised data under a key of its content and settings.")


@dataclass
class TrackingSettings:
    """`tracking.*`: Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto",
        "auto: online with a login, offline without; offline: write files to sync later; disabled: none.",
    )
    project: str = option("hydratune", "W&B project.")
    entity: str | None = option(None, "W&B user or team.")
    group: str | None = option(None, "W&B group; a sweep sets its study's name.")
    tags: list[str] = option(factory=list, help="W&B tags, added to algo, model, data and peft.")
    notes: str | None = option(None, "W&B notes.")
    samples: int = option(
        4, "Sample completions written at the end (table in W&B and in the report); 0 for none."
    )
    sample_tokens: int = option(64, "New tokens of a sample completion.")


@dataclass
class SweepSettings:
    """`sweep.*`: how `python train.py -m …` (or `hydratune.sweep.run`) searches."""

    name: str | None = option(
        None, "Name of the study; null: made from the base and the space, so that the same command goes on."
    )
    n_trials: int | None = option(
        None,
        "Finished trials that the study shall have, over all restarts and machines; a grid knows its own.",
    )
    timeout: float | None = option(None, "Seconds after which no new trial starts.")
    sampler: str = option(
        "auto",
        "auto (the exact grid when all is finite, else tpe), grid, random, tpe, gp, cmaes, nsga2, nsga3, qmc, or the dotted path of an Optuna sampler.",
    )
    sampler_options: dict[str, Any] = option(factory=dict, help="Keyword arguments of the sampler.")
    pruner: str = option(
        "none",
        "none, median, percentile, asha, hyperband, patient, wilcoxon, or the dotted path of an Optuna pruner.",
    )
    pruner_options: dict[str, Any] = option(factory=dict, help="Keyword arguments of the pruner.")
    prune_on: str | None = option(
        None, "Logged metric that the pruner sees; null: the objective. loss: judged at every logged step."
    )
    direction: Any = option(
        None, "minimize or maximize, a list for several objectives; null: told from the metric's name."
    )
    constraints: list[str] = option(
        factory=list, help="Bounds that a good trial keeps, e.g. ['peak_memory_gib <= 20']."
    )
    space: dict[str, Any] = option(
        factory=dict, help="KEY: values in the grammar of the command line, as -m KEY=VALUES would be."
    )
    paired: dict[str, Any] = option(
        factory=dict, help="NAME: a list of mappings; the settings of one mapping move together."
    )
    space_function: str | None = option(
        None,
        "Dotted path of a function from an Optuna trial to a mapping of settings, for conditional spaces.",
    )
    base: list[str] = option(factory=list, help="Overrides that every trial starts from, for a kept search.")
    enqueue: list[dict[str, Any]] = option(factory=list, help="Known good points, tried first.")
    workers: Any = option(
        "auto", "Trials at the same time; auto: one for each device (on a CPU one), 8 on a cluster."
    )
    gpus_per_trial: int = option(1, "GPUs that a trial gets.")
    trials_per_gpu: int = option(1, "Trials that share a GPU.")
    executor: Literal["local", "submitit", "ray"] = option(
        "local", "Where trials run: processes here, SLURM (or its local mode), or a Ray cluster."
    )
    executor_options: dict[str, Any] = option(
        factory=dict, help="Of submitit (cluster, slurm_partition, …) or of ray (address, num_cpus, …)."
    )
    fork: bool = option(True, "Fork trials from a warm process; false: a new process for each.")
    launch_prefix: str | None = option(
        None, "Put before a trial's command, e.g. 'accelerate launch --num_processes 2'."
    )
    storage: str | None = option(
        None,
        "Journal file, or URL of a PostgreSQL, MySQL or SQLite database; null: journal.log of the study.",
    )
    max_failures: int = option(10, "Failed trials in a row after which the sweep stops.")
    max_retries: int = option(2, "Times that a trial is taken up again after its process died.")
    lease: float = option(
        120.0, "Seconds without a sign of life after which another machine's trials are taken over."
    )
    keep: Literal["all", "best", "none"] = option(
        "all", "Of which finished trials the model and checkpoints stay on disk."
    )


@dataclass
class RunSettings:
    """One run, parsed and typed: what `hydratune.run.run` takes. Nothing here knows Hydra."""

    algo: str
    algo_options: dict[str, Any]  # fields of the algorithm's config class, trainer.* merged in, set ones only
    model: ModelSettings
    data: DataSettings
    peft: dict[str, Any] | None  # {"type": "lora", **fields of the peft config}, None without an adapter
    tracking: TrackingSettings
    output_dir: str
    sweep: SweepSettings = field(default_factory=SweepSettings)  # of the sweep, not of its trials
    seed: int = 42
    run_name: str | None = None
    objective: str | list[str] | None = (
        None  # METRIC or METRIC:RULE (objective.py); null: eval_loss, eval_reward, else loss
    )
    resume: str | None = None
    check: bool = False
    debug: bool = False
    choices: dict[str, str] = field(default_factory=dict)  # group → entry picked, e.g. {"model": "tiny"}
    resolved: dict[str, Any] = field(
        default_factory=dict
    )  # the whole resolved config, for config.yaml and W&B
    command: str = ""
    began: float | None = None  # when that command did, in `time.perf_counter()`
