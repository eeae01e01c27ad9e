import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from umiad import detectors
from umiad.detectors.check import clean_images, with_blob
from umiad.errors import ConfigError, TrainingError

SIZE = 64


def build(**settings):
    config = detectors.preset_config("intensity", "default", size=SIZE, **settings)
    return detectors.make("intensity", config.canonical(), None)


def fitted(images, **settings):
    detector = build(**settings)
    detector.collect(detector.prepare(images))
    detector.finish(torch.Generator())
    return detector


def tinted(images):
    """The images with unequal channels, whose mean is what counts."""
    return images + torch.tensor([0.3, -0.1, 0.4])[:, None, None]


def test_map_and_score_equal_numpy_and_scipy():
    images, new = tinted(clean_images(10, size=SIZE)), tinted(clean_images(3, size=SIZE, seed=1))
    detector = build()
    for start in (0, 4, 8):  # collected in uneven batches
        detector.collect(detector.prepare(images[start : start + 4]))
    detector.finish(torch.Generator())
    scores = detector.score(new)
    grey, new_grey = images.double().numpy().mean(1), new.double().numpy().mean(1)
    for index in range(3):
        smoothed = gaussian_filter(new_grey[index], 4.0, mode="mirror")
        expected = np.abs(smoothed - grey.mean()) / grey.std()
        # float32 grey values and z in the order of 1
        np.testing.assert_allclose(scores.anomaly_map[index], expected, atol=2e-6)
        highest = np.sort(expected.ravel())[-round(0.01 * SIZE * SIZE) :]
        assert float(scores.image_score[index]) == pytest.approx(highest.mean(), abs=2e-6)


def test_the_tails_are_the_two_directions_of_the_same_deviation():
    images, new = clean_images(6, size=SIZE), clean_images(2, size=SIZE, seed=1)
    both, bright, dark = (
        fitted(images, tail=tail).score(new).anomaly_map for tail in ("both", "bright", "dark")
    )
    assert torch.equal(bright, -dark)
    assert torch.equal(both, bright.abs())


def test_a_bright_and_a_dark_lesion_are_found_by_their_tail_alone():
    normal = clean_images(8, size=SIZE)
    for tail, value, other in (("bright", 4.0, "dark"), ("dark", -4.0, "bright")):
        lesion = with_blob(normal, value=value)
        for name, found in ((tail, True), ("both", True), (other, False)):
            detector = fitted(normal, tail=name)
            higher = detector.score(lesion).image_score > detector.score(normal).image_score
            assert bool(higher.all()) is found, (tail, name)


def test_the_image_is_smoothed_before_the_tail_is_taken():
    normal = clean_images(4, size=SIZE)
    stripes = torch.ones(SIZE)
    stripes[::2] = -1  # as strange as can be pixel by pixel, usual on average
    image = stripes.expand(1, 3, SIZE, SIZE).contiguous() + float(normal.mean())
    assert float(fitted(normal).score(image).image_score) < 0.1
    assert float(fitted(normal, sigma=0.0).score(image).image_score) > 3


def test_constant_images_give_finite_scores():
    flat = torch.full((3, 3, SIZE, SIZE), 0.7)
    detector = fitted(flat)
    assert detector.score(flat).image_score.abs().max() < 1e-3  # float32 of 0.7, divided by the floor
    other = detector.score(flat + 1)
    # the deviation of 1 in units of the smallest std that is allowed
    assert other.image_score.numpy() == pytest.approx(1000, rel=1e-4)
    assert torch.isfinite(other.anomaly_map).all()


def test_one_image_is_not_enough():
    detector = build()
    detector.collect(detector.prepare(clean_images(1, size=SIZE)))
    with pytest.raises(TrainingError, match="at least 2 normal images, got 1"):
        detector.finish(torch.Generator())


def test_the_monitor_is_silent_before_fitting_and_small_on_normal_images():
    images = clean_images(8, size=SIZE)
    detector = build(sigma=0.0)
    rows = detector.prepare(images)
    assert detector.monitor(rows) == {}
    detector.collect(rows)
    detector.finish(torch.Generator())
    assert detector.monitor(rows)["squared_z"] == pytest.approx(1, rel=1e-5)  # by definition, unsmoothed


def test_settings_out_of_range_are_refused():
    for settings in ({"tail": "left"}, {"top_fraction": 0.0}, {"top_fraction": 1.5}, {"sigma": -1.0}):
        with pytest.raises(ConfigError):
            build(**settings)


def test_there_is_no_network_and_nothing_to_count():
    detector = build(backbone="resnet50", weights="imagenet")
    assert "encoder" not in detector.parts()
    assert sum(p.numel() for p in detector.module.parameters()) == 0
    assert sum(values.numel() for values in detector.state().values()) == 2
