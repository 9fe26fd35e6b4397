"""Questions that were written after all others, to be asked and not to be learned from.

``fresh.txt`` holds one a line, after the key of its fact or the word "refusal". It was written
when the training was under way, so nothing in the other sheets was written with it in mind.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.questions import facts
from parallax.demo.corpus.refusals import REFUSAL

_PATH = Path(__file__).resolve().parent / "fresh.txt"


@cache
def cases() -> tuple[Document, ...]:
    """Return the fresh questions and refusals, in the order of the file."""
    answers = {fact.key: fact.answer for fact in facts()}
    found = []
    for line in _PATH.read_text(encoding="utf-8").splitlines():
        key, _, text = line.partition(": ")
        kind = "fresh refusals" if key == "refusal" else "fresh questions"
        found.append(Document(kind, [user(text), assistant(answers.get(key, REFUSAL))]))
    return tuple(found)
