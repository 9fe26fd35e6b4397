"""What the machine under a node fails at, as errors that say so: its disk, its memory.

MLX tells everything as ``RuntimeError``; that memory ran out is only in its words, which differ by
backend: ``[malloc]`` and ``[metal::malloc]`` of its allocators, ``Insufficient Memory`` of a Metal
command buffer, ``out of memory`` of CUDA. The CPU backend of 0.32 says nothing: its process dies.
"""

from __future__ import annotations

import errno
import re

from parallax.fabric.errors import DiskFull, InternalError, ModelBroken, OutOfMemory, ParallaxError

_NO_MEMORY = re.compile(r"malloc\]|out ?of ?memory|insufficient memory", re.IGNORECASE)
_TEXT = 500  # characters of what the system says


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what MLX or Python raise when there is no memory left."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def error_of(error: Exception, what: str) -> ParallaxError:
    """The error that people are told when ``what``, a sentence, came of this one."""
    said = str(error)[:_TEXT] or type(error).__name__
    if isinstance(error, ParallaxError):
        return error
    if is_out_of_memory(error):
        fix = "Close other programs on that machine, give the node less with --memory, or add nodes"
        return OutOfMemory(what, f"There was no memory left: {said}", fix)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(what, f"The disk is full: {said}", "Make room on that machine")
    if isinstance(error, OSError):
        fix = "Check that machine's disk; if a file is damaged, fetch the model again"
        return ModelBroken(what, f"Its disk or a file failed: {said}", fix)
    return InternalError(what, f"{type(error).__name__}: {said}")
