import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from umiad import detectors
from umiad.detectors.check import clean_images
from umiad.detectors.size import log_sharpness
from umiad.errors import InputError, TrainingError

SIZE = 64


def build(**settings):
    config = detectors.preset_config("size", "default", size=SIZE, **settings)
    return detectors.make("size", config.canonical(), None)


def edges(count, *, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.round(scale * rng.uniform(200, 500, (count, 2)))).long()


def fitted(images, sizes, **settings):
    detector = build(**settings)
    detector.collect(detector.prepare(images, original_size=sizes))
    detector.finish(torch.Generator())
    return detector


def with_square(row, column):
    image = torch.zeros(1, 3, SIZE, SIZE)
    image[:, :, row : row + 6, column : column + 6] = 1.0
    return image


def numpys_features(images, sizes):
    grey = images.double().numpy().mean(1)
    blocks = grey.reshape(len(grey), SIZE // 2, 2, SIZE // 2, 2)
    fine = ((blocks - blocks.mean((2, 4), keepdims=True)) ** 2).mean((1, 2, 3, 4))
    sharpness = np.log((fine + 1e-6) / (grey.var((1, 2)) + 1e-6))
    return np.column_stack([np.log(sizes.numpy()), sharpness])


def test_the_score_equals_scipys_mahalanobis_distance():
    images, sizes = clean_images(12, size=SIZE), edges(12)
    detector = build()
    for start in (0, 5, 10):  # collected in uneven batches
        part = slice(start, start + 5)
        detector.collect(detector.prepare(images[part], original_size=sizes[part]))
    detector.finish(torch.Generator())
    features = numpys_features(images, sizes)
    covariance = np.cov(features.T)
    covariance += (1e-3 * np.trace(covariance) / 3 + 1e-4) * np.eye(3)
    new, new_sizes = clean_images(3, size=SIZE, seed=1), edges(3, seed=1, scale=2)
    scores = detector.score(new, original_size=new_sizes)
    for index, row in enumerate(numpys_features(new, new_sizes)):
        expected = mahalanobis(row, features.mean(0), np.linalg.inv(covariance))
        # float32 features in the order of 10, and a float32 whitening
        assert float(scores.image_score[index]) == pytest.approx(expected, rel=1e-4)
        assert scores.anomaly_map[index].unique().tolist() == [float(scores.image_score[index])]


def test_larger_and_smaller_files_are_unusual_alike():
    images = clean_images(20, size=SIZE)
    detector = fitted(images, edges(20))
    usual, larger, smaller = (
        detector.score(images[:1], original_size=torch.tensor([[n, n]])).image_score
        for n in (316, 316 * 4, 316 // 4)
    )
    assert min(float(larger), float(smaller)) > 3 * float(usual)
    assert float(larger) == pytest.approx(float(smaller), rel=0.5)


def test_the_size_of_the_file_counts_and_the_place_of_a_blob_does_not():
    detector = fitted(clean_images(20, size=SIZE), edges(20))
    size = torch.tensor([[300, 400]])
    first = detector.score(with_square(8, 8), original_size=size).image_score
    moved = detector.score(with_square(40, 24), original_size=size).image_score
    assert float(first) == pytest.approx(float(moved), rel=1e-6)
    assert not torch.equal(
        first, detector.score(with_square(8, 8), original_size=torch.tensor([[600, 400]])).image_score
    )


def test_without_an_original_size_the_edge_of_the_input_stands_for_it():
    images = clean_images(4, size=SIZE)
    detector = build()
    bare = detector.prepare(images)["features"]
    assert torch.equal(bare, detector.prepare(images, original_size=torch.full((4, 2), SIZE))["features"])


def test_sharpness_falls_when_an_image_was_enlarged_and_ignores_contrast_and_brightness():
    sharp = torch.randn(4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.avg_pool2d(sharp[:, None], 2)
    enlarged = torch.nn.functional.interpolate(small, size=SIZE, mode="bilinear", align_corners=False)[:, 0]
    assert (log_sharpness(enlarged) < log_sharpness(sharp) - 1).all()
    # only the floors, 1e-6 against energies of 0.25 and more, tell them apart
    assert torch.allclose(log_sharpness(3 * sharp + 5), log_sharpness(sharp), atol=1e-4)
    assert log_sharpness(torch.full((2, SIZE, SIZE), 0.7)).abs().max() < 1e-6


def test_features_that_never_vary_give_finite_distances():
    flat, size = torch.full((5, 3, SIZE, SIZE), 0.7), torch.full((5, 2), 300)
    detector = fitted(flat, size)
    # 300 rounded to float32 in log, in units of the floor's 0.01
    assert detector.score(flat, original_size=size).image_score.max() < 1e-3
    wider = detector.score(flat[:1], original_size=torch.tensor([[300, 303]])).image_score
    assert float(wider) == pytest.approx(np.log(303 / 300) / 0.01, rel=1e-3)


def test_one_image_is_not_enough():
    detector = build()
    detector.collect(detector.prepare(clean_images(1, size=SIZE)))
    with pytest.raises(TrainingError, match="at least 2 normal images, got 1"):
        detector.finish(torch.Generator())


def test_sizes_that_cannot_be_are_refused():
    detector, images = build(), clean_images(2, size=SIZE)
    with pytest.raises(InputError, match=r"shape \(1, 2\), expected \[2,2\]"):
        detector.prepare(images, original_size=torch.tensor([[300, 300]]))
    with pytest.raises(InputError, match="an edge of 0 pixels, expected at least 1"):
        detector.prepare(images, original_size=torch.tensor([[300, 300], [0, 300]]))


def test_the_monitor_is_silent_before_fitting_and_near_one_on_the_fitted_images():
    images, sizes = clean_images(40, size=SIZE), edges(40)
    detector = build(ridge=0.0, floor=1e-9)
    rows = detector.prepare(images, original_size=sizes)
    assert detector.monitor(rows) == {}
    detector.collect(rows)
    detector.finish(torch.Generator())
    # the mean squared distance of n fitted points is d (n - 1) / n
    assert detector.monitor(rows)["distance_per_dim"] == pytest.approx(39 / 40, rel=1e-3)


def test_there_is_no_network_and_nothing_to_count():
    detector = build(backbone="resnet50", weights="imagenet")
    assert "encoder" not in detector.parts()
    assert sum(p.numel() for p in detector.module.parameters()) == 0
    assert sum(values.numel() for values in detector.state().values()) == 12
