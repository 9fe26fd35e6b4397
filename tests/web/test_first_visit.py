"""From an empty scheduler to an answer, as a person does it: choose, watch, chat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.cluster import boot
from tests.web.test_chat import add_fields

BUILTIN_MODEL = Path(__file__).parents[2] / "demo" / "model"
pytestmark = pytest.mark.browser

RECORD_STATES = """() => {
  window.states = [];
  const state = document.getElementById("state");
  new MutationObserver(() => window.states.push(state.textContent))
    .observe(state, { childList: true, characterData: true, subtree: true });
}"""


def test_a_person_chooses_a_model_watches_nodes_join_and_chats(page: Page, model: Path) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    elsewhere: list[str] = []
    with boot(None, nodes=0) as cluster:
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(cluster.url) else elsewhere.append(request.url)
            ),
        )
        page.goto(cluster.url)
        page.evaluate(RECORD_STATES)
        expect(page.locator("#state")).to_have_text("No model chosen")
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        join = page.locator("#join-command")
        expect(join).to_have_text(cluster.get("/node/join/command")["data"])

        page.get_by_role("combobox", name="Model").select_option("Another model…")
        page.get_by_label("Hub id, or folder on the scheduler").fill(str(model))
        page.get_by_role("spinbutton", name="Nodes").fill("2")
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#state")).to_have_text("Waiting for 2 more nodes")
        expect(page.locator("#model-name")).to_have_text(cluster.status()["model_name"])

        cluster.join("alpha")
        expect(page.locator(".node", has_text="alpha")).to_be_visible()
        expect(page.locator("#state")).to_have_text("Waiting for 1 more node")
        cluster.join("beta")
        expect(page.locator("#state")).to_have_text("Ready", timeout=120_000)
        expect(page.locator("#nodes-count")).to_have_text("2 of 2")

        ring = cluster.wait_ready()["rings"][0]
        for shown, stage in zip(page.locator(".stage").all(), ring["stages"], strict=True):
            first, end = stage["layers"]
            expect(shown.locator("strong")).to_have_text(stage["name"])
            numbers = f"{first}" if end - first == 1 else f"{first}–{end - 1}"
            expect(shown.locator(".held")).to_have_text(numbers)
            row = page.locator(".node", has_text=stage["name"])
            expect(row.locator(".doing")).to_contain_text(numbers)

        add_fields(page, max_tokens=40, ignore_eos=True)  # a random model may end at once
        page.get_by_label("Your message").fill("Hello")
        page.keyboard.press("Enter")
        facts = page.locator(".answer .facts")
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)
        expect(facts).to_contain_text("to first token")
        expect(facts).to_contain_text("tokens/s")

        states = page.evaluate("window.states")
        assert "Waiting for 1 more node" in states
        assert states[-1] == "Ready"
    assert complaints == []
    assert elsewhere == []


@pytest.mark.skipif(
    not (BUILTIN_MODEL / "config.json").exists() and "CI" not in os.environ,
    reason="demo/model has not been made here",
)
def test_a_running_cluster_is_switched_to_the_built_in_model(page: Page, model: Path) -> None:
    with boot(model, nodes=2) as cluster:
        page.goto(cluster.url)
        expect(page.locator("#state")).to_have_text("Ready")
        page.get_by_text("Change the model").click()
        page.get_by_role("combobox", name="Model").select_option("builtin")
        page.get_by_role("button", name="Switch").click()
        expect(page.locator("#model-name")).to_have_text("builtin")
        expect(page.locator("#state")).to_have_text("Ready", timeout=120_000)

        add_fields(page, temperature=0)
        page.get_by_role("button", name="What is Parallax?").click()
        expect(page.locator("p.question")).to_contain_text("What is Parallax?")
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)
        expect(page.locator(".answer .text")).not_to_be_empty()
        assert page.locator(".answer .problem").is_hidden()
        assert cluster.status()["model_name"] == "builtin"
