"""Imports without the garbage collector leave it as it was."""

from __future__ import annotations

import gc

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
