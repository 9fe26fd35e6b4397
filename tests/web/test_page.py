"""How the page is served and laid out, and how its modules read streams."""

from __future__ import annotations

import re
import signal
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, expect

from tests.cluster import boot

if TYPE_CHECKING:
    from tests.cluster import Cluster

pytestmark = pytest.mark.browser


def test_the_page_may_load_nothing_from_elsewhere_and_nothing_inline(cluster: Cluster) -> None:
    with urllib.request.urlopen(cluster.url + "/", timeout=10) as answer:
        policy = answer.headers["Content-Security-Policy"]
        html = answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in html
    assert " style=" not in html
    assert re.search(r"\son\w+\s*=", html) is None


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out_at_any_width(page: Page, cluster: Cluster, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    page.goto(cluster.url)
    expect(page.locator("#state")).to_have_text("Ready")
    page.get_by_text("Change the model").click()
    too_wide = """width => [...document.querySelectorAll("body *")]
      .filter((e) => !e.closest("option, .unseen, .skip"))
      .filter((e) => e.getBoundingClientRect().right > width + 1)
      .map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(too_wide, width) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(
    page: Page, cluster: Cluster
) -> None:
    page.goto(cluster.url)
    expect(page.locator("#state")).to_have_text("Ready")
    page.get_by_text("Change the model").click()
    page.get_by_label("Your message").fill("x")
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    controls = {"choose-model", "choose-nodes", "choose-start", "join-copy", "question", "send"}
    assert controls <= reached
    for role, name in [
        ("combobox", "Model"),
        ("spinbutton", "Nodes"),
        ("button", "Switch"),
        ("button", "Copy"),
        ("textbox", "Your message"),
        ("button", "Send"),
    ]:
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()  # type: ignore[arg-type]
    expect(page.get_by_role("log", name="Answers")).to_be_attached()


def test_the_join_command_is_copied(page: Page, cluster: Cluster) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(cluster.url)
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#join-said")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == cluster.get("/node/join/command")["data"]


def test_the_page_says_that_the_scheduler_is_silent_and_comes_back_by_itself(page: Page) -> None:
    with boot(None, nodes=0) as alone:
        page.goto(alone.url)
        expect(page.locator("#state")).to_have_text("No model chosen")
        alone.scheduler.child.send_signal(signal.SIGSTOP)
        try:
            expect(page.locator("#state")).to_contain_text("No connection to the scheduler")
        finally:
            alone.scheduler.child.send_signal(signal.SIGCONT)
        expect(page.locator("#state")).to_have_text("No model chosen")


def module(page: Page, cluster: Cluster, name: str, body: str) -> Any:
    """What a function gives, called with one of the page's own modules."""
    page.goto(cluster.url)
    return page.evaluate(f"async () => {{ const m = await import('./{name}'); {body} }}")


def test_events_are_read_whole_however_the_bytes_are_cut(page: Page, cluster: Cluster) -> None:
    found = module(
        page,
        cluster,
        "stream.js",
        r"""
        const text = ': note\n\ndata: {"a":"häß 🙂"}\r\n\r\ndata:x\ndata: y\n\ndata: [DONE]\n\n';
        const bytes = new TextEncoder().encode(text);
        const all = [];
        for (let size = 1; size <= bytes.length; size += 1) {
          const body = new ReadableStream({
            start(controller) {
              for (let at = 0; at < bytes.length; at += size) {
                controller.enqueue(bytes.slice(at, at + size));
              }
              controller.close();
            },
          });
          const events = [];
          for await (const event of m.events(body)) events.push(event);
          all.push(JSON.stringify(events));
        }
        return [...new Set(all)];
        """,
    )
    assert found == ['["{\\"a\\":\\"häß 🙂\\"}","x\\ny","[DONE]"]']


WORDS = {
    "bytes(0)": "0 bytes",
    "bytes(64 * 2 ** 30)": "64 GB",
    "bytes(9700000)": "9.25 MB",
    "bytes(1023)": "1 KB",
    "duration(84.6)": "85 ms",
    "duration(1240)": "1.24 s",
    "percent(0.999)": "99%",
    "range([0, 6])": "0–5",
    "layers([3, 4])": "layer 3",
    "plural(1, 'node')": "1 node",
    "plural(1200, 'node')": "1,200 nodes",
}


def test_numbers_read_well(page: Page, cluster: Cluster) -> None:
    calls = ", ".join(f"m.{call}" for call in WORDS)
    found = module(page, cluster, "words.js", f"return [{calls}];")
    assert dict(zip(WORDS, found, strict=True)) == WORDS


def test_a_model_that_is_not_there_is_refused_in_words(page: Page, cluster: Cluster) -> None:
    page.goto(cluster.url)
    page.get_by_text("Change the model").click()
    page.get_by_role("combobox", name="Model").select_option("Another model…")
    page.get_by_label("Hub id, or folder on the scheduler").fill("/nowhere/at/all")
    page.get_by_role("button", name="Switch").click()
    expect(page.locator("#choose-error")).to_contain_text("/nowhere/at/all")
    expect(page.locator("#model-name")).to_have_text("tiny")
    expect(page.get_by_role("button", name="Switch")).to_be_enabled()


NODE = {
    "node_id": "a",
    "name": "<b>studio</b>",
    "chip": "Apple M2",
    "state": "ready",
    "memory_bytes": 64 << 30,
    "budget_bytes": 48 << 30,
    "layers": [0, 3],
    "load": {"done_bytes": 25, "total_bytes": 100, "phase": "reading", "fraction": 0.25},
}


def test_loading_and_trouble_are_shown_as_they_are_told(page: Page, cluster: Cluster) -> None:
    page.route("**/cluster/status", lambda route: route.abort())  # what is shown comes from here
    page.goto(cluster.url)
    gone = NODE | {"node_id": "b", "name": "mini", "state": "gone", "load": None, "layers": None}
    why = "Rings with it broke 2 times in a row"
    aside = gone | {"node_id": "c", "name": "old", "state": "aside", "aside": {"why": why}}
    status = {
        "status": "waiting",
        "model_name": "tiny",
        "init_nodes_num": 2,
        "need_more_nodes": True,
        "node_list": [NODE, gone, aside],
        "model": {"name": "tiny", "layers": 3, "context_tokens": 2048, "weight_bytes": 5 << 20},
        "rings": [
            {
                "epoch": 1,
                "status": "forming",
                "stages": [{"node_id": "a", "name": "<b>studio</b>", "layers": [0, 3]}],
                "load": {"decoding": 0, "prefilling": 0, "free_rows": 1, "lanes": 1},
            }
        ],
        "queue": {"waiting": 2, "running": 0},
        "missing_bytes": None,
        "problem": "The model does not fit.",
        "notice": "Not for open networks.",
    }
    page.evaluate(
        "async (status) => { (await import('./status.js')).cluster().update(status); }", status
    )
    expect(page.locator("#state")).to_have_text("Loading 25%")
    expect(page.locator("#problem")).to_have_text("The model does not fit.")
    expect(page.locator("#notice")).to_have_text("Not for open networks.")
    expect(page.locator("#nodes-count")).to_have_text("2 of 2")
    rows = page.locator(".node .doing")
    expect(rows.nth(0)).to_have_text("reading 25%")
    expect(rows.nth(1)).to_have_text("gone")
    expect(rows.nth(2)).to_have_text("put aside")
    expect(rows.nth(2)).to_have_attribute("title", why)
    expect(page.locator(".node strong").nth(0)).to_have_text("<b>studio</b>")
    expect(page.locator(".ring .facts")).to_have_text("Forming · 2 waiting")
    bar = page.locator(".bar")
    expect(bar).to_have_attribute("style", "--layers: 3; --done: 0.25;")


def test_a_node_is_drained_and_used_again_from_its_menu(page: Page, cluster: Cluster) -> None:
    page.goto(cluster.url)
    expect(page.locator("#state")).to_have_text("Ready")
    node = page.locator(".node", has_text="node0")
    page.get_by_label("Menu of node0").click()
    node.get_by_role("button", name="Drain").click()
    expect(node.locator(".doing")).to_have_text("drained")
    page.get_by_label("Menu of node1").click()
    page.locator(".node", has_text="node1").get_by_role("button", name="Drain").click()
    expect(page.locator("#nodes-error")).to_contain_text("bytes are missing")
    page.get_by_label("Menu of node0").click()
    node.get_by_role("button", name="Use again").click()
    expect(node.locator(".doing")).to_contain_text("layers")
    cluster.wait(lambda s: [len(ring["stages"]) for ring in s["rings"]] == [2])
