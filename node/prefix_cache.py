"""The prefix cache of a ring: what to keep of which sequence, what to begin a prompt with. Pure.

The stages only obey ``retain``, ``fork`` and ``evict``, all in the same order, so they never
disagree about what is kept. What may be kept depends on the model, as its self-check showed:

* Where decoded tokens leave the caches that a prefill would, bit for bit, and caches can be cut at
  any length, a whole answer is kept with its prompt, and used up to any step of it.
* Where not, only what was prefilled is kept, and used from the grid's boundaries on, so that a
  prompt is prefilled in the same chunks whether or not some of it was known.
* Where caches cannot be cut (states, windows that have wrapped), they are kept at boundaries: the
  prompt's last one, and the one up to which it is like a prefix that is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Tokens

from parallax.node.budget import Budget
from parallax.node.prefixes import Prefix, Prefixes
from parallax.node.sequences import Phase, Sequence
from parallax.proto import wire_pb2 as wire

UNLIMITED = (1 << 32) - 1  # ``CacheCost.trim_tokens`` of caches that can be cut at any length
FINEST_STEP_TOKENS = 32  # a prefix is used in such steps at the finest; a divisor of most grids
MOST_KEPT = 1024  # so that small prefixes too are bounded in number


class PrefixCache:
    """Keeps prefixes within what live sequences leave of the budget.

    Args:
        commands: where commands for the next frame go, in order.
        budget: what caches cost.
        grid: the prefill grid in tokens.
        costs: what the stages' caches can do.
    """

    def __init__(
        self,
        commands: list[wire.Command],
        budget: Budget,
        grid: int,
        costs: Tokens[wire.CacheCost],
    ) -> None:
        self._commands = commands
        self._budget = budget
        self._grid = grid
        self._works = bool(costs) and all(cost.forks for cost in costs)
        self._trim_tokens = min((cost.trim_tokens for cost in costs), default=0)
        self._answers = self._trim_tokens == UNLIMITED and all(cost.answers for cost in costs)
        step = math.gcd(grid, FINEST_STEP_TOKENS) if self._answers else grid
        self._index = Prefixes(max(1, step))
        self._next_handle = 1
        self.kept_bytes = [0] * len(costs)  # on each stage
        self._prompts = 0
        self._hits = 0
        self._saved_tokens = 0
        self._evictions = 0

    # ------------------------------------------------------------------ prompts

    def find(self, sequence: Sequence) -> Prefix | None:
        """The prefix that :meth:`begin` would use for a sequence; it counts as used."""
        if not len(self._index):
            return None
        found = self._index.longest(sequence.slice(0, sequence.prefill_length))
        return found[0] if found else None

    def known_tokens(self, sequence: Sequence) -> int:
        """How many tokens of a sequence :meth:`begin` would not have to prefill."""
        if not self._works or not len(self._index):
            return 0
        found = self._index.longest(sequence.slice(0, sequence.prefill_length))
        return found[1] if found else 0

    def begin(self, sequence: Sequence) -> None:
        """A sequence's prefill begins: with a copy of the longest kept prefix, if there is one."""
        if not self._works:
            return
        tokens = sequence.slice(0, sequence.prefill_length)
        self._prompts += 1
        found = self._index.longest(tokens)
        if found is not None:
            prefix, length = found
            fork = wire.Fork(handle=prefix.handle, sequence=sequence.id, tokens=length)
            self._commands.append(wire.Command(fork=fork))
            sequence.cached = sequence.forked = length
            self._hits += 1
            self._saved_tokens += length
        if not self._can_trim(sequence.prefill_length):
            last = sequence.prefill_length // self._grid * self._grid
            parting = self._index.common(tokens) // self._grid * self._grid
            sequence.boundaries = {last, parting}

    def prefilled(self, sequence: Sequence, live_bytes: Callable[[], int]) -> None:
        """A chunk was injected: what is in the caches now is kept, if it is worth it.

        Args:
            live_bytes: what the live sequences are charged, without kept prefixes.
        """
        if sequence.boundaries is not None:
            if sequence.cached in sequence.boundaries:
                self._keep(sequence, live_bytes(), evict=True)
        elif sequence.cached == sequence.prefill_length:
            # Where the answer is kept as well, this only serves until then: nothing goes for it.
            self._keep(sequence, live_bytes(), evict=not self._answers)

    def ended(self, sequence: Sequence, live_bytes: int) -> None:
        """A sequence is about to be dropped; ``live_bytes`` are those of the others."""
        if sequence.phase is Phase.DECODE and not self._answers:
            return
        if self._can_trim(sequence.cached) or sequence.cached % self._grid == 0:
            self._keep(sequence, live_bytes, evict=True)

    # ----------------------------------------------------------------- eviction

    def evict_oldest(self, spare: Prefix | None = None) -> bool:
        """Lets the least recently used prefix go; False if there is none, or only ``spare``."""
        for prefix in self._index:
            if prefix is not spare:
                self._evict(prefix)
                self._evictions += 1
                return True
        return False

    def load(self) -> wire.PrefixLoad:
        """What is kept, and totals."""
        return wire.PrefixLoad(
            kept=len(self._index),
            kept_bytes=max(self.kept_bytes, default=0),
            prompts=self._prompts,
            hits=self._hits,
            saved_tokens=self._saved_tokens,
            evictions=self._evictions,
        )

    # ------------------------------------------------------------------ keeping

    def _can_trim(self, tokens: int) -> bool:
        return self._trim_tokens == UNLIMITED or tokens < self._trim_tokens

    def _keep(self, sequence: Sequence, live_bytes: int, *, evict: bool) -> None:
        # All but the last token at most: what follows it in the caches may not be the answer's.
        held = min(sequence.cached, sequence.prefill_length)
        steps = self._index.steps(sequence.slice(0, held)) if self._works else ()
        if not steps or self._index.covers(steps):
            return
        trims = self._can_trim(held)
        needless = self._index.within(steps) if trims else []  # the new one serves as well
        bytes_ = self._budget.kept(held)
        spared = self._bytes_of(needless)
        limit = self._budget.limit_bytes
        room = limit - live_bytes if limit else UNLIMITED << 32
        if max(bytes_) > room or not (evict or self._fits(bytes_, spared, room)):
            return
        for prefix in needless:
            self._evict(prefix)
        while len(self._index) >= MOST_KEPT or not self._fits(bytes_, self._bytes_of([]), room):
            if not self.evict_oldest():
                return
        prefix = Prefix(self._next_handle, steps, held, trims)
        self._next_handle += 1
        self._index.add(prefix)
        self._count(bytes_, 1)
        retain = wire.Retain(sequence=sequence.id, handle=prefix.handle)
        self._commands.append(wire.Command(retain=retain))

    def _fits(self, more: list[int], less: list[int], room: int) -> bool:
        """Whether on every stage what is kept stays within ``room``."""
        changes = zip(self.kept_bytes, more, less, strict=True)
        return all(kept + m - n <= room for kept, m, n in changes)

    def _bytes_of(self, prefixes: list[Prefix]) -> list[int]:
        """What these take, on each stage."""
        total = [0] * len(self.kept_bytes)
        for prefix in prefixes:
            total = [a + b for a, b in zip(total, self._budget.kept(prefix.held), strict=True)]
        return total

    def _evict(self, prefix: Prefix) -> None:
        self._index.remove(prefix)
        self._count(self._budget.kept(prefix.held), -1)
        self._commands.append(wire.Command(evict=wire.Evict(handle=prefix.handle)))

    def _count(self, bytes_: list[int], sign: int) -> None:
        for stage, more in enumerate(bytes_):
            self.kept_bytes[stage] += sign * more
