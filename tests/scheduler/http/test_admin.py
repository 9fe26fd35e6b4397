"""``/admin/tokens`` and ``/admin/nodes`` over a real gate and its store."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from parallax.fabric.identity import fingerprint, peer_id_of
from parallax.scheduler.admission_values import Admitted, Refused, Waiting
from parallax.scheduler.gate import Gate
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.store import Store
from tests.scheduler.http.scripted import Scripted, Site, site

SCHEDULER = peer_id_of(b"s" * 32)
NODE = peer_id_of(b"n" * 32)
OTHER = peer_id_of(b"o" * 32)


@asynccontextmanager
async def served(folder: Path, state: Path) -> AsyncIterator[tuple[Site, Gate]]:
    async with await Store.open(state) as store:
        gate = Gate(SCHEDULER, store, Metrics(), lambda event: None)
        await gate.start()
        async with site(Scripted(folder, chosen=False), gate=gate) as at:
            yield at, gate


async def call(
    at: Site, method: str, path: str, body: Any = None, *, status: int = 200
) -> dict[str, Any]:
    async with at.session.request(method, at.url + path, json=body) as response:
        assert response.status == status, await response.text()
        answer: dict[str, Any] = await response.json()
        if status < 300:
            assert response.headers["Cache-Control"] == "no-store"
        return answer


async def ask(gate: Gate, node_id: str, token: str = "") -> object:
    return await gate.ask(node_id, "attic", token, local=False, address="10.0.0.9")


async def test_a_token_is_told_once_and_lets_as_many_in_as_it_says(
    folder: Path, tmp_path: Path
) -> None:
    async with served(folder, tmp_path) as (at, gate):
        asked = {"expires_s": 3600, "uses": 1, "note": "the attic"}
        made = (await call(at, "POST", "/admin/tokens", asked, status=201))["data"]
        assert made["join_command"] == f"parallax join -s {SCHEDULER} --token {made['token']}"
        assert made["expires"] - made["created"] == 3600
        assert await ask(gate, NODE, made["token"]) == Admitted(new=True)
        assert isinstance(await ask(gate, OTHER, made["token"]), Refused)
        async with at.session.get(at.url + "/admin/tokens") as response:
            text = await response.text()
        assert made["token"] not in text
        listed = (await call(at, "GET", "/admin/tokens"))["data"]
        mine = next(token for token in listed if token["id"] == made["id"])
        assert (mine["state"], mine["uses"], mine["uses_limit"]) == ("used up", 1, 1)
        assert mine["note"] == "the attic"


async def test_a_token_without_words_is_good_for_a_day(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path) as (at, _):
        made = (await call(at, "POST", "/admin/tokens", {}, status=201))["data"]
        assert made["expires"] - made["created"] == 86_400
        assert made["uses_limit"] is None


async def test_a_revoked_token_lets_nobody_in(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path) as (at, gate):
        made = (await call(at, "POST", "/admin/tokens", {}, status=201))["data"]
        told = await call(at, "DELETE", f"/admin/tokens/{made['id']}")
        assert told["data"]["state"] == "revoked"
        refused = await ask(gate, NODE, made["token"])
        assert isinstance(refused, Refused)
        assert refused.error.fields == {"reason": "revoked"}
        missing = await call(at, "DELETE", "/admin/tokens/beef", status=404)
        assert missing["error"]["code"] == "token_not_found"


async def test_who_waits_is_listed_and_let_in_or_refused(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path) as (at, gate):
        assert isinstance(await ask(gate, NODE), Waiting)
        assert isinstance(await ask(gate, OTHER), Waiting)
        listed = (await call(at, "GET", "/admin/nodes/pending"))["data"]
        assert [(p["node_id"], p["name"], p["address"]) for p in listed] == [
            (NODE, "attic", "10.0.0.9"),
            (OTHER, "attic", "10.0.0.9"),
        ]
        mark = listed[0]["fingerprint"]
        assert re.fullmatch(r"[A-Z2-7]{4}(-[A-Z2-7]{4}){3}", mark)
        assert mark == fingerprint(SCHEDULER, NODE)
        told = (await call(at, "POST", f"/admin/nodes/{mark.lower()}/approve"))["data"]
        assert (told["node_id"], told["name"], told["standing"]) == (NODE, "attic", "admitted")
        told = (await call(at, "POST", f"/admin/nodes/{OTHER}/deny"))["data"]
        assert told["standing"] == "denied"
        assert await ask(gate, NODE) == Admitted()
        assert isinstance(await ask(gate, OTHER), Refused)
        assert (await call(at, "GET", "/admin/nodes/pending"))["data"] == []


@pytest.mark.parametrize("verb", ["approve", "deny"])
async def test_a_node_that_nobody_knows_is_404(folder: Path, tmp_path: Path, verb: str) -> None:
    async with served(folder, tmp_path) as (at, _):
        answer = await call(at, "POST", f"/admin/nodes/AAAA-BBBB-CCCC-DDDD/{verb}", status=404)
        assert answer["error"]["code"] == "node_not_found"


async def test_a_member_is_not_denied(folder: Path, tmp_path: Path) -> None:
    async with served(folder, tmp_path) as (at, gate):
        await gate.approve(NODE)
        answer = await call(at, "POST", f"/admin/nodes/{NODE}/deny", status=400)
        assert "nodes remove" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"expires_s": 0}, "expires_s"),
        ({"expires_s": 1e300}, "expires_s"),
        ({"uses": 0}, "uses"),
        ({"uses": True}, "uses"),
        ({"note": "x" * 201}, "note"),
        ({"usage": 1}, "usage"),
    ],
)
async def test_a_wrong_token_request_is_400_with_the_field(
    folder: Path, tmp_path: Path, body: dict[str, object], field: str
) -> None:
    async with served(folder, tmp_path) as (at, _):
        answer = await call(at, "POST", "/admin/tokens", body, status=400)
        assert answer["error"]["param"] == field
