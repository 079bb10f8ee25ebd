"""`hydratune merge` and `hydratune export`: a trained model as a folder that plain transformers loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hydratune.commands.common import Home, RunName, clear, one_of, require_new
from hydratune.errors import UserError, Violation
from hydratune.runs import HOME

_DTYPES = ("float32", "bfloat16", "float16")
_LOGIN = "log in with: hf auth login (or set HF_TOKEN)"
Dtype = Annotated[
    str | None, typer.Option(help=f"Of the saved weights: {', '.join(_DTYPES)}. Default: as they are.")
]


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    one_of("--dtype", name, _DTYPES)
    import torch

    return getattr(torch, name)


@clear
def merge(
    source: Annotated[Path, typer.Argument(help="A run directory, or a saved adapter.")],
    target: Annotated[Path, typer.Argument(help="Where the stand-alone model goes; a new directory.")],
    dtype: Dtype = None,
) -> None:
    """Merge an adapter into its base.

    Example: `hydratune merge outputs/RUN merged`
    """
    wanted = _dtype(dtype)
    from hydratune.adapters import find_adapter, merge_adapter

    find_adapter(source)
    require_new("target", target, folder=True)
    print(f"merged model in {merge_adapter(source, target, dtype=wanted)}")


@clear
def export(
    run: RunName,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Where the model goes; a new directory.")],
    dtype: Dtype = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to this repository of the hub.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is public, not private.")
    ] = False,
    home: Home = HOME,
) -> None:
    """Save a run's model, merged, with tokenizer and card; push it if asked.

    Example: `hydratune export latest my-model --dtype bfloat16`
    """
    from hydratune.trained import find_model

    place = find_model(run, home)
    require_new("DIR", target, folder=True)
    wanted = _dtype(dtype)
    hub = _hub(push_to_hub) if push_to_hub else None  # before anything is made
    from hydratune.export import export_model

    export_model(place, target, dtype=wanted)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"model in {target} ({size / 2**20:,.1f} MiB)")
    if push_to_hub:
        print(_push(hub, target, push_to_hub, private=not public))


def _hub(name: str) -> Any:
    """
    Raises:
        UserError: the name is none, or nobody is logged in; nothing was made.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(Violation("--push-to-hub", name, "is not OWNER/NAME", "give both, e.g. me/my-model"))
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise UserError(
            Violation("--push-to-hub", name, "HF_HUB_OFFLINE is set", "unset it, or leave this out")
        )
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(Violation("--push-to-hub", name, "there is no login for the hub here", _LOGIN))
    return HfApi()


def _push(hub: Any, folder: Path, name: str, *, private: bool) -> str:
    """The address of the repository.

    Raises:
        UserError: the hub refuses; the exported folder stays.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Exported by hydratune")
    except (HfHubHTTPError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        fix = f"check the name and its rights, then: hf upload {name} {folder}"
        raise UserError(Violation("--push-to-hub", name, f"the hub did not take it ({said})", fix)) from error
    return str(made)
