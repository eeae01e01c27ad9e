"""Every detector on a few real ultrasound images with the real backbone, through the functions users call."""

from pathlib import Path

import numpy as np
import pytest

import umiad
from umiad import detectors
from umiad.api import FitOptions

SHARED = Path(__file__).parents[2] / "shared"
BUSI = SHARED / "data" / "busi"
WEIGHTS = sorted((SHARED / "weights").glob("*.safetensors"))
SIZE = 64


@pytest.fixture(scope="module")
def images():
    if not BUSI.is_dir() or not WEIGHTS:
        pytest.skip("the real image sets and weights do not lie beside the repository")

    def read(kind, count):
        paths = [BUSI / kind / f"{kind} ({number}).png" for number in range(1, count + 1)]
        return [umiad.read_image(path) for path in paths]

    return read("normal", 12), read("malignant", 3)


@pytest.mark.real
@pytest.mark.parametrize("name", detectors.names())
def test_real_images_are_fitted_scored_saved_and_loaded(name, images, tmp_path):
    normal, malignant = images
    detector = umiad.build(name, preset="quick", weights=str(WEIGHTS[0]), size=SIZE)
    if not detector.info.closed_form:
        settings = {"training": {"epochs": 1}}
        detector = umiad.build(name, preset="quick", weights=str(WEIGHTS[0]), size=SIZE, settings=settings)
    arrays = [image.pixels[0] for image in normal]
    model = umiad.fit(detector, arrays, options=FitOptions(holdout=0.25), out=tmp_path / "model")
    findings = model.score(malignant)
    for image, finding in zip(malignant, findings, strict=True):
        assert finding.anomaly_map.shape == image.size
        assert np.isfinite(finding.anomaly_map).all()
        assert np.isfinite(finding.image_score)
    again = umiad.load(tmp_path / "model").score(malignant)
    assert [each.image_score for each in again] == [each.image_score for each in findings]
