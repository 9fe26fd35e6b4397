"""Which prefixes the stages keep, and where a new prompt meets them. Pure.

A trie over steps of a fixed number of tokens: prefixes are only ever used up to a whole step, so
what lies beyond their last one is not looked at. (As in SGLang's RadixAttention, but of steps, and
the conductor of a ring has the only one.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Step = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Caches that every stage keeps under ``handle``.

    Attributes:
        steps: their tokens, as far as they fill whole steps.
        held: tokens in the caches; the steps' or a few more.
        trims: whether a copy can be cut to fewer tokens.
    """

    handle: int
    steps: tuple[Step, ...]
    held: int
    trims: bool


@dataclass(slots=True, eq=False)
class _Node:
    """After some steps: what goes on from here, and which prefixes come by or end here."""

    children: dict[Step, _Node] = field(default_factory=dict)
    passing: dict[int, Prefix] = field(default_factory=dict)  # those that trim, ending ones too
    ending: dict[int, Prefix] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return not self.children and not self.passing and not self.ending


class Prefixes:
    """The index of kept prefixes, least recently used first."""

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self._root = _Node()
        self._by_use: OrderedDict[int, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_use)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._by_use.values())

    def longest(self, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """The prefix that spares most of ``tokens``, and how many; it counts as used."""
        best: tuple[Prefix, int] | None = None
        for depth, node in enumerate(self._walk(self.steps(tokens)), start=1):
            usable = node.ending or node.passing
            if usable:
                best = usable[next(reversed(usable))], depth * self.step_tokens
        if best is not None:
            self.touch(best[0])
        return best

    def common(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` some kept prefix begins with, even if it cannot be cut there."""
        return self.step_tokens * sum(1 for _ in self._walk(self.steps(tokens)))

    def covers(self, steps: Sequence[Step]) -> bool:
        """Whether some prefix already serves wherever one with these steps would."""
        way = list(self._walk(steps))
        return len(way) == len(steps) and bool(way and (way[-1].passing or way[-1].ending))

    def within(self, steps: Sequence[Step]) -> list[Prefix]:
        """The prefixes that end on the way along these steps."""
        return [prefix for node in self._walk(steps) for prefix in node.ending.values()]

    def oldest(self) -> Prefix | None:
        """The least recently used one."""
        return next(iter(self._by_use.values()), None)

    def touch(self, prefix: Prefix) -> None:
        """It has been used just now."""
        self._by_use.move_to_end(prefix.handle)

    def add(self, prefix: Prefix) -> None:
        """Takes a new one in; it has at least one step."""
        node = self._root
        for step in prefix.steps:
            node = node.children.setdefault(step, _Node())
            if prefix.trims:
                node.passing[prefix.handle] = prefix
        node.ending[prefix.handle] = prefix
        self._by_use[prefix.handle] = prefix

    def remove(self, prefix: Prefix) -> None:
        """Forgets one."""
        del self._by_use[prefix.handle]
        way = [self._root, *self._walk(prefix.steps)]
        for node in way:
            node.passing.pop(prefix.handle, None)
        way[-1].ending.pop(prefix.handle)
        for depth in range(len(prefix.steps), 0, -1):
            if not way[depth].idle:
                break
            del way[depth - 1].children[prefix.steps[depth - 1]]

    def steps(self, tokens: Sequence[int]) -> tuple[Step, ...]:
        """The whole steps of ``tokens``."""
        size = self.step_tokens
        ends = range(size, len(tokens) + 1, size)
        return tuple(tuple(tokens[end - size : end]) for end in ends)

    def _walk(self, steps: Sequence[Step]) -> Iterator[_Node]:
        node = self._root
        for step in steps:
            found = node.children.get(step)
            if found is None:
                return
            node = found
            yield node
