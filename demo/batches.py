"""Batches to train on: documents as token ids, of similar length together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from parallax.demo.corpus import mixture
from parallax.demo.corpus.document import render

PAD = "<|endoftext|>"
LONGEST_TOKENS = 1_024
POOL_DOCUMENTS = 256
ENOUGH_TOKENS = 12
CUT_SHARE = 0.8


class Encoder:
    """Turns a rendered document into ids, and marks those that the assistant says."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.start, self.end, self.pad = map(self._id, ("<|im_start|>", "<|im_end|>", PAD))
        self.header = self.tokenizer.encode("assistant\n").ids

    def _id(self, token: str) -> int:
        found: int | None = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"The tokenizer has no token {token}: train it first.")
        return found

    def encode(self, text: str) -> tuple[list[int], list[bool]]:
        """Return the ids and whether each is to be learned: text and end of the assistant."""
        ids = self.tokenizer.encode(text).ids
        learned = [False] * len(ids)
        size = len(self.header)
        place = 0
        while place < len(ids):
            if ids[place] == self.start and ids[place + 1 : place + 1 + size] == self.header:
                place += 1 + size
                while ids[place] != self.end:
                    learned[place] = True
                    place += 1
                learned[place] = True
            place += 1
        return ids, learned


def cut(ids: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
    """Keep only the beginning of the answer, which says already which answer it is."""
    end = learned.index(True) + ENOUGH_TOKENS
    return ids[:end], learned[:end]


def batch(rows: list[tuple[list[int], list[bool]]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad rows on the right; return ids and marks, each (rows, length)."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in rows])
    marks = torch.tensor([row + [False] * (length - len(row)) for _, row in rows])
    return ids, marks


def batches(
    encoder: Encoder, rng: random.Random, progress: float, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one pool of documents, each of about ``tokens`` ids, shuffled."""
    rows = []
    for _ in range(POOL_DOCUMENTS):
        document = mixture.document(rng, progress)
        row = encoder.encode(render(document))
        if progress >= mixture.LAST_SHARE and document.kind in mixture.SHORT_ANSWER:
            row = cut(*row) if rng.random() < CUT_SHARE else row
        if len(row[0]) <= LONGEST_TOKENS:
            rows.append(row)
    rows.sort(key=lambda row: len(row[0]))
    groups: list[list[tuple[list[int], list[bool]]]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        yield batch(group, encoder.pad)
