"""The sampling values that a model's makers recommend, as its generation_config.json has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# As the API takes them (scheduler/http/requests.py). ``do_sample`` and ``max_new_tokens`` are left
# out on purpose: few files mean them, and other servers do not follow them either.
_TAKEN: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 2,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: 0 <= value <= 1 << 31 and value == int(value),
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0 < value <= 10,
}


def recommended(config: Mapping[str, Any]) -> dict[str, float]:
    """The values of this generation configuration that can be used; others are as if not there."""
    return {
        name: value
        for name, taken in _TAKEN.items()
        if isinstance(value := config.get(name), int | float)
        and not isinstance(value, bool)
        and taken(value)
    }
