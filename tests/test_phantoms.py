from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from make import tiny_set
from umiad.errors import ConfigError, DiskError, InputError
from umiad.io import read_image, read_mask
from umiad.phantoms import draw_phantom, write_phantoms


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_layout_and_form(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path / "new" / "set", n_normal=3, n_abnormal=2, size=80)
    assert root == tmp_path / "new" / "set"
    assert sorted(digests(root)) == [
        "abnormal/abnormal_000.png",
        "abnormal/abnormal_001.png",
        "masks/abnormal_000_mask.png",
        "masks/abnormal_001_mask.png",
        "normal/normal_000.png",
        "normal/normal_001.png",
        "normal/normal_002.png",
    ]
    for path in root.rglob("*.png"):
        with PIL.Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("L", (80, 80))


def test_same_seed_same_bytes_and_counts_do_not_matter(tmp_path: Path) -> None:
    first = digests(tiny_set(tmp_path / "a", 3, 3))
    assert digests(tiny_set(tmp_path / "b", 3, 3)) == first
    more = digests(tiny_set(tmp_path / "c", 5, 4))
    assert {name: more[name] for name in first} == first
    other = digests(tiny_set(tmp_path / "d", 3, 3, seed=1))
    assert not set(other.values()) & set(first.values())


def test_images_differ_and_are_not_saturated(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / "a", 10, 0, 96)
    assert len(set(digests(root).values())) == 10
    for path in (root / "normal").iterdir():
        pixels = read_image(path).pixels
        assert 0.15 < pixels.mean() < 0.6
        assert pixels.std() > 0.1
        assert (pixels >= 1.0).mean() < 0.05


def test_masks_are_binary_and_of_sensible_area(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / "a", 0, 20, 96)
    for path in sorted((root / "masks").iterdir()):
        assert set(np.unique(read_image(path).pixels)) == {0.0, 1.0}
        assert 0.003 < read_mask([path], size=(96, 96)).mean() < 0.15


def test_lesions_change_the_image_inside_the_mask_only() -> None:
    mean_change = []
    for seed in range(8):
        image, mask = draw_phantom(np.random.default_rng(seed), size=96, lesions=1)
        clean, empty = draw_phantom(np.random.default_rng(seed), size=96, lesions=0)
        assert image.dtype == np.float32
        assert mask.any()
        assert not empty.any()
        assert clean.shape == image.shape == mask.shape
        mean_change.append(image[mask].std() + abs(image[mask].mean() - clean[mask].mean()))
    assert np.mean(mean_change) > 0.1


def test_a_simple_detector_finds_the_lesions(tmp_path: Path) -> None:
    """A Gaussian per pixel on blurred grey and roughness: images and pixels well above 0.8."""
    root = tiny_set(tmp_path / "a", 45, 15, 96)

    def features(path: Path) -> np.ndarray:
        grey = read_image(path).pixels[0]
        smooth = gaussian_filter(grey / np.median(grey[grey > 0.2]), 2)
        rough = np.sqrt(gaussian_filter((grey - gaussian_filter(grey, 2)) ** 2, 2))
        return np.stack([smooth, 4 * rough])

    normal = np.stack([features(path) for path in sorted((root / "normal").iterdir())])
    abnormal = np.stack([features(path) for path in sorted((root / "abnormal").iterdir())])
    masks = np.stack([read_mask([path]) for path in sorted((root / "masks").iterdir())])
    fitted, held_out = normal[:30], normal[30:]
    mean, deviation = fitted.mean(axis=0), fitted.std(axis=0) + 0.03

    def maps(images: np.ndarray) -> np.ndarray:
        return (((images - mean) / deviation) ** 2).sum(axis=1)

    tested = np.concatenate([maps(held_out), maps(abnormal)])
    scores = np.sort(tested.reshape(30, -1), axis=1)[:, -96 * 96 // 50 :].mean(axis=1)
    assert roc_auc_score([0] * 15 + [1] * 15, scores) > 0.85
    assert roc_auc_score(masks.ravel(), maps(abnormal).ravel()) > 0.85


@pytest.mark.parametrize("wrong", [{"n_normal": -1}, {"n_abnormal": -2}, {"size": 63}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        write_phantoms(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder"):
        write_phantoms(tmp_path, n_normal=1, n_abnormal=0)
    with pytest.raises(InputError, match="not an empty folder"):
        write_phantoms(tmp_path / "mine.txt", n_normal=1, n_abnormal=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_writing_that_fails_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="cannot be written"):
        write_phantoms(tmp_path / "file" / "set", n_normal=1, n_abnormal=0)
