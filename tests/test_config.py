import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umiad.config import Preprocessing, TrainingConfig, canonical_json, check_size, nearest
from umiad.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "best"), [(250, 256), (63, 64), (1, 64), (0, 64), (-32, 64), (100, 96), (257, 256)]
)
def test_a_wrong_size_is_an_error_that_names_the_nearest(size, best):
    with pytest.raises(ConfigError, match=f"the nearest is {best}"):
        check_size(size)


@pytest.mark.parametrize("size", [64, 96, 256, 512])
def test_multiples_of_32_from_64_up_are_sizes(size):
    assert check_size(size) == size


def test_unknown_keys_name_the_nearest_known_one():
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        TrainingConfig.parse({"epoch": 3})


def test_wrong_types_and_ranges_say_what_was_given():
    with pytest.raises(ConfigError, match="epochs: .* got '3'"):
        TrainingConfig.parse({"epochs": "3"})
    with pytest.raises(ConfigError, match="size: .*nearest is 96"):
        Preprocessing.parse({"size": 100})
    with pytest.raises(ConfigError, match="not JSON serializable"):
        TrainingConfig.parse({"epochs": object()})


def test_nearest_lists_all_where_none_is_near():
    assert nearest("zzz", ["b", "a"]) == " (known: a, b)"


@given(st.integers(1, 10**6), st.floats(1e-9, 10, allow_nan=False))
def test_a_configuration_survives_canonical_json(epochs, rate):
    config = TrainingConfig(epochs=epochs, learning_rate=rate)
    text = canonical_json(config.canonical())
    assert TrainingConfig.parse(json.loads(text)) == config
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": float("nan")})
