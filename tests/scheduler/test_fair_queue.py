"""Turns and places under arrivals that are meant to be unfair."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from parallax.scheduler.fair_queue import CLIENTS_REMEMBERED, SHARE, FairQueue


class Line:
    """A queue with its clients' names, served one request after another."""

    def __init__(self, places: int = 10_000) -> None:
        self.queue = FairQueue(places)
        self.clients: dict[int, str] = {}
        self.costs: dict[int, int] = {}

    def ask(self, client: str, cost: int = 100, count: int = 1) -> None:
        for _ in range(count):
            id = len(self.clients) + 1
            self.clients[id], self.costs[id] = client, cost
            self.queue.push(id, client, cost)

    def serve(self) -> int:
        (_, ids), *_ = self.queue.turns()
        id = next(iter(ids))
        self.queue.take(id, self.clients[id])
        return id

    def turns(self, count: int) -> Counter[str]:
        """Tokens that each client got in so many turns."""
        got: Counter[str] = Counter()
        for _ in range(count):
            id = self.serve()
            got[self.clients[id]] += self.costs[id]
        return got


def test_one_request_does_not_wait_for_a_hundred_of_another_client() -> None:
    line = Line()
    line.ask("many", count=100)
    line.turns(3)
    line.ask("one")
    assert line.turns(2)["one"] == 100


def test_requests_of_one_client_keep_their_order() -> None:
    line = Line()
    line.ask("a", cost=900)
    line.ask("a", cost=1)
    line.ask("a", cost=50)
    assert [line.serve() for _ in range(3)] == [1, 2, 3]


def test_long_requests_get_as_many_tokens_as_short_ones_not_as_many_turns() -> None:
    line = Line()
    line.ask("long", cost=1000, count=50)
    line.ask("short", cost=10, count=5000)
    got = line.turns(1010)
    assert abs(got["long"] - got["short"]) <= 1000


def test_a_client_that_was_away_has_saved_up_nothing() -> None:
    line = Line()
    line.ask("late")
    line.ask("busy", count=200)
    line.turns(101)
    line.ask("late", count=50)
    got = line.turns(40)
    assert abs(got["late"] - got["busy"]) <= 100


def test_a_client_that_was_alone_owes_nothing_for_it() -> None:
    line = Line()
    line.ask("alone", count=500)
    line.turns(400)
    line.ask("new", count=50)
    got = line.turns(40)
    assert abs(got["alone"] - got["new"]) <= 100


def test_many_small_bursts_gain_nothing_over_one_long_queue() -> None:
    line = Line()
    line.ask("steady", count=400)
    got: Counter[str] = Counter()
    for _ in range(100):
        line.ask("bursts", count=2)
        got += line.turns(3)
    assert got["bursts"] <= got["steady"] + 200


def test_what_a_request_did_not_use_is_given_back_and_what_it_overused_is_owed() -> None:
    line = Line()
    line.ask("modest", cost=1000, count=3)
    line.ask("usual", cost=100, count=40)
    assert line.serve() == 1
    line.queue.settle("modest", -990)
    assert {line.clients[line.serve()] for _ in range(2)} == {"modest", "usual"}
    line.queue.settle("usual", 5000)
    assert line.clients[line.serve()] == "modest"


def test_turns_name_every_client_and_its_requests_and_take_nobody_out() -> None:
    line = Line()
    line.ask("a", count=3)
    line.ask("b")
    assert [(name, list(ids)) for name, ids in line.queue.turns()] == [("a", [1, 2, 3]), ("b", [4])]
    assert line.serve() == 1
    assert [(name, list(ids)) for name, ids in line.queue.turns()] == [("b", [4]), ("a", [2, 3])]
    line.queue.remove(4, "b")
    assert [name for name, _ in line.queue.turns()] == ["a"]


@pytest.mark.parametrize("clients", [1, 2, 5, 40])
def test_flooders_leave_a_place_for_someone_new(clients: int) -> None:
    queue = FairQueue(256)
    id = 0
    for _ in range(300):
        for flooder in range(clients):
            if queue.has_place(str(flooder)):
                id += 1
                queue.push(id, str(flooder), 1)
    assert queue.has_place("new")
    assert len(queue) >= (256 * SHARE * clients) // (SHARE * clients + 1) - clients
    held = [queue.waiting_of(str(flooder)) for flooder in range(clients)]
    assert max(held) - min(held) <= SHARE


def test_clients_come_and_go_without_being_remembered_for_good() -> None:
    queue = FairQueue(8)
    for id in range(5 * CLIENTS_REMEMBERED):
        queue.push(id, f"client {id}", 10)
        queue.take(id, f"client {id}")
    assert len(queue._clients) <= CLIENTS_REMEMBERED + 1
    queue.rest()
    assert not queue._clients


@pytest.mark.parametrize("seed", range(30))
def test_clients_that_always_wait_get_equal_tokens_whatever_they_ask(seed: int) -> None:
    chance = random.Random(seed)
    line = Line()
    most: dict[str, int] = {name: chance.choice([5, 100, 2000]) for name in "abcd"}
    got: Counter[str] = Counter()
    waiting: defaultdict[str, int] = defaultdict(int)
    for _ in range(3000):
        for name, cost in most.items():
            if not waiting[name] or chance.random() < 0.1:
                line.ask(name, chance.randint(1, cost))
                waiting[name] += 1
        id = line.serve()
        name = line.clients[id]
        waiting[name] -= 1
        got[name] += line.costs[id]
    # Goyal's theorem 1: apart by at most the largest request of each.
    for one, largest in most.items():
        for other, its_largest in most.items():
            assert abs(got[one] - got[other]) <= largest + its_largest
