"""What a machine fails at, told as what it is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from parallax.fabric.errors import DiskFull, InternalError, ModelBroken, OutOfMemory, ParallaxError
from parallax.node.shortcomings import error_of, is_out_of_memory


def take_64_tib() -> None:
    bytes(1 << 46)


def read_a_folder() -> None:
    Path("/").read_bytes()


def raiser(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "kind", "word"),
    [
        (take_64_tib, OutOfMemory, "MemoryError"),
        (raiser(RuntimeError("[malloc] Unable to allocate")), OutOfMemory, "Unable to allocate"),
        (raiser(RuntimeError("[metal::malloc] Attempting to allocate")), OutOfMemory, "metal"),
        (raiser(RuntimeError("Insufficient Memory (0000000E)")), OutOfMemory, "0000000E"),
        (read_a_folder, ModelBroken, "Is a directory"),
        (raiser(OSError(errno.EIO, "Input/output error")), ModelBroken, "Input/output error"),
        (raiser(OSError(errno.ENOSPC, "No space left")), DiskFull, "No space left"),
        (raiser(RuntimeError("shapes do not fit")), InternalError, "shapes do not fit"),
        (raiser(OutOfMemory("told before")), OutOfMemory, "told before"),
    ],
)
def test_a_failure_is_told_as_what_it_is(
    fail: Callable[[], None], kind: type[ParallaxError], word: str
) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each raises another
        fail()
    error = error_of(raised.value, "It went wrong")
    assert type(error) is kind
    assert word in error.sentence
    assert is_out_of_memory(raised.value) == (kind is OutOfMemory and "told" not in word)
