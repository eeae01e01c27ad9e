import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umiad.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    REST,
    TENSORS,
    SafeCheckpointIO,
    checkpoint_path,
    clear,
    clear_temporary,
    keep_only,
    newest_valid,
)
from umiad.errors import ConfigError, DiskError, ModelFileError
from umiad.strictjson import dump_bytes

NESTED = '{"list":[' * 400 + "]}" * 400

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


def alter(folder, name, content):
    """Replace a file of a checkpoint and list it in the manifest, as one who knows the format could."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_bytes(dump_bytes(manifest, source="manifest"))


@pytest.mark.parametrize(
    "text",
    ['{"set": []}', '{"dict": 3}', '{"tensor": "t9"}', '{"a": 1, "b": 2}', "[]", "{", '{"value": 3}', NESTED],
)
def test_damaged_files_are_model_file_errors(tmp_path, text):
    io = SafeCheckpointIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "last")
    alter(tmp_path / "last", REST, text.encode())
    with pytest.raises(ModelFileError, match="rest.json|damaged entry|unknown kind"):
        io.load_checkpoint(tmp_path / "last")


def test_missing_files_are_model_file_errors(tmp_path):
    io = SafeCheckpointIO()
    for name in (REST, TENSORS, MANIFEST):
        io.save_checkpoint({"epoch": torch.zeros(1)}, tmp_path / "last")
        (tmp_path / "last" / name).unlink()
        with pytest.raises(ModelFileError, match="no such file"):
            io.load_checkpoint(tmp_path / "last")
    io.remove_checkpoint(tmp_path / "last")
    assert not (tmp_path / "last").exists()


def test_the_rest_is_readable_json(tmp_path):
    SafeCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "last")
    content = (tmp_path / "last" / REST).read_text()
    assert json.loads(content) == {"dict": [["epoch", {"value": 1}]]}


def test_the_newest_two_are_kept_and_found_by_number(tmp_path):
    folder = tmp_path / CHECKPOINTS
    for epoch in (2, 10, 9):
        SafeCheckpointIO().save_checkpoint({"epoch": epoch}, checkpoint_path(folder, epoch))
    assert newest_valid(folder) == (folder / "epoch-000010", [])
    keep_only(folder, [folder / "epoch-000010", folder / "epoch-000009"])
    assert sorted(each.name for each in folder.iterdir()) == ["epoch-000009", "epoch-000010"]
    clear(tmp_path)
    assert newest_valid(folder) == (None, [])


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    for value in (1, 2):
        SafeCheckpointIO().save_checkpoint({"value": value}, tmp_path / "epoch-000001")
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "epoch-000001") == {"value": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["epoch-000001"]


def test_what_interrupted_saves_left_is_cleared_and_nothing_else(tmp_path):
    folder = tmp_path / CHECKPOINTS
    SafeCheckpointIO().save_checkpoint({}, checkpoint_path(folder, 1))
    (folder / "epoch-000002.new.tmp").mkdir()
    (folder / "epoch-000002.new.tmp" / TENSORS).write_text("half")
    (folder / "epoch-000001.old.tmp").mkdir()
    (tmp_path / ".log.jsonl.umiad-new-00aa").write_text("half")
    (tmp_path / "other.tmp").write_text("not ours")
    clear_temporary(tmp_path)
    assert [each.name for each in folder.iterdir()] == ["epoch-000001"]
    assert sorted(each.name for each in tmp_path.iterdir()) == [CHECKPOINTS, "other.tmp"]


@pytest.mark.parametrize("name", ["last", "last.old.tmp"])
def test_the_state_of_an_older_umiad_is_refused_clearly(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="older umiad; start the fit anew"):
        newest_valid(tmp_path / CHECKPOINTS)
    clear(tmp_path)
    assert newest_valid(tmp_path / CHECKPOINTS) == (None, [])


@pytest.mark.parametrize(
    ("entry", "value"),
    [("kind", "umiad model"), ("format", 2), ("files", {}), ("files", {TENSORS: 1, REST: 2}), ("more", "x")],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, entry, value):
    SafeCheckpointIO().save_checkpoint({}, tmp_path / "last")
    path = tmp_path / "last" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(ModelFileError, match="manifest.json"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "last")


def test_nan_is_not_saved(tmp_path):
    with pytest.raises(ModelFileError, match="NaN"):
        SafeCheckpointIO().save_checkpoint({"w": torch.tensor([float("nan")])}, tmp_path / "last")
    assert not list(tmp_path.iterdir())


def test_room_is_asked_for_before_writing_more_of_it_the_first_time(tmp_path, monkeypatch):
    state = {"w": torch.zeros(100_000)}
    monkeypatch.setattr("umiad.diskfile.free_bytes", lambda _: 700_000)
    with pytest.raises(DiskError, match=r"needed 100\d{4} bytes, free 700000 bytes"):
        SafeCheckpointIO().save_checkpoint(state, tmp_path / "epoch-000001")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("umiad.diskfile.free_bytes", lambda _: None)  # unknown: try
    SafeCheckpointIO().save_checkpoint(state, tmp_path / "epoch-000001")
    monkeypatch.setattr("umiad.diskfile.free_bytes", lambda _: 700_000)  # enough for the next one
    SafeCheckpointIO().save_checkpoint(state, tmp_path / "epoch-000002")
    monkeypatch.setattr("umiad.diskfile.free_bytes", lambda _: 300_000)
    with pytest.raises(DiskError, match=r"needed 40\d{4} bytes, free 300000 bytes"):
        SafeCheckpointIO().save_checkpoint(state, tmp_path / "epoch-000003")
    assert newest_valid(tmp_path)[0] == tmp_path / "epoch-000002"
