"""What the benchmarks share: one process per arm, arms alternating (A B A B …), medians and ratios.

The first two steps are warm-up. A run fails unless gradients flow, parameters move and the arms' losses agree.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

WARM_UP = 2
OURS = "ours"
DEFAULTS, BEST = "TRL, defaults", "TRL, at its best"


def measure(make: Callable[[Any], Any]) -> dict[str, Any]:
    """Train, and give the figures of the steps after warm-up.

    Args:
        make: from a callback to the trainer that has it.

    Returns:
        seconds and cpu_seconds of those steps, tokens (not padding) of them, peak_mib of memory, first_step (seconds from
        the start of the process to the end of its first step), mfu (of a known GPU), losses.
    """
    import psutil
    import torch
    from transformers import TrainerCallback

    from hydratune.meter import host_peak, utilisation

    cuda, times, cpu, first = torch.cuda.is_available(), [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            cpu.append(time.process_time())
            if not first:
                first.append(time.time() - psutil.Process().create_time())

    trainer = make(Clock())
    watched = next(p for p in trainer.model.parameters() if p.requires_grad)
    before = watched.detach().flatten()[:4096].cpu().clone()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(float(entry["grad_norm"]) > 0 for entry in logs), "no gradient"
    assert not torch.equal(before, watched.detach().flatten()[:4096].cpu()), "parameters did not move"
    peak = torch.cuda.max_memory_allocated() if cuda else host_peak()
    seconds = times[-1] - times[WARM_UP - 1]
    tokens = logs[-1]["num_tokens"] - logs[WARM_UP - 1]["num_tokens"]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu[-1] - cpu[WARM_UP - 1],
        "tokens": tokens,
        "peak_mib": peak / 2**20,
        "first_step": first[0],
        "mfu": utilisation(tokens / seconds, trainer.model),
        "losses": [float(entry["loss"]) for entry in logs],
    }


def alternate(script: str, arms: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The results of each arm, one a round: the script is run again with `--arm NAME` and prints JSON as its last line.

    Threads sleep while they wait, as `train.py` has it: on a CPU that others use too, spinning ones make any figure.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in arms:
            command = [sys.executable, script, *sys.argv[1:], "--arm", arm]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}, {arm}: {results[arm][-1]['seconds']:.2f} s", file=sys.stderr)
    return results


def medians(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median of each number by arm; None where there is none."""
    made: dict[str, dict[str, Any]] = {}
    for arm, runs in results.items():
        names = [name for name, value in runs[0].items() if value is None or isinstance(value, int | float)]
        columns = {name: [run[name] for run in runs] for name in names}
        made[arm] = {name: None if None in c else statistics.median(c) for name, c in columns.items()}
    return made


def check_losses(results: dict[str, list[dict[str, Any]]], tolerance: dict[str, float]) -> None:
    """Every arm's losses against ours, step by step in every round; one that trains on other batches has no tolerance."""
    for arm, allowed in tolerance.items():
        for own, theirs in zip(results[OURS], results[arm], strict=True):
            pairs = zip(own["losses"], theirs["losses"], strict=True)
            worst = max(abs(a - b) / max(1, abs(a)) for a, b in pairs)
            assert worst < allowed, f"{arm}: the losses differ by {worst}"


def figures(found: dict[str, dict[str, Any]], unit: str) -> str:
    """The table of one case.

    Args:
        found: by arm seconds, cpu_seconds, peak_mib, first_step and the unit's plural (real tokens, episodes).
    """
    ours = found[OURS]
    head = [
        "arm",
        f"{unit}/s",
        "ours is faster by",
        "by CPU time",
        "peak memory MiB",
        "ours / theirs",
        "first step s",
    ]
    head += ["MFU"] * (ours.get("mfu") is not None)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm, own in found.items():
        cells = [
            arm,
            f"{own[unit] / own['seconds']:.0f}",
            f"{speed(ours, own, unit):.2f}×",
            f"{speed(ours, own, unit, 'cpu_seconds'):.2f}×",
            f"{own['peak_mib']:.0f}",
            f"{ours['peak_mib'] / own['peak_mib']:.2f}",
            "–" if own.get("first_step") is None else f"{own['first_step']:.1f}",
        ]
        if ours.get("mfu") is not None:
            cells.append(f"{own['mfu']:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(ours: dict[str, Any], theirs: dict[str, Any], unit: str, clock: str = "seconds") -> float:
    """How many times as much ours does in a second."""
    return (ours[unit] / ours[clock]) / (theirs[unit] / theirs[clock])


def machine() -> str:
    """What a figure depends on."""
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    own = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return f"{device}, {torch.get_num_threads()} threads, {own}"


def report(
    case: str, results: dict[str, list[dict[str, Any]]], unit: str, title: str, path: str | None
) -> None:
    """Print the table of a case; its numbers go to a file, for `suite.py`."""
    found = medians(results)
    table = f"{title}; {machine()}\n\n{figures(found, unit)}"
    print(table)
    if path:
        Path(path).write_text(json.dumps({"case": case, "unit": unit, "arms": found, "table": table}))
