"""Imports without the garbage collector leave it as it was, and spare it the walk at the end."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from hydratune.processes import quick_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_whatever_happens(enabled):
    before = gc.isenabled()
    gc.enable() if enabled else gc.disable()
    try:
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()


def test_nothing_is_collected_when_the_interpreter_ends():
    script = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from hydratune.processes import quick_imports
with quick_imports():
    pass
with quick_imports():
    pass
print(gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]
