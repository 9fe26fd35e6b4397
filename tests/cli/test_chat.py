"""``parallax chat`` against prepared answers, on pipes and on a real terminal."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.canned import SPEED, canned, events, piece
from tests.cli.processes import parallax
from tests.cli.terminals import terminal

CHAT = "/v1/chat/completions"


def test_an_answer_is_printed_as_it_comes_and_nothing_else(tmp_path: Path) -> None:
    with canned() as cluster:
        cluster.answers[CHAT] = (200, events(piece("Hel"), piece("lo é"), SPEED))
        done = parallax(tmp_path, "chat", "hi there", "--temperature", "0", "--url", cluster.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello é\n", "")
    (body,) = cluster.posted
    assert body["messages"] == [{"role": "user", "content": "hi there"}]
    assert body["stream"] is True
    assert body["temperature"] == 0


def test_the_prompt_can_come_from_standard_input(tmp_path: Path) -> None:
    with canned() as cluster:
        cluster.answers[CHAT] = (200, events(piece("ok")))
        done = parallax(
            tmp_path, "chat", "--system", "be brief", "--url", cluster.url, text="what?\n"
        )
    assert done.stdout == "ok\n"
    assert cluster.posted[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what?\n"},
    ]


def test_an_empty_prompt_exits_with_2(tmp_path: Path) -> None:
    with canned() as cluster:
        done = parallax(tmp_path, "chat", "--url", cluster.url, text=" \n")
    assert done.returncode == 2
    assert "The prompt is empty" in done.stderr
    assert cluster.posted == []


def test_comments_between_events_are_passed_over(tmp_path: Path) -> None:
    with canned() as cluster:
        body = b": keep-alive\n\n" + events(piece("a")) + b": more\n\n"
        cluster.answers[CHAT] = (200, body)
        assert parallax(tmp_path, "chat", "hi", "--url", cluster.url).stdout == "a\n"


def test_an_answer_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with canned() as cluster:
        cluster.answers[CHAT] = (200, events(piece("a\x1b[2J\nb\tc")))
        assert parallax(tmp_path, "chat", "hi", "--url", cluster.url).stdout == "a[2J\nb\tc\n"


def test_an_error_in_the_middle_of_an_answer_has_its_exit_status(tmp_path: Path) -> None:
    error = {"error": {"message": "The ring broke.", "type": "server_error", "code": "ring_lost"}}
    with canned() as cluster:
        cluster.answers[CHAT] = (200, events(piece("a"), error))
        done = parallax(tmp_path, "chat", "hi", "--url", cluster.url)
    assert done.returncode == 3
    assert "The ring broke." in done.stderr


def test_an_answer_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    with canned() as cluster:
        cluster.answers[CHAT] = (200, events(piece("a"), done=False))
        done = parallax(tmp_path, "chat", "hi", "--url", cluster.url)
    assert done.returncode == 5
    assert "broke off" in done.stderr


def test_an_event_that_makes_no_sense_is_an_error(tmp_path: Path) -> None:
    with canned() as cluster:
        cluster.answers[CHAT] = (200, b"data: {]\n\n")
        done = parallax(tmp_path, "chat", "hi", "--url", cluster.url)
    assert done.returncode == 5
    assert "cannot be understood" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_queue_keeps_its_exit_status(tmp_path: Path) -> None:
    body = {"error": {"message": "The queue is full.", "type": "x", "code": "queue_full"}}
    with canned() as cluster:
        cluster.answers[CHAT] = (429, json.dumps(body).encode())
        done = parallax(tmp_path, "chat", "hi", "--url", cluster.url)
    assert done.returncode == 3
    assert "The queue is full." in done.stderr


def test_a_conversation_is_kept_and_can_be_forgotten(tmp_path: Path) -> None:
    with canned() as cluster, terminal(tmp_path, "chat", "--url", cluster.url) as screen:
        cluster.answers[CHAT] = (200, events(piece("first answer"), SPEED))
        screen.wait_for("> ")
        screen.type("one\r")
        screen.wait_for("21.0 tokens/s")
        screen.wait_for("> ", 2)
        cluster.answers[CHAT] = (200, events(piece("second answer"), SPEED))
        screen.type("two\r")
        screen.wait_for("second answer")
        screen.wait_for("> ", 3)
        screen.type("/new\r")
        screen.wait_for("> ", 4)
        screen.type("three\r")
        screen.wait_for("second answer", 2)
        screen.wait_for("> ", 5)
        screen.type("\x04")
        assert screen.process.wait(10) == 0
    roles = [[m["content"] for m in body["messages"]] for body in cluster.posted]
    assert roles == [["one"], ["one", "first answer", "two"], ["three"]]


def test_an_error_does_not_end_a_conversation(tmp_path: Path) -> None:
    with canned() as cluster, terminal(tmp_path, "chat", "--url", cluster.url) as screen:
        cluster.answers[CHAT] = (200, events(piece("a"), done=False))
        screen.wait_for("> ")
        screen.type("one\r")
        screen.wait_for("broke off")
        screen.wait_for("> ", 2)
        cluster.answers[CHAT] = (200, events(piece("better now")))
        screen.type("two\r")
        screen.wait_for("better now")
        screen.wait_for("> ", 3)
        screen.type("/quit\r")
        assert screen.process.wait(10) == 0
    assert [m["content"] for m in cluster.posted[1]["messages"]] == ["two"]
