"""PPO and GRPO side by side with TRL: episodes per second, peak memory and rewards, as ratios of medians.

Each arm is a process of its own on the same saved models, prompts, reward and settings (`peers/`), fp32, and arms
alternate (A B A B …); a round has its own seed. PPO is held against TRL 1.9.2, the last with a PPO trainer, in the
environment that `peers/setup_trl_ppo.sh` makes (here, if need be); GRPO against the TRL of this environment.

    python bench/rl.py --tokenizer ../shared/data/tokenizer/gpt-neox-20b --append
    python bench/rl.py ppo-learns grpo-learns --rounds 6     learning differs more by seed than by arm: ask for many
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing heavy here: on Linux a process starts with its parent's peak memory as its own.
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from arms import BEST, DEFAULTS, OURS
from settings import Settings

BENCH = Path(__file__).resolve().parent
PEERS = BENCH / "peers"

BATCH = {"per_device_train_batch_size": 32, "response_length": 24, "num_ppo_epochs": 2, "learning_rate": 1e-3}
# TRL's PPO never clips gradients, so ours does not either
PPO = BATCH | {"max_grad_norm": 0.0, "episodes": 512, "reward": "digits"}
GRPO = BATCH | {"num_generations": 8, "temperature": 1.0, "episodes": 512, "reward": "digits"}
LARGE = {"vocabulary": "large", "hidden": 128, "layers": 4, "episodes": 96}
# questions of many lengths, completions of about 45 tokens (128 at most): what padding costs; the trainers' default passes
MIXED = {"per_device_train_batch_size": 16, "response_length": 128, "num_ppo_epochs": 4, "learning_rate": 3e-6,
         "vocabulary": "large", "hidden": 128, "layers": 4, "episodes": 32, "max_grad_norm": 0.0,
         "reward": "verify"}  # fmt: skip
STOPS = 1 / 48  # of each token, the chance of being EOS, in the mixed case
# for a GPU: half a billion parameters but for the MLP, which is three times as wide as the model
HALF = {"per_device_train_batch_size": 64, "response_length": 256, "num_ppo_epochs": 1, "learning_rate": 1e-6,
        "vocabulary": "large", "hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "episodes": 256,
        "max_grad_norm": 0.0, "reward": "digits"}  # fmt: skip
LEARNS = {"episodes": 1024, "kl_coef": 0.01, "learning_rate": 3e-3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", PPO),
    "ppo-reward-model": ("ppo", PPO | {"reward": "model"}),
    "ppo-50k": ("ppo", PPO | LARGE | {"reward": "verify"}),
    "ppo-mixed": ("ppo", MIXED),
    "ppo-half-b": ("ppo", HALF),
    "ppo-learns": ("ppo", PPO | LEARNS),
    "grpo": ("grpo", GRPO),
    "grpo-reward-model": ("grpo", GRPO | {"reward": "model"}),
    "grpo-50k": ("grpo", GRPO | LARGE),
    "grpo-half-b": ("grpo", HALF | {"num_generations": 8, "temperature": 1.0}),
    "grpo-learns": ("grpo", GRPO | LEARNS),
}
SCORES = {"ppo": "objective/scores", "grpo": "reward"}  # the logs' mean reward of a rollout


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; none: all that can run")
    parser.add_argument("--tokenizer", help="directory of that of the 50k cases, which are left out without")
    parser.add_argument(
        "--questions",
        help="JSON lines with `question` and `answer`, prompts of ppo-mixed, which is left out without",
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each arm")
    parser.add_argument("--peer-env", default=str(PEERS / ".venv-trl-ppo"), help="folder, for TRL's PPO")
    parser.add_argument("--cuda", action="store_true", help="on a GPU, under bf16 autocast")
    parser.add_argument("--append", action="store_true", help="write a section into RESULTS.md")
    parser.add_argument("--json", help="file for the figures of the one case, for suite.py")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.cases) - CASES.keys()):
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if not options.cases:
        options.cases = [name for name in CASES if options.tokenizer or not _is_large(name)]
        options.cases = [name for name in options.cases if options.questions or name != "ppo-mixed"]
        options.cases = [name for name in options.cases if options.cuda or not name.endswith("half-b")]
    elif "ppo-mixed" in options.cases and options.questions is None:
        parser.error("ppo-mixed needs --questions, a file of prompts")
    elif options.tokenizer is None and any(map(_is_large, options.cases)):
        parser.error("the 50k cases need --tokenizer, the directory of a tokenizer")
    return options


def _is_large(case: str) -> bool:
    return CASES[case][1].get("vocabulary") == "large"


def prepare(case: str, folder: Path, options: argparse.Namespace) -> None:
    """Save tokenizer, models and settings of a case into a folder, for all arms."""
    from common import build, load_tokenizer
    from make_settings import arithmetic_settings

    algo, values = CASES[case]
    values = values | {"vocabulary": options.tokenizer if _is_large(case) else "byte"}
    values |= {"use_cpu": False, "bf16": True} if options.cuda else {}
    path = arithmetic_settings(folder, options.prompts, **values)
    settings = Settings.read(path)
    tokenizer = load_tokenizer(settings)
    if case == "ppo-mixed":
        settings.rows = _questions(options.questions, tokenizer, options.prompts)
    kinds = {"model": ("policy", 0)}
    kinds |= {"value_model": ("scalar", 2)} if algo == "ppo" else {}
    kinds |= {"reward": ("scalar", 1)} if settings.reward == "model" else {}
    for name, (kind, more) in kinds.items():
        where = str(folder / name)
        model = build(settings, tokenizer, kind, None, settings.seed + more)
        if case == "ppo-mixed" and name == "model":
            _let_stop(model, tokenizer.eos_token_id, settings)
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
        setattr(settings, name, where)
    settings.write(path)


def _questions(path: str, tokenizer: Any, many: int) -> list[dict[str, Any]]:
    rows = []
    with Path(path).open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(many), strict=False):
            row = json.loads(line)
            answer = int(row["answer"].split()[-1].replace(",", ""))
            rows.append({"prompt_ids": tokenizer(row["question"])["input_ids"], "answer": answer})
    return rows


def _let_stop(model: Any, eos: int, settings: Settings) -> None:
    """Give a random model a chance of `STOPS` that any token is EOS, as a trained one has, by a constant direction that a
    bias puts into its last states."""
    import torch

    with torch.no_grad():
        model.model.layers[-1].self_attn.v_proj.bias.fill_(2.0)
        ids = torch.randint(model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
        states = model.model(ids).last_hidden_state
        constant = states.mean((0, 1))
        logit = math.log(model.config.vocab_size * STOPS) * settings.temperature
        model.get_input_embeddings().weight[eos] = constant * logit / (states @ constant).mean()


def run(command: list[str], threads: int, what: str) -> str:
    """Standard output of a process, which must succeed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    environment["PYTHONPATH"] = str(BENCH.parent / "src")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-3000:]}")
    return done.stdout


# what TRL does unless told otherwise, and costs time; what is sampled and trained on stays the same
TRL_DEFAULTS = {
    "gradient_checkpointing": True,
    "bf16": True,
    "gc_freeze": False,
    "local_rollout_forward_batch_size": 64,
}


def arms(algo: str, options: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """(command, to which the settings' path is added; what its settings have of their own) by arm."""
    ours = [sys.executable, str(PEERS / "ours_rl.py"), algo]
    peer = [sys.executable, str(PEERS / "trl_grpo.py")]
    if algo == "ppo":
        peer = [f"{options.peer_env}/bin/python", str(PEERS / "trl_ppo.py")]
    return {OURS: (ours, {}), DEFAULTS: (peer, TRL_DEFAULTS), BEST: (peer, {})}


def late_reward(algo: str, result: dict[str, Any]) -> float:
    """Mean reward of the last quarter of the episodes."""
    scores = [entry[SCORES[algo]] for entry in result["log"] if SCORES[algo] in entry]
    assert len(scores) == result["rollouts"], (len(scores), result["rollouts"])
    return statistics.fmean(scores[-(len(scores) // 4) :])


def compare(case: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The results of each arm, one a round."""
    algo = CASES[case][0]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms(algo, options)}
    with tempfile.TemporaryDirectory() as folder:
        more = [] if options.tokenizer is None else ["--tokenizer", options.tokenizer]
        more += [] if options.questions is None else ["--questions", options.questions]
        more += ["--cuda"] if options.cuda else []
        command = [sys.executable, __file__, case, "--prompts", str(options.prompts), *more]
        run([*command, "--prepare", folder], options.threads, f"preparing {case}")
        path = Path(folder) / "settings.json"
        for turn in range(options.rounds):
            for name, (start, own) in arms(algo, options).items():
                settings = Settings.read(path)
                settings.seed = turn
                own_path = path.with_name("arm.json")
                dataclasses.replace(settings, **own).write(own_path)
                said = run([*start, str(own_path)], options.threads, f"{case}, {name}")
                result = json.loads(said.splitlines()[-1])
                assert result["optimizer_steps"] == result["optimizer_steps_meant"], (case, name)
                assert result["threads"] == options.threads
                found[name].append(result | {"late_reward": late_reward(algo, result)})
                print(f"{case} round {turn + 1} {name}: {result['episodes_per_second_after_first']:.1f} "
                      f"episodes/s", file=sys.stderr)  # fmt: skip
    return found


COLUMNS = (
    "case", "arm", "episodes/s", "ours is faster by", "by CPU time", "generation s", "peak memory MiB", "ours / theirs",
    "of it by training", "reward at the end",
)  # fmt: skip


def _speed(result: dict[str, Any]) -> float:
    return result["episodes_per_second_after_first"]


def _cpu(result: dict[str, Any]) -> float:
    return result["cpu_seconds_after_first"]


def _memory(result: dict[str, Any]) -> float:
    return result["peak_cuda_mib"] or result["peak_rss_mib"]


def shared_figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The names that all benchmarks' figures have (`arms.measure`), medians over rounds."""
    made = {}
    for arm, results in found.items():
        columns = {
            "seconds": [r["seconds_after_first"] for r in results],
            "cpu_seconds": [_cpu(r) for r in results],
            "episodes": [r["episodes"] * (1 - 1 / r["rollouts"]) for r in results],
            "peak_mib": [_memory(r) for r in results],
        }
        made[arm] = {name: statistics.median(values) for name, values in columns.items()}
    return made


def lines(case: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table's rows of one case."""

    def median(arm: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, found[arm]))

    made = []
    for arm in found:
        rewards = [r["late_reward"] for r in found[arm]]
        own = [
            case if arm == OURS else "",
            arm,
            f"{median(arm, _speed):.1f}",
            f"{median('ours', _speed) / median(arm, _speed):.2f}×",
            f"{median(arm, _cpu) / median('ours', _cpu):.2f}×",
            f"{median(arm, lambda r: r['generation_seconds']):.1f}",
            f"{median(arm, _memory):.0f}",
            f"{median('ours', _memory) / median(arm, _memory):.2f}",
            f"{median(arm, lambda r: r['peak_rss_mib'] - r['resident_before_mib']):.0f}",
            f"{statistics.median(rewards):.3f} ({min(rewards):.3f} to {max(rewards):.3f})",
        ]
        made.append("| " + " | ".join(own) + " |")
    return made


def shown_command(options: argparse.Namespace) -> str:
    """What was run, without the places of this machine."""
    words, left = ["python", "bench/rl.py"], iter(sys.argv[1:])
    for word in left:
        if word == "--peer-env":
            next(left)
        elif not word.startswith("--peer-env="):
            words.append(word)
    if options.tokenizer:
        name = Path(options.tokenizer).name
        words = [f"TOKENIZERS/{name}" if w == options.tokenizer else w for w in words]
    if options.questions:
        words = [Path(w).name if w == options.questions else w for w in words]
    return shlex.join(words)


def main() -> None:
    options = parse()
    if options.prepare:
        prepare(options.cases[0], Path(options.prepare), options)
        return
    if any(CASES[case][0] == "ppo" for case in options.cases):
        setup = ["bash", str(PEERS / "setup_trl_ppo.sh"), options.peer_env]
        subprocess.run(setup, check=True, env=os.environ | {"PYTHON": sys.executable}, stdout=sys.stderr)
    table, versions = [], {}
    for case in options.cases:
        found = compare(case, options)
        table += lines(case, found)
        own = found[OURS][0]["versions"]
        versions |= {name: own[name] for name in ("torch", "transformers")}
        versions[f"TRL ({CASES[case][0].upper()})"] = found[BEST][0]["versions"]["trl"]
        same = found[BEST][0]["versions"]
        assert all(same[name] == own[name] for name in ("torch", "transformers")), (own, same)
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
    text = (
        f"## PPO and GRPO against TRL, {found['ours'][0]['device'].upper()}, {datetime.date.today()}\n\n"
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s) an arm, {said}; medians of "
        f"{options.rounds} rounds, arms alternating.\n\n    {shown_command(options)}\n\n{head}\n"
        + "\n".join(table)
    )
    print(text)
    if options.json:
        figures = {
            "case": options.cases[-1],
            "unit": "episodes",
            "arms": shared_figures(found),
            "table": text,
        }
        Path(options.json).write_text(json.dumps(figures), encoding="utf-8")
    if options.append:
        with (BENCH / "RESULTS.md").open("a", encoding="utf-8") as results:
            results.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
