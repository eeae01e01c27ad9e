"""The battery on every registered detector, and toy detectors that show that it can fail."""

import pytest
import torch

from umiad import detectors
from umiad.detectors.check import CHECKS, CheckError, check_detector
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.types import Scores

SIZE = 64


def make(name, seed):
    config = detectors.preset_config(name, "quick", size=SIZE, seed=seed)
    return detectors.make(name, config.canonical(), None)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", detectors.names())
def test_battery(name, check):
    CHECKS[check](lambda seed: make(name, seed), SIZE)


@pytest.mark.parametrize("name", detectors.names())
@pytest.mark.parametrize("preset", ["paper", "default", "quick"])
def test_every_detector_has_the_three_presets(name, preset):
    config = detectors.preset_config(name, preset, size=SIZE)
    assert (config.preset, config.size) == (preset, SIZE)


def test_unknown_names_give_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'padim'"):
        detectors.detector_class("padin")
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        detectors.preset_config("egmf", "papr")


class Broken:
    """A fitted padim with one fault; everything else is passed on."""

    def __init__(self, seed, fault):
        self.inner, self.fault = make("padim", seed), fault

    def __getattr__(self, name):
        if name in ("inner", "fault"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def score(self, images):
        return self.fault(self.inner, images)


def wrong_shape(inner, images):
    scores = inner.score(images)
    return Scores(scores.anomaly_map[:, ::2], scores.image_score)


def not_finite(inner, images):
    scores = inner.score(images)
    return Scores(scores.anomaly_map / 0 * 0, scores.image_score)


def scores_unfitted(inner, images):
    return Scores(torch.zeros(len(images), SIZE, SIZE), torch.zeros(len(images)))


def takes_anything(inner, images):
    try:
        return inner.score(images)
    except InputError:
        return Scores(torch.zeros(1, SIZE, SIZE), torch.zeros(1))


def changes_input(inner, images):
    scores = inner.score(images)
    images.mul_(2)
    return scores


def draws_random_numbers(inner, images):
    torch.rand(1)
    return inner.score(images)


def leaves_eval_mode(inner, images):
    inner.module.eval()
    return inner.score(images)


def random_scores(inner, images):
    with torch.random.fork_rng():
        torch.seed()
        return Scores(torch.rand(len(images), SIZE, SIZE), torch.rand(len(images)))


def batch_normalised(inner, images):
    scores = inner.score(images)
    return Scores(
        scores.anomaly_map / scores.anomaly_map.amax(), scores.image_score / scores.image_score.max()
    )


def upside_down(inner, images):
    scores = inner.score(images)
    return Scores(-scores.anomaly_map, -scores.image_score)


FAULTS = [
    ("shapes", wrong_shape),
    ("shapes", not_finite),
    ("not_fitted", scores_unfitted),
    ("wrong_input", takes_anything),
    ("leaves_alone", changes_input),
    ("leaves_alone", draws_random_numbers),
    ("leaves_alone", leaves_eval_mode),
    ("seeds", random_scores),
    ("batches", batch_normalised),
    ("prepared", batch_normalised),
    ("blob", upside_down),
]


@pytest.mark.parametrize(("check", "fault"), FAULTS, ids=[f"{c}-{f.__name__}" for c, f in FAULTS])
def test_each_check_catches_its_fault(check, fault):
    with pytest.raises(CheckError):
        CHECKS[check](lambda seed: Broken(seed, fault), SIZE)


def test_the_battery_names_the_check_that_failed():
    with pytest.raises(CheckError, match="^shapes: map of shape"):
        check_detector(lambda seed: Broken(seed, wrong_shape), size=SIZE)


@pytest.mark.parametrize("name", detectors.names())
def test_a_state_that_does_not_fit_is_a_model_file_error(name):
    detector = make(name, 0)
    state = detector.state()
    key = next(iter(state))
    for wrong, words in (
        ({k: v for k, v in state.items() if k != key}, "missing"),
        ({**state, "surplus": torch.zeros(1)}, "not part"),
        ({**state, key: torch.zeros(1, 2, 3)}, "shape"),
    ):
        with pytest.raises(ModelFileError, match=words):
            detector.load_state(wrong)
