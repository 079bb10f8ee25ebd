"""What a run records of itself: metrics, config, log, W&B, and the summary at its end.

W&B is a mirror, never a condition: without a login it writes offline, and when its server does not answer in time the
run goes on offline with one line that says so. `metrics.jsonl` is flushed at every event and is the record that counts.
"""

from __future__ import annotations

import io
import json
import logging
import math
import netrc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from hydratune.card import origin
from hydratune.objective import Objective, default, last_values, named
from hydratune.rowfile import append_rows
from hydratune.secrets import redact, redact_override
from hydratune.settings import RunSettings
from hydratune.whole import write_whole

log = logging.getLogger("hydratune")

_PACKAGES = ("hydratune", "torch", "transformers", "peft", "accelerate", "datasets", "hydra-core", "wandb")
_SECONDS_TO_CONNECT = 20
_SECONDS_TO_UPLOAD = 60
_SECONDS_TO_START = 120  # W&B's own service, which reaches nothing: on a cold disk it is slow


class PhaseClock:
    """Seconds by phase: config, imports, data, model, training, evaluation, saving; and those to the first step.

    Args:
        began: when the command did (`time.perf_counter()`), if that was before now: what lies between is the phase config.
    """

    def __init__(self, began: float | None = None) -> None:
        now = time.perf_counter()
        self._began = now if began is None else began
        self.seconds: dict[str, float] = {} if began is None else {"config": now - began}
        self.to_first_step: float | None = None
        self.started = time.time()

    def step_ended(self) -> None:
        """Only the first counts; on a GPU, that its work was handed over."""
        if self.to_first_step is None:
            self.to_first_step = time.perf_counter() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def write_config(out_dir: Path, resolved: dict[str, Any]) -> None:
    (out_dir / "config.yaml").write_text(
        yaml.safe_dump(redact(resolved), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def setup_logging(out_dir: Path, debug: bool) -> None:
    """Send the log of this package and the warnings of transformers to train.log; a resumed run appends.

    Warnings of this package are shown too.
    """
    handler = logging.FileHandler(out_dir / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("hydratune", "transformers", "accelerate", "peft", "datasets"):
        logger = logging.getLogger(name)
        for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False  # what the console shows is said once, by progress, by _say, and here
    if not any(isinstance(handler, _Shown) for handler in log.handlers):
        log.addHandler(_Shown(logging.WARNING))


class _Shown(logging.Handler):
    """Lines on stderr as it is at the time, which progress bars put themselves in the place of."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {record.getMessage()}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep the libraries' bars and warnings off the console: warnings go to train.log, our progress shows the rest."""
    import warnings

    with redirect_stdout(io.StringIO()):  # transformers prints a line about WANDB_MODE=offline
        import datasets
        import transformers
        import transformers.integrations.integration_utils

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # between transformers and peft, nothing for the user
    transformers.logging.disable_default_handler()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


@contextmanager
def _clean_arguments() -> Iterator[None]:
    """`sys.argv` without secrets, for W&B records it."""
    before = sys.argv
    sys.argv = [redact_override(word) for word in before]
    try:
        yield
    finally:
        sys.argv = before


class RunTracker:
    """metrics.jsonl, samples.jsonl and W&B of one run.

    Args:
        settings: of the run; `tracking` says what W&B does.
        out_dir: the run directory.
        clock: whose start is the zero of `time` in metrics.jsonl.
        filed: what W&B is told in place of the settings (name, group, id, job_type, …), and `tags` and `config` beside them.
    """

    def __init__(
        self, settings: RunSettings, out_dir: Path, clock: PhaseClock, *, filed: dict[str, Any] | None = None
    ) -> None:
        self._settings, self._out, self._clock = settings, out_dir, clock
        self._filed = filed or {}
        self._wandb: Any = None

    def start(self, extra_config: dict[str, Any] | None = None) -> None:
        """Open the W&B run, unless tracking is off. Never fails and never waits for long."""
        mode: str = self._settings.tracking.wandb
        if mode in ("auto", "online"):  # what asks for less than the environment stays
            mode = os.environ.get("WANDB_MODE") or mode
        if mode == "disabled":
            return
        import wandb

        if mode == "auto":
            mode = "online" if has_login() else "offline"
        try:
            self._wandb = self._open(wandb, mode, extra_config)
        except Exception as error:  # W&B raises many kinds; none of them may end a training run
            if mode == "offline":
                _say(f"W&B is off: {_first_line(error)}")
                return
            _say(f"W&B cannot be reached ({_first_line(error)}): this run is recorded offline")
            mode = "offline"
            try:
                self._wandb = self._open(wandb, mode, extra_config)
            except Exception as again:
                _say(f"W&B is off: {_first_line(again)}")
                return
        if mode == "offline":
            _say(f"W&B records offline; to upload: wandb sync {Path(self._wandb.dir).parent}")

    def _open(self, wandb: Any, mode: str, extra_config: dict[str, Any] | None) -> Any:
        settings, tracking = self._settings, self._settings.tracking
        tags = [settings.algo, *(settings.choices.get(g) for g in ("model", "data", "peft")), *tracking.tags]
        filed = dict(self._filed)
        tags += filed.pop("tags", [])
        config = {**redact(settings.resolved), **(extra_config or {}), **filed.pop("config", {})}
        patience = _SECONDS_TO_START if mode == "offline" else _SECONDS_TO_CONNECT
        names = {"group": tracking.group, "name": settings.run_name or self._out.name}
        with _clean_arguments():
            return wandb.init(
                mode=mode,
                dir=str(self._out),
                project=tracking.project,
                entity=tracking.entity,
                notes=tracking.notes,
                tags=list(dict.fromkeys(tag for tag in tags if tag and tag != "none")),
                config=config,
                reinit="finish_previous",
                **{**names, **filed},
                settings=wandb.Settings(
                    silent=True, console="off", save_code=False, disable_git=True, init_timeout=patience,
                    login_timeout=patience, finish_timeout=_SECONDS_TO_UPLOAD, x_service_wait=_SECONDS_TO_START,
                ),
            )  # fmt: skip

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in metrics.items() if isinstance(v, int | float)}, step=step)

    def _generations(self, rows: list[dict[str, Any]]) -> None:
        """generations.jsonl, and a table in W&B."""
        append_rows(self._out / "generations.jsonl", rows)
        self._table("generations", rows)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Keep sample completions: samples.jsonl, and a table in W&B."""
        (self._out / "samples.jsonl").unlink(missing_ok=True)
        append_rows(self._out / "samples.jsonl", rows)
        self._table("samples", rows)

    def _table(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._wandb is not None:
            import wandb

            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = wandb.Table(columns=columns, data=[[row.get(c) for c in columns] for row in rows])
            self._wandb.log({name: table})

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the W&B run with the summary; a failed upload is a line, not an error."""
        if self._wandb is None:
            return
        try:
            self._wandb.summary.update(
                {k: v for k, v in summary.items() if k not in ("command", "versions", "base")}
            )
            if status != "completed":
                self._wandb.tags = (*self._wandb.tags, status)
            self._wandb.finish(exit_code=0 if status in ("completed", "pruned") else 1)
        except Exception as error:
            _say(f"W&B did not take the end of the run: {_first_line(error)}")
        self._wandb = None

    def callback(self) -> Any:
        """The `transformers.TrainerCallback` that writes every log event of the main process."""
        from transformers import TrainerCallback

        tracker = self

        class _Metrics(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    keep_until(tracker._out / "metrics.jsonl", state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                tracker._clock.step_ended()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if state.is_world_process_zero and logs:
                    tracker._record(dict(logs), state)

            def on_generations(self, rows: list[dict[str, Any]]) -> None:
                """Completions made during an evaluation: an event of our own trainers, on the main process."""
                tracker._generations(rows)

        return _Metrics()

    def _record(self, logs: dict[str, Any], state: Any) -> None:
        metrics = {k: float(v) if hasattr(v, "item") else v for k, v in logs.items() if k != "epoch"}
        event = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        event |= {"time": round(time.time() - self._clock.started, 3)}
        event |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with (self._out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self.log({**metrics, "epoch": event["epoch"]}, state.global_step)


_PLACE = ("step", "epoch", "time")


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl; a line that is torn or damaged is left out."""
    path = out_dir / "metrics.jsonl"
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:  # of JSON, or of its encoding
            continue
        if isinstance(event, dict) and all(isinstance(event.get(k, 0), int | float) for k in _PLACE):
            events.append(event)
    return events


def keep_until(path: Path, step: int) -> None:
    """Drop events after the step that a run starts from, which it will record again."""
    if path.is_file():
        kept = [
            e for e in read_metrics(path.parent) if e.get("step", 0) <= step and (step or "loss" not in e)
        ]
        path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")


def collect_summary(
    settings: RunSettings, out_dir: Path, clock: PhaseClock, *, status: str, trainer: Any = None
) -> dict[str, Any]:
    """The facts of a run for summary.json.

    Returns:
        run_name, status (completed, pruned, failed, interrupted), algo, model, data, peft (entries picked), base (`card.origin`),
        objective {name, value}, objectives {name: value} when there are several, metrics {final, best}, steps,
        tokens, seconds {phase: s}, seconds_to_first_step (from the start of the command), tokens_per_second (over
        training), peak_memory {bytes, kind: "cuda" or "host"}, seed, device, versions, git_commit, command, started,
        logged_bytes (of metrics.jsonl, which tell whether a resumed run has logged since).
    """
    logged = out_dir / "metrics.jsonl"
    size = logged.stat().st_size if logged.is_file() else 0
    events = read_metrics(out_dir)
    final = last_values(events)
    best: dict[str, float] = {}
    for event in events:
        for key, value in event.items():
            if key in ("step", "epoch", "time") or not isinstance(value, int | float):
                continue
            better = min if key.endswith("loss") else max
            if key.endswith(("loss", "accuracy", "accuracies")):
                best[key] = better(best.get(key, value), value)
    objectives = named(settings.objective) or [Objective(default(final))]
    training = clock.seconds.get("training", 0.0)
    tokens = getattr(trainer, "num_tokens", 0)
    device, peak = _device_and_peak()
    summary: dict[str, Any] = {
        "run_name": settings.run_name or out_dir.name,
        "status": status,
        "algo": settings.algo,
        **{group: settings.choices.get(group) for group in ("model", "data", "peft")},
        "base": origin(settings.model.name_or_path),
        "objective": {},
        "metrics": {"final": final, "best": best},
        "steps": trainer.state.global_step if trainer is not None else 0,
        "tokens": tokens,
        "seconds": {k: round(v, 3) for k, v in clock.seconds.items()},
        "seconds_to_first_step": None if clock.to_first_step is None else round(clock.to_first_step, 3),
        "tokens_per_second": round(tokens / training, 1) if training and tokens else None,
        "peak_memory": peak,
        "seed": settings.seed,
        "device": device,
        "versions": {"python": sys.version.split()[0], **{p: v for p in _PACKAGES if (v := _version(p))}},
        "git_commit": _git_commit(),
        "command": settings.command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(clock.started)),
        "logged_bytes": size,
    }
    found = {str(o): o.value(events, summary) for o in objectives}
    values = {name: None if v is None or not math.isfinite(v) else v for name, v in found.items()}
    name, value = next(iter(values.items()))
    summary["objective"] = {"name": name, "value": value}
    if len(values) > 1:
        summary["objectives"] = values
    return summary


def write_summary(out_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json, replaced whole or not at all."""
    write_whole(out_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _device_and_peak() -> tuple[str, dict[str, Any]]:
    import platform

    import torch

    from hydratune.meter import host_peak

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), {"bytes": torch.cuda.max_memory_allocated(), "kind": "cuda"}
    device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device, {"bytes": host_peak(), "kind": "host"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def has_login() -> bool:
    """Whether W&B has an API key here; nothing is asked over the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(line: str) -> None:
    log.info(line)
    print(line, file=sys.stderr)
