"""Which rings have likely kept the beginning of a prompt."""

from __future__ import annotations

from parallax.scheduler.known_prefixes import MOST_STEPS, STEP_TOKENS, KnownPrefixes


def test_a_ring_knows_whole_steps_of_what_it_served() -> None:
    known = KnownPrefixes()
    served = tuple(range(100))
    known.served(1, served)
    assert known.length(1, served) == 96
    assert known.length(1, (*served[:70], *range(500, 600))) == 64
    assert known.length(1, (5, *served)) == 0, "counted from the first token on"
    assert known.length(1, served[:31]) == 0
    assert known.length(2, served) == 0, "another ring"


def test_the_middle_of_a_prompt_is_not_its_beginning() -> None:
    known = KnownPrefixes()
    known.served(1, (1,) * 32 + (2,) * 32)
    assert known.length(1, (2,) * 32) == 0
    assert known.length(1, (3,) * 32 + (2,) * 32) == 0


def test_a_ring_that_is_no_more_knows_nothing() -> None:
    known = KnownPrefixes()
    known.served(1, tuple(range(64)))
    known.forget(1)
    known.forget(2)
    assert known.length(1, tuple(range(64))) == 0


def test_only_so_much_is_remembered_and_what_was_not_used_goes_first() -> None:
    known = KnownPrefixes()
    old, used = tuple(range(64)), tuple(range(1000, 1064))
    known.served(1, old)
    known.served(1, used)
    for n in range(MOST_STEPS // 2 - 1):
        known.served(1, tuple(range(n + 5000, n + 5000 + 2 * STEP_TOKENS)))
        if n == MOST_STEPS // 4:
            known.served(1, used)
    assert known.length(1, old) == 0
    assert known.length(1, used) == 64
    assert len(known._rings[1]) == MOST_STEPS


def test_of_what_is_too_long_the_beginning_is_remembered() -> None:
    known = KnownPrefixes()
    long = (7,) * (STEP_TOKENS * (MOST_STEPS + 10))
    known.served(1, long)
    assert known.length(1, long) == STEP_TOKENS * MOST_STEPS
    known.served(1, tuple(range(64)))
    assert known.length(1, long) == STEP_TOKENS * (MOST_STEPS - 2)


def test_what_is_short_is_not_worth_remembering() -> None:
    known = KnownPrefixes()
    known.served(1, tuple(range(63)))
    assert known.length(1, tuple(range(63))) == 0
