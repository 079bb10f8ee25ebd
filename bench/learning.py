"""Does online RL learn? PPO with the verifier, PPO with a trained reward model, and GRPO, each over several seeds.

With the verifier they start from one small model after a short SFT on the built-in sums. The reward model is made by
`algo=reward` from a deeper model, and scores a policy that SFT on answers of which half are wrong has spoiled: the kinds of
mistake are those of its pairs. No question stands twice in the data, so the held-out ones are new to every model. Prints a
table of held-out accuracy before and after, and draws accuracy against episodes. Runs that are done already are not run again.

    python bench/learning.py --out OUT --seeds 3
    python bench/learning.py --out OUT --arms grpo --seeds 1 --picture OUT/learning.svg
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = "data.size=4096 data.distinct=true data.eval_fraction=0.125 data.seed=42"
SFT = "algo.assistant_only_loss=true"
STARTS = {  # what is trained before the arms
    "base": f"{SFT} model.architecture.num_hidden_layers=2 trainer.lr_scheduler_type=constant_with_warmup epochs=12",
    "base-rm": f"{SFT} epochs=10",
    "reward-8": "algo=reward model.name_or_path={out}/base-rm/model batch_size=32 lr=3e-4 epochs=8",
    "reward": "algo=reward model.name_or_path={out}/reward-8/model batch_size=32 lr=3e-4 epochs=4",
    "mixed": f"{SFT} model.name_or_path={{out}}/base-rm/model lr=5e-4 epochs=2 "
    "data.path={out}/rows/train.jsonl data.eval_path={out}/rows/eval.jsonl",
}
NAMES = {
    "base": "SFT",
    "base-rm": "SFT, four layers",
    "reward-8": "reward model from it, 8 epochs",
    "reward": "reward model, 4 epochs more",
    "mixed": "SFT of the four layers, half of the answers wrong",
}
LOOKS = "trainer.eval_on_start=true trainer.eval_strategy=steps trainer.eval_steps=5 trainer.logging_steps=5"
ONLINE = (
    "batch_size=256 max_steps=30 lr=3e-4 trainer.lr_scheduler_type=linear "
    f"trainer.warmup_steps=3 trainer.save_strategy=no {LOOKS} seed={{seed}}"
)
PPO = "algo=ppo algo.response_length=16 algo.temperature=1 algo.num_ppo_epochs=1"
ARMS = {
    "ppo": ("PPO, verifier", "base", PPO),
    "grpo": ("GRPO, verifier", "base", "algo=grpo algo.max_completion_length=16"),
    "ppo-rm": (
        "PPO, reward model (another start)",
        "mixed",
        f"{PPO} algo.kl_coef=1 algo.reward_model={{out}}/reward/model",
    ),
}
COLOURS = {"ppo": "#2f6fde", "ppo-rm": "#2c9b6a", "grpo": "#d9572b"}
ACCURACY = "eval_verified_accuracy"  # of sampled completions


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "img" / "learning.svg")
    options = parser.parse_args()
    options.arms = options.arms.split(",")
    if unknown := sorted(set(options.arms) - ARMS.keys()):
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    options.out = options.out.resolve()
    return options


def train(folder: Path, settings: str, threads: int) -> None:
    """One run through train.py, unless it is done; one that was cut short starts anew."""
    if (folder / "cost.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py"), *DATA.split(), *settings.split(), "tracking=none"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, f"output_dir={folder}"], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost = {"seconds": time.monotonic() - start, "cpu_seconds": cpu}
    print(f"{folder.name}: {cpu / 60:.1f} minutes of CPU", file=sys.stderr)
    (folder / "cost.json").write_text(json.dumps(cost))


def mix(folder: Path) -> None:
    """The rows of `DATA` with a wrong answer in about half of them, of the kinds of the built-in pairs, for SFT."""
    from hydratune.data.load import load
    from hydratune.settings import DataSettings

    settings = DataSettings(source="builtin", size=4096, distinct=True, eval_fraction=0.125)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), load(settings, 42, "unpaired"), strict=True):
        lines = [json.dumps({"messages": r["prompt"] + r["completion"], "answer": r["answer"]}) for r in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, name: str) -> float:
    return [entry[name] for entry in events(folder) if name in entry][-1]


def curve(folder: Path) -> list[tuple[int, float]]:
    """Episodes and the share of held-out questions whose sampled completion was right."""
    found = events(folder)
    episodes = {0: 0} | {entry["step"]: entry["episode"] for entry in found if "episode" in entry}
    return [(episodes[entry["step"]], entry[ACCURACY]) for entry in found if ACCURACY in entry]


def minutes(folders: list[Path], kind: str) -> float:
    return statistics.median(json.loads((f / "cost.json").read_text())[kind] for f in folders) / 60


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def table(out: Path, starts: list[str], runs: dict[str, list[Path]]) -> str:
    """Medians over seeds, and the lowest and highest."""
    curves = {arm: [curve(f) for f in folders] for arm, folders in runs.items()}
    lines = ["| run | sampled | greedy | episodes | minutes of CPU |", "|---|---|---|---|---|"]
    for name in starts:
        folder, sampled = out / name, ""
        if first := [c[0][1] for arm, found in curves.items() if ARMS[arm][1] == name for c in found]:
            sampled = spread(first)
        if name.startswith("reward"):
            said = f"{last(folder, 'eval_accuracy'):.1%} of held-out pairs"
        else:
            said = f"{last(folder, 'verified_accuracy'):.0%}"
        lines.append(f"| {NAMES[name]} | {sampled} | {said} | | {minutes([folder], 'cpu_seconds'):.1f} |")
    for arm, folders in runs.items():
        sampled = spread([c[-1][1] for c in curves[arm]])
        greedy = spread([last(f, "verified_accuracy") for f in folders])
        lines.append(
            f"| {ARMS[arm][0]} | {sampled} | {greedy} | {curves[arm][0][-1][0]:,} "
            f"| {minutes(folders, 'cpu_seconds'):.1f} |"
        )
    return "\n".join(lines)


def draw(runs: dict[str, list[Path]], path: Path) -> None:
    """Each arm's median over seeds as a line, lowest to highest as a band."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for arm, folders in runs.items():
        curves = [curve(f) for f in folders]
        episodes = [point[0] for point in curves[0]]
        values = [[point[1] for point in points] for points in zip(*curves, strict=True)]
        axes.plot(
            episodes, [statistics.median(v) for v in values], color=COLOURS[arm], label=ARMS[arm][0],
            linewidth=1.8, marker="o", markersize=3.5,
        )  # fmt: skip
        axes.fill_between(
            episodes, [min(v) for v in values], [max(v) for v in values],
            color=COLOURS[arm], alpha=0.18, linewidth=0,
        )  # fmt: skip
    axes.set_xlabel("episodes (completions sampled and rewarded)")
    axes.set_ylabel("held-out questions answered right")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "learning"}):
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None, "Creator": None})


def main() -> None:
    options = parse()
    own = {ARMS[arm][1] for arm in options.arms}
    starts = [name for name in STARTS if (name in own if name == "base" else "mixed" in own)]
    if "mixed" in own:
        mix(options.out / "rows")
    for name in starts:
        train(options.out / name, STARTS[name].format(out=options.out), options.threads)
    runs: dict[str, list[Path]] = {arm: [] for arm in options.arms}
    for seed in range(1, options.seeds + 1):
        for arm in options.arms:
            folder = options.out / f"{arm}-{seed}"
            _, start, own_settings = ARMS[arm]
            settings = f"{own_settings} model.name_or_path={{out}}/{start}/model {ONLINE}"
            settings = settings.format(out=options.out, seed=seed)
            train(folder, settings, options.threads)
            runs[arm].append(folder)
    import torch
    import transformers

    print(table(options.out, starts, runs))
    print(
        f"\n{datetime.date.today()}, {options.threads} thread(s) of {os.cpu_count()} {platform.machine()} cores, "
        f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, {options.seeds} seeds"
    )
    draw(runs, options.picture)


if __name__ == "__main__":
    main()
