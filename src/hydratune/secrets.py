"""What must not be written down or shown: tokens and passwords, known by the names of their keys or from URLs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_KEY = (
    r"(?<!\w)(?!(?:eos|pad|bos|unk|stop|sep|cls|mask)_token\b)(?:\w*_)?"
    r"(?:api_?key|password|passwd|secret|credentials?|token)"
)
_SECRET = re.compile(rf"(?i){_KEY}")
_SET = rf"(?i)({_KEY}['\"]?[^\S\n]*[:=][^\S\n]*)(?!(?:null|none|true|false)\b)"
_VALUE = re.compile(rf"{_SET}(?:'(?:[^'\n]|'')*'|\"(?:[^\"\\\n]|\\.)*\"|[^\s,'\"}}\])]+|['\"][^\n]*)")
_LINE = re.compile(rf"{_SET}\S.*")
_PASSWORD = re.compile(r"(://[^:/@\s\"',]*:)[^\s\"']+@")  # to the last @: more rather than less
_NAMED = re.compile(
    r"\$\{(?:oc\.env:\w+(?:,\s*null)?|(?:oc\.select:)?[\w.\[\]@/-]+)\}"
)  # with no text of its own
_NO_SECRET = ("", "null", "true", "false")  # as Hydra reads them: no token, or the one that is saved
_OURS = "HYDRATUNE_"
_HIDDEN = "***"


def is_secret(key: str) -> bool:
    """Whether the value of a key, dotted or not, is one to hide: trainer.hub_token, api_key; not eos_token."""
    return bool(_SECRET.fullmatch(key.rpartition(".")[2]))


def hide_password(text: str) -> str:
    """A URL, or a text with URLs in it, without their passwords: postgresql://me:***@host/db."""
    return _PASSWORD.sub(rf"\1{_HIDDEN}@", text)


def redact(config: Any) -> Any:
    """The config with the values of keys that look like secrets replaced by ***, and URLs without passwords."""
    if isinstance(config, dict):
        return {
            key: _HIDDEN if isinstance(value, str) and is_secret(str(key)) else redact(value)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [redact(value) for value in config]
    return hide_password(config) if isinstance(config, str) else config


def redact_override(word: str) -> str:
    """A word of a command line: `trainer.hub_token=hf_…` becomes `trainer.hub_token=***`; so inside a {…} of it."""
    key, sign, value = word.partition("=")
    if names_variable(word):
        return word
    if sign and value.strip().lower() not in _NO_SECRET and is_secret(key.lstrip("+~")):
        return f"{key}={_HIDDEN}"
    return _values(word)


def variable_of(key: str) -> str:
    """The variable of the environment that a typed secret is put into: HYDRATUNE_TRAINER_HUB_TOKEN."""
    return _OURS + re.sub(r"[^A-Za-z0-9]", "_", key).upper()


def untold(key: str, message: str) -> tuple[str, str] | None:
    """Why, and the way out, when OmegaConf misses the variable of a secret that was typed once; None for other messages."""
    if f"'{variable_of(key)}' not found" not in message:
        return None
    also = f"; {key}=null takes HF_TOKEN" if key == "trainer.hub_token" else ""
    return "was typed when this began, and secrets are not kept", (
        f"type it again ({key}=…), or set {variable_of(key)}" + also
    )


def names_variable(word: str) -> bool:
    """Whether an override's value is one interpolation and no text: it holds no secret, but says where one is."""
    value = word.partition("=")[2].strip()
    quoted = len(value) > 1 and value[0] in "'\"" and value[0] == value[-1]
    return bool(_NAMED.fullmatch(value[1:-1] if quoted else value))


@contextmanager
def unsaved(options: Any) -> Iterator[None]:
    """An object's attributes without what is secret in them, while it is written to disk."""
    held = dict(vars(options))
    for name, value in held.items():
        if isinstance(value, dict):
            vars(options)[name] = redact(value)
        elif isinstance(value, str) and is_secret(name):
            vars(options)[name] = None
    try:
        yield
    finally:
        vars(options).update(held)


def redact_file(text: str, suffix: str) -> str:
    """The text of a file for a reader: YAML, JSON, a script, or lines of any kind, with what is secret as ***.

    Unlike `redact`, this knows overrides too, which Hydra keeps as they were typed: older runs have secrets there.
    """
    text = hide_password(text)
    if suffix == ".json":
        try:
            loaded = json.loads(text)
        except ValueError:
            return _values(text)
        clean = _strings(redact(loaded))
        return text if clean == loaded else json.dumps(clean, indent=2, ensure_ascii=False)
    if suffix in (".yaml", ".yml"):  # to the end of the line: a quoted override may hold anything
        return _LINE.sub(rf"\1{_HIDDEN}", text)
    if suffix == ".sh":
        return "\n".join(_script_line(line) for line in text.split("\n"))
    return _values(text)


def _values(text: str) -> str:
    return _VALUE.sub(rf"\1{_HIDDEN}", hide_password(text))


def _strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strings(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strings(inner) for inner in value]
    return redact_override(value) if isinstance(value, str) else value


def _script_line(line: str) -> str:
    try:
        words = shlex.split(line)
    except ValueError:
        return _values(line)
    clean = [redact_override(word) for word in words]
    return line if clean == words else " ".join(map(shlex.quote, clean))
