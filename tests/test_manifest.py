import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umiad import manifest, tensorfile
from umiad.errors import ModelFileError

FILES = {
    "config.json": b"{}",
    "split.json": b"{}",
    "card.md": b"card",
    "weights.safetensors": tensorfile.to_bytes({"a": torch.ones(2)}),
    "log.jsonl": b"",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.build(FILES)), encoding="utf-8")
    return tmp_path


def read(model: Path) -> dict[str, Any]:
    return manifest.read(model / "manifest.json")


def edit_manifest(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    facts = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    change(facts)
    (model / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")


def test_what_is_built_is_read_and_finds_its_files(model: Path) -> None:
    assert read(model) == manifest.build(FILES)
    assert manifest.read_listed(model, read(model)) == FILES


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"manifest.json: not there, expected in every saved model"):
        read(tmp_path)


def test_a_pinned_hash_must_fit(model: Path) -> None:
    path = model / "manifest.json"
    assert manifest.read(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ModelFileError, match="not the model that was pinned"):
        manifest.read(path, sha256="0" * 64)


def test_the_weights_header_is_checked_before_the_hash(model: Path) -> None:
    content = b"PK\x03\x04".ljust(len(FILES["weights.safetensors"]), b"\0")
    (model / "weights.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match="this is a zip archive"):
        manifest.read_listed(model, read(model))


def test_ceilings_depend_on_the_name() -> None:
    assert manifest.ceiling("config.json") == 1 << 20
    assert manifest.ceiling("weights.safetensors") == 2 << 30
    assert manifest.ceiling("split.json") == manifest.ceiling("log.jsonl") == 64 << 20


def test_a_model_without_its_parts_is_not_built() -> None:
    with pytest.raises(ModelFileError, match=r"the model to be saved: lists no weights.safetensors"):
        manifest.build({"config.json": b"{}"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2, "umiad_version": "9.1"}, "written by umiad 9.1: pip install 'umiad>=9.1'"),
        ({"format": 0}, "expected an integer from 1 to 1"),
        ({"format": None}, "expected an integer from 1 to 1"),
        ({"format": True}, "expected an integer from 1 to 1"),
        ({"format": "1"}, "expected an integer from 1 to 1"),
        ({"umiad_version": None}, "umiad_version is missing or malformed"),
        ({"format": 2, "umiad_version": "9'; rm -rf ~ #"}, "umiad_version is missing or malformed"),
        ({"kind": "another"}, "not a manifest of umiad"),
        ({"files": []}, "'files' must be an object"),
        ({"files": {f"f{n}": {} for n in range(65)}}, "at most 64 names"),
        ({"files": {}}, "lists no config.json"),
    ],
)
def test_M4_manifests_of_other_formats_are_refused(model: Path, changes: dict[str, Any], words: str) -> None:
    edit_manifest(model, lambda manifest: manifest.update(changes))
    with pytest.raises(ModelFileError) as caught:
        read(model)
    assert words in str(caught.value)


def test_M4_a_manifest_without_a_format_is_refused(model: Path) -> None:
    edit_manifest(model, lambda manifest: manifest.pop("format"))
    with pytest.raises(ModelFileError, match="format is 'None'"):
        read(model)


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/hostname",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "C:x",
        "x\0y",
        "~x",
        "x\n",
        "é",
        ".hidden",
        "x" * 101,
    ],
)
def test_M5_unsafe_names_are_refused(model: Path, name: str) -> None:
    facts = {"bytes": 0, "sha256": "0" * 64}
    edit_manifest(model, lambda manifest: manifest["files"].update({name: facts}))
    with pytest.raises(ModelFileError, match="expected letters, digits"):
        read(model)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("text", "must hold 'bytes' and 'sha256' only"),
        ({"bytes": 1}, "must hold 'bytes' and 'sha256' only"),
        ({"bytes": 1, "sha256": "0" * 64, "url": "x"}, "must hold 'bytes' and 'sha256' only"),
        ({"bytes": -1, "sha256": "0" * 64}, "has -1 bytes"),
        ({"bytes": 1.0, "sha256": "0" * 64}, "has 1.0 bytes"),
        ({"bytes": 2**20 + 1, "sha256": "0" * 64}, "expected 0 to 1048576"),
        ({"bytes": 1, "sha256": "0" * 63}, "expected 64 hex digits"),
        ({"bytes": 1, "sha256": None}, "expected 64 hex digits"),
    ],
)
def test_M5_malformed_entries_are_refused(model: Path, facts: object, words: str) -> None:
    edit_manifest(model, lambda manifest: manifest["files"].update({"config.json": facts}))
    with pytest.raises(ModelFileError) as caught:
        read(model)
    assert words in str(caught.value)


@pytest.mark.parametrize("manifest_twin", ["Config.json", "MANIFEST.JSON", "manifest.json"])
def test_M5_names_that_differ_in_case_only_are_refused(model: Path, manifest_twin: str) -> None:
    facts = {"bytes": 0, "sha256": "0" * 64}
    edit_manifest(model, lambda manifest: manifest["files"].update({manifest_twin: facts}))
    with pytest.raises(ModelFileError, match="differ in more than case"):
        read(model)


def test_a_giant_manifest_is_refused_unread(model: Path) -> None:
    with (model / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelFileError, match="the ceiling is 1048576 bytes"):
        read(model)
