"""Names that others gave: which text can be shown as one."""

from __future__ import annotations

import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp"})


def controls(text: str, *, layout: str = "") -> bool:
    """Whether a terminal or a log could obey a text: it has C0 or C1 controls beyond ``layout``."""
    if text.isprintable():
        return False
    return any(unicodedata.category(c) == "Cc" and c not in layout for c in text)


def unseen(text: str) -> bool:
    """Whether a text has what is not seen, and changes what is.

    Controls, direction marks, joiners, line separators: with them one name can be made to look
    like another.
    """
    return not text.isprintable() and any(unicodedata.category(c) in _UNSEEN for c in text)
