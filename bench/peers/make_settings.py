"""Write a settings file for the peers: our byte tokenizer, and prompts of the built-in arithmetic as token ids.

In the project's environment:

    python bench/peers/make_settings.py FOLDER --prompts 64 episodes=256 learning_rate=1e-3 reward='"digits"'

gives FOLDER/tokenizer and FOLDER/settings.json, whose path is printed. Values are JSON (or else taken as text).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from settings import Settings


def arithmetic_settings(folder: str | Path, prompts: int, seed: int = 0, **values: Any) -> Path:
    """Write the tokenizer and the settings into `folder`, made if need be, and give the settings' path.

    Args:
        prompts: how many questions.
        seed: of the questions.
        values: fields of `Settings`.
    """
    from hydratune.data.builtin import arithmetic
    from hydratune.models import load_tokenizer

    folder = Path(folder)
    tokenizer = load_tokenizer("byte")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [
        {
            "prompt_ids": tokenizer.apply_chat_template(
                row["messages"][:1], add_generation_prompt=True, return_dict=False
            ),
            "answer": row["answer"],
        }
        for row in arithmetic(prompts, seed)
    ]
    path = folder / "settings.json"
    Settings(tokenizer=str(folder / "tokenizer"), rows=rows, **values).write(path)
    return path


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-seed", type=int, default=0)
    parser.add_argument("values", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    pairs = [item.partition("=") for item in options.values]
    values = {key: _value(text) for key, _, text in pairs}
    print(arithmetic_settings(options.folder, options.prompts, options.prompt_seed, **values))


if __name__ == "__main__":
    main()
