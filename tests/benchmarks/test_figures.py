"""Rows, goals and what is shown of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import report
from benchmarks.__main__ import measure
from benchmarks.bench import Bench
from benchmarks.disturbance import Disturbance
from benchmarks.figures import Part, Row, Sheet, at_least, at_most, quantile
from benchmarks.plot import Line, bars, lines

RATIO = Row("decode", "tokens/s", "mlx-lm", at_least(0.9))
ALONE = Row("models", "ms", goal=at_most(1.0))


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What other processes do in the next rounds, in cores; nothing once that is used up."""
    cores: list[float] = []
    monkeypatch.setattr(Disturbance, "cores", lambda _: cores.pop(0) if cores else 0.0)
    return cores


def quiet(_: str) -> None:
    return None


def results(part: Part) -> dict[str, Any]:
    return {part.name: measure(part, Bench(2, 2, "float32", None))}  # type: ignore[arg-type]


def fill(bench: Bench, sheet: Sheet) -> None:
    sheet.compare(RATIO.name, 80, 100)
    sheet.compare(RATIO.name, 120, 100)
    sheet.compare(RATIO.name, 90, 100)
    sheet.value(ALONE.name, 1.5)


def test_a_ratio_is_judged_by_its_median_and_a_value_by_its_bound() -> None:
    sheet = Sheet((RATIO, ALONE), quiet)
    fill(Bench(1, 2, "float32", None), sheet)  # type: ignore[arg-type]
    ratio, value = sheet.as_json()["rows"]
    assert (ratio["met"], ratio["ratio"]) == (True, {"median": 0.9, "min": 0.8, "max": 1.2})
    assert (value["met"], value["value"]["median"]) == (False, 1.5)


def test_a_part_that_fails_leaves_its_rows_missing_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(bench: Bench, sheet: Sheet) -> None:
        sheet.value(ALONE.name, 0.5)
        raise RuntimeError("the feature is not there")

    found = results(Part("some", (RATIO, ALONE), fail))
    ratio, value = found["some"]["rows"]
    assert ratio["missing"] == "the feature is not there"
    assert ratio["met"] is None
    assert value["met"] is True
    assert "not measured" in report.table(found)
    assert "not measured: the feature is not there" in report.markdown(found)


def test_a_round_that_others_disturb_is_done_again_and_left_out(others: list[float]) -> None:
    sheet = Sheet((RATIO,), quiet)
    others.extend([0.0, 0.0, 9.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # before and in each round
    numbers = []
    for number in sheet.rounds(2, warm_up=1):
        numbers.append(number)
        if number >= 0:
            sheet.compare(RATIO.name, 100 - number, 100)
    assert numbers == [-1, 0, 1, 2]
    row = sheet.as_json()["rows"][0]
    assert (row["rounds"], row["disturbed"]) == (2, 1)
    assert row["ratio"] == {"median": 0.985, "min": 0.98, "max": 0.99}


def test_where_all_is_disturbed_it_is_said_with_the_figure(others: list[float]) -> None:
    sheet = Sheet((RATIO,), quiet)
    others.extend([1.0] * 20)
    for _ in sheet.rounds(2):
        sheet.compare(RATIO.name, 100, 100)
    row = sheet.as_json()["rows"][0]
    assert row["rounds"] == 4
    assert row["notes"] == ["other processes used up to 1.00 cores meanwhile"]


def test_the_tables_hold_every_row_with_its_goal_and_verdict() -> None:
    found = results(Part("some", (RATIO, ALONE), fill))
    text = report.table(found)
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "decode (tokens/s)",
        "models (ms)",
    ]
    assert text.splitlines()[1].endswith("≥ 0.9  met")
    assert text.splitlines()[2].endswith("≤ 1    NOT MET")
    assert "| models |  |  | 1.5 ms | 1.5 to 1.5 | ≤ 1 | **not met** |" in report.markdown(found)


def test_a_quantile_is_a_value_that_so_many_do_not_exceed() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert quantile([7.0], 0.99) == 7.0


def test_plots_are_the_same_bytes_for_the_same_values() -> None:
    curve = Line("cluster", [[1, 10.0, 9.0, 11.0], [64, 250.0, 240.0, 260.0]])
    drawn = lines("speed <by> streams", [curve], logarithmic=True)
    assert drawn == lines("speed <by> streams", [curve], logarithmic=True)
    assert "speed &lt;by&gt; streams" in drawn
    assert drawn.count("<circle") == 2
    assert bars("step", {"compute": 0.002, "conductor": 0.0001}).count("<rect") == 2


def test_the_document_gets_its_tables_between_its_marks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    marks = "\n".join(
        f"{report.BEGIN.format(name)}\nold\n{report.END}" for name in ("table", "step")
    )
    report.DOCUMENT.write_text(f"before\n{marks}\nafter\n")

    def draw(bench: Bench, sheet: Sheet) -> None:
        fill(bench, sheet)
        sheet.point("tokens/s by stages", "1 stream", 1, [10.0])
        sheet.bar("compute", 0.001)

    report.write_document(results(Part("step", (RATIO, ALONE), draw)))
    text = report.DOCUMENT.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| compute | 1.000 | 100.0% |" in text
    assert {path.name for path in report.PLOTS.iterdir()} == {"speed-by-stages.svg", "step.svg"}
    report.DOCUMENT.write_text("no marks")
    with pytest.raises(ValueError, match="no place"):
        report.write_document({})
