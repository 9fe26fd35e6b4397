"""Keys, hosts and sites over the real server: who is let through, and how it is counted."""

from __future__ import annotations

import asyncio
import json

import pytest

from parallax.fabric.settings import SchedulerSettings
from parallax.scheduler.api_keys import KeyRecord, KeyRing, digest_of
from parallax.scheduler.http.access import Access, Level, level_of
from tests.scheduler.http.scripted import site, until

LOCKED = Access(keys_required=True)
OPEN_TO = Access(origins=frozenset({"https://chat.example"}))
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
PATHS = {
    "free": ["/", "/main.js", "/health"],
    "key": ["/v1/models", "/model/list", "/cluster/status_json", "/metrics"],
    "admin": ["/node/join/command", "/admin/keys"],
}


def ring(**limits: int) -> KeyRing:
    return KeyRing(
        [
            KeyRecord("key_use", "bob", digest_of("px-use"), **limits),
            KeyRecord("key_admin", "eve", digest_of("px-admin"), admin=True),
        ]
    )


async def ask(here, path, key=None, method="GET", **fields):
    """Status, code of the error, headers."""
    headers = fields.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
    async with here.session.request(method, here.url + path, headers=headers, **fields) as got:
        raw = await got.read()
        try:
            code = json.loads(raw)["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = None
        return got.status, code, got.headers


def refused(here, reason: str) -> float:
    value = here.metrics.registry.get_sample_value(
        "parallax_http_refused_total", {"reason": reason}
    )
    return value or 0.0


async def test_each_path_asks_for_its_kind_of_key(says):
    async with site(says("a"), access=LOCKED, keys=ring()) as here:
        may = {None: {"free"}, "px-use": {"free", "key"}, "px-admin": {"free", "key", "admin"}}
        for key, kinds in may.items():
            for kind, paths in PATHS.items():
                for path in paths:
                    status, code, headers = await ask(here, path, key)
                    if kind in kinds:
                        assert (status, code) == (200, None), (key, path)
                    elif key is None:
                        assert (status, code) == (401, "invalid_api_key"), path
                        assert headers["WWW-Authenticate"] == "Bearer"
                    else:
                        assert (status, code) == (403, "admin_key_required"), path
        assert (await ask(here, "/v1/models", "px-other"))[:2] == (401, "invalid_api_key")
        status = await ask(here, "/v1/models", headers={"x-api-key": "px-use"})
        assert status[0] == 200
        body = {"model_name": "builtin"}
        assert (await ask(here, "/scheduler/init", "px-use", "POST", json=body))[0] == 403
        assert here.cluster.choices == []
        assert (await ask(here, "/scheduler/init", "px-admin", "POST", json=body))[0] == 200
        assert refused(here, "invalid_api_key") == 7
        assert refused(here, "admin_key_required") == 3


@pytest.mark.parametrize(
    "path",
    ["//admin/keys", "/%61dmin/keys", "/admin%2fkeys", "/v1/../admin/keys", "/ADMIN/keys", "/none"],
)
async def test_no_spelling_of_a_path_gets_around_its_key(says, path):
    async with site(says("a"), access=LOCKED, keys=ring()) as here:
        for key, statuses in ((None, (401,)), ("px-use", (403, 404))):
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            authorization = f"Authorization: Bearer {key}\r\n" if key else ""
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n"
            writer.write(head.encode())
            status = int((await reader.readline()).split()[1])
            writer.close()
            assert status in statuses, (path, key)


async def test_on_loopback_no_key_is_needed_and_any_is_taken(says):
    async with site(says("a"), keys=ring()) as here:
        for key in (None, "none", "px-use"):
            for paths in PATHS.values():
                for path in paths:
                    assert (await ask(here, path, key))[0] == 200


async def test_a_key_is_made_used_counted_and_revoked(says):
    async with site(says("abc"), access=LOCKED, keys=ring()) as here:
        body = {"name": "laptop", "rate": 100, "concurrent": 3}
        url, admin = here.url + "/admin/keys", {"Authorization": "Bearer px-admin"}
        async with here.session.post(url, json=body, headers=admin) as got:
            assert got.status == 201
            assert got.headers["Cache-Control"] == "no-store"
            made = (await got.json())["data"]
        key = {"Authorization": f"Bearer {made['key']}"}
        chats = here.url + "/v1/chat/completions"
        async with here.session.post(chats, json=HELLO, headers=key) as got:
            usage = (await got.json())["usage"]
        assert here.cluster.generations[-1].client == made["id"]
        async with here.session.get(url, headers=admin) as got:
            raw = await got.text()
        assert made["key"] not in raw
        assert "digest" not in raw
        (mine,) = [k for k in json.loads(raw)["data"] if k["id"] == made["id"]]
        assert (mine["name"], mine["rate"], mine["concurrent"], mine["requests"]) == (
            *("laptop", 100, 3),
            1,
        )
        assert mine["prompt_tokens"] == usage["prompt_tokens"] > 0
        assert mine["completion_tokens"] == usage["completion_tokens"] == 3
        assert mine["last_used"] > 1_700_000_000
        async with here.session.delete(f"{url}/{made['id']}", headers=admin) as got:
            assert got.status == 200
        async with here.session.post(chats, json=HELLO, headers=key) as got:
            assert got.status == 401
        async with here.session.delete(f"{url}/{made['id']}", headers=admin) as got:
            assert got.status == 404
        for wrong in ({"rate": 0}, {"rate": "5"}, {"concurrent": -1}, {"colour": "red"}):
            async with here.session.post(url, json=wrong, headers=admin) as got:
                assert got.status == 400, wrong


async def test_a_key_over_its_rate_is_429_with_retry_after(says):
    async with site(says("a"), access=LOCKED, keys=ring(rate=2)) as here:
        for _ in range(2):
            assert (await ask(here, "/v1/models", "px-use"))[0] == 200
        status, code, headers = await ask(here, "/v1/models", "px-use")
        assert (status, code) == (429, "rate_limit_exceeded")
        assert 0 < int(headers["Retry-After"]) <= 60
        assert (await ask(here, "/cluster/status_json", "px-use"))[0] == 200  # not an answer
        assert (await ask(here, "/v1/models", "px-admin"))[0] == 200
        assert refused(here, "rate_limit_exceeded") == 1


async def test_a_key_with_its_requests_in_progress_waits_for_one_to_end(says):
    cluster, goes_on = says("a"), asyncio.Event()
    cluster.script.insert(0, goes_on)
    async with site(cluster, access=LOCKED, keys=ring(concurrent=1)) as here:
        chat = "/v1/chat/completions"
        first = asyncio.create_task(ask(here, chat, "px-use", "POST", json=HELLO))
        await until(lambda: cluster.running == 1)
        status, code, headers = await ask(here, chat, "px-use", "POST", json=HELLO)
        assert (status, code, headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        goes_on.set()
        assert (await first)[0] == 200
        assert (await ask(here, chat, "px-use", "POST", json=HELLO))[0] == 200


async def test_a_client_that_goes_frees_its_place_under_the_key(says):
    cluster = says("a")
    cluster.script.append(asyncio.Event())
    keys = ring(concurrent=1)
    async with site(cluster, access=LOCKED, keys=keys) as here:
        chat = here.url + "/v1/chat/completions"
        key = {"Authorization": "Bearer px-use"}
        async with here.session.post(chat, json=HELLO | {"stream": True}, headers=key) as got:
            await got.content.readline()
            assert keys.get("key_use").running == 1
        await until(lambda: keys.get("key_use").running == 0)


async def test_a_status_stream_ends_when_its_key_is_revoked(says):
    keys = ring()
    async with site(says("a"), access=LOCKED, keys=keys) as here:
        headers = {"Authorization": "Bearer px-use"}
        async with here.session.get(here.url + "/cluster/status", headers=headers) as got:
            await got.content.readline()
            keys.revoke("key_use")
            async with asyncio.timeout(20):
                await got.content.read()
            assert got.content.at_eof()


@pytest.mark.parametrize("begins", [True, False], ids=["streams", "waits"])
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "object"])
async def test_an_answer_ends_when_its_key_is_revoked_and_others_go_on(says, streams, begins):
    cluster, keys = says("a"), ring()
    cluster.repeats = begins  # without an end
    if not begins:
        cluster.script.insert(0, asyncio.Event())
    body = HELLO | {"stream": streams, "max_tokens": 1_000_000}
    async with site(cluster, access=LOCKED, keys=keys) as here:
        chat = here.url + "/v1/chat/completions"
        posts = [
            here.session.post(chat, json=body, headers={"Authorization": f"Bearer {key}"})
            for key in ("px-use", "px-admin")
        ]
        asked, other = (asyncio.create_task(answer(post)) for post in posts)
        await until(lambda: cluster.running == 2 and (cluster.yielded > 100 or not begins))
        keys.revoke("key_use")
        async with asyncio.timeout(20):
            text = await asked
        assert "invalid_api_key" in text
        assert "[DONE]" not in text
        await until(lambda: cluster.running == 1)
        assert not other.done()
        other.cancel()


async def answer(post):
    async with post as got:
        return await got.text()


async def test_a_foreign_name_is_told_421_whatever_it_asks(says):
    async with site(says("a"), access=Access(names=frozenset({"studio.local"}))) as here:
        for path in ("/", "/main.js", "/health", "/v1/models", "/none"):
            host = {"Host": f"evil.example:{here.port}"}
            assert (await ask(here, path, headers=host))[:2] == (421, "wrong_host"), path
        assert (await ask(here, "/health", headers={"Host": "studio.local"}))[0] == 200
        assert refused(here, "wrong_host") == 5


async def test_what_a_proxy_sends_on_is_not_taken_for_this_machine(says):
    access = Access.of(SchedulerSettings(), frozenset())
    async with site(says("a"), access=access, keys=ring()) as here:
        through = {"X-Forwarded-For": "203.0.113.9"}
        for path in ("/", "/health", "/v1/models", "/admin/keys", "/none"):
            found = await ask(here, path, "px-admin", headers=through)
            assert found[:2] == (403, "through_proxy"), path
        assert (await ask(here, "/admin/keys"))[0] == 200
        assert refused(here, "through_proxy") == 5


async def test_pages_of_other_sites_change_nothing(says):
    async with site(says("a")) as here:
        own = {"Origin": here.url, "Sec-Fetch-Site": "same-origin"}
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            for path, method in (("/scheduler/init", "POST"), ("/cluster/status_json", "GET")):
                fields = {"json": {"model_name": "builtin"}} if method == "POST" else {}
                found = await ask(here, path, None, method, headers=headers, **fields)
                assert found[:2] == (403, "cross_site"), (headers, path)
                assert "Access-Control-Allow-Origin" not in found[2]
        assert here.cluster.choices == []
        body = {"model_name": "builtin"}
        assert (await ask(here, "/scheduler/init", None, "POST", headers=own, json=body))[0] == 200
        assert len(here.cluster.choices) == 1
        assert refused(here, "cross_site") == 8


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_what_a_form_can_post_is_not_taken_for_json(says, kind):
    async with site(says("a")) as here:
        body = b'{"model_name": "builtin"}'
        kind_line = f"Content-Type: {kind}\r\n" if kind else ""
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(
            f"POST /scheduler/init HTTP/1.1\r\nHost: localhost\r\n{kind_line}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert b" 415 " in await reader.readline()
        writer.close()
        assert here.cluster.choices == []
        assert refused(here, "unsupported_media_type") == 1


async def test_a_named_origin_may_ask_and_no_other(says):
    access = Access(keys_required=True, origins=frozenset({"https://chat.example"}))
    async with site(says("a"), access=access, keys=ring()) as here:
        asked = {
            "Origin": "https://chat.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        path = "/v1/chat/completions"
        status, _, headers = await ask(here, path, None, "OPTIONS", headers=asked)
        assert status == 204
        assert headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert "Origin" in headers["Vary"]
        here_from = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
        for key, expected in (("px-use", 200), (None, 401)):
            fields = {"json": HELLO | {"stream": True}, "headers": here_from}
            status, _, headers = await ask(here, path, key, "POST", **fields)
            assert status == expected
            assert headers["Access-Control-Allow-Origin"] == "https://chat.example"
        status, code, headers = await ask(
            here, path, None, "OPTIONS", headers=asked | {"Origin": "https://evil.example"}
        )
        assert (status, code) == (403, "cross_site")
        assert "Access-Control-Allow-Origin" not in headers


async def test_whatever_changes_something_takes_an_admin_key_and_answers_take_any(says):
    async with site(says("a")) as here:
        changing = {
            route.resource.canonical
            for route in here.app.router.routes()
            if route.method not in ("GET", "HEAD")
        }
        assert {"/v1/chat/completions", "/scheduler/init", "/admin/keys"} <= changing
        for place in changing:
            expected = Level.KEY if place.startswith("/v1/") else Level.ADMIN
            assert level_of(place, frozenset()) is expected, place


async def test_every_answer_tells_browsers_to_be_careful(says):
    async with site(says("a")) as here:
        for path, status in (("/", 200), ("/main.js", 200), ("/v1/models", 200), ("/none", 404)):
            found, _, headers = await ask(here, path)
            assert found == status
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert "aiohttp" not in headers["Server"]
            policy = headers["Content-Security-Policy"]
            for rule in (
                "default-src 'none'",
                "frame-ancestors 'none'",
                "base-uri 'none'",
                "form-action 'none'",
            ):
                assert rule in policy
            assert "unsafe" not in policy
            assert "*" not in policy
