"""What figures of a node are worth while it is in no ring."""

from __future__ import annotations

from parallax.scheduler.absences import AWAY_S, FORGIVEN_S, HALF_LIFE_S, Absences


def test_figures_fade_by_half_in_five_minutes_and_a_ring_that_forms_anew_is_no_absence() -> None:
    absences = Absences()
    assert absences.weight("a", 1e6) == 1, "never heard of"
    assert not absences.seen("a", 0.0)
    assert absences.weight("a", AWAY_S - 1) == 1
    assert not absences.seen("a", AWAY_S - 1)
    assert absences.weight("a", AWAY_S + HALF_LIFE_S) > 0.4
    assert absences.weight("a", 100 * HALF_LIFE_S) == 0
    assert absences.seen("a", 1e4)
    assert absences.weight("a", 1e4) == 1


def test_who_fails_again_fades_half_as_fast_until_an_hour_went_well() -> None:
    absences = Absences()
    absences.seen("a", 0.0)
    for turn in (1, 2):
        absences.seen("a", turn * 1200.0)
        absences.failed("a")
        absences.failed("a")
        assert absences.has_failed("a")
        faded = absences.weight("a", turn * 1200.0 + HALF_LIFE_S * 2**turn)
        assert 0.4 < faded < 0.6
    assert absences.seen("a", 1e4)
    assert not absences.has_failed("a")
    for now in range(10_000, 10_000 + int(FORGIVEN_S) + 60, 30):
        absences.seen("a", float(now))
    assert absences.weight("a", now + 4 * HALF_LIFE_S) < 0.1
