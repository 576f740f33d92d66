"""What a bar tells of the time that is left."""

import pytest

from tasks.running.bars import Pace


def pace_at(*moments: float, unit: str = "") -> Pace:
    clock = iter(moments)
    return Pace(unit, lambda: next(clock))


def test_the_time_left_is_that_of_the_steps_left_at_the_pace_so_far_in_hours_and_minutes() -> None:
    pace = pace_at(100, 130, 160)
    assert [pace.text(done, 1000) for done in (0, 1, 2)] == ["", "8 h 19 min left", "8 h 19 min left"]


def test_a_stage_that_goes_on_is_timed_from_where_it_goes_on() -> None:
    pace = pace_at(1000, 1010)
    assert [pace.text(done, 1000) for done in (900, 901)] == ["", "16 min 30 s left"]


@pytest.mark.parametrize("done", [0, 10], ids=["not risen", "at its end"])
def test_nothing_is_said_where_nothing_is_known_or_left(done: int) -> None:
    pace = pace_at(0, 1)
    assert [pace.text(value, 10) for value in (0, done)] == ["", ""]


def test_a_count_that_falls_back_is_timed_anew() -> None:
    """A trainer that was started again goes back to its last checkpoint."""
    pace = pace_at(0, 10, 20, 30)
    assert [pace.text(done, 100) for done in (50, 60, 40, 50)][-1] == "50 s left"


def test_where_a_unit_is_named_so_is_how_many_are_done_in_a_second() -> None:
    pace = pace_at(0, 10, 20, unit="tokens")
    assert [pace.text(done, 100_000) for done in (20_000, 40_000, 60_000)] == [
        "",
        "2,000 tokens/s, 30 s left",
        "2,000 tokens/s, 20 s left",
    ]


def test_a_total_that_nobody_knows_has_a_pace_and_no_end() -> None:
    pace = pace_at(0, 10, unit="tokens")
    assert [pace.text(done, 0) for done in (0, 5000)] == ["", "500 tokens/s"]
