"""What the router keeps for those who come later: rows, turns of prompts, rings for long ones."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from parallax.fabric.errors import PromptTooLong, QueueFull
from parallax.fabric.limits import DEFAULT_LIMITS, Limits
from parallax.scheduler.ring_load import AHEAD_TOKENS, PREFIX_WORTH_TOKENS
from parallax.scheduler.router import Dispatch, Router

CHUNK = 32


def with_rows(rows: int, **given: int) -> Router:
    made = Router(Limits())
    made.ring_up(1, rows, **given)  # type: ignore[arg-type]
    return made


def ask(
    made: Router, *ids: int, client: str = "a", tokens: int = 0, answer: int = 100, now: float = 0.0
) -> None:
    for id in ids:
        most = tokens + answer
        made.enqueue(id, client, most, now, tokens=tokens, most_tokens=most)


def sent(made: Router, now: float = 0.0) -> list[int]:
    return [each.id for each in made.dispatch(now)]


# --------------------------------------------------------------------------- rows


def test_a_client_whose_long_answers_have_all_they_can_leaves_rows_for_others() -> None:
    made = with_rows(2 * DEFAULT_LIMITS.lane_rows)
    ask(made, *range(1, 101))
    assert len(sent(made)) == 32
    ask(made, 101, client="b")
    assert sent(made) == [101]
    ask(made, 102, client="c")
    assert sent(made) == [102]


def test_rows_that_become_free_go_to_the_client_that_has_fewer_until_both_have_as_many() -> None:
    made = with_rows(36)
    ask(made, *range(1, 101))
    sent(made)
    ask(made, *range(101, 151), client="b")
    assert sent(made) == [101, 102, 103, 104], "the rows that were left"
    rows = Counter(a=32, b=4)
    running = list(range(1, 33))
    for _ in range(12):
        made.finished(1, running.pop(0))
        rows["a"] -= 1
        for id in sent(made):
            assert id > 100, "of the client that has fewer"
            rows["b"] += 1
    assert rows["b"] >= 12
    assert rows["a"] - rows["b"] <= 8


@pytest.mark.parametrize(("rows", "alone"), [(1, 1), (2, 2), (7, 7), (8, 7), (18, 16), (72, 63)])
def test_what_a_client_gets_of_a_ring_when_it_is_alone(rows: int, alone: int) -> None:
    made = with_rows(rows)
    ask(made, *range(1, 101))
    assert len(sent(made)) == alone


def test_answers_of_a_ring_that_broke_leave_rows_for_others_too() -> None:
    made = with_rows(36)
    ask(made, *range(1, 33))
    assert len(sent(made)) == 32
    made.ring_up(2, 18)
    for id in made.ring_down(1):
        made.requeue_front(id, begun=True)
    ask(made, 33, client="b")
    assert sent(made) == [*range(1, 17), 33]
    made.finished(2, 1)
    made.finished(2, 2)
    assert sent(made) == [17]


# ------------------------------------------------------------------------ prompts


def test_a_prompt_waits_for_no_more_than_two_long_ones_that_came_before() -> None:
    made = with_rows(36, chunk_tokens=CHUNK, stages=2)
    ask(made, *range(1, 21), tokens=2000)
    assert sent(made) == [1, 2]
    ask(made, 21, client="b", tokens=2000)
    assert sent(made) == []
    assert made.begun(1)
    assert not made.begun(1), "it is no news any more"
    assert sent(made) == [21], "one is being prefilled, and too little was behind it"
    assert made.begun(2)
    assert sent(made) == [3]


def test_a_prompt_waits_for_none_that_is_twice_as_long() -> None:
    made = with_rows(36, chunk_tokens=CHUNK, stages=2)
    ask(made, *range(1, 21), tokens=20_000)
    assert sent(made) == [1, 2]
    ask(made, *range(21, 31), client="b", tokens=2000)
    assert sent(made) == [21, 22], "heads let them pass, and begin them one after the other"
    assert made.begun(21)
    assert sent(made) == [23]


def test_what_heads_let_pass_waits_for_no_prompt() -> None:
    known = {6: 1990}
    made = Router(Limits(), lambda _epoch, id: known.get(id, 0))
    made.ring_up(1, 36, chunk_tokens=CHUNK)
    ask(made, 1, 2, 3, tokens=2000)
    assert sent(made) == [1, 2]
    ask(made, 4, client="b", tokens=2 * CHUNK)
    ask(made, 5, client="c", tokens=2000)
    ask(made, 6, client="d", tokens=2000)
    assert sent(made) == [4, 6], "short, or nearly all of it is known there"


def test_enough_small_prompts_go_ahead_for_every_stage_to_be_busy() -> None:
    made = with_rows(72, chunk_tokens=CHUNK, stages=2)
    ask(made, *range(1, 41), tokens=100)
    assert len(sent(made)) == 1 + -(-AHEAD_TOKENS // 100)
    large = with_rows(72, chunk_tokens=512, stages=3)
    ask(large, *range(1, 41), tokens=2000)
    assert len(sent(large)) == 1 + -(-2 * 4 * 512 // 2000)


def test_prompts_that_end_or_come_back_before_their_first_token_make_room() -> None:
    made = with_rows(36, chunk_tokens=CHUNK)
    ask(made, *range(1, 6), tokens=2000)
    assert sent(made) == [1, 2]
    made.finished(1, 1)
    assert sent(made) == [3]
    made.requeue_front(2, refused=True)
    assert sent(made) == [], "it pauses"
    assert sent(made, 5.0) == [2]


# ----------------------------------------------------------------------- prefixes


def test_a_chat_stays_with_the_ring_that_knows_it_until_that_is_busier_than_this_is_worth() -> None:
    known = {(2, id): 2048 for id in range(100, 120)}
    made = Router(Limits(), lambda epoch, id: known.get((epoch, id), 0))
    for epoch in (1, 2):
        made.ring_up(epoch, 36)
    ask(made, 100, tokens=2100, answer=500)
    assert made.dispatch(0.0) == [Dispatch(100, 2)], "of idle ones"
    ask(made, 101, tokens=2100, answer=500)
    assert made.dispatch(0.0) == [Dispatch(101, 2)], "it has one answer more"
    ask(made, *range(102, 110), tokens=2100, answer=500)
    epochs = [each.epoch for each in made.dispatch(0.0)]
    assert epochs.index(1) == 2, "its work is more than the prompt's on the idle one"


def test_only_what_must_be_prefilled_counts_as_work_and_only_until_it_has_been() -> None:
    known = {(1, 1): 10_000}
    made = Router(Limits(), lambda epoch, id: known.get((epoch, id), 0))
    made.ring_up(1, 8)
    ask(made, 1, tokens=10_000)
    sent(made)
    made.ring_up(2, 8)
    ask(made, 2, tokens=1000)
    assert made.dispatch(0.0) == [Dispatch(2, 2)]
    ask(made, 3, tokens=10)
    assert made.dispatch(0.0) == [Dispatch(3, 1)], "the long prompt is known there"
    made.begun(2)
    ask(made, 4, tokens=10)
    assert made.dispatch(0.0) == [Dispatch(4, 2)], "one answer each side, but for the third"


@pytest.mark.parametrize("begins", [False, True])
def test_agents_with_one_long_prompt_in_common_are_spread_all_the_same(begins: bool) -> None:
    common = 16_000
    served: set[int] = set()
    made = Router(Limits(), lambda epoch, _id: common if epoch in served else 0)
    for epoch in (1, 2):
        made.ring_up(epoch, 36)
    rings: Counter[int] = Counter()
    for id in range(1, 41):
        ask(made, id, client=str(id), tokens=common + 100, answer=512)
        for each in made.dispatch(0.0):
            rings[each.epoch] += 1
            served.add(each.epoch)
            if begins:
                made.begun(each.id)
    assert sum(rings.values()) == 40
    assert max(rings.values()) - min(rings.values()) <= PREFIX_WORTH_TOKENS // 512


# ------------------------------------------------------------- rings of other sizes


def two_sizes(short_rows: int = 4, long_rows: int = 1) -> Router:
    made = Router(Limits())
    made.ring_up(1, short_rows, context_tokens=1000)
    made.ring_up(2, long_rows, context_tokens=100_000, row_bytes=lambda tokens: tokens)
    return made


def test_others_pass_who_waits_for_a_ring_that_alone_can_hold_it() -> None:
    made = two_sizes()
    ask(made, 1, tokens=5000)
    assert made.dispatch(0.0) == [Dispatch(1, 2)]
    ask(made, 2, client="b", tokens=5000)
    for id in range(3, 9):
        ask(made, id, client=str(id), tokens=100)
    assert made.dispatch(1.0) == [Dispatch(id, 1) for id in (3, 4, 5, 6)]
    made.finished(1, 3)
    assert made.dispatch(2.0) == [Dispatch(7, 1)]


def test_who_waits_for_the_only_ring_that_can_hold_it_is_passed_there_by_nobody() -> None:
    made = two_sizes(short_rows=2, long_rows=16)
    ask(made, 1, tokens=5000)
    assert made.dispatch(0.0) == [Dispatch(1, 2)]
    made.load(2, 15, 1, room_bytes=4000)
    ask(made, 2, client="b", tokens=5000)
    for id in range(3, 20):
        ask(made, id, client=str(id), tokens=100)
    assert made.dispatch(1.0) == [Dispatch(3, 1), Dispatch(4, 1)], "there is room on the other"
    made.finished(2, 1)
    made.load(2, 16, 0, room_bytes=10_000)
    assert made.dispatch(2.0)[0] == Dispatch(2, 2)


def test_a_prompt_waits_for_a_ring_that_is_coming_and_else_is_too_long_at_once() -> None:
    made = with_rows(4, context_tokens=100)
    with pytest.raises(PromptTooLong, match="at most 99 tokens"):
        made.enqueue(1, "a", 500, 0.0, tokens=400, most_tokens=500)
    made.enqueue(1, "a", 500, 0.0, tokens=400, most_tokens=500, ring_coming=True)
    assert sent(made) == []
    made.ring_up(2, 4, context_tokens=1000)
    assert made.dispatch(0.0) == [Dispatch(1, 2)]


def test_an_answer_outgrows_a_ring_only_where_another_one_goes_on_with_it() -> None:
    made = two_sizes()
    assert made.fits_another(1, 1000)
    assert not made.fits_another(1, 999)
    assert not made.fits_another(2, 100_000)
    made.ring_down(2)
    assert not made.fits_another(1, 1000)


@pytest.mark.parametrize("seed", range(8))
def test_nobody_waits_for_long_beside_a_client_that_asks_for_all_there_is(seed: int) -> None:
    chance = random.Random(seed)
    made = Router(Limits(), lambda epoch, id: 900 if (id + epoch) % 3 else 0)
    rows, contexts, budgets = {1: 16, 2: 8}, {1: 2000, 2: 9000}, {1: 20_000, 2: 30_000}
    for ring, count in rows.items():
        made.ring_up(ring, count, context_tokens=contexts[ring], row_bytes=int, chunk_tokens=CHUNK)
    asked: dict[int, tuple[str, int, float]] = {}  # whose, how long, when
    running: dict[int, tuple[int, float]] = {}  # its ring, and when it ends
    longest_s: dict[str, float] = {}
    id, now = 0, 0.0
    while now < 60.0 or running:  # the flood goes on; afterwards all comes to an end
        now += 0.25
        some = ["flood"] * 4 + ["some"] * (now % 2 == 0) + ["rare"] * (now % 10 == 0)
        for client in some if now < 60.0 else ():
            id += 1
            asked[id] = client, chance.choice([20, 60, 300, 1500, 5000]), now
            try:
                ask(made, id, client=client, tokens=asked[id][1], answer=200, now=now)
            except QueueFull:
                assert client == "flood"
        for each, (ring, end) in list(running.items()):
            if end <= now:
                made.finished(ring, each, asked[each][1] + 200)
                del running[each]
            elif chance.random() < 0.5:
                made.begun(each)
        for ring, count in rows.items():
            mine = [each for each, (where, _) in running.items() if where == ring]
            used = sum(asked[each][1] + 200 for each in mine)
            made.load(ring, count - len(mine), len(mine), room_bytes=budgets[ring] - used)
        for late in made.expired(now):
            assert asked[late][0] == "flood"
        for sent in made.dispatch(now):
            client, tokens, since = asked[sent.id]
            assert tokens < contexts[sent.epoch]
            longest_s[client] = max(longest_s.get(client, 0.0), now - since)
            running[sent.id] = sent.epoch, now + chance.uniform(0.5, 4.0)
    assert made.waiting == 0
    assert longest_s["flood"] > 20, "it asks for more than there is"
    assert max(longest_s["some"], longest_s["rare"]) < 4, longest_s
