"""Several processes of one run."""

from __future__ import annotations

import gc
import sys


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
