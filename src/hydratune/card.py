"""The model card of a trained model: what it was made from, how, and with which result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


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
    metrics = summary["metrics"]
    results = [
        f"| {k} | {v:.4g} |"
        for k, v in metrics["final"].items()
        if k.endswith(("loss", "accuracy", "entropy"))
    ]
    chosen = {**(config.get("trainer") or {}), **(config.get("algo") or {}), **(config.get("peft") or {})}
    settings = [f"| {k} | {v} |" for k, v in chosen.items() if isinstance(v, str | int | float | bool)]
    load = (
        "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(DIR)"
        if adapter
        else "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(DIR)"
    )
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

| metric | value |
|---|---|
{chr(10).join(results)}

## Settings

| setting | value |
|---|---|
{chr(10).join(settings)}

Command: `{summary["command"]}`

Versions: {versions}
"""
    (model_dir / "README.md").write_text(text, encoding="utf-8")
