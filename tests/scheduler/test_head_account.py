"""What a head may report: whatever an honest one says passes, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from parallax.fabric.bounds import MOST_EVENTS
from parallax.fabric.errors import MessageRefused
from parallax.node.conductor import Output
from parallax.node.head import parts_of
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.head_account import REPORT_BYTES, HeadAccount
from tests.node.pretend import NEVER, PretendRing, make_ring, prompt_of, submit

FORKS = wire.CacheCost(bytes_per_token=1, forks=True, answers=True, trim_tokens=(1 << 32) - 1)


class Reporting:
    """A pretend ring whose head's answers wait for a slow stream, then pass by an account."""

    def __init__(self, ring: PretendRing) -> None:
        self.ring, self.account = ring, HeadAccount()
        self.report = wire.HeadReport(epoch=7)
        take = ring.take

        def kept(out: Output) -> None:
            self.report.tokens.extend(out.tokens)
            self.report.ends.extend(out.ends)
            take(out)

        ring.take = kept  # type: ignore[method-assign]

    def submit(self, order: wire.Submit) -> None:
        self.account.sent(order)
        self.ring.take(self.ring.conductor.submit(order))

    def read(self) -> None:
        report, self.report = self.report, wire.HeadReport(epoch=7)
        report.load.CopyFrom(self.ring.load)
        for part in parts_of(report):
            self.account.take(wire.HeadReport.FromString(part.SerializeToString()))


@pytest.mark.parametrize("seed", range(8))
def test_an_honest_head_is_believed_however_seldom_it_is_read(seed: int) -> None:
    rng = random.Random(seed)
    ring = make_ring(
        stages=rng.randrange(1, 4),
        rows=4 if seed % 2 else 1,
        lanes=2 if seed % 2 else 1,
        budget=rng.choice([0, 2000]),
        cost=FORKS,
        draft_tokens=16,
        block_tokens=4,
    )
    head = Reporting(ring)
    shared = prompt_of(rng, 200)
    for number in range(1, 25):
        head.submit(submit(number, shared + prompt_of(rng), 30, NEVER if number % 3 else 5))
        for _ in range(rng.randrange(40)):
            if ring.frames:
                ring.step()
            if rng.random() < 0.1:
                victim = rng.randrange(1, number + 1)
                ring.take(ring.conductor.cancel(wire.Cancel(request=victim, attempt=1)))
            if rng.random() < 0.05:
                head.read()
    ring.run_out()
    head.read()
    assert not head.account._open, "each request that was sent has had its end"
    assert ring.load.prefixes.hits


def test_the_largest_honest_report_leaves_in_parts_that_are_small_enough_to_be_read() -> None:
    most = 2 * MOST_EVENTS + 1
    event = wire.TokenEvent(
        **{field.name: (1 << 32) - 1 for field in wire.TokenEvent.DESCRIPTOR.fields}
    )
    event.request = (1 << 64) - 1
    end = wire.EndEvent(request=event.request, attempt=event.attempt, reason=wire.END_REFUSED)
    load = wire.HeadLoad(decoding=3)
    report = wire.HeadReport(epoch=7, tokens=[event] * most, ends=[end] * most, load=load)
    parts = parts_of(report)
    together = wire.HeadReport()
    for part in parts:
        assert part.epoch == 7
        together.MergeFrom(part)
    assert together == report
    assert [len(part.tokens) for part in parts] == [MOST_EVENTS, MOST_EVENTS, 1, 0, 0, 0]
    assert [len(part.ends) for part in parts] == [0, 0, 0, MOST_EVENTS, MOST_EVENTS, 1]
    assert [part.HasField("load") for part in parts] == [False] * 5 + [True]
    fullest = wire.HeadReport(epoch=1 << 63, tokens=[event] * MOST_EVENTS)
    fullest.ends.extend([end] * MOST_EVENTS)
    assert fullest.ByteSize() < REPORT_BYTES - 1024


def token(**values: int) -> wire.HeadReport:
    event = wire.TokenEvent(**{"request": 1, "attempt": 1, "index": 2, "token": 9} | values)
    return wire.HeadReport(tokens=[event])


def loaded(prefixes: wire.PrefixLoad | None = None, **values: int) -> wire.HeadReport:
    return wire.HeadReport(load=wire.HeadLoad(prefixes=prefixes, **values))


END = wire.EndEvent(request=1, attempt=1)
SENSELESS: dict[str, wire.HeadReport] = {
    "millions of tokens": wire.HeadReport(tokens=[wire.TokenEvent()] * (MOST_EVENTS + 1)),
    "millions of ends": wire.HeadReport(ends=[wire.EndEvent()] * (MOST_EVENTS + 1)),
    "a token of nobody": token(request=2),
    "a token of another attempt": token(attempt=2),
    "a token before the first": token(index=1),
    "a token that leaves one out": token(index=3),
    "more from a cache than there was": token(cached_tokens=6),
    "an end of nobody": wire.HeadReport(ends=[wire.EndEvent(request=2, attempt=1)]),
    "two ends": wire.HeadReport(ends=[END, END]),
    "more at work than was sent": loaded(decoding=1, prefilling=1),
    "more lanes than rows": loaded(lanes=2),
    "bytes without end": loaded(budget_bytes=1 << 60),
    "rows without end": loaded(free_rows=1 << 30),
    "more prompts than were sent": loaded(wire.PrefixLoad(prompts=2)),
    "more hits than prompts": loaded(wire.PrefixLoad(prompts=1, hits=2)),
    "more saved than was sent": loaded(wire.PrefixLoad(prompts=1, saved_tokens=6)),
    "evictions of nothing": loaded(wire.PrefixLoad(evictions=1 << 20)),
    "more kept than a ring keeps": loaded(wire.PrefixLoad(kept=1 << 20)),
    "drafts without answers": loaded(drafted_tokens=1 << 40),
    "more drafts accepted than sent": loaded(accepted_tokens=1),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_head_that_says_what_cannot_be_is_not_believed(name: str) -> None:
    account = HeadAccount()
    order = submit(1, [1, 2, 3], max_tokens=3)
    order.generated.extend([4, 5])
    account.sent(order)
    with pytest.raises(MessageRefused) as caught:
        account.take(SENSELESS[name])
    assert caught.value.fields["field"]


@pytest.mark.parametrize("more", [token(index=3), token()], ids=["beyond its length", "again"])
def test_of_an_answer_there_are_so_many_tokens_and_none_after_its_end(
    more: wire.HeadReport,
) -> None:
    account = HeadAccount()
    order = submit(1, [1, 2, 3], max_tokens=3)
    order.generated.extend([4, 5])
    account.sent(order)
    account.take(token(cached_tokens=5))
    with pytest.raises(MessageRefused):
        account.take(more)
    account.take(wire.HeadReport(ends=[END]))
    with pytest.raises(MessageRefused):
        account.take(wire.HeadReport(ends=[END]))


def test_a_head_that_never_tells_an_end_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallax.scheduler.head_account.MOST_OPEN", 2)
    account = HeadAccount()
    sent: Callable[[int], None] = lambda number: account.sent(submit(number, [1]))  # noqa: E731
    sent(1)
    sent(2)
    with pytest.raises(MessageRefused, match="ends"):
        sent(3)
