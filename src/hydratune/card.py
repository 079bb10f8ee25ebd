"""The model card of a trained model: what it was made from, how, and with which result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hydratune.amounts import amount, duration
from hydratune.objective import REWARD_ACCURACY, REWARDS


def facts_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run's results and costs are, in words: for the table at its end and for the card."""
    metrics = summary["metrics"]
    final, best = metrics["final"], metrics["best"]
    rows = []
    for key, name in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        if key in final:
            better = best.get(key, final[key])
            rows.append(
                (name, f"{final[key]:.4f}" + (f"  (best {better:.4f})" if better < final[key] else ""))
            )
    if "eval_mean_token_accuracy" in final:
        rows.append(("token accuracy", f"{final['eval_mean_token_accuracy']:.1%}"))
    rows += [("reward accuracy", f"{final[key]:.1%}") for key in REWARD_ACCURACY if key in final]
    for key in (key for key in REWARDS if key in final):
        rows.append(("mean reward" + " (evaluation)" * (key == "eval_reward"), f"{final[key]:.3f}"))
    if "verified_accuracy" in final:
        rows.append(("verified answers", f"{final['verified_accuracy']:.0%}"))
    spent = duration(summary["seconds"].get("training", 0))
    speed = f", {amount(summary['tokens_per_second'])} tokens/s" if summary["tokens_per_second"] else ""
    peak = summary["peak_memory"]
    rows.append(
        ("training", f"{summary['steps']} steps, {amount(summary['tokens'])} tokens in {spent}{speed}")
    )
    rows.append(("peak memory", f"{peak['bytes'] / 2**30:.1f} GiB ({peak['kind']})"))
    return rows


def write_card(model_dir: Path, out_dir: Path) -> None:
    """Write README.md beside the weights, from summary.json and config.yaml of the run."""
    summary = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((out_dir / "config.yaml").read_text(encoding="utf-8")) or {}
    adapter = (model_dir / "adapter_config.json").is_file()
    base = (config.get("model") or {}).get("name_or_path")
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "tags": ["hydratune", summary["algo"]],
    }
    if base and not Path(base).is_absolute() and not Path(base).exists():
        front["base_model"] = base  # a hub id; a local directory means nothing to a reader
    shown = base if base is None or "base_model" in front else Path(base).name
    results = [f"| {name} | {text} |" for name, text in facts_of(summary)]
    chosen = {**(config.get("trainer") or {}), **(config.get("algo") or {}), **(config.get("peft") or {})}
    settings = [
        f"| {k} | {_local(str(v))} |" for k, v in chosen.items() if isinstance(v, str | int | float | bool)
    ]
    auto = f"Auto{'Peft' * adapter}ModelFor{'SequenceClassification' if summary['algo'] == 'reward' else 'CausalLM'}"
    labels = ", num_labels=1" if adapter and summary["algo"] == "reward" else ""
    load = f"from {front['library_name']} import {auto}\n\nmodel = {auto}.from_pretrained(DIR{labels})"
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    text = f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {summary["run_name"]}

{shown or "A model with random weights"} trained with `{summary["algo"]}` on `{summary["data"]}` (adapter: {summary["peft"]}), \
{summary["steps"]} steps, {summary["tokens"]} tokens, seed {summary["seed"]}, by hydratune.

```python
{load}
```

## Results

| | |
|---|---|
{chr(10).join(results)}

## Settings

| setting | value |
|---|---|
{chr(10).join(settings)}

Command: `{_local(summary["command"])}`

Versions: {versions}
"""
    (model_dir / "README.md").write_text(text, encoding="utf-8")


def _local(text: str) -> str:
    """Without the folders of this machine, which mean nothing to a reader."""
    return re.sub(r"(?<![\w.…/])~?/(?:[^\s,'\"\]/]+/)+", "…/", text)
