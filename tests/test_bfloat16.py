"""bfloat16 for the backbone: used only where scores agree, never silently, and never for fitting."""

import dataclasses

import numpy as np
import pytest
import torch

from make import blob_image, save_array, tiny_set
from umiad import api, batch, bfloat16
from umiad.errors import ConfigError
from umiad.fitted import FittedModel


@pytest.fixture(scope="module")
def model():
    built = api.build("padim", weights="random", size=64, settings={"backbone": "resnet-tiny"})
    normals = [blob_image(seed=seed).pixels[0] for seed in range(24)]
    return api.fit(built, normals, options=api.FitOptions(holdout=0.4))


@pytest.fixture
def images():
    return [blob_image(seed=100 + seed, blob=seed % 2 == 0) for seed in range(4)]


@pytest.fixture(autouse=True)
def _as_fitted(model):
    yield
    for each in bfloat16.backbones(model):
        each.dtype = None


def scores(model, images):
    return [score for _, score, _ in model.score_images(images)]


def test_float32_is_what_it_was(model, images):
    before = scores(model, images)
    choice = bfloat16.choose(model, images, "float32")
    assert choice.precision == "float32"
    assert scores(model, images) == before


def test_bfloat16_changes_scores_a_little_and_says_how_much(model, images, monkeypatch):
    monkeypatch.setattr(bfloat16, "MAP_BOUND", 1.0)
    monkeypatch.setattr(bfloat16, "SCORE_BOUND", 1e6)
    monkeypatch.setattr(bfloat16.Parity, "agrees", True)
    before = scores(model, images)
    choice = bfloat16.choose(model, images, "bfloat16")
    after = scores(model, images)
    assert choice.precision == "bfloat16"
    assert choice.parity is not None
    assert 0 < np.abs(np.array(after) - before).max() < 0.1 * np.abs(before).max()
    assert choice.parity.score_error > 0
    assert f"{choice.parity.score_error:.2%}" in choice.reason
    assert all(np.isfinite(after))
    assert all(each.dtype is torch.bfloat16 for each in bfloat16.backbones(model))


def test_maps_and_features_stay_float32(model, images, monkeypatch):
    monkeypatch.setattr(bfloat16.Parity, "agrees", True)
    bfloat16.choose(model, images, "bfloat16")
    (pyramid,) = bfloat16.backbones(model)
    assert all(each.dtype == torch.float32 for each in pyramid(torch.zeros(1, 3, 64, 64), depth=3))
    assert all(each.dtype == np.float32 for _, _, each in model.score_images(images))


def test_a_check_that_fails_leaves_float32_and_says_why(model, images, monkeypatch):
    monkeypatch.setattr(bfloat16, "SCORE_BOUND", 0.0)
    before = scores(model, images)
    choice = bfloat16.choose(model, images, "bfloat16")
    assert choice.precision == "float32"
    assert "not used" in choice.reason
    assert choice.parity is not None
    assert scores(model, images) == before


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"map_error": 0.021}, False),
        ({"score_error": 0.021}, False),
        ({"decisions": 1}, False),
        ({"map_error": float("nan")}, False),
        ({"score_error": float("nan")}, False),
    ],
)
def test_every_part_of_the_check_can_refuse(changes, agrees):
    fine = bfloat16.Parity(images=8, map_error=0.02, score_error=0.02, decisions=0)
    assert dataclasses.replace(fine, **changes).agrees is agrees


def test_a_decision_that_changes_is_counted(model, images):
    exact = scores(model, images)
    calibration = model.config.calibration
    with bfloat16._precision(model, torch.bfloat16):
        rough = scores(model, images)
    low, high = sorted((exact[0], rough[0]))
    between = calibration.model_copy(update={"image_threshold": (low + high) / 2})
    moved = FittedModel(model.detector, model.config.model_copy(update={"calibration": between}), model.split)
    assert bfloat16.compare(moved, images[:1]).decisions == 1


def test_auto_needs_a_processor_that_has_it(model, images, monkeypatch):
    monkeypatch.setattr(bfloat16, "native", lambda: False)
    choice = bfloat16.choose(model, images, "auto")
    assert (choice.precision, choice.parity) == ("float32", None)
    assert "processor" in choice.reason
    monkeypatch.setattr(bfloat16, "native", lambda: True)
    assert bfloat16.choose(model, images, "auto").parity is not None


def test_without_images_or_backbone_nothing_changes(model):
    assert bfloat16.choose(model, [], "bfloat16").precision == "float32"
    bare = api.fit(
        api.build("intensity", weights="random", size=64),
        [blob_image(seed=seed).pixels[0] for seed in range(4)],
        options=api.FitOptions(holdout=0.0),
    )
    choice = bfloat16.choose(bare, [blob_image()], "bfloat16")
    assert choice.precision == "float32"
    assert "no frozen backbone" in choice.reason


def test_another_word_is_refused(model, images):
    with pytest.raises(ConfigError, match="float32, auto, bfloat16"):
        bfloat16.choose(model, images, "half")


def test_the_choice_is_plain_json(model, images):
    found = bfloat16.choose(model, images, "bfloat16").to_json()
    assert set(found) == {"precision", "reason", "parity"}
    assert set(found["parity"]) == {"images", "map_error", "score_error", "decisions"}


def test_no_state_carries_the_precision(model, images, monkeypatch):
    monkeypatch.setattr(bfloat16.Parity, "agrees", True)
    before = model.detector.state()
    bfloat16.choose(model, images, "bfloat16")
    after = model.detector.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Notes:
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)

    def stage(self, *_):
        pass


def test_scoring_a_folder_says_what_the_backbone_ran_in_and_puts_it_back(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bfloat16.Parity, "agrees", True)
    data = tiny_set(tmp_path / "set", n_normal=3, n_abnormal=1)
    (data / "normal" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for wanted, said in (("float32", []), ("bfloat16", ["backbone in bfloat16: over 4 images"])):
        notes = Notes()
        scorer = batch.FileScorer(model, reporter=notes, precision=wanted)
        summary = scorer.run([data], tmp_path / wanted)
        assert summary.to_json()["precision"] == wanted
        found = [text for text in notes.texts if "backbone" in text]
        assert [text[: len(start)] for text, start in zip(found, said, strict=True)] == said
        assert [each.dtype for each in bfloat16.backbones(model)] == [None]
    exact, rough = ((tmp_path / each / "scores.jsonl").read_text() for each in ("float32", "bfloat16"))
    assert exact != rough


def test_a_folder_scored_in_float32_is_so_whatever_the_model_was_set_to_before(
    model, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(bfloat16.Parity, "agrees", True)
    path = save_array(tmp_path / "one.png", (blob_image().pixels[0] * 255).astype(np.uint8))
    batch.score_files(model, [path], tmp_path / "before")
    assert bfloat16.choose(model, images, "bfloat16").precision == "bfloat16"
    batch.score_files(model, [path], tmp_path / "after")
    same = [(tmp_path / name / "scores.jsonl").read_text() for name in ("before", "after")]
    assert same[0] == same[1]


def test_a_run_that_fails_puts_the_precision_back(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bfloat16.Parity, "agrees", True)
    path = save_array(tmp_path / "one.png", (blob_image().pixels[0] * 255).astype(np.uint8))
    monkeypatch.setattr(batch, "_finished", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.FileScorer(model, precision="bfloat16").run([path], tmp_path / "out")
    assert [each.dtype for each in bfloat16.backbones(model)] == [None]


def test_on_an_accelerator_nothing_is_changed(model, images, monkeypatch):
    monkeypatch.setattr(bfloat16, "device_of", lambda _: torch.device("cuda"))
    choice = bfloat16.choose(model, images, "bfloat16")
    assert (choice.precision, choice.parity) == ("float32", None)
    assert "cuda" in choice.reason
