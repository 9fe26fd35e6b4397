"""Keys: whose they are, how much they may, what they used; without a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parallax.fabric.errors import KeyLimited, KeyRefused, UnknownKey
from parallax.scheduler.api_keys import (
    Holder,
    KeyRecord,
    KeyRing,
    Usage,
    digest_of,
    new_secret,
)
from parallax.scheduler.key_store import KeyStore
from parallax.scheduler.store import Store


def record(key_id: str = "key_1", key: str = "px-a", **fields: object) -> KeyRecord:
    return KeyRecord(key_id, "name", digest_of(key), **fields)  # type: ignore[arg-type]


def test_a_key_has_at_least_160_random_bits_and_no_two_are_alike() -> None:
    made = {new_secret() for _ in range(1000)}
    assert len(made) == 1000
    for secret in made:
        found = re.fullmatch(r"px-([A-Za-z0-9_-]+)", secret)
        assert found
        assert len(found[1]) * 6 >= 160


def test_neither_a_record_nor_a_ring_shows_a_secret_or_its_digest() -> None:
    secret = new_secret()
    ring = KeyRing([record(key=secret)], secret)
    shown = f"{ring} {ring.find(secret)} {ring.holders()} {ring.holders()[0].record}"
    assert secret not in shown
    assert digest_of(secret) not in shown


def test_only_a_key_that_counts_is_found() -> None:
    ring = KeyRing([record()], local_secret="px-local")
    assert ring.find("px-a").id == "key_1"
    assert ring.find("px-local").admin
    for secret in (None, "", "px-b", "PX-A", digest_of("px-a")):
        with pytest.raises(KeyRefused):
            ring.find(secret)
    holder = ring.revoke("key_1")
    assert holder.revoked
    with pytest.raises(KeyRefused):
        ring.find("px-a")
    with pytest.raises(UnknownKey):
        ring.revoke("key_1")
    with pytest.raises(UnknownKey):
        ring.revoke("local")


def test_no_minute_has_more_requests_than_the_rate() -> None:
    holder = Holder(record(rate=3))
    allowed_s = []
    for tenth in range(3000):
        now_s = tenth / 10
        try:
            holder.begin(now_s, 0)
        except KeyLimited:
            continue
        holder.end()
        allowed_s.append(now_s)
    assert len(allowed_s) == 15  # three in each of five minutes
    for start_s in allowed_s:
        assert sum(start_s <= at_s < start_s + 60 for at_s in allowed_s) <= 3


def test_a_refusal_says_after_how_many_seconds_to_come_back() -> None:
    holder = Holder(record(rate=1))
    holder.begin(100.0, 0)
    with pytest.raises(KeyLimited) as refused:
        holder.begin(100.5, 0)
    assert refused.value.fields["retry_after_s"] == "60"
    with pytest.raises(KeyLimited) as refused:
        holder.begin(159.9, 0)
    assert refused.value.fields["retry_after_s"] == "1"
    holder.begin(160.0, 0)


def test_so_many_requests_run_at_a_time_and_no_more() -> None:
    holder = Holder(record(concurrent=2))
    holder.begin(0, 0)
    holder.begin(0, 0)
    with pytest.raises(KeyLimited):
        holder.begin(0, 0)
    assert holder.usage.requests == 2
    holder.end()
    holder.begin(0, 0)


def test_usage_is_taken_once_and_shown_whole() -> None:
    ring = KeyRing([record(usage=Usage(5, 50, 500, 1000))])
    holder = ring.find("px-a")
    holder.begin(0, 2000)
    holder.used(10, 100)
    assert holder.usage == Usage(6, 60, 600, 2000)
    assert ring.take_fresh() == {"key_1": Usage(1, 10, 100, 2000)}
    assert ring.take_fresh() == {}
    assert holder.usage == Usage(6, 60, 600, 2000)


async def test_keys_and_their_usage_outlive_a_restart(tmp_path: Path) -> None:
    first = record("key_1", "px-a", admin=True, created=1)
    second = record("key_2", "px-b", rate=5, concurrent=2, created=2)
    async with await Store.open(tmp_path) as store:
        keys = await KeyStore.open(store)
        await keys.add(first)
        await keys.add(second)
        await keys.write({"key_2": Usage(1, 2, 3, 4), "key_9": Usage(1, 1, 1, 1)})
        await keys.write({"key_2": Usage(1, 2, 3, None)})
    async with await Store.open(tmp_path) as store:
        keys = await KeyStore.open(store)
        kept = await keys.all()
        assert kept[0] == first
        assert (kept[1].id, kept[1].rate, kept[1].concurrent) == ("key_2", 5, 2)
        assert kept[1].usage == Usage(2, 4, 6, 4)
        await keys.remove("key_1")
        assert [key.id for key in await keys.all()] == ["key_2"]
    assert b"px-" not in (tmp_path / "state.db").read_bytes()
