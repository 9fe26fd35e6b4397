"""The conversation: exact text, figures, stopping, errors, history."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, Route, expect

if TYPE_CHECKING:
    from tests.cluster import Cluster

pytestmark = pytest.mark.browser

COMPLETIONS = "**/v1/chat/completions"


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def add_fields(page: Page, **fields: object) -> None:
    """Send more fields with each question than the page itself does."""

    def go_on(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(body | fields))

    page.route(COMPLETIONS, go_on)


def open_ready(page: Page, cluster: Cluster) -> None:
    page.goto(cluster.url)
    expect(page.locator("#state")).to_have_text("Ready")


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)


def test_the_page_shows_exactly_the_text_that_the_api_gives(page: Page, cluster: Cluster) -> None:
    fields: dict[str, Any] = {"seed": 7, "temperature": 1, "max_tokens": 60, "ignore_eos": True}
    expected = cluster.chat("Hello\nthere", **fields)
    open_ready(page, cluster)
    add_fields(page, **fields)
    ask(page, "Hello\nthere")
    finished(page)
    answer = expected["choices"][0]["message"]["content"]
    assert page.locator(".answer .text").evaluate("e => e.textContent") == answer


def test_an_answer_shows_its_figures(page: Page, cluster: Cluster) -> None:
    open_ready(page, cluster)
    add_fields(page, max_tokens=40, ignore_eos=True)
    ask(page, "Hello")
    finished(page)
    facts = page.locator(".answer .facts").inner_text()
    pattern = r"([\d.]+) (ms|s) to first token · ([\d.,]+) tokens/s · 40 tokens · ended at .*"
    found = re.fullmatch(pattern, facts)
    assert found, facts
    assert float(found[1]) > 0
    assert float(found[3].replace(",", "")) > 1


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_ends_the_answer_and_frees_the_ring(
    page: Page, cluster: Cluster, way: str
) -> None:
    open_ready(page, cluster)
    add_fields(page, ignore_eos=True)  # else a random model may end by itself first
    ask(page, "Hello")
    text = page.locator(".answer .text")
    expect(text).not_to_be_empty()
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".answer .facts")).to_contain_text("stopped")
    finished(page)
    kept = text.evaluate("e => e.textContent")
    cluster.wait(
        lambda status: all(
            ring["load"]["decoding"] + ring["load"]["prefilling"] == 0 for ring in status["rings"]
        ),
        timeout_s=5,
    )
    assert kept
    assert text.evaluate("e => e.textContent") == kept
    assert page.locator(".answer .problem").is_hidden()


def test_the_conversation_so_far_goes_along_with_a_question(page: Page, cluster: Cluster) -> None:
    open_ready(page, cluster)
    add_fields(page, max_tokens=5)
    ask(page, "One")
    finished(page)
    first = page.locator(".answer .text").evaluate("e => e.textContent")
    with page.expect_request(COMPLETIONS) as asked:
        ask(page, "Two")
    finished(page)
    messages = json.loads(asked.value.post_data or "")["messages"]
    said = [{"role": "user", "content": "One"}, {"role": "assistant", "content": first}]
    assert messages == [*(said if first else []), {"role": "user", "content": "Two"}]

    page.get_by_role("button", name="New chat").click()
    assert page.locator(".exchange").count() == 0
    with page.expect_request(COMPLETIONS) as asked:
        ask(page, "Three")
    finished(page)
    assert json.loads(asked.value.post_data or "")["messages"] == [
        {"role": "user", "content": "Three"}
    ]


def test_a_refusal_is_shown_as_the_scheduler_s_sentence_and_can_be_tried_again(
    page: Page, cluster: Cluster
) -> None:
    open_ready(page, cluster)
    add_fields(page, top_k=-1)
    ask(page, "Hello")
    problem = page.locator(".answer .problem")
    expect(problem).to_contain_text("top_k")
    finished(page)
    page.unroute(COMPLETIONS)
    add_fields(page, max_tokens=5, ignore_eos=True)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .facts")).to_contain_text("5 tokens")
    assert problem.is_hidden()


def test_markup_in_a_question_stays_text(page: Page, cluster: Cluster) -> None:
    open_ready(page, cluster)
    add_fields(page, max_tokens=2)
    ask(page, "<img src=x onerror=document.title='owned'><b>bold</b>")
    finished(page)
    expect(page.locator("p.question")).to_contain_text("<b>bold</b>")
    assert page.locator(".exchange img, .exchange b").count() == 0
    assert page.title() == "Parallax"
