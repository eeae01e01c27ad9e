import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umiad.checkpoint import REST, TENSORS, SafeCheckpointIO
from umiad.errors import DiskError, ModelFileError

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_values_come_back_equal_and_of_the_same_kind(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("checkpoint")
    SafeCheckpointIO().save_checkpoint({"value": value}, folder / "last")
    back = SafeCheckpointIO().load_checkpoint(folder / "last")["value"]
    assert repr(back) == repr(value)


def test_tensors_come_back_bit_equal_wherever_they_stand(tmp_path):
    state = {"a": [torch.randn(3), {"b": torch.arange(4)}], "same": torch.zeros(2)}
    SafeCheckpointIO().save_checkpoint(state, tmp_path / "last")
    back = SafeCheckpointIO().load_checkpoint(tmp_path / "last")
    assert torch.equal(back["a"][0], state["a"][0])
    assert torch.equal(back["a"][1]["b"], state["a"][1]["b"])


def test_infinity_survives_as_a_number_of_the_optimiser_may_be_infinite(tmp_path):
    SafeCheckpointIO().save_checkpoint({"best": float("inf")}, tmp_path / "last")
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "last") == {"best": float("inf")}


@pytest.mark.parametrize("value", [object(), {1.5: "key"}, {"deep": [set()]}])
def test_what_is_not_plain_is_refused(tmp_path, value):
    with pytest.raises(ModelFileError, match="checkpoint"):
        SafeCheckpointIO().save_checkpoint({"value": value}, tmp_path / "last")


def test_a_failed_save_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    io = SafeCheckpointIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "last")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umiad.checkpoint.write_tensors", full)
    with pytest.raises(DiskError, match="No space left"):
        io.save_checkpoint({"epoch": 2}, tmp_path / "last")
    assert io.load_checkpoint(tmp_path / "last") == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_a_save_interrupted_between_the_renames_leaves_a_loadable_copy(tmp_path):
    io = SafeCheckpointIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / "last.old.tmp")
    assert io.load_checkpoint(tmp_path / "last") == {"epoch": 1}


@pytest.mark.parametrize(
    "text", ['{"set": []}', '{"dict": 3}', '{"tensor": "t9"}', '{"a": 1, "b": 2}', "[]", "{"]
)
def test_damaged_files_are_model_file_errors(tmp_path, text):
    io = SafeCheckpointIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "last")
    (tmp_path / "last" / REST).write_text(text)
    with pytest.raises(ModelFileError):
        io.load_checkpoint(tmp_path / "last")


def test_missing_files_are_model_file_errors(tmp_path):
    io = SafeCheckpointIO()
    for name in (REST, TENSORS):
        io.save_checkpoint({"epoch": torch.zeros(1)}, tmp_path / "last")
        (tmp_path / "last" / name).unlink()
        with pytest.raises(ModelFileError):
            io.load_checkpoint(tmp_path / "last")
    io.remove_checkpoint(tmp_path / "last")
    assert not (tmp_path / "last").exists()


def test_the_rest_is_readable_json(tmp_path):
    SafeCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "last")
    assert json.loads((tmp_path / "last" / REST).read_text()) == {"dict": [["epoch", {"value": 1}]]}
