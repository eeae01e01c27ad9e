import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umiad.errors import ConfigError, ModelFileError
from umiad.strictjson import dump_bytes, load_object, loads

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_round_trip(value: object) -> None:
    assert loads(dump_bytes(value, source="x"), source="x") == value


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_anything_gives_a_value_or_one_kind_of_error(text: str | bytes) -> None:
    with contextlib.suppress(ModelFileError):
        value = loads(text, source="x")
        assert loads(dump_bytes(value, source="x"), source="x") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "'a' appears twice"),
        ('[{"x": {"y": 1, "y": 2}}]', "'y' appears twice"),
        ("NaN", "NaN found"),
        ("[-Infinity]", "-Infinity found"),
        ("1e999", "beyond float64"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("1" * 10_000, "not acceptable JSON"),
        ("", "not acceptable JSON"),
        ("{'a': 1}", "not acceptable JSON"),
        ("[1] [2]", "not acceptable JSON"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"\xef\xbb\xbf{}", "not acceptable JSON"),
    ],
)
def test_refused_with_the_source_and_the_reason(text: str | bytes, words: str) -> None:
    with pytest.raises(ModelFileError, match=r"^model/config\.json: ") as caught:
        loads(text, source="model/config.json")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_object_is_asked_for() -> None:
    assert load_object('{"a": 1}', source="x") == {"a": 1}
    with pytest.raises(ModelFileError, match="a JSON list at the top"):
        load_object("[]", source="x")


def test_equal_values_give_equal_bytes() -> None:
    assert dump_bytes({"b": 1, "a": [1.5]}, source="x") == dump_bytes({"a": [1.5], "b": 1}, source="x")


def test_file_names_that_are_not_unicode_survive() -> None:
    name = b"scan\xff.png".decode("utf-8", errors="surrogateescape")
    content = dump_bytes({name: name}, source="x")
    assert content.decode("ascii")
    assert loads(content, source="x") == {name: name} == json.loads(content)


def test_what_json_cannot_hold_is_a_config_error() -> None:
    endless: list[object] = []
    endless.append(endless)
    for value in (math.nan, math.inf, object(), endless, {1: {2, 3}}):
        with pytest.raises(ConfigError, match=r"^config\.json: cannot be written"):
            dump_bytes({"value": value}, source="config.json")
