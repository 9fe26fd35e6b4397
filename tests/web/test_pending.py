"""Nodes are let in and refused on the page."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.cluster import boot

pytestmark = pytest.mark.browser

WAITING = r"Waiting to be let in\. Fingerprint: (\S+)"


def test_a_person_lets_one_node_in_and_refuses_another_and_cuts_the_first_off(page: Page) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    with boot(None, nodes=0, scheduler_module="tests.strangers") as cluster:
        page.goto(cluster.url)
        part = page.locator("#pending-part")
        expect(page.locator("#state")).to_have_text("No model chosen")
        expect(part).to_be_hidden()
        expect(page.locator("#join-command")).to_have_text(
            re.compile(r"^parallax join -s 12D3KooW\w+ --token pxt_\w+$")
        )
        wanted, unwanted = cluster.join("attic"), cluster.join("cellar")
        for node, name in ((wanted, "attic"), (unwanted, "cellar")):
            shown = node.wait_for(WAITING).group(1)
            row = part.locator(".asks", has_text=name)
            expect(row.locator("code")).to_have_text(shown)
            expect(row).to_contain_text("127.0.0.1")

        page.get_by_role("button", name="Let attic in").click()
        expect(page.locator(".node", has_text="attic")).to_be_visible()
        page.get_by_role("button", name="Refuse cellar").click()
        expect(part).to_be_hidden()
        wanted.wait_for("Joined 12D3KooW")
        unwanted.wait_for("This node was refused")
        assert unwanted.child.wait(20) == 5
        assert [node["name"] for node in cluster.status()["node_list"]] == ["attic"]

        page.on("dialog", lambda dialog: dialog.accept())
        page.locator(".node", has_text="attic").locator("summary").click()
        page.get_by_role("button", name="Remove at once").click()
        wanted.wait_for("attic was removed")
        wanted.child.wait(20)
    assert complaints == []
