"""The page where the scheduler asks for a key, and what a browser does to other sites' pages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from tests.cluster import Cluster, boot
from tests.web.test_chat import add_fields, ask, finished

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.browser

COMPLAINTS = """() => {
  window.violations = [];
  document.addEventListener("securitypolicyviolation",
    (event) => window.violations.push(event.violatedDirective));
}"""


@pytest.fixture(scope="module")
def locked(model: Path) -> Iterator[Cluster]:
    """A cluster that asks for keys."""
    with boot(model, nodes=1, flags=("--keys",)) as cluster:
        yield cluster


def make_key(cluster: Cluster, *, admin: bool) -> tuple[str, str]:
    made = cluster.post("/admin/keys", {"admin": admin})["data"]
    return made["key"], made["id"]


def unlock(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Unlock").click()


def test_the_page_asks_for_a_key_and_then_works_as_ever(page: Page, locked: Cluster) -> None:
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.add_init_script(f"({COMPLAINTS})()")
    key, key_id = make_key(locked, admin=True)
    page.goto(locked.url)
    expect(page.locator("#state")).to_have_text("An API key is needed")
    expect(page.locator("main")).to_be_hidden()
    expect(page.get_by_label("API key")).to_be_focused()
    unlock(page, "px-wrong")
    expect(page.locator("#unlock-error")).to_contain_text("does not know this key")
    # The browser itself notes each 401; nothing else may be there.
    assert [said for said in complaints if "401" not in said] == []
    complaints.clear()

    unlock(page, f" {key} ")
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#join-command")).to_have_text(locked.get("/node/join/command")["data"])
    add_fields(page, max_tokens=5, ignore_eos=True)
    ask(page, "Hello")
    finished(page)
    expect(page.locator(".answer .facts")).to_contain_text("5 tokens")
    assert page.locator(".answer .problem").is_hidden()

    page.reload()  # the tab remembers it
    expect(page.locator("#state")).to_have_text("Ready")
    assert page.locator("#unlock").is_hidden()
    assert page.evaluate("sessionStorage.length") == 1
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert key not in page.url
    assert page.evaluate("window.violations") == []
    assert complaints == []

    revoke(locked, key_id)
    expect(page.locator("#state")).to_have_text("An API key is needed")
    assert page.evaluate("sessionStorage.length") == 0


def revoke(cluster: Cluster, key_id: str) -> None:
    from urllib.request import Request, urlopen

    url = f"{cluster.url}/admin/keys/{key_id}"
    with urlopen(Request(url, headers=cluster.headers, method="DELETE"), timeout=10):
        pass


def test_with_a_key_for_use_the_page_shows_nothing_of_the_settings(
    page: Page, locked: Cluster
) -> None:
    page.goto(locked.url)
    unlock(page, make_key(locked, admin=False)[0])
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#join")).to_be_hidden()
    expect(page.locator("#choice")).to_be_hidden()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


PRIES = """async (url) => {
  const outcomes = [];
  for (const [path, options] of [
    ["/cluster/status_json", {}],
    ["/scheduler/init", {method: "POST", body: '{"model_name": "builtin"}',
                         headers: {"Content-Type": "application/json"}}],
    ["/scheduler/init", {method: "POST", body: '{"model_name": "builtin"}', mode: "no-cors"}],
    ["/cluster/status_json", {mode: "no-cors"}],
  ]) {
    try {
      const response = await fetch(url + path, options);
      outcomes.push(response.type === "opaque" ? "opaque" : await response.text());
    } catch {
      outcomes.push("refused");
    }
  }
  const script = document.createElement("script");
  script.src = url + "/words.js";
  outcomes.push(await new Promise((resolve) => {
    script.onload = () => resolve("loaded");
    script.onerror = () => resolve("refused");
    document.head.append(script);
  }));
  return outcomes;
}"""


def test_a_page_of_another_site_neither_reads_nor_changes_anything(page: Page) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Elsewhere</title>")

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with boot(None, nodes=0) as cluster:
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            outcomes = page.evaluate(PRIES, cluster.url)
            status = cluster.status()
            # A name of somebody else's that now points here, as after DNS rebinding.
            rebound = page.goto(cluster.url.replace("127.0.0.1", "rebound.example"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert rebound
    assert rebound.status == 421
    # What is opaque was answered with an error, and cannot be read anyhow.
    assert set(outcomes) <= {"refused", "opaque"}, outcomes
    assert outcomes[:2] == ["refused", "refused"]
    assert (status["model_name"], status["choosing"]) == ("", None)
