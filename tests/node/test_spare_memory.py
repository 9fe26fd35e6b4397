"""Memory that MLX has done with goes back to the system."""

from __future__ import annotations

import sys
import threading

import mlx.core as mx
import psutil
import pytest

from parallax.node import spare_memory

MIB = 1 << 20
FLOATS = 8192  # of a buffer, which glibc takes from a heap, not from the system


def work(found: list[int]) -> None:
    """Leaves a heap of 64 MB with every sixteenth buffer in use."""
    resident = psutil.Process().memory_info
    arrays = [mx.zeros((FLOATS,)) for _ in range(64 * MIB // (4 * FLOATS))]
    mx.eval(arrays)
    kept = arrays[::16]
    del arrays
    mx.clear_cache()
    before = resident().rss
    spare_memory.give_back()
    found.append(before - resident().rss)
    assert all(not array.any() for array in kept)  # what is in use stays as it is
    mx.clear_streams()


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(mx, "cpu"), reason="glibc's heaps")
def test_a_heap_that_is_free_but_for_a_few_buffers_does_not_stay_resident() -> None:
    found: list[int] = []
    thread = threading.Thread(target=work, args=(found,))  # with a heap of its own
    thread.start()
    thread.join()
    assert found[0] > 48 * MIB
