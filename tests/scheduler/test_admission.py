"""Who is let in, who waits and who is sent away, without a clock, a disk or a network."""

from __future__ import annotations

from typing import cast

import pytest

from parallax.fabric.errors import InvalidRequest, JoinRefused, UnknownNode, UnknownToken
from parallax.fabric.identity import fingerprint, peer_id_of
from parallax.scheduler import admission, wrong_tokens
from parallax.scheduler.admission import Admission
from parallax.scheduler.admission_values import (
    Admitted,
    DropNode,
    DropToken,
    Known,
    Refused,
    Remembered,
    SaveNode,
    SaveToken,
    Verdict,
    Waiting,
)
from parallax.scheduler.tokens import Token, TokenState, digest_of, new_token

NOW = 1_000_000.0
HOUR = 3600.0
DAY = 24 * HOUR


def node(number: int) -> str:
    return peer_id_of(number.to_bytes(32, "big"))


def print_of(node_id: str) -> str:
    return fingerprint(SCHEDULER, node_id)


SCHEDULER = node(99)
ONE, TWO, THREE = node(1), node(2), node(3)


def ask(
    machine: Admission,
    node_id: str,
    token: str = "",
    *,
    local: bool = False,
    now: float = NOW,
    name: str = "studio",
    address: str = "10.0.0.9",
) -> Verdict:
    return machine.ask(node_id, name, token, local=local, now=now, address=address)


def made(machine: Admission, now: float = NOW, uses: int | None = None) -> tuple[str, Token]:
    plain = new_token()
    return plain, machine.add_token(plain, expires_s=HOUR, uses=uses, note="", now=now)


def reason(verdict: Verdict) -> str:
    assert isinstance(verdict, Refused), verdict
    return verdict.error.fields["reason"]


def restarted(machine: Admission) -> Admission:
    """A new machine that knows what the changes of another one wrote down."""
    tokens: dict[str, Token] = {}
    nodes: dict[str, Known] = {}
    for change in machine.take_changes():
        match change:
            case SaveToken(token):
                tokens[token.id] = token
            case DropToken(token_id):
                del tokens[token_id]
            case SaveNode(known):
                nodes.pop(known.node_id, None)
                nodes[known.node_id] = known
            case DropNode(node_id):
                del nodes[node_id]
    again = Admission(SCHEDULER, open=machine.open)
    again.recall(Remembered(tuple(tokens.values()), tuple(nodes.values())))
    return again


def test_a_stranger_without_a_token_waits_under_its_print_of() -> None:
    machine = Admission(SCHEDULER)
    assert ask(machine, ONE) == Waiting(print_of(ONE), new=True)
    assert ask(machine, ONE, now=NOW + 2, name="attic") == Waiting(print_of(ONE))
    assert not machine.allowed(ONE)
    (pending,) = machine.pending(NOW + 2)
    assert (pending.node_id, pending.name, pending.address) == (ONE, "attic", "10.0.0.9")
    assert (pending.since_s, pending.asked_s) == (NOW, NOW + 2)
    assert machine.take_changes() == []  # strangers write nothing to disk


def test_a_node_of_the_same_machine_is_admitted_and_stays_so_from_elsewhere() -> None:
    machine = Admission(SCHEDULER)
    assert ask(machine, ONE, local=True) == Admitted(new=True)
    assert machine.allowed(ONE)
    assert ask(machine, ONE) == Admitted()


def test_a_good_token_admits_and_is_not_needed_or_used_again() -> None:
    machine = Admission(SCHEDULER)
    plain, _ = made(machine, uses=1)
    assert ask(machine, ONE, plain) == Admitted(new=True)
    assert ask(machine, ONE, plain) == Admitted()
    assert ask(machine, ONE) == Admitted()
    assert ask(machine, ONE, "pxt_of_last_year") == Admitted()
    assert machine.tokens()[0].uses == 1
    assert reason(ask(machine, TWO, plain)) == "used_up"


def test_a_waiting_node_that_comes_back_with_a_token_waits_no_more() -> None:
    machine = Admission(SCHEDULER)
    plain, _ = made(machine)
    ask(machine, ONE)
    assert ask(machine, ONE, plain) == Admitted(new=True)
    assert machine.pending(NOW) == []


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda machine, token: None, "expired"),
        (lambda machine, token: machine.revoke(token.id, NOW), "revoked"),
    ],
)
def test_tokens_end_by_time_and_by_revocation(spoil: object, why: str) -> None:
    machine = Admission(SCHEDULER)
    plain, token = made(machine)
    assert ask(machine, ONE, plain, now=NOW + HOUR - 1) == Admitted(new=True)
    spoil(machine, token)  # type: ignore[operator]
    verdict = ask(machine, TWO, plain, now=NOW + HOUR)
    assert reason(verdict) == why
    assert machine.allowed(ONE)
    assert not machine.allowed(TWO)
    assert machine.refused == {why: 1}
    sentence = cast(Refused, verdict).error.sentence
    assert token.id in sentence
    assert plain not in sentence
    assert "parallax tokens create" in sentence


@pytest.mark.parametrize("word", ["pxt_nonsense", "x" * 100_000, "\ud800"])
def test_words_that_are_no_token_are_refused_and_not_repeated(word: str) -> None:
    machine = Admission(SCHEDULER)
    verdict = ask(machine, ONE, word)
    assert reason(verdict) == "unknown"
    assert word not in cast(Refused, verdict).error.sentence
    assert machine.pending(NOW) == []


def test_wrong_tokens_of_one_address_are_soon_not_looked_into_but_a_right_one_is() -> None:
    machine = Admission(SCHEDULER)
    plain, _ = made(machine)
    for _ in range(wrong_tokens.MOST_FAILURES):
        assert reason(ask(machine, ONE, "guess")) == "unknown"
    assert reason(ask(machine, ONE, "guess")) == "too_many"
    assert reason(ask(machine, ONE, "guess", address="10.0.0.10")) == "unknown"
    assert ask(machine, TWO, plain) == Admitted(new=True)
    later = NOW + wrong_tokens.WINDOW_S
    assert reason(ask(machine, ONE, "guess", now=later)) == "unknown"


def test_guesses_from_everywhere_do_not_fill_memory() -> None:
    machine = Admission(SCHEDULER)
    for number in range(wrong_tokens.MOST_ADDRESSES + 50):
        ask(machine, ONE, "guess", address=f"10.{number}")
    assert len(machine._wrong._windows) == wrong_tokens.MOST_ADDRESSES


def test_an_approved_node_is_admitted_when_it_asks_again() -> None:
    machine = Admission(SCHEDULER)
    ask(machine, ONE)
    assert machine.approve(ONE, NOW).how == "approval"
    assert machine.pending(NOW) == []
    assert ask(machine, ONE) == Admitted()


def test_a_node_can_be_approved_before_it_comes() -> None:
    machine = Admission(SCHEDULER)
    machine.approve(machine.find(ONE), NOW)
    assert ask(machine, ONE) == Admitted()


def test_nodes_are_found_by_id_and_by_fingerprint_however_it_is_typed() -> None:
    machine = Admission(SCHEDULER)
    ask(machine, ONE)
    ask(machine, TWO)
    for waiting in (ONE, TWO):
        print_ = print_of(waiting)
        for word in (waiting, print_, print_.lower(), print_.replace("-", "")):
            assert machine.find(word) == waiting
    for word in (print_of(THREE), "studio", "", "-", print_of(ONE)[:-1]):
        with pytest.raises(UnknownNode):
            machine.find(word)


def test_a_denied_node_is_refused_until_it_is_approved_or_has_a_token() -> None:
    machine = Admission(SCHEDULER)
    plain, _ = made(machine)
    ask(machine, ONE)
    ask(machine, TWO)
    machine.deny(ONE, NOW)
    machine.deny(TWO, NOW)
    assert reason(ask(machine, ONE)) == "denied"
    assert reason(ask(machine, ONE, local=True)) == "denied"
    assert [p.node_id for p in machine.pending(NOW)] == []
    assert ask(machine, ONE, plain) == Admitted(new=True)
    machine.approve(TWO, NOW)
    assert ask(machine, TWO) == Admitted()


def test_a_member_is_not_denied_but_removed() -> None:
    machine = Admission(SCHEDULER)
    machine.approve(ONE, NOW, "studio")
    with pytest.raises(InvalidRequest, match="nodes remove"):
        machine.deny(ONE, NOW)
    assert machine.allowed(ONE)


@pytest.mark.parametrize("open_to_all", [False, True])
def test_a_removed_node_needs_an_approval_or_a_token_made_since(open_to_all: bool) -> None:
    machine = Admission(SCHEDULER, open=open_to_all)
    plain, _ = made(machine)
    ask(machine, ONE, plain)
    machine.remove(ONE, NOW + 10)
    assert not machine.allowed(ONE)
    assert reason(ask(machine, ONE, now=NOW + 20)) == "removed"
    assert reason(ask(machine, ONE, local=True, now=NOW + 20)) == "removed"
    assert reason(ask(machine, ONE, plain, now=NOW + 20)) == "removed"
    fresh, _ = made(machine, now=NOW + 11)
    assert ask(machine, ONE, fresh, now=NOW + 20) == Admitted(new=True)
    machine.remove(ONE, NOW + 30)
    machine.deny(ONE, NOW + 31)  # a denial does not weaken a removal
    assert reason(ask(machine, ONE, fresh, now=NOW + 40)) == "removed"
    machine.approve(ONE, NOW + 50)
    assert ask(machine, ONE, now=NOW + 60) == Admitted()


def test_removing_does_not_use_up_a_token() -> None:
    machine = Admission(SCHEDULER)
    plain, _ = made(machine, uses=2)
    ask(machine, ONE, plain)
    machine.remove(ONE, NOW + 1)
    ask(machine, ONE, plain, now=NOW + 2)
    assert machine.tokens()[0].uses == 1


def test_open_admits_everybody_and_remembers_nobody() -> None:
    machine = Admission(SCHEDULER, open=True)
    assert ask(machine, ONE) == Admitted()
    assert ask(machine, TWO, "nonsense") == Admitted()
    assert machine.allowed(THREE)
    assert machine.take_changes() == []
    assert not restarted(Admission(SCHEDULER)).allowed(ONE)


def test_everything_decided_survives_a_restart() -> None:
    machine = Admission(SCHEDULER)
    limited, _ = made(machine, uses=2)
    revoked, gone = made(machine)
    good, _ = made(machine)
    ask(machine, ONE, limited)
    machine.approve(TWO, NOW)
    machine.remove(TWO, NOW + 1)
    ask(machine, THREE)
    machine.deny(THREE, NOW + 1)
    machine.revoke(gone.id, NOW + 1)
    machine = restarted(machine)
    assert machine.allowed(ONE)
    assert reason(ask(machine, TWO, good, now=NOW + 2)) == "removed"
    assert reason(ask(machine, THREE, now=NOW + 2)) == "denied"
    assert reason(ask(machine, node(4), revoked)) == "revoked"
    assert ask(machine, node(5), limited) == Admitted(new=True)
    assert reason(ask(machine, node(6), limited)) == "used_up"


def test_strangers_cannot_fill_the_list_and_the_first_keep_their_places() -> None:
    machine = Admission(SCHEDULER)
    for number in range(100):
        ask(machine, node(number + 10), address="10.6.6.6")
    assert len(machine.pending(NOW)) == admission.MOST_PENDING_PER_ADDRESS
    assert ask(machine, ONE) == Waiting(print_of(ONE), new=True)
    for number in range(200):
        verdict = ask(machine, node(number + 200), address=f"10.0.1.{number}")
    assert verdict == Waiting("", listed=False)
    pending = machine.pending(NOW)
    assert len(pending) == admission.MOST_PENDING
    assert ONE in [p.node_id for p in pending]


def test_who_stops_asking_makes_room() -> None:
    machine = Admission(SCHEDULER)
    silent = admission.PENDING_SILENT_S
    ask(machine, ONE)
    ask(machine, TWO)
    ask(machine, TWO, now=NOW + silent)
    ask(machine, THREE, now=NOW + silent)
    assert [p.node_id for p in machine.pending(NOW + silent + 1)] == [TWO, THREE]


def test_two_nodes_of_one_fingerprint_have_to_be_named_by_their_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "fingerprint", lambda scheduler, node: "AAAA-BBBB-CCCC-DDDD")
    machine = Admission(SCHEDULER)
    ask(machine, ONE)
    ask(machine, TWO)
    with pytest.raises(UnknownNode, match="Two nodes"):
        machine.find("AAAA-BBBB-CCCC-DDDD")
    assert machine.find(ONE) == ONE


def test_names_are_cut_and_cannot_steer_a_terminal() -> None:
    machine = Admission(SCHEDULER)
    ask(machine, ONE, name="\x1b[2Jstudio\n\u202e" + "x" * 1_000_000)
    (pending,) = machine.pending(NOW)
    assert pending.name.startswith("[2Jstudiox")
    assert len(pending.name) == admission.MOST_NAME


@pytest.mark.parametrize(
    ("expires_s", "uses", "field"),
    [
        (0, None, "expires_s"),
        (1e12, None, "expires_s"),
        (float("nan"), 1, "expires_s"),
        (HOUR, 0, "uses"),
    ],
)
def test_tokens_have_sensible_figures(expires_s: float, uses: int | None, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Admission(SCHEDULER).add_token(
            new_token(), expires_s=expires_s, uses=uses, note="", now=NOW
        )
    assert caught.value.fields == {"field": field}


def test_a_token_that_does_not_exist_cannot_be_revoked() -> None:
    with pytest.raises(UnknownToken, match="tokens list"):
        Admission(SCHEDULER).revoke("beef", NOW)


def test_old_tokens_are_forgotten_in_time_and_good_ones_never() -> None:
    machine = Admission(SCHEDULER)
    _, old = made(machine)
    plain = new_token()
    machine.add_token(plain, expires_s=admission.LONGEST_TOKEN_S, uses=None, note="", now=NOW)
    made(machine, now=NOW + admission.KEEP_TOKEN_S)
    assert old in machine.tokens()
    made(machine, now=NOW + HOUR + admission.KEEP_TOKEN_S + 1)
    assert old not in machine.tokens()
    assert digest_of(plain) in {token.digest for token in machine.tokens()}
    assert DropToken(old.id) in machine.take_changes()


def test_there_are_only_so_many_tokens_and_dead_ones_go_first() -> None:
    machine = Admission(SCHEDULER)
    tokens = [made(machine)[1] for _ in range(admission.MOST_TOKENS)]
    with pytest.raises(InvalidRequest, match="Revoke some"):
        made(machine)
    machine.revoke(tokens[500].id, NOW)
    made(machine)
    assert tokens[500].id not in {token.id for token in machine.tokens()}
    assert len(machine.tokens()) == admission.MOST_TOKENS


def test_a_token_lets_in_only_so_many_that_never_attend() -> None:
    machine = Admission(SCHEDULER, most_idle=3)
    plain, token = made(machine)
    other, _ = made(machine)
    for number in range(3):
        assert ask(machine, node(number), plain) == Admitted(new=True)
    assert ask(machine, node(0), plain) == Admitted()
    verdict = ask(machine, node(9), plain)
    assert reason(verdict) == "crowded"
    assert token.id in cast(Refused, verdict).error.sentence
    assert plain not in cast(Refused, verdict).error.sentence
    assert machine.tokens()[0].uses == 3
    assert ask(machine, node(10), other) == Admitted(new=True)
    assert ask(machine, node(11), local=True) == Admitted(new=True)
    machine = restarted(machine)
    machine.most_idle = 3
    assert reason(ask(machine, node(9), plain)) == "crowded"
    machine.attended(node(1))
    machine.attended(node(1))
    assert ask(machine, node(9), plain) == Admitted(new=True)
    assert reason(ask(machine, node(12), plain)) == "crowded"


def test_of_too_many_nodes_those_that_never_came_are_forgotten_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MOST_NODES", 4)
    machine = Admission(SCHEDULER)
    plain, _ = made(machine)
    machine.approve(ONE, NOW)
    for number in range(10, 13):
        ask(machine, node(number), plain)
    machine.attended(node(10))
    machine = restarted(machine)
    assert ask(machine, node(20), plain) == Admitted(new=True)
    assert not machine.allowed(node(11))
    assert ask(machine, node(21), local=True) == Admitted(new=True)
    assert machine.approve(node(22), NOW).how == "approval"
    assert [k.node_id for k in machine.known()] == [ONE, node(10), node(21), node(22)]
    machine.approve(node(23), NOW)
    assert not machine.allowed(ONE), "who came with a token went before it"
    assert machine.allowed(node(10)), "who has attended stays"


def test_of_too_many_nodes_those_removed_go_once_their_certificates_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MOST_NODES", 3)
    machine = Admission(SCHEDULER, certificate_s=10 * DAY)
    plain = new_token()
    machine.add_token(plain, expires_s=30 * DAY, uses=None, note="", now=NOW)
    for number in range(3):
        machine.approve(node(number), NOW)
        machine.attended(node(number))
    machine.remove(node(1), NOW)
    over = NOW + (10 + 2) * DAY
    for now in (NOW, over):
        assert reason(ask(machine, node(9), plain, now=now)) == "full"
        assert reason(ask(machine, node(9), local=True, now=now)) == "full"
        with pytest.raises(JoinRefused, match="attended"):
            machine.approve(node(9), now)
    assert machine.tokens()[0].uses == 0
    assert ask(machine, node(9), plain, now=over + 1) == Admitted(new=True)
    assert not machine.removed(node(1))
    assert not machine.allowed(node(1)), "it is a stranger now"


def test_who_came_in_with_the_token_of_another_is_known_also_after_its_removal() -> None:
    machine = Admission(SCHEDULER)
    plain, _ = made(machine)
    other, _ = made(machine)
    for number in (1, 2, 3):
        ask(machine, node(number), plain)
    ask(machine, node(4), other)
    machine.approve(node(5), NOW)
    machine.approve(node(6), NOW)
    machine.remove(TWO, NOW + 1)
    for removed in (False, True):
        assert [known.node_id for known in machine.came_with(ONE)] == [THREE]
        if not removed:
            machine.remove(ONE, NOW + 1)
    assert [known.node_id for known in restarted(machine).came_with(ONE)] == [THREE]
    assert machine.came_with(node(4)) == []
    assert machine.came_with(node(5)) == [], "approvals are no token"
    assert machine.came_with(node(99)) == []


def test_denials_beyond_the_bound_forget_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MOST_DENIED", 2)
    machine = Admission(SCHEDULER)
    for number in range(4):
        machine.deny(node(number), NOW + number)
    assert [known.node_id for known in machine.known()] == [node(2), node(3)]
    assert restarted(machine).known() == machine.known()


def test_tokens_are_long_random_and_of_plain_letters() -> None:
    tokens = {new_token() for _ in range(200)}
    assert len(tokens) == 200
    assert all(token.removeprefix("pxt_").isalnum() and len(token) > 26 for token in tokens)


def test_what_is_remembered_holds_no_plain_token() -> None:
    machine = Admission(SCHEDULER)
    plain, token = made(machine)
    assert plain not in repr(machine)
    assert plain not in repr(token)
    assert token.state(NOW) is TokenState.GOOD
    assert isinstance(machine.approve(ONE, NOW), Known)
