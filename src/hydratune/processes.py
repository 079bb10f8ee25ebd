"""What a process does at its start and at its end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers and the like without the garbage collector, which would walk all of it many times.

    That was a quarter of the time of these imports.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leave_group() -> None:
    """Closes the process group, if there is one, while the interpreter is still whole. Called once no trainer is left.

    A thread of gloo that frees its last tensors while the interpreter ends is aborted (SIGABRT), and torchrun then
    calls a run that finished a failed one (seen with torch 2.13; pytorch/pytorch#179291). Destroying the group joins
    its threads, but only when nothing else holds it: DDP does, and its module is in reference circles.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
