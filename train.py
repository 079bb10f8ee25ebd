"""The one entry: Hydra composes the config, `hydratune.run` runs it, the objective is returned.

The command line is checked before Hydra runs anything, so that a wrong one ends in under a second with one message
that lists all that is wrong, and leaves no directory behind. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hydratune.command import (
    CONF,
    arguments,
    check_command,
    entries,
    explain,
    group_names,
    kept_search,
    resumed,
    rewrite,
    settings_of,
    with_kept_search,
    without_secrets,
)

_NO_WARM_START = ("check", "sweep.executor", "sweep.fork", "hydra/sweeper", "hydra/launcher")

HELP = """\
hydratune: experiments and sweeps for LLM post-training

  python train.py                                             the embedded default: a small model, built-in data
  python train.py algo=sft model=qwen2.5_0.5b data=capybara peft=lora lr=1e-4
  python train.py model.name_or_path=DIR data.path=FILE.jsonl any model, any jsonl, json, csv or parquet file
  python train.py -m lr=1e-5,2e-5                             a sweep: one trial for each value
  python train.py -m lr='tag(log,interval(1e-6,1e-3))' peft.r=8,16 peft=lora sweep.n_trials=30
  python train.py -m sweep=sft_lora                           a search kept in sweeps/sft_lora.yaml
  python train.py resume=outputs/DATE/TIME-NAME               go on where a run, or a sweep, stopped
  python train.py check=true …                                only the checks and the plan, no training
  accelerate launch train.py trainer=fsdp …                   several GPUs

Groups, picked as GROUP=ENTRY:
{groups}

Shortcuts, set as KEY=VALUE:
{shortcuts}

Fields, without +:
  trainer.FIELD  of transformers.TrainingArguments       algo.FIELD   of the algorithm's own config
  peft.FIELD     of the peft config (peft.r=16)          model.FIELD  data.FIELD  tracking.FIELD
  sweep.FIELD    with -m: n_trials, sampler, pruner, workers, executor, storage, … (docs/options.md)
  model.init_kwargs.NAME=VALUE goes to from_pretrained untouched.

--cfg job shows the composed config, debug=true a traceback, --hydra-help what else Hydra can do.
Exit codes: 0 done, 2 config or data is wrong, 3 training failed, 4 pruned by its sweep, 130 interrupted and resumable.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: that of the process); returns the exit code."""
    began = time.perf_counter()
    typed = sys.argv[1:] if argv is None else argv
    # read when torch is imported: threads that spin while they wait cost a shared CPU many times what they save
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--help" in typed or "-h" in typed:
        print(help_text())
        return 0
    show = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0") or bool(
        {"debug=true", "debug=True"} & set(typed)
    )
    from hydratune.errors import Interrupted, Pruned, TrainingFailed, UserError
    from hydratune.sweep import trial

    current = trial.current()  # a sweep's trial writes down how it ended
    before, argv_before = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing and exiting
    from hydratune.processes import leave_group
    from hydratune.sweep.executors import ForkExecutor

    try:
        if current is None:
            if _seems_a_search(typed):  # which Hydra's import, and all that follows, will tell for sure
                ForkExecutor.launch()
            _hydra(resumed(typed), typed, began)
        else:
            current.judge(lambda: _hydra(resumed(typed), typed, began, checked=True))
        leave_group()  # not when it failed: other processes may still wait in a collective
        return 0
    except (UserError, TrainingFailed, Pruned, KeyboardInterrupt) as error:
        if show:
            traceback.print_exc()
        print(message(error), file=sys.stderr)
        return getattr(error, "exit_code", Interrupted.exit_code)
    finally:
        ForkExecutor.dismiss()
        sys.argv = argv_before
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def message(error: BaseException) -> str:
    """What the user reads: all violations under one headline."""
    violations = getattr(error, "violations", None)
    if violations is None:
        return f"error: {error}" if str(error) else "interrupted"
    what = "1 problem" if len(violations) == 1 else f"{len(violations)} problems"
    return "\n".join([f"error: {what} in the configuration or data", *(f"  {v}" for v in violations)])


def warm(argv: list[str]) -> None:
    """Hold the data and the weights of a command line's run in this process, for the trials forked from it."""
    from hydratune.run import warm

    if any(a.startswith("-") for a in argv):
        return  # a config of another folder: its trials prepare for themselves
    _register_resolvers({})
    warm(settings_of(argv))


def help_text() -> str:
    from hydratune.config import SHORTCUTS

    groups = "\n".join(f"  {g:<9} {', '.join(entries(g))}" for g in group_names())
    lines = "\n".join(f"  {name:<13} {option.help}" for name, option in SHORTCUTS.items())
    return HELP.format(groups=groups, shortcuts=lines).rstrip()


# ------------------------------------------------------------------ Hydra


def _hydra(typed: list[str], shown: list[str], began: float, *, checked: bool = False) -> Any:
    """Checks the command line, then lets Hydra compose and start the run, or the sweep; gives what the run returns."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from hydratune.config import key_of, parse
    from hydratune.errors import Pruned, TrainingFailed, UserError, Violation
    from hydratune.secrets import redact_override
    from hydratune.sweep.executors import ForkExecutor

    absent: dict[Path, list[Path]] = {}
    typed = without_secrets(typed)
    _register_resolvers(absent)
    args = arguments(typed)
    overrides = rewrite(with_kept_search(args.overrides))
    if not checked:  # a trial has its search behind it
        _register_searches()
    options = [a for a in typed if a not in args.overrides]
    command = shlex.join(["python", "train.py", *map(redact_override, shown)])
    if args.multirun and not args.cfg and not any(key_of(o) in _NO_WARM_START for o in overrides):
        ForkExecutor.launch()  # imports for the trials while the command line is still being read
    else:
        ForkExecutor.dismiss()
    stopped: list[BaseException] = []
    returned: list[Any] = []

    def task(cfg: DictConfig) -> float | list[float] | None:
        runtime = HydraConfig.get()
        try:
            settings = parse(
                cfg,
                command=command,
                began=began,
                output_dir=str(runtime.runtime.output_dir),
                choices=dict(runtime.runtime.choices),
                overrides=list(runtime.overrides.task),
                conf=CONF,
            )
            from hydratune.run import run

            value = run(settings)
            if settings.check and not args.multirun:
                _remove_unused(Path(settings.output_dir), absent)
            returned.append(value)
            return value
        except (UserError, TrainingFailed, Pruned) as error:
            if args.multirun:
                raise
            stopped.append(error)  # raised below: Hydra would print a line of its own on the way
            return None

    try:
        if not (
            checked
            or args.info
            or args.hydra_help
            or args.shell_completion
            or args.experimental_rerun
            or args.config_path
        ):
            check_command(overrides, multirun=args.multirun, args=args)
        sys.argv = [str(CONF.parent / "train.py"), *options, *overrides]
        if checked and not options:
            _run_once(task, overrides)
        else:
            hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(Violation("command line", None, *explain(error))) from error
    if stopped:
        for path in list(absent):
            _remove_unused(path, absent)
        raise stopped[0]
    return returned[0] if returned else None


def _run_once(task: Any, overrides: list[str]) -> None:
    """What `hydra.main` does for one run, without composing the config a first time only to look for `hydra.mode`."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    version.setbase("1.3")
    search_path = create_automatic_config_search_path(str(CONF.parent / "train.py"), None, str(CONF))
    try:
        app = Hydra.create_main_hydra2(task_name="train", config_search_path=search_path)
        app.run("train", task, [*overrides, "hydra.mode=RUN"])
    finally:
        GlobalHydra.instance().clear()


def _seems_a_search(typed: list[str]) -> bool:
    keys = {word.lstrip("+~").partition("=")[0] for word in typed}
    return bool({"-m", "--multirun"} & keys) and not keys & {"-c", "--cfg", *_NO_WARM_START}


def _remove_unused(directory: Path, absent: dict[Path, list[Path]]) -> None:
    """Takes back the directory that Hydra made for a run that wrote nothing; never one that was there before."""
    made = absent.get(directory.absolute(), [])
    if not made or not directory.is_dir() or {p.name for p in directory.iterdir()} - {".hydra"}:
        return
    for file in directory.glob(".hydra/*.yaml"):
        file.unlink()
    for folder in [directory / ".hydra", *made]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _register_resolvers(absent: dict[Path, list[Path]]) -> None:
    """Teaches OmegaConf how a run's directory is named; notes in `absent` which folders are not there yet."""
    from omegaconf import OmegaConf

    def directory(given: str | None, parent: str, time: str, run_name: str | None, choices: Any) -> str:
        """`output_dir` as given, else <parent>/<time>-<name>."""
        if given is not None:
            return noted(Path(str(given)).expanduser())
        picked = [str(choices[g]) for g in ("algo", "model", "data", "peft") if choices and choices.get(g)]
        name = str(run_name) if run_name is not None else "-".join(picked) or "sweep"
        return noted(Path(parent) / f"{time}-{name.replace('/', '_')}")

    def noted(path: Path) -> str:
        whole = path.absolute()
        absent.setdefault(whole, [p for p in (whole, *whole.parents) if not p.exists()])
        return str(path)

    OmegaConf.register_new_resolver("hydratune_dir", directory, replace=True)


def _register_searches() -> None:
    """Every file of `sweeps/` is an entry of the group `sweep`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name in entries("sweep")[1:]:
        store.store(group="sweep", name=name, node=kept_search(name), package="sweep")


if __name__ == "__main__":
    code = main()
    gc.freeze()  # the interpreter's end would walk all that torch and transformers have made: over a second
    sys.exit(code)
