import itertools
import math

import pytest

from umiad.config import TrainingConfig
from umiad.errors import ConfigError
from umiad.schedule import SCHEDULES, factor


def training(**values):
    return TrainingConfig(epochs=100, **values)


def test_constant_changes_nothing():
    assert {factor(training(), progress) for progress in (0, 3.7, 99.9)} == {1.0}


@pytest.mark.parametrize(
    ("schedule", "end"), [("cosine", 1e-3), ("linear", 0.4), ("steps", 0.33**2), ("constant", 1.0)]
)
def test_every_schedule_starts_at_one_falls_and_ends_where_it_says(schedule, end):
    values = [factor(training(schedule=schedule), progress) for progress in range(101)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(end)
    assert all(first >= second for first, second in itertools.pairwise(values))


def test_the_cosine_is_half_way_down_at_half_time():
    assert factor(training(schedule="cosine"), 50) == pytest.approx((1 + 1e-3) / 2)


def test_steps_fall_at_seventy_and_ninety_percent():
    steps = training(schedule="steps")
    assert [factor(steps, at) for at in (69.9, 70, 89.9, 90)] == pytest.approx([1, 0.33, 0.33, 0.33**2])


def test_warm_up_rises_in_a_line_from_a_tenth():
    warm = training(warmup_epochs=10)
    assert [factor(warm, at) for at in (0, 5, 10, 11)] == pytest.approx([0.1, 0.55, 1, 1])


def test_warm_up_multiplies_the_schedule():
    warm = training(schedule="cosine", warmup_epochs=10)
    own = 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * 0.05))
    assert factor(warm, 5) == pytest.approx(0.55 * own)


def test_progress_beyond_the_end_stays_at_the_end():
    assert factor(training(schedule="linear"), 150) == pytest.approx(0.4)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="schedule"):
        TrainingConfig.parse({"schedule": "exponential"})
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "steps"}
