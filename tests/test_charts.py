from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from umiad.charts import STYLES, pro_chart, roc_chart, score_histogram, training_curves

ROWS = [{"epoch": n, "nats_per_dim": 2.0 / n, "loss": 5.0} for n in range(1, 6)]
MONITORED = [
    {**row, "var_ratio": 0.1**k, "min_eigenvalue": -1e-9, "var_y": 1.0} for k, row in enumerate(ROWS)
]


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        return np.asarray(picture.convert("RGB")).astype(int)


def has_colour(png: bytes, colour: tuple[int, int, int]) -> bool:
    """A line of the palette was drawn: some pixels have its colour (tolerance 8 of 255 for antialiasing)."""
    return int((np.abs(pixels(png) - colour).max(axis=-1) <= 8).sum()) > 10


BLUE, VERMILION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


CHARTS = {
    "training": lambda: training_curves(ROWS),
    "monitored": lambda: training_curves(MONITORED),
    "roc": lambda: roc_chart({"images": ([0, 0, 1], [0, 0.8, 1])}, "ROC"),
    "pro": lambda: pro_chart([0, 0.1, 0.3], [0, 0.5, 0.9]),
    "histogram": lambda: score_histogram([1.0, 2.0, 5.0], [0, 0, 1], 3.0),
}
EMPTY = {
    "no epochs": lambda: training_curves([]),
    "no likelihood": lambda: training_curves([{"epoch": 1, "loss": 0.5}]),
    "likelihood not finite": lambda: training_curves([{"epoch": 1, "nats_per_dim": math.nan}]),
    "no curves": lambda: roc_chart({}, "ROC"),
    "empty curve": lambda: roc_chart({"images": ([], [])}, "ROC"),
    "no PRO": lambda: pro_chart([], []),
    "no scores": lambda: score_histogram([], []),
    "scores not finite": lambda: score_histogram([math.inf], [1]),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_coloured_png_of_a_readable_size(name: str) -> None:
    png = CHARTS[name]()
    found = pixels(png)
    height, width, _ = found.shape
    assert 400 <= width <= 1000
    assert 400 <= height <= 1000
    assert len(png) < 200_000
    assert (found.max(axis=-1) - found.min(axis=-1)).max() > 50


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_gives_a_grey_placeholder_of_the_usual_size(name: str) -> None:
    found = pixels(EMPTY[name]())
    assert min(found.shape[:2]) >= 400
    assert (found.max(axis=-1) == found.min(axis=-1)).all()
    assert found.min() < 128  # there is text


def test_training_curves_add_a_panel_for_the_monitors_only_where_there_are_any() -> None:
    assert pixels(training_curves(MONITORED)).shape[0] > 1.4 * pixels(training_curves(ROWS)).shape[0]
    assert has_colour(training_curves(MONITORED), GREEN)


def test_training_curves_ignore_other_columns() -> None:
    assert training_curves(ROWS) == training_curves(
        [{**row, "seconds": 3.0, "edge_loss": 9.0} for row in ROWS]
    )


def test_held_out_normals_get_their_own_line_even_with_gaps() -> None:
    rows = [{**row, "holdout_nats_per_dim": 3.0 if row["epoch"] % 2 else None} for row in ROWS]
    assert not has_colour(training_curves(ROWS), VERMILION)
    assert has_colour(training_curves(rows), VERMILION)


def test_monitors_are_drawn_without_any_likelihood() -> None:
    png = training_curves([{"epoch": 1, "var_ratio": 0.5}, {"epoch": 2, "var_ratio": 0.0}])
    assert has_colour(png, BLUE)


def test_epoch_zero_counts_and_a_missing_epoch_is_the_row_number() -> None:
    numbered = [{"epoch": n, "nats_per_dim": 1.0} for n in (1, 2)]
    assert training_curves(numbered) == training_curves([{"nats_per_dim": 1.0}] * 2)
    from_zero = [{"epoch": n, "nats_per_dim": 1.0} for n in (0, 1)]
    assert training_curves(from_zero) != training_curves(numbered)


def test_roc_draws_every_curve_in_its_own_colour() -> None:
    curve = ([0.0, 0.2, 1.0], [0.0, 0.7, 1.0])
    one = roc_chart({"images": curve}, "ROC")
    two = roc_chart({"images": curve, "pixels": ([0.0, 0.5, 1.0], [0.0, 0.6, 1.0])}, "ROC")
    assert has_colour(two, BLUE)
    assert has_colour(two, VERMILION)
    assert not has_colour(one, VERMILION)


def test_names_are_texts_not_mathematics() -> None:
    assert has_colour(roc_chart({"a $\\frac{": ([0, 1], [0, 1])}, "cost: $5 \\frac{ $"), BLUE)


def test_pro_limit_moves_the_line() -> None:
    assert pro_chart([0, 0.3], [0, 1], limit=0.3) != pro_chart([0, 0.3], [0, 1], limit=0.05)


def test_histogram_shows_the_threshold_only_where_there_is_one() -> None:
    scores, labels = [1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1]
    plain = score_histogram(scores, labels)
    assert score_histogram(scores, labels, 2.5) != plain
    assert score_histogram(scores, labels, math.nan) == plain
    assert score_histogram(scores, [False, False, True, True]) == plain


@pytest.mark.parametrize("draw", [lambda: score_histogram([1.0], []), lambda: pro_chart([0.1], [])])
def test_columns_of_different_length_are_refused(draw) -> None:
    with pytest.raises(ValueError, match="shorter"):
        draw()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8), st.integers(0, 1))
def test_histogram_survives_any_finite_scores(scores: list[float], label: int) -> None:
    assert pixels(score_histogram(scores, [label] * len(scores))).shape[2] == 3


@pytest.mark.parametrize("scores", [[0.0, 0.0], [1e6, 1e6 + 1e-9], [5e-324, 0.0], [-3.0, -3.0]])
def test_histogram_of_almost_equal_scores(scores: list[float]) -> None:
    assert pixels(score_histogram(scores, [0, 1], 1.0)).shape[2] == 3


def test_twenty_four_lines_differ_and_neighbours_differ_in_colour_and_dashes() -> None:
    assert len(set(STYLES)) == len(STYLES) == 24
    for (colour, dashes), (next_colour, next_dashes) in itertools.pairwise(STYLES):
        assert colour != next_colour
        assert dashes != next_dashes
    many = {str(n): ([0.0, 0.5, 1.0], [0.0, (n + 1) / 30, 1.0]) for n in range(12)}
    assert has_colour(roc_chart(many, "ROC"), (139, 69, 19))


def test_same_input_same_bytes() -> None:
    assert training_curves(ROWS) == training_curves(ROWS)


def test_drawing_uses_no_global_state_of_pyplot() -> None:
    code = (
        "import sys, umiad.charts as c; assert 'matplotlib' not in sys.modules;"
        "c.pro_chart([0, 0.3], [0, 1]); assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
