"""Write a settings file for the peers: a tokenizer, and prompts of the built-in arithmetic as token ids.

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


def arithmetic_settings(
    folder: str | Path, prompts: int, question_seed: int = 0, vocabulary: str = "byte", **values: Any
) -> Path:
    """Write the tokenizer and the settings into `folder`, made if need be, and give the settings' path.

    Args:
        prompts: how many questions.
        question_seed: of the questions.
        vocabulary: "byte" for our byte tokenizer, or a tokenizer's directory.
        values: fields of `Settings`.
    """
    from hydratune.data.builtin import arithmetic
    from hydratune.models import load_tokenizer

    folder = Path(folder)
    tokenizer = load_tokenizer(vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [
        {
            "prompt_ids": tokenizer.apply_chat_template(
                row["messages"][:1], add_generation_prompt=True, return_dict=False
            ),
            "answer": row["answer"],
        }
        for row in arithmetic(prompts, question_seed)
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
    parser.add_argument("--question-seed", type=int, default=0)
    parser.add_argument("--vocabulary", default="byte", help="byte, or a tokenizer's directory")
    parser.add_argument("values", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    pairs = [item.partition("=") for item in options.values]
    values = {key: _value(text) for key, _, text in pairs}
    path = arithmetic_settings(
        options.folder, options.prompts, options.question_seed, options.vocabulary, **values
    )
    print(path)


if __name__ == "__main__":
    main()
