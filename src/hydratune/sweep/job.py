"""A trial as a job: what any executor starts, in a forked child, a new process, or on another machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle

from hydratune.checkpoints import last_checkpoint
from hydratune.command import text
from hydratune.errors import Interrupted, Pruned
from hydratune.held import die_with_parent
from hydratune.secrets import redact_override
from hydratune.sweep.place import alone
from hydratune.sweep.trial import VARIABLE, TrialSpec, current

THREADS = "HYDRATUNE_THREADS"  # of torch by default, where a warm process has set them to one


@dataclass(frozen=True)
class Command:
    """A trial as a command line: `[prefix] python train.py OVERRIDES SETTINGS`.

    Attributes:
        script: the entry script, which has `main(argv)`.
        overrides: what all trials have in common.
        folder: where the command is run.
        prefix: put before it, e.g. ("accelerate", "launch"); the script then runs in processes of its own.
        python: the interpreter.
        warm_with: command lines whose data and weights a warm process reads up front.
        decided_by: command lines of which, if the data or the model of each is wrong, that of every trial is; None
            when there are no such few.
    """

    script: str
    overrides: tuple[str, ...]
    folder: str
    prefix: tuple[str, ...] = ()
    python: str = sys.executable
    warm_with: tuple[tuple[str, ...], ...] = ()
    decided_by: tuple[tuple[str, ...], ...] | None = None

    def arguments(self, settings: Mapping[str, Any]) -> list[str]:
        """The overrides of a trial; a setting of its own replaces one that all have."""
        mine = {key: f"{key}={text(value)}" for key, value in settings.items()}
        shared = [o for o in self.overrides if o.partition("=")[0].lstrip("+~") not in mine]
        return [*shared, *mine.values()]

    def line(self, settings: Mapping[str, Any]) -> str:
        """As a user types it, for the records and without secrets."""
        launch = self.prefix or ("python",)
        shown = (shlex.quote(redact_override(word)) for word in self.arguments(settings))
        return " ".join([*launch, Path(self.script).name, *shown])

    def shell(self, settings: Mapping[str, Any], env: Mapping[str, str]) -> str:
        """A shell script that runs the trial's command alone, as a run of its own."""
        variables = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(env.items()))
        launch = [*self.prefix, self.script] if self.prefix else [self.python, self.script]
        words = " ".join(shlex.quote(w) for w in [*launch, *self.arguments(settings)])
        return f'#!/bin/sh\n# {self.line(settings)}\ncd {shlex.quote(self.folder)}\n{variables}exec {words} "$@"\n'

    def run(self, spec: TrialSpec) -> int:
        """Run the trial of `spec`, which judges itself; gives the exit code."""
        place = [f"output_dir={text(spec.directory)}"]
        if spec.attempt and last_checkpoint(Path(spec.directory)):
            place.append(f"resume={text(spec.directory)}")
        arguments = [*self.arguments(spec.settings), *place]
        os.chdir(self.folder)
        if self.prefix:
            return _forward([*self.prefix, self.script, *arguments])
        return load_script(self.script).main(arguments)


def load_script(path: str) -> Any:
    """The module of a script, loaded once."""
    name = f"hydratune_entry_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _forward(command: list[str]) -> int:
    """Run a command, and pass on to it the request to stop."""
    process = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Job:
    """One attempt at a trial, ready to be sent somewhere.

    Attributes:
        spec: the trial.
        task: a `Command`, or a function from the trial's settings to its objective.
        env: variables of its process, e.g. the devices that it sees.
        threads: CPU threads of torch; None leaves its default.
    """

    spec: TrialSpec
    task: Command | Callable[[dict[str, Any]], Any]
    env: dict[str, str] = field(default_factory=dict)
    threads: int | None = None

    def pack(self) -> bytes:
        return pack(self)

    def run(self) -> int:
        """Run in this process, as the last that it does; gives its exit code. The console goes to console.log.

        An earlier attempt that a killed supervisor left on a cluster is waited for, in `place.alone`.
        """
        directory = Path(self.spec.directory)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            alone(directory, self.spec.attempt)
        except TimeoutError as error:
            from hydratune.sweep.study import Outcome

            Outcome("crashed", reason=str(error), attempt=self.spec.attempt, study=self.spec.uid).write(
                directory
            )
            return 1
        (directory / "result.json").unlink(missing_ok=True)
        os.environ.update(self.env)
        os.environ[VARIABLE] = str(self.spec.write())
        self._console()
        if threads := self.threads or int(os.environ.get(THREADS, 0)):
            import torch

            torch.set_num_threads(threads)
        if isinstance(self.task, Command):
            return self.task.run(self.spec)
        trial = current()
        assert trial is not None
        if "numpy" in sys.modules:  # forked from one process, all would draw the same
            sys.modules["numpy"].random.seed()
        try:
            trial.judge(lambda: self.task(dict(self.spec.settings)))  # type: ignore[operator]
        except KeyboardInterrupt:
            return Interrupted.exit_code
        except Pruned:
            return Pruned.exit_code
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return getattr(error, "exit_code", 1)
        return 0

    def _console(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        log = os.open(
            Path(self.spec.directory) / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def pack(value: Any) -> bytes:
    """For another process: functions of a script or a notebook go by value, those of modules with the way to them."""
    return pickle.dumps(([str(Path(p).absolute()) for p in sys.path], cloudpickle.dumps(value)))


def unpack(packed: bytes) -> Any:
    paths, value = pickle.loads(packed)
    sys.path += [p for p in paths if p not in sys.path]
    return cloudpickle.loads(value)


def how_it_ended(code: int) -> str:
    """A crash in words; nothing for a process that came to its own end, whatever it says."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    return "" if code in (0, 1, 2, 3, 4, 130) else f"exit code {code}"


def run_packed(packed: bytes) -> int:
    """Run a packed job in this process."""
    job: Job = unpack(packed)
    return job.run()
