"""Whether an answer is what it should be."""

from __future__ import annotations

from tests.chaos.history import History


def wrong_with(history: History, text: str, tokens: int) -> str:
    """What is wrong with an answer of exactly so many tokens; "" if nothing is."""
    if not history.whole:
        return f"it failed: {history.status} {history.error}"
    if history.text != text:
        return f"another text: {history.text[:80]!r}, not {text[:80]!r}"
    if history.usages != [tokens]:
        return f"usage {history.usages}"
    if history.finishes != ["length"] or history.done != 1:
        return f"ends {history.finishes}, {history.done} times [DONE]"
    return ""
