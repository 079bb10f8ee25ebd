"""Trials on a cluster: SLURM (or its local mode) by submitit, and Ray.

Neither runs a trial in its own process: each runs a keeper (`keeper.py`) that starts the packed job, and says how it
ended. What a trial is told goes through its directory (`place.py`), which all nodes must share anyway, because results
and checkpoints are in it; not by signals, because these do not arrive as they should: `scancel --signal=TERM --full`
ends the batch script's shell, and with it the job, and srun answers it by killing its step; `ray.cancel` raises
KeyboardInterrupt, which leaves no time for a checkpoint; and no signal reaches another node of a Ray cluster.

When the supervisor is killed, SLURM jobs go on, and so do those of submitit's local mode. That is wanted: one that
comes to its end before somebody takes up the study is told from its result. If its trial is taken up before, the new
attempt's order tells the old keeper to leave: it has the run save a checkpoint, ends it, and only then the new attempt
begins (`place.alone`), from that checkpoint. Ray ends the jobs of a supervisor that is gone.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratune.errors import UserError, Violation, nearest
from hydratune.sweep.job import Job
from hydratune.sweep.keeper import APPEARS, keep, keep_for_submitit
from hydratune.sweep.place import Word, has_begun, order

_LOCAL_POLL, _SLURM_POLL = 0.1, 2.0  # seconds between looks at jobs; submitit asks SLURM more rarely still
_ASK = 60.0  # seconds after which SLURM is asked in any case; submitit alone would take up to ten minutes
_CLOSE = 15.0  # seconds for running jobs to end when the executor closes

# The states in which a SLURM job stays. `Job.done()` of submitit takes every state it does not know for an end, a
# suspended job's too, and never sees one in a job that was preempted and not requeued.
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "FINISHED", "INTERRUPTED", "NODE_FAIL",
    "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT", "NO",
}  # fmt: skip  # FINISHED, INTERRUPTED and NO PROCESS AND NO RESULT are of submitit's local mode


@dataclass
class _Run:
    """A job that was handed over."""

    handle: Any  # submitit's job, or Ray's reference
    directory: Path
    attempt: int
    started: float
    ended: float | None = None  # when it was first seen ended, without a word from its keeper


class _Orders:
    """What both executors have in common: jobs by key, and their orders."""

    def __init__(self) -> None:
        self._running: dict[int, _Run] = {}
        self._word: Word = "run"

    def prepare(self, stopped: Callable[[], bool]) -> None:
        """Every job prepares for itself."""

    def start(self, key: int, job: Job) -> None:
        directory, attempt = Path(job.spec.directory), job.spec.attempt
        order(directory, attempt, "run")
        self._running[key] = _Run(self._submit(job), directory, attempt, time.monotonic())
        if self._word != "run":  # a signal came meanwhile
            self._tell(self._word)

    def stop(self, *, now: bool) -> None:
        word: Word = "end" if now else "stop"
        if word == self._word:
            return
        self._word = word
        self._tell(self._word)
        self._cancel(now=now)

    def close(self) -> None:
        if self._running:
            self.stop(now=True)
            until = time.monotonic() + _CLOSE
            while self._running and time.monotonic() < until:
                self.wait(1.0)

    def _tell(self, word: Word) -> None:
        for run in self._running.values():
            with contextlib.suppress(OSError):
                order(run.directory, run.attempt, word)

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        raise NotImplementedError

    def _submit(self, job: Job) -> Any:
        raise NotImplementedError

    def _cancel(self, *, now: bool) -> None:
        """Withdraw the jobs that still wait for a place; all of them, when it shall be now."""
        raise NotImplementedError


class SubmititExecutor(_Orders):
    """Every trial is a job of submitit.

    Args:
        options: `cluster` (slurm, local, null: SLURM where there is srun), and those of submitit's
            `AutoExecutor.update_parameters`, e.g. slurm_partition, timeout_min (default: a day), gpus_per_node
            (without it a trial sees no GPU, in local mode too).
        folder: for the jobs' files, on a file system that the nodes share.

    Raises:
        UserError: submitit is not installed, or does not take the options.
    """

    def __init__(self, options: Mapping[str, Any], folder: Path):
        super().__init__()
        submitit = _package("submitit", "slurm")
        logging.getLogger("submitit").setLevel(logging.CRITICAL)  # it speaks between the lines of the view
        # A folder for each supervisor: in local mode jobs are named by process ids, which come again
        self._folder = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._executor = _auto_executor(submitit, dict(options), self._folder)
        self._local = self._executor.cluster == "local"
        self._looked = self._asked = -math.inf
        self._accepted = False

    def script(self, job: Job) -> str:
        """What sbatch is given for a job; empty in local mode."""
        self._name(job)
        inner = self._executor._executor
        return inner._make_submission_file_text(inner._submitit_command_str, "")

    def _name(self, job: Job) -> None:
        name = re.sub(r"[^\w.-]", "-", f"hydratune-{job.spec.study}-{job.spec.number}")
        self._executor.update_parameters(name=name)

    def _submit(self, job: Job) -> Any:
        """
        Raises:
            UserError: the first job of all was refused; a later refusal is a crash of its trial, which is retried.
        """
        self._name(job)
        # In local mode the job is in the terminal's group: blocked here, SIGINT is blocked in it until it has left that
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            given = self._executor.submit(keep_for_submitit, job.pack(), job.spec.directory, job.spec.attempt)
        except Exception as error:
            if not self._accepted:
                fix = "mend the options; the whole message is above"
                raise _wrong(None, None, f"the job was refused: {_says(error)}", fix) from error
            return f"the job was refused: {_says(error)}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._accepted = True
        return given

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        until, poll = time.monotonic() + seconds, _LOCAL_POLL if self._local else _SLURM_POLL
        ended: list[tuple[int, str]] = []
        while not ended:
            now = time.monotonic()
            if self._running and now >= self._looked + poll:
                self._looked = now
                ended = self._look(now)
            if now >= until:
                break
            time.sleep(max(0.0, min(until, self._looked + poll if self._running else until) - now))
        for key, how in ended:
            self._tidy(self._running.pop(key), keep_logs=bool(how))
        return ended

    def _look(self, now: float) -> list[tuple[int, str]]:
        gone: set[str] = set()
        if not self._local and now > self._asked + (_ASK if self._word == "run" else _ASK / 12):
            self._asked = now
            jobs = [r.handle for r in self._running.values() if not isinstance(r.handle, str)]
            for job in jobs[:1]:
                # submitit takes a suspended job for one that has ended, and would not ask about it again
                getattr(job.watcher, "_finished", set()).difference_update(j.job_id for j in jobs)
                job.watcher.update()  # of all jobs
            old = {
                r.handle.job_id for r in self._running.values() if now - r.started > _ASK and r.handle in jobs
            }
            if any(job.job_id in old and job.state == "UNKNOWN" for job in jobs):
                gone = old - _queued(old)  # a cluster that keeps no accounts knows no more
        return [
            (key, how) for key, run in self._running.items() if (how := self._how(run, now, gone)) is not None
        ]

    def _how(self, run: _Run, now: float, gone: set[str]) -> str | None:
        """How a job ended, None while it has not."""
        job = run.handle
        if isinstance(job, str):
            return job
        job.done()  # has submitit ask SLURM when it is time to, and NFS look again
        state = str(job.state).upper().split()[0]  # "CANCELLED by 1000"
        if job.paths.result_pickle.exists():
            return _result(job.paths.result_pickle)
        if state not in _ENDED and not (state == "UNKNOWN" and job.job_id in gone):
            return None
        if self._local:
            return f"its process ended without a word (see {job.paths.stderr})"
        run.ended = run.ended or now
        if has_begun(run.directory, run.attempt) and now - run.ended < APPEARS:
            return None  # its word may be on its way
        known = "without a trace" if state == "UNKNOWN" else f"in state {state}"
        return f"the SLURM job {job.job_id} ended {known} (see {job.paths.stderr})"

    def _tidy(self, run: _Run, *, keep_logs: bool) -> None:
        if isinstance(run.handle, str):
            return
        for file in self._folder.glob(f"{run.handle.job_id}_*"):
            if not keep_logs or file.suffix == ".pkl":
                file.unlink(missing_ok=True)

    def _cancel(self, *, now: bool) -> None:
        ids = [r.handle.job_id for r in self._running.values() if not isinstance(r.handle, str)]
        if self._local or not ids:
            return
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            only = [] if now else ["--state=PENDING"]
            subprocess.run(["scancel", *only, *ids], capture_output=True, timeout=30)

    def close(self) -> None:
        super().close()
        for link in self._folder.glob(".submission_file_*"):
            if not link.exists():
                link.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # unless logs were kept


def _auto_executor(submitit: Any, options: dict[str, Any], folder: Path) -> Any:
    """
    Raises:
        UserError: an option is wrong, or there is no SLURM here.
    """
    cluster = options.pop("cluster", None)
    if cluster not in (None, "slurm", "local"):
        why = "runs in this process, one after the other" if cluster == "debug" else "is no cluster"
        raise _wrong("cluster", cluster, why, "use slurm or local, or null: SLURM where there is srun")
    several = [k for k in options if k.endswith(("tasks_per_node", "nodes")) and options[k] not in (None, 1)]
    if several:
        why = "would run the same trial several times"
        fix = "leave it out; sweep.launch_prefix starts the processes of a trial, e.g. 'accelerate launch'"
        raise _wrong(several[0], options[several[0]], why, fix)
    # SLURM must not start a job again behind the supervisor's back, which itself starts what was preempted
    extra = {"no-requeue": True, **(options.pop("slurm_additional_parameters", None) or {})}
    try:
        # No timeout left to requeue after: -1, for at 0 submitit still requeues a job that was preempted
        executor = submitit.AutoExecutor(
            folder=folder, cluster=cluster, slurm_max_num_timeout=-1, local_max_num_timeout=-1
        )
    except RuntimeError as error:
        raise _wrong("cluster", cluster, str(error), "run it on a login node of the cluster") from error
    known = {"cluster", *executor._typed_parameters()}
    known |= {f"slurm_{p}" for p in {*known, *submitit.SlurmExecutor._valid_parameters()}} - {"slurm_cluster"}
    known |= {f"local_{p}" for p in submitit.LocalExecutor._valid_parameters()}
    _check_names(options, known - {"name", "slurm_name", "slurm_job_name"})
    try:
        executor.update_parameters(
            **{"timeout_min": 24 * 60, **options, "slurm_additional_parameters": extra}
        )
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise _wrong(None, options, _says(error), "see submitit's AutoExecutor.update_parameters") from error
    return executor


def _result(path: Path) -> str:
    """What a keeper said, or the error that kept it from saying it."""
    try:
        outcome, said = pickle.loads(path.read_bytes())
    except Exception as error:
        return f"what its job left cannot be read ({_says(error)})"
    return said if outcome == "success" else f"its job failed: {_says(said)}"


def _queued(ids: set[str]) -> set[str]:
    """Those of the jobs that SLURM still has in its queue, running or not; all of them when it does not answer."""
    command = ["squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ids
    return ids & {*asked.stdout.split()}


class RayExecutor(_Orders):
    """Every trial is a task of Ray, with a worker process of its own.

    Args:
        options: `address` of a cluster (null: the one that RAY_ADDRESS names, else one is started here), `runtime_env`,
            `namespace`, and what a trial asks for: num_cpus, num_gpus (without it a trial sees no GPU), memory (bytes),
            resources, …

    Raises:
        UserError: ray is not installed, does not take the options, or the cluster does not answer.
    """

    _CLUSTER = ("address", "runtime_env", "namespace")
    _TASK = (
        "num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "label_selector", "scheduling_strategy",
    )  # fmt: skip

    def __init__(self, options: Mapping[str, Any]):
        super().__init__()
        # Read when Ray starts: nothing is sent anywhere, and no warning that a trial without num_gpus sees no GPU
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        self._ray = _package("ray", "ray")
        chosen = {k: v for k, v in options.items() if v is not None}
        _check_names(chosen, {*self._CLUSTER, *self._TASK})
        asked = {k: v for k, v in chosen.items() if k in self._TASK}
        try:
            # A process never serves two trials, so that nothing leaks; and only the supervisor starts one again
            self._task = self._ray.remote(max_retries=0, max_calls=1, **asked)(keep)
        except (ValueError, TypeError) as error:
            raise _wrong(None, asked, _says(error), "see ray.remote") from error
        self._ours = not self._ray.is_initialized()
        if self._ours:
            address = chosen.get("address") or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
            self._connect(address, {k: chosen[k] for k in ("runtime_env", "namespace") if k in chosen})
            if address == "local":
                self._check_size(asked)

    def _connect(self, address: str, chosen: dict[str, Any]) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)  # it speaks between the lines of the view
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                **chosen,
            )
        except Exception as error:  # of many kinds, ConnectionError and ValueError among them
            why = f"Ray does not start: {_says(error)}"
            fix = "check that the cluster runs, that both have one version of Ray, and its token (RAY_AUTH_MODE=token)"
            raise _wrong("address", address, why, fix) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # Ray has put its own there

    def _check_size(self, asked: Mapping[str, Any]) -> None:
        """A cluster that is started here does not grow: a trial that does not fit would wait for ever."""
        there = self._ray.cluster_resources()
        wanted = {"CPU": asked.get("num_cpus"), "GPU": asked.get("num_gpus"), **asked.get("resources", {})}
        for name, number in wanted.items():
            if number and number > there.get(name, 0):
                self.close()
                has = there.get(name, 0)
                key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(name, f"resources.{name}")
                raise _wrong(
                    key, number, f"there is {has:g} here", "ask for less, or give a cluster's address"
                )

    def _submit(self, job: Job) -> Any:
        name = f"hydratune-{job.spec.study}-{job.spec.number}"
        return self._task.options(name=name).remote(job.pack(), job.spec.directory, job.spec.attempt)

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        keys = {run.handle: key for key, run in self._running.items()}
        if not keys:
            time.sleep(seconds)
            return []
        ready, rest = self._ray.wait([*keys], timeout=seconds)
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        ended = [(keys[ref], self._how(ref)) for ref in ready]
        for key, _ in ended:
            del self._running[key]
        return ended

    def _how(self, ref: Any) -> str:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.TaskCancelledError:
            return "it was cancelled"
        except errors.OutOfMemoryError:
            return "Ray ended it, because its node was out of memory"
        except (errors.WorkerCrashedError, errors.NodeDiedError) as error:
            return "its node died" if isinstance(error, errors.NodeDiedError) else "its Ray worker died"
        except errors.RayTaskError as error:
            return f"its task failed: {_says(error.cause)}"
        except errors.RayError as error:
            return f"Ray: {_says(error)}"

    def _cancel(self, *, now: bool) -> None:
        for run in [*self._running.values()]:
            # One that began ends by its order; a KeyboardInterrupt would leave it no time for a checkpoint
            if now or not has_begun(run.directory, run.attempt):
                self._ray.cancel(run.handle, force=False)

    def close(self) -> None:
        super().close()
        for run in self._running.values():
            self._ray.cancel(run.handle, force=True)
        self._running.clear()
        if self._ours:
            self._ray.shutdown()


# -- what is wrong


def _package(name: str, extra: str) -> Any:
    """
    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        chosen = "submitit" if extra == "slurm" else name
        fix = f"pip install 'hydratune[{extra}]'"
        raise UserError(Violation("sweep.executor", chosen, f"needs the package {name}", fix)) from error


def _wrong(option: str | None, value: object, why: str, fix: str) -> UserError:
    key = f"sweep.executor_options.{option}" if option else "sweep.executor_options"
    return UserError(Violation(key, value, why, fix))


def _check_names(options: Mapping[str, Any], known: set[str]) -> None:
    """
    Raises:
        UserError: with all names that are not known.
    """
    unknown = [k for k in options if k not in known]
    if unknown:
        raise UserError(
            Violation(f"sweep.executor_options.{k}", options[k], "there is no such option", nearest(k, known))
            for k in unknown
        )


def _says(error: object) -> str:
    """The line of a message that says it: the last of a traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if "Traceback" in str(error) else 0] if lines else type(error).__name__
