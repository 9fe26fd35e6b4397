"""What lazy results are made of."""

from __future__ import annotations

import mlx.core as mx

from parallax.node.trace import reached


def test_only_what_results_are_made_of_is_reached() -> None:
    inputs = {name: mx.zeros((4, 4)) for name in ("left", "right", "unused", "itself")}
    made = mx.concatenate([inputs["left"] @ inputs["right"], mx.ones((1, 4))]).sum()
    assert reached([made, inputs["itself"]], inputs) == {"left", "right", "itself"}
    assert reached([], inputs) == set()


def test_parts_of_arrays_and_operations_of_several_results_are_followed() -> None:
    inputs = {"a": mx.zeros((6,)), "b": mx.zeros((6,)), "c": mx.zeros((6,))}
    first, _ = mx.split(inputs["a"] + 1, 2)
    written = mx.zeros((6,))
    written[2:4] = inputs["b"][:2]
    assert reached([first, written], inputs) == {"a", "b"}


def test_evaluated_inputs_are_reached_too() -> None:
    inputs = {"a": mx.ones((3,)), "b": mx.ones((3,))}
    mx.eval(inputs)
    assert reached([inputs["a"] * 2], inputs) == {"a"}


def test_there_may_be_any_number_of_inputs() -> None:
    inputs = {f"tensor.{i}": mx.zeros((2,)) for i in range(2500)}
    some = {f"tensor.{i}" for i in (0, 999, 1000, 1001, 2499)}
    assert reached([sum((inputs[n] for n in some), mx.zeros((2,)))], inputs) == some


def test_nothing_is_evaluated() -> None:
    before = mx.get_active_memory()
    huge = {"huge": mx.zeros((1 << 20, 1 << 10))}  # 4 GiB, were it evaluated
    assert reached([huge["huge"] + 1], huge) == {"huge"}
    assert mx.get_active_memory() - before < 1 << 20
