import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umiad import diskfile, modelfile
from umiad.errors import ConfigError, DiskError, InputError, ModelFileError

CONFIG = {"detector": "egmf", "size": 64, "threshold": 1.5, "names": ["ä", "b"]}
SPLIT = {"train": ["a.png"], "holdout": ["scan\udcff.png"]}
EXTRAS = {"log.jsonl": b'{"epoch": 1}\n', "curves.png": b"\x89PNG\r\n"}
FILES = {"config.json", "weights.safetensors", "split.json", "manifest.json", "card.md"}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"encoder.weight": torch.full((3, 2), value), "count": torch.tensor(4)}


def write(path: Path, value: float = 1.0) -> Path:
    return modelfile.save(
        path, config=CONFIG, tensors=tensors(value), split=SPLIT, card="# card\n", extras=EXTRAS
    )


def value_of(path: Path) -> float:
    return float(modelfile.load(path).tensors["encoder.weight"][0, 0])


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def edit_manifest(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def refresh(model: Path, name: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest, as one who alters both would."""
    (model / name).write_bytes(content)
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(model, lambda manifest: manifest["files"].update({name: facts}))


# ---- what goes in comes out


def test_round_trip(model: Path) -> None:
    saved = modelfile.load(str(model))
    assert saved.path == model
    assert (saved.config, saved.split, saved.card, saved.extras) == (CONFIG, SPLIT, "# card\n", EXTRAS)
    assert saved.tensors.keys() == tensors().keys()
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in tensors().items())
    assert names(model) == FILES | set(EXTRAS)
    assert names(model.parent) == {"model"}


def test_the_manifest_lists_every_file_by_name_size_and_hash(model: Path) -> None:
    manifest = modelfile.load(model).manifest
    assert (manifest["format"], manifest["kind"]) == (1, "umiad model")
    assert set(manifest["files"]) == (FILES | set(EXTRAS)) - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (model / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_equal_models_are_equal_byte_for_byte(model: Path, tmp_path: Path) -> None:
    again = modelfile.save(
        tmp_path / "again",
        config=dict(reversed(CONFIG.items())),
        tensors=dict(reversed(tensors().items())),
        split=SPLIT,
        card="# card\n",
        extras=EXTRAS,
    )
    assert all((model / name).read_bytes() == (again / name).read_bytes() for name in names(model))


def test_M1_loading_never_unpickles(model: Path) -> None:
    seen: list[str] = []
    active = [True]
    sys.addaudithook(lambda event, _: seen.append(event) if active and event == "pickle.find_class" else None)
    modelfile.load(model)
    active.clear()
    assert seen == []


# ---- saving over something


def test_a_model_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".DS_Store").write_bytes(b"")
    for value in (1.0, 2.0):
        write(tmp_path / "model", value)
        assert value_of(tmp_path / "model") == value
    assert names(tmp_path) == {"model"}


def test_folders_above_are_made_and_links_to_a_model_stay_links(tmp_path: Path) -> None:
    target = write(tmp_path / "deep" / "er" / "model")
    link = tmp_path / "link"
    link.symlink_to(target, target_is_directory=True)
    write(link, 2.0)
    assert link.is_symlink()
    assert value_of(target) == 2.0


def foreign_file(path: Path) -> None:
    path.write_text("mine")


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "photo.png").write_text("mine")


def foreign_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "an extension of a browser"}')


def model_and_notes(path: Path) -> None:
    write(path)
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (foreign_file, "is no folder"),
        (foreign_folder, "without a readable umiad model"),
        (foreign_manifest, "not a manifest of umiad"),
        (model_and_notes, "holds 'notes.txt', which is no part of the model"),
    ],
)
def test_foreign_files_are_never_overwritten(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "out"
    make(path)
    before = names(path) if path.is_dir() else path.read_text()
    for attempt in (write, modelfile.check_target):
        with pytest.raises(InputError, match=words):
            attempt(path)
    assert before == (names(path) if path.is_dir() else path.read_text())
    assert names(tmp_path) == {"out"}


def test_a_target_that_cannot_be_looked_into(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        modelfile.check_target(model)


def test_what_cannot_be_loaded_is_not_saved(model: Path) -> None:
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (ConfigError, {"config": {"threshold": float("nan")}}),
        (ConfigError, {"split": {"train": {1, 2}}}),
        (ModelFileError, {"tensors": {"a": torch.tensor(float("nan"))}}),
        (ModelFileError, {"extras": {"config.json": b""}}),
        (ModelFileError, {"extras": {"MANIFEST.json": b""}}),
        (ModelFileError, {"extras": {"../escape": b""}}),
        (ModelFileError, {"extras": {"a/b": b""}}),
        (ModelFileError, {"extras": {"Log.jsonl": b"", "log.jsonl": b""}}),
        (ModelFileError, {"extras": {f"file{n}": b"" for n in range(100)}}),
        (ModelFileError, {"config": {"long": "x" * (1 << 20)}}),
    ]
    good: dict[str, Any] = {"config": CONFIG, "tensors": tensors(), "split": SPLIT, "card": ""}
    for error, change in bad:
        with pytest.raises(error):
            modelfile.save(model, **(good | change))
    assert value_of(model) == 1.0
    assert names(model.parent) == {"model"}


# ---- faults while saving (T2)


def fail_always(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["mkdir", "write", "fsync", "rename"])
def test_T2_a_failing_disk_keeps_the_old_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner: Any = {"mkdir": Path, "write": diskfile, "fsync": os, "rename": Path}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, "write_synced" if step == "write" else step, fail_always)
        with pytest.raises(DiskError, match=r"No space left.*needed [0-9]+ bytes, free [0-9]+ bytes"):
            write(model, 2.0)
    assert value_of(model) == 1.0
    assert names(model.parent) == {"model"}


@pytest.mark.parametrize("good_steps", range(9))
def test_T2_a_disk_that_fills_up_at_any_file_keeps_the_old_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, good_steps: int
) -> None:
    calls = 0
    original = os.fsync

    def sometimes(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > good_steps:
            raise OSError(5, "Input/output error")
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sometimes)
        with pytest.raises(DiskError):
            write(model, 2.0)
    # 7 files and the new folder are flushed before the swap, the folder above after it
    assert value_of(model) == (1.0 if good_steps < 8 else 2.0)


def test_T2_the_old_model_is_put_back_when_the_second_rename_fails(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "umiad-new" in self.name:
            fail_always()
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(DiskError):
            write(model, 2.0)
    assert value_of(model) == 1.0
    assert names(model.parent) == {"model"}


def test_T2_a_disk_known_to_be_too_full_is_not_written_to(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diskfile, "free_bytes", lambda _: 10)
    with pytest.raises(DiskError, match=r"needed [0-9]+ bytes, free 10 bytes; nothing was written"):
        write(model, 2.0)
    assert value_of(model) == 1.0


def test_T1_a_save_killed_between_the_renames_loses_nothing(model: Path) -> None:
    folder = model.parent
    model.rename(folder / ".model.umiad-old-00000000")
    shutil.copytree(folder / ".model.umiad-old-00000000", folder / ".model.umiad-new-00000000")
    assert value_of(model) == 1.0  # read from where it was put aside
    assert not model.exists()
    write(model, 2.0)
    assert value_of(model) == 2.0
    assert names(folder) == {"model"}


def test_T1_leftovers_of_killed_saves_are_cleared_and_nothing_else(model: Path) -> None:
    folder = model.parent
    for name in (".model.umiad-new-12345678", ".model.umiad-old-12345678", ".other.umiad-new-1", "model.bak"):
        (folder / name).mkdir()
        (folder / name / "part").write_bytes(b"x")
    (folder / ".model.umiad-new-link").symlink_to(folder / "model.bak", target_is_directory=True)
    write(model, 2.0)
    assert names(folder) == {"model", ".other.umiad-new-1", "model.bak", ".model.umiad-new-link"}
    assert (folder / "model.bak" / "part").exists()


def test_T1_an_interrupted_save_is_not_restored_over_a_refusal(model: Path) -> None:
    kept = model.rename(model.parent / ".model.umiad-old-00000000")
    foreign_folder(model)
    with pytest.raises(InputError):
        write(model, 2.0)
    assert value_of(kept) == 1.0


# ---- updating


def test_update_changes_what_is_given_and_keeps_the_rest(model: Path) -> None:
    before = (model / "weights.safetensors").read_bytes()
    modelfile.update(model, config={"threshold": 2.5})
    saved = modelfile.load(model)
    assert (saved.config, saved.split, saved.card, saved.extras) == (
        {"threshold": 2.5},
        SPLIT,
        "# card\n",
        EXTRAS,
    )
    assert (model / "weights.safetensors").read_bytes() == before
    modelfile.update(model, config=CONFIG, split={"train": []}, card="new")
    saved = modelfile.load(model)
    assert (saved.config, saved.split, saved.card) == (CONFIG, {"train": []}, "new")


# ---- loading what must not be loaded


def test_a_missing_model_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none" / "model"):
        with pytest.raises(InputError, match="no such folder, expected a saved model"):
            modelfile.load(path)


def test_M1_a_file_is_no_model_and_its_kind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": 1}, path)
    with pytest.raises(ModelFileError, match=r"is a file \(a zip archive.*expected a model folder"):
        modelfile.load(path)
    monkeypatch.setattr(Path, "open", fail_always)
    with pytest.raises(ModelFileError, match=r"is a file, expected a model folder"):
        modelfile.load(path)


def test_a_broken_link_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match="broken link"):
        modelfile.load(tmp_path / "model")


@pytest.mark.parametrize("name", sorted(FILES | set(EXTRAS)))
def test_M2_a_missing_cut_longer_or_altered_file_is_refused_by_name(model: Path, name: str) -> None:
    path = model / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for altered in (content[:-2], content + b"x", bytes(flipped), b""):
        path.write_bytes(altered)
        with pytest.raises(ModelFileError, match=name):
            modelfile.load(model)
    path.unlink()
    with pytest.raises(ModelFileError, match=f"{name}: (missing|not there)"):
        modelfile.load(model)
    path.mkdir()
    with pytest.raises(ModelFileError, match=f"{name}: is a folder"):
        modelfile.load(model)


def test_M2_a_flipped_bit_in_every_percent_of_the_weights_is_seen(model: Path) -> None:
    path = model / "weights.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 100)):
        altered = bytearray(content)
        altered[position] ^= 0x10
        path.write_bytes(altered)
        with pytest.raises(ModelFileError):
            modelfile.load(model)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b'{"a": 1, "a": 2}', "'a' appears twice"),
        ("config.json", b"[]", "expected an object"),
        ("config.json", b'{"a": NaN}', "NaN found"),
        ("config.json", b'{"a":' * 5000, "nested too deep"),
        ("split.json", b"\xff", "not UTF-8"),
        ("card.md", b"\xff", "not UTF-8"),
        ("weights.safetensors", b"PK\x03\x04" + bytes(40), "zip archive"),
        ("weights.safetensors", b"\x80\x04\x95" + bytes(1) + b"\x05" * 40, "pickled object"),
    ],
)
def test_M2_contents_are_checked_even_if_the_hashes_fit(
    model: Path, name: str, content: bytes, words: str
) -> None:
    refresh(model, name, content)
    with pytest.raises(ModelFileError) as caught:
        modelfile.load(model)
    assert words in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need POSIX")
@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "special file"])
def test_M5_links_and_pipes_are_refused(model: Path, name: str, kind: str) -> None:
    path = model / name
    outside = path.rename(model.parent / "outside")
    if kind == "special file":
        os.mkfifo(path)
    else:
        (path.symlink_to if kind == "symbolic link" else path.hardlink_to)(outside)
    with pytest.raises(ModelFileError, match=f"is a {kind}"):
        modelfile.load(model)


def test_M5_a_device_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelFileError, match="symbolic link"):
        modelfile.load(model)


def test_M7_an_altered_manifest_is_seen_when_its_hash_is_pinned(model: Path) -> None:
    pinned = hashlib.sha256((model / "manifest.json").read_bytes()).hexdigest()
    assert modelfile.load(model, manifest_sha256=pinned).config == CONFIG
    refresh(model, "config.json", b'{"threshold": 99}')
    assert modelfile.load(model).config == {"threshold": 99}  # a manifest alone is no authenticity
    with pytest.raises(ModelFileError, match="not the model that was pinned"):
        modelfile.load(model, manifest_sha256=pinned)
