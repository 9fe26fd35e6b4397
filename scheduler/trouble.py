"""What is wrong just now, as people are told it."""

from __future__ import annotations

from collections.abc import Callable

from parallax.fabric.errors import ParallaxError, from_fault, to_fault
from parallax.fabric.events import Event, Problem


class Trouble:
    """The latest problem, until somebody says that it is over; a new one is an event too."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self.problem: ParallaxError | None = None

    def tell(self, error: ParallaxError) -> None:
        """This is wrong now."""
        if self.problem is None or self.problem.sentence != error.sentence:
            self._on_event(Problem(error))
        self.problem = error

    def over(self, what: ParallaxError | type[ParallaxError] = ParallaxError) -> None:
        """This problem, or every one of this kind, is no more."""
        same = isinstance(self.problem, what) if isinstance(what, type) else self.problem is what
        if same:
            self.problem = None


def of_node(name: str, error: ParallaxError, what: str = "") -> ParallaxError:
    """A node's error as people are told it: ``what`` it could not do, and of which node it is."""
    fault = to_fault(error)
    fault.what = " ".join(filter(None, (name, what))) + f": {fault.what}"
    return from_fault(fault)
