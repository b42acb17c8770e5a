"""Python's garbage collector, held off where it is in the way; needs no more than Python."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def paused_gc() -> Generator[None]:
    """Keep the collector out while many nodes are made, none of which is garbage, or runs timed.

    It walks all of them again and again: at 100,000 nodes that takes longer than making them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
