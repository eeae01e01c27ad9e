"""Thresholds by folds: every training normal is scored by a fit without it, the model is fitted on all."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import umiad
from make import tiny_set
from umiad.api import FitOptions
from umiad.cli.app import app
from umiad.errors import ConfigError, InputError
from umiad.splits import fold_numbers

FOLDS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=24, n_abnormal=4, size=80)


def detector(name="padim", preset="quick", **settings):
    return umiad.build(name, preset=preset, weights="random", size=64, settings=settings)


@pytest.fixture(scope="module")
def model(data):
    return umiad.fit(detector(), data, options=FitOptions(folds=FOLDS))


def test_the_model_is_the_one_fitted_on_all_training_normals(model, data):
    plain = umiad.fit(detector(), data, options=FitOptions(holdout=0))
    assert model.split == plain.split
    assert model.info["n_holdout"] == 0
    assert model.info["folds"] == FOLDS
    for name, tensor in plain.detector.state().items():
        assert torch.equal(model.detector.state()[name], tensor), name


def test_every_normal_is_scored_by_a_fit_without_its_fold(model, data):
    entries, found = model.split.part("train"), model.config.calibration
    numbers = np.array(fold_numbers(entries, FOLDS, seed=0))
    scores, peaks = [], []
    for fold in range(FOLDS):
        fitted = [data / entries[k].name for k in np.flatnonzero(numbers != fold)]
        left_out = [data / entries[k].name for k in np.flatnonzero(numbers == fold)]
        images = [umiad.read_image(path).pixels[0] for path in fitted]
        other = umiad.fit(detector(), images, options=FitOptions(holdout=0))
        raw = list(other.score_images(umiad.read_image(path) for path in left_out))
        scores += [score for _, score, _ in raw]
        peaks += [float(small.max()) for _, _, small in raw]
    assert found.n == len(entries) == len(scores)
    np.testing.assert_allclose(found.image_scores, sorted(scores), rtol=1e-5)
    np.testing.assert_allclose(found.map_maxima, sorted(peaks), rtol=1e-5)


def test_scores_by_folds_are_those_of_unseen_images(model, data):
    """The fitted model's own training images score lower than they do without it."""
    images = [umiad.read_image(data / entry.name) for entry in model.split.part("train")]
    seen = [score for _, score, _ in model.score_images(iter(images))]
    assert np.mean(model.config.calibration.image_scores) > np.mean(seen)


def test_the_rule_says_that_the_rate_is_aimed_at(model):
    rule = model.config.calibration.rule
    assert model.config.calibration.source == "folds"
    assert "each scored by a fit without its fold" in rule
    assert "false-positive rate about" in rule
    assert "at most" not in rule


def test_it_is_saved_and_another_seed_makes_other_folds(model, data, tmp_path):
    model.save(tmp_path / "model")
    assert umiad.load(tmp_path / "model").config.calibration == model.config.calibration
    entries = model.split.part("train")
    assert fold_numbers(entries, FOLDS, seed=1) != fold_numbers(entries, FOLDS, seed=0)


@pytest.mark.parametrize(
    ("options", "words"), [({"folds": 1}, "folds 1"), ({"folds": 3, "holdout": 0.3}, "give one")]
)
def test_what_makes_no_sense_is_refused(options, words, data):
    with pytest.raises(ConfigError, match=words):
        umiad.fit(detector(), data, options=FitOptions(**options))


def test_trained_detectors_are_refused(data):
    with pytest.raises(ConfigError, match="would be trained 4 times"):
        umiad.fit(detector("fastflow"), data, options=FitOptions(folds=FOLDS))


def test_too_few_images_for_the_folds_are_told_before_any_work(data, tmp_path, monkeypatch):
    built = detector()
    monkeypatch.setattr(built, "prepare", None)  # not called
    with pytest.raises(InputError, match="fewer folds, or more normal images"):
        umiad.fit(built, data, options=FitOptions(folds=20), out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["patchcore", "egmf", "intensity", "size"])
def test_other_closed_forms_are_fitted_by_folds(name, data):
    made = umiad.fit(detector(name), data, options=FitOptions(folds=2))
    assert made.config.calibration.n == len(made.split.part("train"))
    assert all(np.isfinite(made.config.calibration.image_scores))


def test_a_given_split_that_holds_out_is_refused(data):
    held = umiad.fit(detector(), data, options=FitOptions(holdout=0.2)).split
    with pytest.raises(InputError, match="holds none"):
        umiad.fit(detector(), data, options=FitOptions(folds=FOLDS), groups=held)


def test_the_command(data, tmp_path):
    words = [
        "fit",
        str(data),
        "--out",
        str(tmp_path / "model"),
        "--detector",
        "posgauss",
        "--weights",
        "random",
    ]
    result = CliRunner().invoke(app, [*words, "--size", "64", "--folds", "2"])
    assert result.exit_code == 0, result.output + result.stderr
    assert "2 further fits for the threshold" in result.stdout
    assert "each scored by a fit without its fold" in result.stdout
    refused = CliRunner().invoke(app, [*words, "--folds", "2", "--holdout", "0.2"])
    assert refused.exit_code != 0
    assert "give one" in refused.stderr
