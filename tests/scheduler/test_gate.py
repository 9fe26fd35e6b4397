"""Admission with its disk: what was answered is written, and survives."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from parallax.fabric.errors import BadSetting
from parallax.fabric.events import Event, NodeAsks
from parallax.fabric.identity import fingerprint, peer_id_of
from parallax.scheduler import store as store_module
from parallax.scheduler.admission_values import Admitted, Refused, Waiting
from parallax.scheduler.gate import Gate
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.store import FILE_NAME, Choice, Store
from parallax.scheduler.tokens import TokenState

SCHEDULER = peer_id_of(b"s" * 32)
NODE = peer_id_of(b"n" * 32)
OTHER = peer_id_of(b"o" * 32)
DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A gate over a store, and what it said."""

    def __init__(self, store: Store, clock: Clock, *, open_to_all: bool = False) -> None:
        self.events: list[Event] = []
        self.metrics = Metrics()
        self.gate = Gate(
            SCHEDULER,
            store,
            self.metrics,
            self.events.append,
            open_to_all=open_to_all,
            token_s=DAY,
            clock=clock,
        )

    async def ask(self, node_id: str, token: str = "", *, local: bool = False) -> object:
        return await self.gate.ask(node_id, "studio", token, local=local, address="10.0.0.9")


def shown(gate: Gate) -> str:
    return gate.join_command().rpartition(" --token ")[2]


async def test_a_decision_is_on_disk_when_the_answer_is_given(tmp_path: Path) -> None:
    clock = Clock()
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, clock)
        await desk.gate.start()
        token = shown(desk.gate)
        assert await desk.ask(NODE, token) == Admitted(new=True)
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as other:
            assert other.execute("SELECT node_id, standing FROM node").fetchall() == [
                (NODE, "admitted")
            ]
            assert other.execute("SELECT uses FROM token").fetchall() == [(1,)]
    content = (tmp_path / FILE_NAME).read_bytes()
    assert NODE.encode() in content
    assert token.encode() not in content


async def test_tokens_members_and_removals_survive_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, clock)
        await desk.gate.start()
        await desk.ask(OTHER)
        await desk.gate.approve(fingerprint(SCHEDULER, OTHER))
        await desk.gate.remove(OTHER, "attic")
        token = shown(desk.gate)
        await desk.ask(NODE, token)
        once, _ = await desk.gate.create_token(DAY, uses=1, note="for the attic")
    clock.now += 1
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, clock)
        await desk.gate.start()
        assert desk.gate.allowed(NODE)
        assert not desk.gate.allowed(OTHER)
        assert [t.note for t, _ in desk.gate.tokens()] == [
            "made by parallax run",  # which the removal ended
            "made by parallax run",
            "for the attic",
            "made by parallax run",
        ]
        assert shown(desk.gate) != token  # nobody knows the old one any more, but it is good
        assert await desk.ask(peer_id_of(b"1" * 32), token) == Admitted(new=True)
        assert await desk.ask(peer_id_of(b"2" * 32), once) == Admitted(new=True)
        refused = await desk.ask(peer_id_of(b"3" * 32), once)
        assert isinstance(refused, Refused)
        page = desk.metrics.page().decode()
        assert 'parallax_joins_refused_total{reason="used_up"} 1.0' in page


async def test_who_waits_is_announced_once(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, Clock())
        await desk.gate.start()
        assert isinstance(await desk.ask(NODE), Waiting)
        assert isinstance(await desk.ask(NODE), Waiting)
        assert desk.events == [NodeAsks("studio", "10.0.0.9", fingerprint(SCHEDULER, NODE))]


async def test_the_shown_token_is_renewed_in_time_and_after_a_revocation(tmp_path: Path) -> None:
    clock = Clock()
    async with await Store.open(tmp_path) as store:
        gate = Desk(store, clock).gate
        await gate.start()
        first = shown(gate)
        await gate.renew()
        assert shown(gate) == first
        clock.now += DAY / 2
        await gate.renew()
        second = shown(gate)
        assert second != first
        assert [state for _, state in gate.tokens()] == [TokenState.GOOD] * 2
        await gate.revoke_token(gate.tokens()[-1][0].id)
        assert shown(gate) not in (first, second)
        assert gate.plain_join_command() == f"parallax join -s {SCHEDULER}"


async def test_a_removed_machine_does_not_come_back_under_another_key(tmp_path: Path) -> None:
    clock = Clock()
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, clock)
        await desk.gate.start()
        handed_out, _ = await desk.gate.create_token(DAY, note="for the attic")
        others, _ = await desk.gate.create_token(DAY, note="for the cellar")
        assert await desk.ask(NODE, handed_out) == Admitted(new=True)
        printed = shown(desk.gate)
        clock.now += 1
        await desk.gate.remove(NODE, "attic")
        for count, token in enumerate((shown(desk.gate), others), 8):  # all others still come in
            assert await desk.ask(peer_id_of(bytes([count]) * 32), token) == Admitted(new=True)
    async with await Store.open(tmp_path) as store:
        again = Desk(store, clock)
        await again.gate.start()
        for count, token in enumerate((handed_out, printed)):
            refused = await again.ask(peer_id_of(bytes([count]) * 32), token)
            assert isinstance(refused, Refused)
            assert refused.error.fields["reason"] == "revoked"


async def test_who_was_sent_away_stays_so_however_old_that_is(tmp_path: Path) -> None:
    clock = Clock()
    async with await Store.open(tmp_path) as store:
        gate = Desk(store, clock).gate
        await gate.start()
        await gate.remove(NODE)
        clock.now += 400 * DAY
        await gate.deny(OTHER)
        assert gate.sent_away() == [NODE, OTHER]
        await gate.approve(NODE)
        assert gate.sent_away() == [OTHER]


async def test_an_open_gate_shows_no_token(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, Clock(), open_to_all=True)
        await desk.gate.start()
        assert desk.gate.join_command() == f"parallax join -s {SCHEDULER}"
        assert await desk.ask(NODE) == Admitted()


async def test_what_could_not_be_written_admits_nobody_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.store._BUSY_S", 0.05)
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, Clock())
        await desk.gate.start()
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for _ in range(2):
                with pytest.raises(BadSetting, match="other program"):
                    await desk.ask(NODE, local=True)
            other.execute("ROLLBACK")
            assert await desk.ask(NODE, local=True) == Admitted()
            assert other.execute("SELECT count(*) FROM node").fetchone() == (1,)


async def test_a_denial_that_cannot_be_written_holds_and_is_written_as_soon_as_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.store._BUSY_S", 0.05)
    async with await Store.open(tmp_path) as store:
        gate = Desk(store, Clock(), open_to_all=True).gate
        told: list[list[str]] = []
        gate.decided = lambda: told.append(gate.sent_away())
        await gate.start()
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(BadSetting, match="is refused from now on, but"):
                await gate.deny(NODE)
            assert told == [[NODE]], "its stream stands"
            assert not gate.allowed(NODE)
            other.execute("ROLLBACK")
            await gate.write()
            assert other.execute("SELECT node_id FROM node").fetchall() == [(NODE,)]


async def test_a_removal_that_could_not_be_written_leaves_no_revoked_token_in_the_join_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.store._BUSY_S", 0.05)
    async with await Store.open(tmp_path) as store:
        desk = Desk(store, Clock())
        await desk.gate.start()
        before = shown(desk.gate)
        assert await desk.ask(NODE, before) == Admitted(new=True)
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(BadSetting):
                await desk.gate.remove(NODE)
            other.execute("ROLLBACK")
        await desk.gate.renew()  # as happens each minute
        assert shown(desk.gate) != before
        assert await desk.ask(OTHER, shown(desk.gate)) == Admitted(new=True)


async def test_a_state_file_of_the_first_form_is_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as old:
        old.executescript(
            """
            CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
            INSERT INTO counter (name, value) VALUES ('epoch', 41);
            CREATE TABLE choice (
                one INTEGER PRIMARY KEY CHECK (one = 1), model TEXT NOT NULL,
                nodes INTEGER NOT NULL
            ) STRICT;
            INSERT INTO choice (one, model, nodes) VALUES (1, 'builtin', 2);
            PRAGMA user_version = 1;
            """
        )
    for _ in range(2):  # and what it has become is opened as it is
        async with await Store.open(tmp_path) as store:
            assert await store.choice() == Choice("builtin", 2)
            desk = Desk(store, Clock())
            await desk.gate.start()
            await desk.ask(NODE, local=True)
    async with await Store.open(tmp_path) as store:
        assert await store.next_epoch() == 42


async def test_who_has_attended_and_the_longest_certificates_are_known_after_a_restart(
    tmp_path: Path,
) -> None:
    async with await Store.open(tmp_path) as store:
        gate = Gate(SCHEDULER, store, Metrics(), lambda event: None, certificate_s=30 * DAY)
        await gate.start()
        for node_id in (NODE, OTHER):
            await gate.approve(node_id)
        gate.attended(NODE)
        await gate.write()
    async with await Store.open(tmp_path) as store:
        gate = Gate(SCHEDULER, store, Metrics(), lambda event: None, certificate_s=DAY)
        await gate.start()
        assert {known.node_id: known.attended for known in gate.known()} == {
            NODE: True,
            OTHER: False,
        }
        assert gate._admission.certificate_s == 30 * DAY
        gate.attended(OTHER)
        await gate.write()
        assert await store.run("SELECT node_id FROM unattended") == []


async def test_members_of_an_older_file_count_as_seen(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as old:
        for script in store_module._MIGRATIONS[:3]:
            old.executescript(script)
        old.execute("INSERT INTO node VALUES (?, 'attic', 'admitted', 1.0, 'token 1234')", (NODE,))
        old.execute("INSERT INTO node VALUES (?, 'cellar', 'removed', 1.0, '')", (OTHER,))
        old.execute("PRAGMA user_version = 3")
        old.commit()
    for _ in range(2):
        async with await Store.open(tmp_path) as store:
            gate = Desk(store, Clock()).gate
            await gate.start()
            assert gate.allowed(NODE)
            assert gate.removed(OTHER)
            assert [known.attended for known in gate.known()] == [True, True]
            assert gate._admission.certificate_s == 7 * DAY
