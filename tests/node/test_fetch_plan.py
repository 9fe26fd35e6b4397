"""The plan of a fetch, with plain lists: whoever fails, every block comes once and is right."""

from __future__ import annotations

import random

from parallax.node.fetch_plan import FetchPlan, Parcel

PATIENCE_S = 60.0


def parcels(count: int, size: int = 4) -> list[Parcel]:
    return [Parcel("f", range(size * n, size * (n + 1))) for n in range(count)]


def everything(_file: str, _block: int) -> bool:
    return True


def make(count: int, *sources: str) -> FetchPlan:
    plan = FetchPlan(parcels(count), patience_s=PATIENCE_S, now=0.0)
    for source in sources:
        plan.offer(source, everything)
    return plan


def test_a_source_that_is_faster_delivers_more() -> None:
    plan = make(90, "slow", "fast")
    flying: dict[str, tuple[float, Parcel]] = {}
    counts = {"slow": 0, "fast": 0}
    now = 0.0
    while not plan.finished:
        for source, takes_s in (("slow", 2.0), ("fast", 1.0)):
            if source not in flying and (parcel := plan.next(source, now)):
                flying[source] = now + takes_s, parcel
        source = min(flying, key=lambda s: flying[s][0])
        now, parcel = flying.pop(source)
        plan.arrived(source, parcel, now)
        counts[source] += 1
    assert counts == {"slow": 30, "fast": 60}


def test_a_source_is_asked_only_for_what_it_holds() -> None:
    plan = make(4, "all")
    plan.offer("some", lambda _file, block: 8 <= block < 12)
    found = plan.next("some", 0.0)
    assert found == Parcel("f", range(8, 12))
    assert plan.next("some", 0.0) is None
    plan.offer("some", lambda _file, block: block < 12)
    assert plan.next("some", 0.0) == Parcel("f", range(4))


def test_what_a_source_did_not_deliver_is_asked_of_another_from_where_it_stopped() -> None:
    plan = make(1, "a", "b")
    parcel = plan.next("a", 0.0)
    assert parcel is not None
    plan.stopped("a", parcel, 3, 1.0)
    assert plan.next("a", 1.1) is None, "a source that failed rests"
    assert plan.next("b", 1.1) == Parcel("f", range(3, 4))


def test_a_source_that_failed_is_asked_again_later_and_later() -> None:
    plan = make(9, "a")
    now, pauses = 0.0, []
    for _ in range(7):
        parcel = plan.next("a", now)
        assert parcel is not None
        plan.stopped("a", parcel, 0, now)
        begin = now
        while plan.next("a", now) is None:
            now += 0.125
        pauses.append(now - begin)
        plan.returned("a", parcel, 0, now)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_two_parcels_lost_with_one_connection_count_as_one_failure() -> None:
    plan = make(2, "a")
    first, second = plan.next("a", 0.0), plan.next("a", 0.0)
    assert first is not None
    assert second is not None
    plan.stopped("a", first, 0, 0.0)
    plan.stopped("a", second, 0, 0.0)
    assert plan.next("a", 0.25) is not None


def test_a_source_with_wrong_bytes_is_never_asked_again() -> None:
    plan = make(3, "liar", "honest")
    parcel = plan.next("liar", 0.0)
    assert parcel is not None
    plan.wrong("liar", parcel, 1, 0.0)
    assert plan.banned == ["liar"]
    assert plan.next("liar", 1e9) is None
    assert plan.next("honest", 0.0) == Parcel("f", range(1, 4))


def test_it_is_hopeless_when_all_lie_or_nothing_comes_for_long() -> None:
    plan = make(3, "liar")
    assert not plan.hopeless(1.0)
    parcel = plan.next("liar", 0.0)
    assert parcel is not None
    plan.wrong("liar", parcel, 0, 0.0)
    assert plan.hopeless(1.0)
    patient = make(3, "a")
    parcel = patient.next("a", 0.0)
    assert parcel is not None
    patient.arrived("a", parcel, 30.0)
    assert not patient.hopeless(30.0 + PATIENCE_S)
    assert patient.hopeless(30.1 + PATIENCE_S)


def test_whatever_fails_every_block_arrives_once() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        plan = make(12, "a", "b", "c")
        arrived: list[int] = []
        flying: list[tuple[str, Parcel]] = []
        now = 0.0
        for _ in range(5000):
            if plan.finished:
                break
            now += 0.1
            source = rng.choice("abc")
            if len(flying) < 5 and (parcel := plan.next(source, now)):
                flying.append((source, parcel))
            if not flying or rng.random() < 0.4:
                continue
            who, parcel = flying.pop(rng.randrange(len(flying)))
            good = rng.randrange(len(parcel.blocks))
            fate = rng.random()
            if fate < 0.5:
                arrived += parcel.blocks
                plan.arrived(who, parcel, now)
                continue
            arrived += parcel.blocks[:good]
            if fate < 0.97 or who == "a":
                plan.stopped(who, parcel, good, now)
            else:
                plan.wrong(who, parcel, good, now)
        assert plan.finished, seed
        assert sorted(arrived) == list(range(48)), seed
