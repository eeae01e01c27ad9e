import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from umiad import detectors
from umiad.detectors.check import clean_images
from umiad.errors import TrainingError


def build(**settings):
    config = detectors.preset_config("padim", "default", size=64, **settings)
    return detectors.make("padim", config.canonical(), None)


def test_distances_equal_scipys_mahalanobis():
    detector = build(channels=12, epsilon=0.05)
    images = clean_images(10, size=64)
    prepared = detector.prepare(images)
    for start in (0, 4, 8):  # collected in uneven batches
        detector.collect({k: v[start : start + 4] for k, v in prepared.items()})
    detector.finish(torch.Generator())
    new = detector.prepare(clean_images(2, size=64, seed=9))
    distance = detector._distance(new)
    features = prepared["features"].double().numpy()
    for row, column in [(0, 0), (3, 5), (7, 7)]:
        fibres = features[:, :, row, column]
        covariance = np.cov(fibres.T) + 0.05 * np.eye(12)
        for image in range(2):
            fibre = new["features"][image, :, row, column].double().numpy()
            expected = mahalanobis(fibre, fibres.mean(0), np.linalg.inv(covariance))
            # float32 whitening of features in the order of 1
            assert float(distance[image, row, column]) == pytest.approx(expected, rel=1e-4)


def test_channels_are_drawn_by_the_seed_and_without_repetition():
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    index = first.statistics.index
    assert len(set(index.tolist())) == 100
    assert torch.equal(index, again.statistics.index)
    assert not torch.equal(index, other.statistics.index)


def test_one_image_is_not_enough():
    detector = build()
    detector.collect(detector.prepare(clean_images(1, size=64)))
    with pytest.raises(TrainingError, match="at least 2 normal images, got 1"):
        detector.finish(torch.Generator())


def test_the_monitor_is_near_one_on_the_images_it_was_fitted_on():
    detector = build(channels=4, epsilon=1e-6)
    prepared = detector.prepare(clean_images(40, size=64))
    assert detector.monitor(prepared) == {}
    detector.collect(prepared)
    detector.finish(torch.Generator())
    # the mean squared distance of n fitted points is d (n - 1) / n
    assert detector.monitor(prepared)["distance_per_dim"] == pytest.approx(39 / 40, rel=0.05)
