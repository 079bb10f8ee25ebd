"""What the benchmarks against a peer share: one process per arm, arms alternating (A B A B …), medians and ratios.

The first two steps are warm-up. A run fails unless gradients flow, parameters move and the arms' losses agree.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def measure(make: Callable[[Any], Any]) -> dict[str, Any]:
    """Train, and give real tokens per second after warm-up, peak memory in MiB, and the losses.

    Args:
        make: from a callback to the trainer that has it.
    """
    import torch
    from transformers import TrainerCallback

    cuda, times = torch.cuda.is_available(), []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = make(Clock())
    watched = next(p for p in trainer.model.parameters() if p.requires_grad)
    before = watched.detach().clone()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(float(entry["grad_norm"]) > 0 for entry in logs), "no gradient"
    assert not torch.equal(before, watched), "parameters did not move"
    memory = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "tokens_per_second": (logs[-1]["num_tokens"] - logs[1]["num_tokens"]) / (times[-1] - times[1]),
        "peak_mib": memory / 2**20,
        "losses": [float(entry["loss"]) for entry in logs],
    }


def compare(script: str, arms: list[str], rounds: int, ours: str, tolerance: float, title: str) -> None:
    """Run the script once for each arm and round, with `--arm`, and print the table.

    Args:
        ours: the arm that all others are held against.
        tolerance: of the losses, for peers that train in another precision by default.
    """
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            command = [sys.executable, script, *sys.argv[1:], "--arm", arm]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
    for arm, runs in results.items():
        pairs = zip(results[ours][0]["losses"], runs[0]["losses"], strict=True)
        worst = max(abs(a - b) for a, b in pairs)
        assert worst < tolerance, f"{arm}: the losses differ by {worst}"

    import torch
    import transformers

    speed = {arm: statistics.median(r["tokens_per_second"] for r in runs) for arm, runs in results.items()}
    memory = {arm: statistics.median(r["peak_mib"] for r in runs) for arm, runs in results.items()}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads, {title}")  # fmt: skip
    print("| arm | tokens/s | ours is faster by | peak memory MiB | ours / theirs |\n|---|---|---|---|---|")
    for arm in arms:
        print(f"| {arm} | {speed[arm]:.0f} | {speed[ours] / speed[arm]:.2f}× | {memory[arm]:.0f} "
              f"| {memory[ours] / memory[arm]:.2f} |")  # fmt: skip
