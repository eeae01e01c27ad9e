from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from umiad import synthetic
from umiad.config import Preprocessing
from umiad.data import load_data
from umiad.errors import ConfigError, InputError
from umiad.io import read_image
from umiad.phantoms import draw_phantom
from umiad.preprocess import to_input
from umiad.synthetic import _ALTER, AREAS, FAMILIES, SyntheticAnomaly, plant, synthetic_set

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
VISIBLE = 1.0 / 255.0


def heads(count: int, size: int = 64) -> list[np.ndarray]:
    return [draw_phantom(np.random.default_rng(n), size=size, lesions=0)[0] for n in range(count)]


HEADS = heads(5)


def planted(
    pixels: np.ndarray, family: str, area: float = 0.05, seed: int = 0, donors: list[np.ndarray] | None = None
) -> SyntheticAnomaly:
    others = HEADS[1:] if donors is None else donors
    return plant(pixels, family=family, area=area, donors=others, rng=np.random.default_rng(seed))


def check_form(found: SyntheticAnomaly, before: np.ndarray) -> None:
    assert found.pixels.dtype == np.float32
    assert found.mask.dtype == bool
    assert found.pixels.shape == found.mask.shape == before.shape
    assert found.pixels.min() >= 0.0
    assert found.pixels.max() <= 1.0
    assert found.mask.any()
    assert found.area == pytest.approx(found.mask.mean())


def test_every_family_has_its_function() -> None:
    assert tuple(_ALTER) != ()
    assert set(_ALTER) == set(FAMILIES)
    assert len(set(FAMILIES)) == len(FAMILIES)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    area=st.floats(*AREAS),
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(64, 100), st.integers(64, 100)),
    number=st.integers(0, 4),
)
def test_range_area_and_untouched_surroundings(
    family: str, area: float, seed: int, shape: tuple[int, int], number: int
) -> None:
    whole = heads(5, 100)
    images = [image[: shape[0], : shape[1]] for image in whole]
    before = images[number]
    copy = before.copy()
    found = planted(before, family, area, seed, images)
    check_form(found, before)
    np.testing.assert_array_equal(before, copy)
    assert abs(found.area - area) * before.size <= 2.0  # rounded to pixels
    changed = found.pixels != before
    assert np.abs(found.pixels - before)[found.mask].mean() >= VISIBLE
    # A soft edge reaches at most as far as the patch's own radius, times its aspect, its lobes and the surface.
    reach = int(6.0 * np.sqrt(found.mask.sum() / np.pi)) + 3
    assert not changed[~binary_dilation(found.mask, np.ones((3, 3)), iterations=reach)].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_far_pixels_stay_bit_equal_and_most_change_lies_in_the_mask(family: str) -> None:
    before = heads(1, 128)[0]
    for seed in range(6):
        found = planted(before, family, 0.02, seed, heads(3, 128)[1:])
        difference = np.abs(found.pixels - before)
        assert (difference == 0.0).mean() > 0.8
        assert difference[found.mask].mean() > 2.0 * difference[~found.mask & (difference > 0)].mean()


def test_direction_of_dark_and_bright_and_detail_of_blur_and_sharpen() -> None:
    before = heads(1, 128)[0]
    donors = [before]

    def detail(pixels: np.ndarray, mask: np.ndarray) -> float:
        return float(np.abs(np.diff(pixels, axis=1))[mask[:, 1:] & mask[:, :-1]].mean())

    for seed in range(8):
        found = {family: planted(before, family, 0.05, seed, donors) for family in FAMILIES}
        change = {name: float((each.pixels - before)[each.mask].mean()) for name, each in found.items()}
        assert change["dark"] < 0.0 < change["bright"]
        for family, sign in (("blur", -1.0), ("sharpen", 1.0)):
            mask = found[family].mask
            assert sign * (detail(found[family].pixels, mask) - detail(before, mask)) > 0.0


def test_patches_lie_on_foreground() -> None:
    image = np.zeros((128, 128), dtype=np.float32)
    image[30:100, 40:110] = 0.5 + 0.1 * np.random.default_rng(0).random((70, 70), dtype=np.float32)
    for seed in range(20):
        for area, share in ((0.03, 0.85), (0.2, 0.85)):  # the square covers 0.3 of the image
            mask = planted(image, "blob", area, seed, []).mask
            assert mask[30:100, 40:110].sum() >= share * mask.sum()


def test_outlines_differ() -> None:
    masks = [planted(HEADS[0], "bright", 0.05, seed).mask for seed in range(10)]
    assert len({mask.tobytes() for mask in masks}) == 10


def test_same_generator_same_anomaly() -> None:
    for family in FAMILIES:
        first, again = planted(HEADS[0], family), planted(HEADS[0], family)
        np.testing.assert_array_equal(first.pixels, again.pixels)
        np.testing.assert_array_equal(first.mask, again.mask)
        assert not np.array_equal(first.pixels, planted(HEADS[0], family, seed=1).pixels)


def test_texture_takes_a_donor_of_other_grey_half_way() -> None:
    image, donor = (np.full((64, 64), value, dtype=np.float32) for value in (0.2, 0.6))
    found = planted(image, "texture", 0.1, 0, [donor])
    assert found.pixels.max() == pytest.approx(0.4, abs=1e-6)  # full weight; float32


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_constant_image_is_changed_where_that_is_possible(value: float) -> None:
    image = np.full((64, 64), value, dtype=np.float32)
    impossible = {"blur", "sharpen", "deform"} | {0.0: {"dark"}, 1.0: {"bright"}}.get(value, set())
    for family in FAMILIES:
        found = planted(image, family)
        check_form(found, image)
        change = np.abs(found.pixels - image)[found.mask].mean()
        if family in impossible:
            assert change < VISIBLE
        else:
            assert change >= VISIBLE


def test_extreme_areas() -> None:
    for family in FAMILIES:
        assert planted(HEADS[0], family, 1e-9).mask.sum() == 1
        assert planted(HEADS[0], family, 0.999).area == pytest.approx(0.999, abs=1e-3)


def test_sets_are_balanced_ordered_and_log_uniform() -> None:
    anomalies = list(synthetic_set(HEADS, per_image=3, seed=4))
    counts = Counter(each.family for each in anomalies)
    assert len(anomalies) == 15
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 1
    for index, each in enumerate(anomalies):
        check_form(each, HEADS[index // 3])
        assert (each.pixels == HEADS[index // 3]).mean() > 0.05  # made from that image
    whole = list(synthetic_set(HEADS, per_image=7, seed=0))
    assert Counter(each.family for each in whole) == dict.fromkeys(FAMILIES, 5)
    areas = np.array(
        [each.area for each in synthetic_set(HEADS[:1], per_image=80, seed=1, families=["blob"])]
    )
    assert areas.min() >= AREAS[0] - 1e-3
    assert areas.max() <= AREAS[1] + 1e-3
    middle = np.sqrt(AREAS[0] * AREAS[1])
    assert 0.3 < (areas < middle).mean() < 0.7  # 80 draws, standard deviation 0.056


def test_what_follows_changes_nothing_before() -> None:
    families = [each for each in FAMILIES if each != "texture"]
    few = list(synthetic_set(HEADS[:2], per_image=4, seed=3, families=families))
    many = list(synthetic_set(HEADS, per_image=4, seed=3, families=families))
    for short, long in zip(few, many, strict=False):
        assert short.family == long.family
        np.testing.assert_array_equal(short.pixels, long.pixels)
        np.testing.assert_array_equal(short.mask, long.mask)
    orders = [each.family for each in synthetic_set(HEADS[:2], per_image=7, seed=3)]
    assert orders == [each.family for each in synthetic_set(HEADS, per_image=7, seed=3)][:14]
    assert orders != [each.family for each in synthetic_set(HEADS[:2], per_image=7, seed=4)]


def test_same_seed_same_set_and_inputs_unchanged() -> None:
    copies = [image.copy() for image in HEADS]
    first, again, other = (list(synthetic_set(HEADS, per_image=2, seed=seed)) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.pixels, two.pixels)
    assert any(not np.array_equal(one.pixels, two.pixels) for one, two in zip(first, other, strict=True))
    for image, copy in zip(HEADS, copies, strict=True):
        np.testing.assert_array_equal(image, copy)


def test_donors_are_all_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        synthetic, "_planted", lambda pixels, _family, _area, donors, _rng: seen.append(donors)
    )
    list(synthetic_set(HEADS, per_image=1, seed=0))
    for index, donors in enumerate(seen):
        assert [id(each) for each in donors] == [id(each) for each in HEADS if each is not HEADS[index]]


def test_texture_moves_towards_the_other_image() -> None:
    images = [np.full((64, 64), value, dtype=np.float32) for value in (0.2, 0.6)]
    for each, own, other in zip(
        synthetic_set(images, per_image=1, seed=0, families=("texture",)), (0.2, 0.6), (0.6, 0.2), strict=True
    ):
        change = float((each.pixels - own)[each.mask].mean())
        assert change * (other - own) > 0.0


def test_one_image_serves_without_texture() -> None:
    assert len(list(synthetic_set(HEADS[:1], per_image=2, seed=0, families=("blur", "dark")))) == 2


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (np.full((64, 64), np.nan, dtype=np.float32), "nan"),
        (np.full((64, 64), np.inf, dtype=np.float32), "inf"),
        (np.full((64, 64), 2.0, dtype=np.float32), "holds values 2 to 2"),
        (np.full((64, 64), -0.5, dtype=np.float32), "holds values -0.5"),
        (np.zeros((1, 64, 64), dtype=np.float32), r"shape \[1, 64, 64\]"),
        (np.zeros((64, 63), dtype=np.float32), r"shape \[64, 63\]"),
        (np.zeros((64, 64)), "float64"),
        (np.zeros((0, 0), dtype=np.float32), r"shape \[0, 0\]"),
        ([[0.0]], "list"),
    ],
)
def test_unusable_images_are_refused_by_name(image: np.ndarray, word: str) -> None:
    with pytest.raises(InputError, match=f"^pixels.*{word}"):
        planted(image, "blob")
    with pytest.raises(InputError, match=rf"^donors\[1\].*{word}"):
        planted(HEADS[0], "texture", donors=[HEADS[1], image])
    with pytest.raises(InputError, match=rf"^images\[1\].*{word}"):
        synthetic_set([HEADS[0], image], per_image=1, seed=0)


def test_unequal_or_missing_images_are_refused() -> None:
    wide = np.zeros((64, 80), dtype=np.float32)
    for family in ("texture", "blur"):
        with pytest.raises(InputError, match=r"donors\[0\].*\[64, 80\].*\[64, 64\]"):
            planted(HEADS[0], family, donors=[wide])
    with pytest.raises(InputError, match=r"images\[1\].*\[64, 80\]"):
        synthetic_set([HEADS[0], wide], per_image=1, seed=0)
    with pytest.raises(InputError, match="donors: is empty"):
        planted(HEADS[0], "texture", donors=[])
    with pytest.raises(InputError, match="holds 0"):
        synthetic_set([], per_image=1, seed=0, families=("blur",))
    with pytest.raises(InputError, match="holds 1, .* 2 for 'texture'"):
        synthetic_set(HEADS[:1], per_image=1, seed=0)


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown family 'sharpn'.*did you mean 'sharpen'"):
        planted(HEADS[0], "sharpn")
    with pytest.raises(ConfigError, match="'textures'.*'texture'"):
        synthetic_set(HEADS, per_image=1, seed=0, families=("blob", "textures"))
    for area in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="not a share"):
            planted(HEADS[0], "blob", area)
    for wrong in ({"per_image": 0}, {"seed": -1}, {"families": ()}, {"families": ("blob", "blob")}):
        with pytest.raises(ConfigError, match="expected families named once each"):
            synthetic_set(HEADS, **{"per_image": 1, "seed": 0, **wrong})


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real image sets are not here")
@pytest.mark.parametrize("name", ["busi", "brain_mri", "head_ct"])
def test_real_normal_images(name: str) -> None:
    normals = [case for case in load_data(REAL / name).cases if case.label == 0][::30]
    plain = Preprocessing(size=128, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = [to_input(read_image(case.path), plain)[0] for case in normals]
    for index, found in enumerate(synthetic_set(images, per_image=7, seed=0)):
        before = images[index // 7]
        check_form(found, before)
        assert np.abs(found.pixels - before)[found.mask].mean() >= VISIBLE
