"""The model card of a trained model: what it was made from, how, and with which result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hydratune.amounts import amount, duration
from hydratune.objective import REWARD_ACCURACY, REWARDS

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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


def origin(name_or_path: str | None) -> dict[str, str | None] | None:
    """What a run started from, in words that still hold when folders are moved or pushed.

    Args:
        name_or_path: of the base: a hub id, or a directory as seen from here.

    Returns:
        Its `name` (of a run's model, the run's) and its `hub` id: its own, or that of what it was itself trained from; None
        when no hub has it. None for random weights.
    """
    if not name_or_path:
        return None
    path = Path(name_or_path).expanduser()
    if _is_hub_id(name_or_path):
        return {"name": name_or_path, "hub": name_or_path}
    if not path.is_dir():
        return {"name": _told(path), "hub": None}
    path = path.absolute()
    run = next((p for p in (path, *path.parents[:3]) if (p / "summary.json").is_file()), None)
    if run is None:
        return {"name": _told(path), "hub": _base_in(path / "README.md")}
    summary, config = _loaded(run / "summary.json"), _loaded(run / "config.yaml")
    named = (config.get("model") or {}).get("name_or_path") or ""
    before = (summary.get("base") or {}).get("hub") or (named if _is_hub_id(named) else None)
    return {"name": str(summary.get("run_name") or run.name), "hub": before}


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).is_dir()


def _told(path: Path) -> str:
    return path.parent.name if path.name == "model" else path.name


def _loaded(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))  # which reads JSON too
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _base_in(card: Path) -> str | None:
    """The hub id of the base that a model card names, the first of several."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n")
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    named = front.get("base_model") if isinstance(front, dict) else None
    named = next(iter(named), None) if isinstance(named, list) else named
    return named if isinstance(named, str) and _is_hub_id(named) else None


def write_card(model_dir: Path, out_dir: Path) -> None:
    """Write README.md beside the weights, from summary.json and config.yaml of the run."""
    summary = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((out_dir / "config.yaml").read_text(encoding="utf-8")) or {}
    adapter = (model_dir / "adapter_config.json").is_file()
    named = (config.get("model") or {}).get("name_or_path")
    base = summary["base"] if "base" in summary else origin(named)  # as it was when the run ended
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "tags": ["hydratune", summary["algo"]],
    }
    shown = "A model with random weights"
    if base:
        shown, hub = str(base["name"]), base["hub"]
        if hub:
            front["base_model"] = hub  # a local directory means nothing to a reader
            shown += f" (from {hub})" * (hub != shown)
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

{shown} trained with `{summary["algo"]}` on `{summary["data"]}` (adapter: {summary["peft"]}), \
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
