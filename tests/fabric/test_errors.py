"""The error tree: its one table is total, and every error survives the wire."""

from __future__ import annotations

import inspect
import re

import grpc
import pytest

from parallax.fabric import errors
from parallax.fabric.errors import ROWS, InternalError, ParallaxError, from_fault, to_fault
from parallax.proto import wire_pb2 as wire

TREE = sorted(
    (
        thing
        for _, thing in inspect.getmembers(errors, inspect.isclass)
        if issubclass(thing, ParallaxError)
    ),
    key=lambda cls: cls.__name__,
)


def test_every_error_has_exactly_one_row_and_every_row_an_error() -> None:
    assert set(ROWS) == set(TREE)


@pytest.mark.parametrize("kind", TREE)
def test_rows_make_sense(kind: type[ParallaxError]) -> None:
    row = ROWS[kind]
    assert 400 <= row.http <= 599
    assert row.grpc is not grpc.StatusCode.OK
    assert 0 < row.exit < 126, "126 and above are the shell's own"
    assert re.fullmatch(r"[a-z_]+", row.code)
    assert row.type in {"invalid_request_error", "rate_limit_error", "server_error"}
    assert (row.type == "rate_limit_error") == (row.http == 429)
    assert (row.type == "server_error") == (row.http >= 500)


def test_programs_can_tell_errors_apart_by_their_code() -> None:
    shared = [row.code for row in ROWS.values()]
    doubles = {code for code in shared if shared.count(code) > 1}
    # A model that is not served and one that is not on disk are the same to a client.
    assert doubles == {"model_not_found"}


@pytest.mark.parametrize("kind", TREE)
def test_the_docstring_draws_every_error_under_its_parent(kind: type[ParallaxError]) -> None:
    drawing = (errors.__doc__ or "").splitlines()
    (line,) = [n for n, text in enumerate(drawing) if re.search(rf"\b{kind.__name__}\b", text)]
    if kind is ParallaxError:
        return
    column = drawing[line].index(kind.__name__)
    above = next(text for text in reversed(drawing[:line]) if _column(text) < column)
    assert kind.__base__ is not None
    assert kind.__base__.__name__ in above


def _column(text: str) -> int:
    match = re.search(r"[A-Z]\w+", text)
    return match.start() if match else 999


@pytest.mark.parametrize("kind", TREE)
def test_an_error_crosses_the_wire_whole(kind: type[ParallaxError]) -> None:
    fields = {name: f"value of {name}" for name in kind.FIELDS}
    sent = kind("What", "Why", "How", **fields)
    fault = wire.Fault.FromString(to_fault(sent).SerializeToString())
    back = from_fault(fault)
    assert type(back) is kind
    assert (back.what, back.why, back.fix, back.fields) == ("What", "Why", "How", fields)


def test_an_error_of_a_newer_version_is_still_an_error() -> None:
    fault = wire.Fault(kind="FromTheFuture", what="What", fields={"new": "1"})
    back = from_fault(fault)
    assert type(back) is ParallaxError
    assert back.sentence == "What."
    assert back.row.exit == 1


def test_a_field_that_an_older_version_does_not_know_is_left_out() -> None:
    fault = wire.Fault(kind="PortInUse", what="What", fields={"port": "1", "new": "2"})
    assert from_fault(fault).fields == {"port": "1"}


def test_the_sentence_is_what_why_and_fix_each_with_one_full_stop() -> None:
    assert InternalError("What", "Why.", "Really?").sentence == "What. Why. Really?"
    assert InternalError("What", "", "Fix").sentence == "What. Fix."
    assert str(InternalError("What")) == "What."


def test_a_field_that_is_none_is_left_out_and_a_misspelt_one_refused() -> None:
    assert errors.PortInUse("What", port=None).fields == {}
    with pytest.raises(TypeError, match="prot"):
        errors.PortInUse("What", prot=1)
