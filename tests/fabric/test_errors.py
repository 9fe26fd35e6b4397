from __future__ import annotations

import inspect

import grpc
import pytest

from parallax.fabric import errors
from parallax.fabric.errors import ROWS, ParallaxError, from_fault, to_fault
from parallax.proto import wire_pb2 as wire

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ParallaxError)
]


def test_the_table_has_one_row_for_each_class_of_the_tree() -> None:
    assert set(ROWS) == set(CLASSES)


def test_every_class_is_drawn_in_the_docstring() -> None:
    drawing = errors.__doc__ or ""
    assert [cls.__name__ for cls in CLASSES if cls.__name__ not in drawing] == []


@pytest.mark.parametrize("cls", CLASSES)
def test_a_row_makes_sense_to_clients(cls: type[ParallaxError]) -> None:
    row = ROWS[cls]
    assert 400 <= row.http < 600
    assert row.grpc is not grpc.StatusCode.OK
    assert row.type in {"invalid_request_error", "rate_limit_error", "server_error"}
    assert row.code == row.code.lower()
    assert 0 < row.exit < 128
    assert (row.type == "rate_limit_error") == (row.http == 429)
    assert (row.type == "server_error") == (row.http >= 500)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_crosses_the_wire_unchanged(cls: type[ParallaxError]) -> None:
    fields = {name: f"value of {name}" for name in cls.FIELDS}
    sent = cls("What happened", "Why it did", "How to fix it", **fields)
    received = from_fault(wire.Fault.FromString(to_fault(sent).SerializeToString()))
    assert type(received) is cls
    assert (received.what, received.why, received.fix) == (sent.what, sent.why, sent.fix)
    assert received.fields == fields
    assert received.row == ROWS[cls]
    assert str(received) == "What happened. Why it did. How to fix it."


def test_a_fault_of_an_unknown_kind_becomes_the_base_class() -> None:
    received = from_fault(wire.Fault(kind="FromTheFuture", what="Odd", fields={"new": "1"}))
    assert type(received) is ParallaxError
    assert received.sentence == "Odd."


def test_a_field_that_a_class_does_not_have_is_a_defect() -> None:
    with pytest.raises(TypeError, match="no fields"):
        errors.QueueFull("Full", colour="red")
