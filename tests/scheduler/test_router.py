from __future__ import annotations

import random
from collections import Counter

import pytest

from parallax.fabric.errors import NoRing, PromptTooLong, QueueFull, QueueTimeout
from parallax.fabric.limits import Limits
from parallax.scheduler.fair_queue import SHARE
from parallax.scheduler.router import REFUSED_PAUSE_S, Dispatch, Router
from parallax.scheduler.row_cost import GROWTH_TOKENS

LIMITS = Limits(queue_requests=8, queue_wait_s=100.0, retry_after_s=5)


def router(*slots: int) -> Router:
    """A router with rings of epochs 1, 2, … and so many rows each."""
    made = Router(LIMITS)
    for epoch, count in enumerate(slots, 1):
        made.ring_up(epoch, count)
    return made


def enqueue(made: Router, *ids: int, client: str = "c", cost: int = 100, now: float = 0.0) -> None:
    for id in ids:
        made.enqueue(id, client, cost, now)


def sent(made: Router, now: float = 0.0) -> list[int]:
    return [dispatch.id for dispatch in made.dispatch(now)]


def test_requests_of_one_client_go_in_their_order() -> None:
    made = router(2)
    enqueue(made, 1, 2, 3)
    assert made.dispatch(0.0) == [Dispatch(1, 1), Dispatch(2, 1)]
    assert (made.waiting, made.running) == (1, 2)
    assert made.dispatch(0.0) == []
    made.finished(1, 1)
    assert made.dispatch(0.0) == [Dispatch(3, 1)]


def test_a_client_with_one_request_does_not_wait_behind_one_with_many() -> None:
    made = router(1)
    enqueue(made, 1, 2, 3, 4, client="many")
    enqueue(made, 5, client="one")
    enqueue(made, 6, 7, client="two")
    order = []
    while ids := sent(made):
        order += ids
        made.finished(1, ids[0])
    assert order == [1, 5, 6, 2, 7, 3, 4]


def test_without_a_ring_a_new_request_is_refused_and_a_waiting_one_waits() -> None:
    made = router()
    with pytest.raises(NoRing) as caught:
        enqueue(made, 1)
    assert caught.value.fields["retry_after_s"] == "5"
    made.ring_up(1, 1)
    enqueue(made, 1, 2)
    sent(made)
    assert made.ring_down(1) == [1]
    made.requeue_front(1)
    assert sent(made, 50.0) == []
    made.ring_up(2, 4)
    assert made.dispatch(60.0) == [Dispatch(1, 2), Dispatch(2, 2)]


def test_a_full_queue_refuses_at_once() -> None:
    made = router(1)
    for id in range(8):
        enqueue(made, id, client=str(id))
    with pytest.raises(QueueFull) as caught:
        enqueue(made, 8)
    assert caught.value.fields["retry_after_s"] == "5"
    sent(made)
    enqueue(made, 8)
    assert made.waiting == LIMITS.queue_requests


def test_a_flooder_leaves_places_for_others() -> None:
    made = router(1)
    enqueue(made, *range(6), client="flooder")
    with pytest.raises(QueueFull, match="for this client") as caught:
        enqueue(made, 6, client="flooder")
    assert caught.value.fields["retry_after_s"] == "5"
    enqueue(made, 6, client="other")
    with pytest.raises(QueueFull, match="for this client"):
        enqueue(made, 7, client="flooder")
    enqueue(made, 7, client="third")
    assert made.waiting == LIMITS.queue_requests


def test_a_wait_ends_at_its_limit() -> None:
    made = router(1)
    enqueue(made, 1, 2, now=0.0)
    enqueue(made, 3, now=30.0)
    sent(made)
    assert made.next_event_s() == 100.0
    assert made.expired(99.9) == []
    assert made.expired(100.0) == [2]
    assert made.expired(100.0) == []
    made.finished(1, 1)
    assert sent(made, 101.0) == [3]
    assert isinstance(made.timeout(), QueueTimeout)
    assert made.timeout().fields["retry_after_s"] == "5"


def test_the_ring_with_least_outstanding_work_is_chosen() -> None:
    made = router(4, 4)
    enqueue(made, 1, cost=5000)
    assert made.dispatch(0.0) == [Dispatch(1, 1)]
    enqueue(made, 2, 3, cost=2000)
    assert made.dispatch(0.0) == [Dispatch(2, 2), Dispatch(3, 2)]
    enqueue(made, 4, 5, cost=2000)
    assert made.dispatch(0.0) == [Dispatch(4, 2), Dispatch(5, 1)]


def test_small_requests_are_spread_over_equal_rings() -> None:
    made = router(4, 4)
    enqueue(made, *range(6), cost=10)
    assert Counter(d.epoch for d in made.dispatch(0.0)) == {1: 3, 2: 3}


def test_work_on_a_fast_ring_weighs_less() -> None:
    made = Router(Limits(queue_requests=64))
    made.ring_up(1, 8, tokens_s=10.0)
    made.ring_up(2, 8, tokens_s=30.0)
    enqueue(made, *range(8), cost=5000)
    assert Counter(d.epoch for d in made.dispatch(0.0)) == {1: 2, 2: 6}


def test_a_head_that_reports_no_room_gets_nothing_until_it_reports_some() -> None:
    made = router(4)
    enqueue(made, 1, 2)
    assert sent(made) == [1, 2]
    made.load(1, 0, 2)
    enqueue(made, 3)
    assert sent(made) == []
    made.load(1, 1, 2)
    assert sent(made) == [3]
    enqueue(made, 4)
    assert sent(made) == []


def test_rows_of_ended_requests_count_until_the_head_is_rid_of_them() -> None:
    made = router(2)
    enqueue(made, 1, 2, 3)
    assert sent(made) == [1, 2]
    made.finished(1, 1)
    made.load(1, 2, 2)
    assert sent(made) == []
    made.load(1, 2, 1)
    assert sent(made) == [3]


def test_an_idle_ring_is_tried_whatever_its_head_said_last() -> None:
    made = router(1)
    made.load(1, 0, 1)
    enqueue(made, 1)
    assert sent(made) == [1]


def test_a_broken_rings_requests_keep_their_place_and_wait_anew() -> None:
    made = router(2, 2)
    enqueue(made, 1, 2, 3, 4)
    enqueue(made, 5, 6)
    assert sent(made) == [1, 2, 3, 4]
    lost = made.ring_down(1)
    assert lost == [1, 3]
    for id in reversed(lost):
        made.requeue_front(id)
    made.requeue_front(1)
    assert sent(made, 90.0) == []
    assert made.expired(100.0) == [5, 6]
    made.finished(2, 2)
    made.finished(2, 4)
    assert made.dispatch(150.0) == [Dispatch(1, 2), Dispatch(3, 2)]


def test_requests_may_be_put_back_before_their_ring_is_taken_down() -> None:
    made = router(2)
    enqueue(made, 1, 2)
    sent(made)
    made.requeue_front(2)
    made.requeue_front(1)
    assert made.ring_down(1) == []
    made.ring_up(2, 2)
    assert made.dispatch(0.0) == [Dispatch(1, 2), Dispatch(2, 2)]


def test_a_refused_request_keeps_its_clock_and_leaves_that_ring_in_peace() -> None:
    made = router(4)
    enqueue(made, 1, 2, 3, cost=1)
    assert made.dispatch(10.0) == [Dispatch(1, 1), Dispatch(2, 1), Dispatch(3, 1)]
    made.requeue_front(3, refused=True)
    made.ring_up(2, 1)
    made.load(1, 2, 2)
    enqueue(made, 4, now=10.0)
    assert made.dispatch(10.0) == [Dispatch(3, 2)]
    assert made.next_event_s() == 10.0 + REFUSED_PAUSE_S
    made.finished(1, 1)
    assert made.dispatch(10.0) == [Dispatch(4, 1)]
    made.requeue_front(3, refused=True)
    assert made.dispatch(60.0) == [Dispatch(3, 1)]


def test_a_refused_request_waits_no_longer_in_all_than_any_other() -> None:
    made = router(1)
    enqueue(made, 1, now=0.0)
    for now in (0.0, 30.0, 60.0):
        assert sent(made, now) == [1]
        made.requeue_front(1, refused=True)
        assert sent(made, now) == []
    assert made.expired(99.9) == []
    assert made.expired(100.0) == [1]


def test_a_ring_that_refused_is_tried_again_after_a_pause() -> None:
    made = router(1)
    enqueue(made, 1)
    assert sent(made) == [1]
    made.requeue_front(1, refused=True)
    assert sent(made, 5.0) == []
    assert sent(made, 5.0 + REFUSED_PAUSE_S - 0.1) == []
    assert sent(made, 5.0 + REFUSED_PAUSE_S) == [1]


def test_cancelling_takes_a_waiting_request_out_and_leaves_a_running_one() -> None:
    made = router(1)
    enqueue(made, 1, 2, 3)
    sent(made)
    assert made.cancel(2)
    assert not made.cancel(2)
    assert not made.cancel(1)
    made.finished(1, 1)
    assert sent(made) == [3]
    made.ring_down(1)
    assert made.cancel(3)  # its ring is gone and it was not put back
    assert (made.waiting, made.running) == (0, 0)


def test_late_words_of_a_ring_that_is_down_change_nothing() -> None:
    made = router(1)
    enqueue(made, 1)
    sent(made)
    made.ring_down(1)
    made.requeue_front(1)
    made.finished(1, 1)
    made.load(1, 5, 0)
    assert made.waiting == 1
    made.ring_up(2, 1)
    assert made.dispatch(0.0) == [Dispatch(1, 2)]
    assert made.ring_down(2) == [1]


def test_an_end_on_an_earlier_ring_does_not_end_the_request_on_its_next_one() -> None:
    made = router(1)
    enqueue(made, 1)
    sent(made)
    made.ring_down(1)
    made.requeue_front(1)
    made.ring_up(2, 1)
    sent(made)
    made.finished(1, 1)
    assert made.running == 1


def test_an_end_frees_a_row_before_the_head_reports_it() -> None:
    made = router(4)
    enqueue(made, 1, 2)
    sent(made)
    made.load(1, 0, 2)
    enqueue(made, 3, 4)
    made.finished(1, 1)
    assert sent(made) == [3]


def with_budget(*, context: int = 0, queue: int = 64) -> Router:
    """One ring of 16 rows whose caches cost a byte a token, in steps of nothing."""
    made = Router(Limits(queue_requests=queue))
    made.ring_up(1, 16, context_tokens=context, row_bytes=lambda tokens: tokens)
    return made


def ask(made: Router, id: int, tokens: int, most: int, client: str = "c") -> None:
    made.enqueue(id, client, most, 0.0, tokens=tokens, most_tokens=most)


def test_a_request_that_the_head_would_refuse_waits_until_its_caches_have_room() -> None:
    made = with_budget()
    ask(made, 1, 100, 110)
    assert sent(made) == [1]
    made.load(1, 15, 1, room_bytes=890)
    ask(made, 2, 900, 910)
    assert sent(made) == []
    made.load(1, 15, 1, room_bytes=909)
    assert sent(made) == []
    made.load(1, 15, 1, room_bytes=910)
    assert sent(made) == [2]


def test_a_request_is_charged_with_room_to_grow_but_never_beyond_its_end() -> None:
    made = with_budget()
    ask(made, 1, 10, 20)
    assert sent(made) == [1]
    made.load(1, 15, 1, room_bytes=GROWTH_TOKENS + 99)
    ask(made, 2, 100, 4000)
    assert sent(made) == []
    made.load(1, 15, 1, room_bytes=GROWTH_TOKENS + 100)
    assert sent(made) == [2]


def test_what_was_sent_counts_until_the_head_has_heard_of_it() -> None:
    made = with_budget()
    ask(made, 1, 10, 10)
    assert sent(made) == [1]
    made.load(1, 15, 1, room_bytes=100)
    for id in (2, 3, 4):
        ask(made, id, 40, 40)
    assert sent(made) == [2, 3]
    made.load(1, 15, 1, room_bytes=100)  # said before it heard of 2 and 3
    assert sent(made) == []
    made.load(1, 13, 3, room_bytes=20)
    assert sent(made) == []
    made.finished(1, 2, 40)
    assert sent(made) == [4]


def test_a_large_request_is_not_overtaken_by_small_ones_for_ever() -> None:
    made = with_budget()
    ask(made, 1, 100, 100)
    assert sent(made) == [1]
    made.load(1, 15, 1, room_bytes=900)
    ask(made, 2, 950, 950, client="large")
    for id in range(3, 9):
        ask(made, id, 10, 10, client="small")
    assert sent(made) == []
    made.finished(1, 1, 100)
    assert sent(made)[0] == 2


def test_a_lone_request_is_always_tried() -> None:
    made = with_budget()
    made.load(1, 0, 0, room_bytes=5)
    ask(made, 1, 1000, 2000)
    assert sent(made) == [1]


def test_a_prompt_that_no_ring_can_ever_hold_is_refused_at_once() -> None:
    made = with_budget(context=100)
    with pytest.raises(PromptTooLong, match="at most 99 tokens") as caught:
        ask(made, 1, 100, 200)
    assert caught.value.fields == {"prompt_tokens": "100", "context_tokens": "100"}
    ask(made, 1, 99, 200)
    assert sent(made) == [1]


def test_what_fits_no_ring_any_more_is_named_and_holds_up_nobody() -> None:
    made = with_budget(context=1000)
    made.load(1, 0, 0)
    ask(made, 1, 500, 600)
    made.ring_down(1)
    made.ring_up(2, 4, context_tokens=100)
    made.enqueue(2, "c", 10, 0.0, tokens=10, most_tokens=20)
    assert made.dispatch(0.0) == [Dispatch(2, 2)]
    assert made.misfits() == [1]
    assert made.misfits() == []
    assert made.waiting == 0


def test_a_long_request_waits_for_the_ring_that_can_hold_it() -> None:
    made = Router(Limits())
    made.ring_up(1, 4, context_tokens=100)
    made.ring_up(2, 1, context_tokens=1000)
    ask(made, 1, 500, 600)
    assert made.dispatch(0.0) == [Dispatch(1, 2)]
    ask(made, 2, 500, 600)
    assert made.dispatch(0.0) == []
    assert made.misfits() == []
    made.finished(2, 1)
    assert made.dispatch(0.0) == [Dispatch(2, 2)]


@pytest.mark.parametrize("seed", range(40))
def test_no_request_is_lost_doubled_or_sent_to_a_full_ring(seed: int) -> None:
    chance = random.Random(seed)
    made = Router(LIMITS)
    rings: dict[int, tuple[int, set[int]]] = {}
    waiting: set[int] = set()
    clients: dict[int, str] = {}
    now, epoch, id = 0.0, 0, 0
    for _ in range(600):
        now += chance.random()
        event = chance.randrange(8)
        running = [(e, i) for e, (_, held) in rings.items() for i in held]
        if event == 0 and len(rings) < 3:
            epoch += 1
            rings[epoch] = (chance.randint(1, 4), set())
            made.ring_up(epoch, rings[epoch][0])
        elif event == 1 and rings and chance.random() < 0.3:
            down = chance.choice(sorted(rings))
            lost = made.ring_down(down)
            assert set(lost) == rings.pop(down)[1]
            for each in lost:
                made.requeue_front(each)
                waiting.add(each)
        elif event in (2, 3):
            id += 1
            clients[id] = client = chance.choice("abc")
            try:
                made.enqueue(id, client, chance.randint(1, 2000), now)
                waiting.add(id)
            except NoRing:
                assert not rings
            except QueueFull:
                own = sum(clients[each] == client for each in waiting)
                assert own >= SHARE * (LIMITS.queue_requests - len(waiting))
        elif event == 4 and running:
            on, ended = chance.choice(running)
            made.finished(on, ended)
            rings[on][1].discard(ended)
        elif event == 5 and running:
            on, refused = chance.choice(running)
            made.requeue_front(refused, refused=True)
            rings[on][1].discard(refused)
            waiting.add(refused)
        elif event == 6 and waiting and chance.random() < 0.5:
            gone = chance.choice(sorted(waiting))
            assert made.cancel(gone)
            waiting.discard(gone)
        elif event == 7 and rings:
            on = chance.choice(sorted(rings))
            made.load(on, chance.randint(0, 4), len(rings[on][1]))
        waiting -= set(made.expired(now))
        for dispatch in made.dispatch(now):
            waiting.remove(dispatch.id)
            slots, held = rings[dispatch.epoch]
            held.add(dispatch.id)
            assert len(held) <= slots
        assert made.waiting == len(waiting)
        assert made.running == sum(len(held) for _, held in rings.values())
    for on, (_, held) in list(rings.items()):
        for each in held:
            made.finished(on, each)
    made.ring_up(epoch + 1, 1000)
    waiting -= set(made.expired(now + 2.0))
    assert {d.id for d in made.dispatch(now + 2.0)} == waiting


def test_a_ring_that_would_cut_an_answer_off_gets_it_only_where_no_other_takes_it() -> None:
    made = Router()
    made.ring_up(1, 4, context_tokens=100)
    made.ring_up(2, 4, context_tokens=1000)
    for id in (1, 2, 3):
        made.enqueue(id, "c", 5000, 0.0, tokens=50, most_tokens=500)
    made.enqueue(4, "c", 10, 0.0, tokens=50, most_tokens=60)
    assert [each.epoch for each in made.dispatch(0.0)] == [2, 2, 2, 1]
    assert made.ring_down(2) == [1, 2, 3]
    for id in (1, 2, 3):
        made.requeue_front(id, tokens=60)
    assert [each.epoch for each in made.dispatch(0.0)] == [1, 1, 1]
