"""The same images give the same scores: again, in other batches, on other threads, in another order (D1 to D3, D7).

The battery (tests/test_detectors.py) proves the parts for every detector; here whole fits from files are compared.
"""

import math
import random

import numpy as np
import pytest
import torch

import umiad
from make import tiny_set
from umiad import detectors
from umiad.io import read_image
from umiad.metrics import det_auroc
from umiad.preprocess import to_input

SIZE, COUNT = 64, 32
PRESETS = [*((name, "quick") for name in detectors.names()), ("egmf", "default"), ("egmf", "paper")]
FAST = {"egmf-quick", "intensity-quick", "padim-quick", "patchcore-quick", "posgauss-quick", "size-quick"}
"""Closed forms: a fit takes seconds at most."""
WHITENED = {"egmf-quick", "egmf-default", "padim-quick", "posgauss-quick"}
"""A covariance of few images at 64 pixels has directions of nearly no variance: they magnify rounding."""
EXACT, BATCH, BATCH_WHITENED, THREADS = 0.0, 2e-6, 5e-5, 1e-5
MAGNIFIED = {"fanogan-quick": 1e-5, "medvit-quick": 1e-4}
"""Trained from random weights for one epoch: fanogan's map is a small difference of large values, medvit's
features hardly differ between images, so that its distances are multiples of float32 rounding. Both D2 and D3."""


def each(*, slow_only=False):
    """All detectors under their presets; those that take longer, or all with `slow_only`, are for `make slow`."""
    names = ["-".join(pair) for pair in PRESETS]
    marks = [[pytest.mark.slow] if slow_only or name not in FAST else [] for name in names]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=mark) for name, mark in zip(names, marks, strict=True)]
    )


def build(name, *, size=SIZE, backbone="resnet18"):
    detector, preset = name.split("-")
    cls = detectors.detector_class(detector)
    settings = {"backbone": backbone} if cls.info.uses_backbone else {}
    if preset == "paper" or not cls.info.closed_form:
        settings["training"] = {"epochs": 1}
    return umiad.build(detector, preset=preset, weights="random", size=size, settings=settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What is fitted on."""
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=24, n_abnormal=2, size=SIZE)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """32 images that no model has seen, one half abnormal."""
    root = tiny_set(tmp_path_factory.mktemp("new"), n_normal=16, n_abnormal=16, size=SIZE, seed=5)
    return sorted((root / "normal").iterdir()) + sorted((root / "abnormal").iterdir())


@pytest.fixture(scope="module")
def fitted(data):
    """Models by name, each fitted once."""
    kept = {}

    def get(name):
        if name not in kept:
            kept[name] = umiad.fit(build(name), data)
        return kept[name]

    return get


def inputs(model, files):
    return np.stack([to_input(read_image(path), model.config.preprocessing) for path in files])


def scored(model, images, batch):
    """Image scores [B] and maps [B,S,S] of prepared images, in batches."""
    size = images.shape[-1]
    parts = [
        model.score_inputs(images[start : start + batch], [(size, size)] * len(images[start : start + batch]))
        for start in range(0, len(images), batch)
    ]
    return torch.cat([part.image_score for part in parts]), torch.cat([part.anomaly_map for part in parts])


def apart(first, second):
    """Largest difference of two lists of scores, relative to the score."""
    first, second = (torch.as_tensor(each, dtype=torch.float64) for each in (first, second))
    return float(((first - second).abs() / second.abs().clamp_min(1e-12)).max())


def maps_apart(first, second):
    """Largest difference within a map, relative to the map's largest value."""
    scale = second.double().abs().amax((1, 2)).clamp_min(1e-12)
    return float(((first.double() - second.double()).abs().amax((1, 2)) / scale).max())


def check_repeats(name, data, files, *, runs, backbone):
    found = []
    for run in range(runs):
        torch.default_generator.manual_seed(run)  # of no influence
        model = umiad.fit(build(name, backbone=backbone), data)
        found.append((scored(model, inputs(model, files), 8), model.info["image_threshold"]))
    first = found[0]
    for (scores, maps), threshold in found[1:]:
        assert torch.equal(scores, first[0][0])
        assert torch.equal(maps, first[0][1])
        assert threshold == first[1]


@pytest.mark.parametrize("name", sorted(FAST))
def test_D1_two_fits_from_files_score_bit_equal(name, data, files):
    check_repeats(name, data, files[::4], runs=2, backbone="resnet-tiny")


@pytest.mark.slow
@each(slow_only=True)
def test_D1_five_fits_from_files_score_bit_equal(name, data, files, record_property):
    check_repeats(name, data, files[::4], runs=5, backbone="resnet18")
    record_property("reliability", {"case": "D1", "tried": 5, "passed": 5, "what": "whole fits, bit-equal"})


def check_batches(model, files, *, tolerance):
    images = inputs(model, files)
    scores, maps = scored(model, images, COUNT)
    truth = np.arange(COUNT) >= COUNT // 2
    for batch in (1, 7):
        other, other_maps = scored(model, images, batch)
        assert apart(other, scores) <= tolerance
        assert maps_apart(other_maps, maps) <= tolerance
        assert abs(det_auroc(other, truth) - det_auroc(scores, truth)) <= 1e-6


@each()
def test_D2_batches_of_1_7_and_32_agree(name, fitted, files):
    usual = BATCH_WHITENED if name in WHITENED else BATCH
    check_batches(fitted(name), files, tolerance=MAGNIFIED.get(name, usual))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WHITENED))
def test_D2_batches_of_1_7_and_32_agree_at_256_pixels(name, tmp_path):
    data = tiny_set(tmp_path / "data", n_normal=40, n_abnormal=2, size=256)
    new = tiny_set(tmp_path / "new", n_normal=16, n_abnormal=16, size=256, seed=5)
    model = umiad.fit(build(name, size=256), data)
    files = sorted((new / "normal").iterdir()) + sorted((new / "abnormal").iterdir())
    check_batches(model, files, tolerance=BATCH)


@pytest.fixture
def threads():
    """Set the number of threads of torch; the old one is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each()
def test_D3_threads_1_2_and_4_agree(name, fitted, files, threads):
    model = fitted(name)
    images = inputs(model, files[::4])
    found = []
    for number in (1, 2, 4):
        threads(number)
        found.append(scored(model, images, 8))
    for scores, maps in found[1:]:
        assert apart(scores, found[0][0]) <= MAGNIFIED.get(name, THREADS)
        assert maps_apart(maps, found[0][1]) <= MAGNIFIED.get(name, THREADS)


@pytest.mark.parametrize(("count", "tolerance"), [(16, EXACT), (9, THREADS)])
@pytest.mark.parametrize("name", ["padim-quick", "patchcore-quick"])
def test_D3_files_in_another_order_score_the_same_by_name(name, count, tolerance, fitted, files):
    # 16 files fill batches of 8: bit-equal; of 9 one is alone in its batch, see D2
    model, chosen = fitted(name), files[:count]
    expected = {finding.name: finding.image_score for finding in model.score(chosen)}
    for seed in range(3):
        shuffled = random.Random(seed).sample(chosen, count)
        found = {finding.name: finding.image_score for finding in model.score(shuffled)}
        assert [finding.name for finding in model.score(shuffled)] == [str(path) for path in shuffled]
        assert found.keys() == expected.keys()
        assert apart([found[key] for key in expected], list(expected.values())) <= tolerance


@pytest.mark.parametrize("name", ["egmf-quick", "intensity-quick", "padim-quick", "size-quick"])
def test_D7_labels_that_mean_nothing_are_not_found_out(name, tmp_path):
    count = 24
    pool = tiny_set(tmp_path / "pool", n_normal=3 * count, n_abnormal=1, size=SIZE, seed=9)
    names = sorted((pool / "normal").iterdir())
    random.Random(0).shuffle(names)
    for number, path in enumerate(names):  # all normal: what the folders call abnormal differs in nothing
        folder = tmp_path / "data" / ("abnormal" if number < count else "normal")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"{number}.png")
    model = umiad.fit(build(name, backbone="resnet-tiny"), tmp_path / "data")
    result = umiad.evaluate(model, tmp_path / "data", n_resamples=10)
    normal, abnormal = result.counts["n_normal"], result.counts["n_abnormal"]
    sigma = math.sqrt((normal + abnormal + 1) / (12 * normal * abnormal))  # of the Mann-Whitney statistic
    assert min(normal, abnormal) >= 10
    assert abs(result.metrics["det_auroc"]["value"] - 0.5) <= 3 * sigma
