"""Phases that alternate and phases that follow one another: which an update belongs to, and which batch it takes."""

import pytest

from research.train.hooks import Phase
from research.train.stages import make_stages, updates_of_a_batch

ONE, TWO = Phase("one"), Phase("two")
HALF = (Phase("first", until=0.5), Phase("second"))
UNEVEN = (Phase("alone", until=0.25), ONE, TWO)


def told(phases, updates):
    stages = make_stages(phases, updates)
    return [(stages.phase(step).name, stages.round(step)) for step in range(stages.updates)]


def test_phases_alternate_in_whole_rounds():
    assert told((ONE,), 3) == [("one", 0), ("one", 1), ("one", 2)]
    assert told((ONE, TWO), 3) == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]


def test_phases_follow_one_another():
    assert told(HALF, 4) == [("first", 0), ("first", 1), ("second", 2), ("second", 3)]
    assert told(HALF, 1) == [("first", 0), ("second", 1)]  # a stage has an update at least


def test_an_alternation_follows_a_single_phase():
    """A batch gets one update in the first quarter of the batches, then two: seven updates are four batches."""
    assert updates_of_a_batch(UNEVEN) == 1.75
    assert told(UNEVEN, 7) == [("alone", 0), *((name, batch) for batch in (1, 2, 3) for name in ("one", "two"))]
    stages = make_stages(UNEVEN, 7)
    assert [stages.of("two").own(step) for step in (1, 2, 3, 5)] == [0, 0, 1, 2]
    assert stages.rounds == 4 and stages.phases == UNEVEN


@pytest.mark.parametrize("updates", range(1, 40))
def test_no_update_is_left_out(updates):
    stages = make_stages(UNEVEN, updates)
    assert stages.updates >= updates and [stage.first for stage in stages.items[1:]] == [stages.items[0].stop]
    rounds = [stages.round(step) for step in range(stages.updates)]
    assert rounds == sorted(rounds) and set(rounds) == set(range(stages.rounds))
