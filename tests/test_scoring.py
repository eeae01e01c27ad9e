from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from umiad.errors import ConfigError, InputError
from umiad.scoring import (
    LIKELIHOODS,
    combine,
    common,
    full_log_likelihood,
    latent_log_likelihood,
    maximum,
    position_log_likelihood,
    smooth,
    smooth_cells,
    top_mean,
)
from umiad.types import Scores

FLOAT32 = 2e-6  # relative; a handful of float32 operations


def levels(batch: int = 3, seed: int = 0, *, scale: float = 1.0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [-scale * torch.rand(batch, edge, edge, generator=rng) for edge in (16, 8, 4, 2)]


def one(value: float, edge: int = 4) -> Tensor:
    return torch.full((1, edge, edge), value)


# Likelihoods


def test_the_density_per_position_is_that_of_a_gaussian_under_a_linear_flow():
    # u = 3 z with C = 5 channels: log p(z) = sum_c log N(u_c; 0, 1) + 5 log 3
    z = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, log_det = 3 * z, torch.full((2, 3, 4), 5 * math.log(3), dtype=torch.float64)
    spread = torch.tensor(1 / 3, dtype=torch.float64)
    exact = torch.distributions.Normal(0 * spread, spread).log_prob(z).mean(dim=1)
    found = position_log_likelihood(u, log_det) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)  # float64


def test_the_two_likelihoods_differ_by_the_log_determinant():
    u, log_det = torch.randn(2, 8, 3, 3), torch.randn(2, 3, 3)
    latent = LIKELIHOODS["latent"](u, log_det)
    torch.testing.assert_close(latent, -0.5 * u.square().mean(1))
    torch.testing.assert_close(latent, latent_log_likelihood(u, None))
    torch.testing.assert_close(LIKELIHOODS["full"](u, log_det) - latent, log_det / 8, rtol=0, atol=1e-5)
    assert full_log_likelihood is LIKELIHOODS["full"]
    assert list(LIKELIHOODS) == ["latent", "full"]


def test_the_full_likelihood_needs_a_log_determinant():
    with pytest.raises(InputError, match='likelihood "full" needs a flow'):
        full_log_likelihood(torch.zeros(1, 2, 3, 3), None)


def test_likelihoods_name_wrong_shapes():
    with pytest.raises(InputError, match=r"\[2, 3\], expected \[B,C,h,w\]"):
        position_log_likelihood(torch.zeros(2, 3), None)
    with pytest.raises(InputError, match=r"\[1\], expected \[1, 3, 3\]"):
        position_log_likelihood(torch.zeros(1, 2, 3, 3), torch.zeros(1))


# Combining scales


def test_constant_levels_give_the_papers_formulas():
    scores = combine([one(-0.5), one(-1.0, 2), one(-2.0, 1)], 8)
    expected = sum(1 - math.exp(-value) for value in (0.5, 1.0, 2.0))
    torch.testing.assert_close(scores.anomaly_map, torch.full((1, 8, 8), expected), rtol=FLOAT32, atol=0)
    # the paper's image score is 1 - exp(-3.5); ours is -log(1 - that)
    assert 1 - math.exp(-scores.image_score.item()) == pytest.approx(1 - math.exp(-3.5), rel=FLOAT32)
    assert scores.anomaly_map.dtype == scores.image_score.dtype == torch.float32


def test_the_image_score_is_a_monotone_map_of_the_papers():
    parts, size = levels(4), 32
    up = [
        torch.nn.functional.interpolate(
            part.double()[:, None], size=(size, size), mode="bilinear", align_corners=True
        )
        for part in parts
    ]
    product = 1 - torch.exp(sum(up, torch.zeros(1)))
    top = product.flatten(1).sort(dim=1, descending=True).values[:, : round(0.03 * size * size)].mean(dim=1)
    found = combine(parts, size).image_score.double()
    torch.testing.assert_close(1 - torch.exp(-found), top, rtol=FLOAT32, atol=0)


def test_levels_are_upsampled_with_aligned_corners():
    scores = combine([torch.tensor([[[0.0, -1.0], [-2.0, -3.0]]])], 5)
    corners = scores.anomaly_map[0, ::4, ::4]
    torch.testing.assert_close(corners, -torch.expm1(torch.tensor([[0.0, -1.0], [-2.0, -3.0]])))


def test_1966_pixels_count_at_256():
    level = torch.zeros(1, 256, 256)
    level.view(-1)[:1966] = -2.0
    assert combine([level], 256).image_score.item() == pytest.approx(2.0, rel=FLOAT32)
    level.view(-1)[1965] = 0.0
    expected = -math.log((1965 * math.exp(-2) + 1) / 1966)
    assert combine([level], 256).image_score.item() == pytest.approx(expected, rel=FLOAT32)


def test_at_least_one_pixel_counts():
    assert combine([one(-1.0, 2)], 2, top_fraction=0.01).image_score.item() == pytest.approx(1.0)


@pytest.mark.parametrize("depth", [-20.0, -50.0, -200.0, -1e4])
def test_very_abnormal_images_keep_their_order(depth):
    # 1 - exp(l) is 1.0 for all of these in float32, and below -37 in float64
    parts = [torch.cat([one(depth), one(depth * 1.001), one(depth * 1.002)])]
    image_score = combine(parts, 8).image_score
    assert image_score[0] < image_score[1] < image_score[2]


def test_tiny_deviations_keep_their_order():
    parts = [torch.cat([one(-1e-9), one(-2e-9)])]
    scores = combine(parts, 8)
    assert 0 < scores.image_score[0] < scores.image_score[1]
    assert 0 < scores.anomaly_map[0].max() < scores.anomaly_map[1].min()


def test_positive_log_likelihoods_are_less_anomalous_still():
    scores = combine([torch.cat([one(1.0), one(0.0), one(-1.0)])], 8)
    assert (scores.image_score.diff() > 0).all()
    assert (scores.anomaly_map[:, 0, 0].diff() > 0).all()


@given(st.integers(0, 1000), st.floats(0.01, 30.0))
def test_one_more_unlikely_scale_never_lowers_a_score(seed, scale):
    parts = levels(2, seed, scale=scale)
    fewer, more = combine(parts[:3], 16), combine(parts, 16)
    assert (more.image_score >= fewer.image_score).all()
    assert (more.anomaly_map >= fewer.anomaly_map).all()


def test_scores_do_not_depend_on_the_batch():
    parts = levels(7, scale=3.0)
    together = combine(parts, 64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    turned = combine([part[order] for part in parts], 64)
    alone = [combine([part[row : row + 1] for part in parts], 64) for row in range(7)]
    for found in (
        torch.cat([each.image_score for each in alone]),
        torch.empty(7).index_copy_(0, order, turned.image_score),
    ):
        torch.testing.assert_close(found, together.image_score, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(
        torch.cat([each.anomaly_map for each in alone]), together.anomaly_map, rtol=FLOAT32, atol=0
    )


def test_levels_are_left_unchanged():
    parts = [torch.rand(2, 8, 8) for _ in range(2)]
    before = [part.clone() for part in parts]
    combine(parts, 8)
    assert all(torch.equal(*pair) for pair in zip(parts, before, strict=True))


@pytest.mark.parametrize(
    "parts",
    [[], [torch.zeros(4, 4)], [torch.zeros(1, 4, 4), torch.zeros(2, 4, 4)]],
    ids=["none", "axes", "batch"],
)
def test_unusable_levels_are_refused(parts):
    with pytest.raises(InputError, match=r"expected at least one \[B,h,w\]"):
        combine(parts, 8)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.1, math.nan])
def test_unusable_fractions_are_refused(fraction):
    with pytest.raises(ConfigError, match="top fraction"):
        combine([one(-1.0)], 8, top_fraction=fraction)
    with pytest.raises(ConfigError, match="top fraction"):
        top_mean(one(-1.0), fraction)


def test_a_map_has_at_least_one_pixel():
    with pytest.raises(ConfigError, match="size 0"):
        combine([one(-1.0)], 0)


# Smoothing


@pytest.mark.parametrize("sigma", [0.5, 1.7, 4.0])
def test_smoothing_equals_scipy(sigma):
    maps = torch.randn(2, 40, 53, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    radius = math.ceil(4 * sigma)
    expected = ndimage.gaussian_filter(
        maps.numpy(), (0, sigma, sigma), mode="mirror", radius=(0, radius, radius)
    )
    np.testing.assert_allclose(smooth(maps, sigma).numpy(), expected, rtol=0, atol=1e-12)  # float64


def test_smoothing_keeps_constants_and_small_maps():
    for shape in ((1, 1, 1), (2, 1, 9), (1, 3, 2)):
        maps = torch.full(shape, 2.5)
        torch.testing.assert_close(smooth(maps, 4.0), maps)


def test_no_smoothing_changes_nothing():
    maps = torch.randn(2, 5, 6)
    assert torch.equal(smooth(maps, 0.0), maps)


@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), 64), ((16, 16), 64), ((3, 5), 32), ((64, 64), 32), ((1, 1), 8)]
)
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0])
def test_smoothed_cells_are_the_smoothed_bilinear_map(grid, size, sigma):
    cells = torch.randn(3, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bilinear = F.interpolate(cells[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(smooth_cells(cells, size, sigma), smooth(bilinear, sigma), rtol=0, atol=1e-12)
    narrow = smooth_cells(cells.float(), size, sigma)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), smooth(bilinear, sigma), rtol=0, atol=1e-6)


def test_smoothing_does_not_depend_on_the_batch():
    maps = torch.randn(7, 33, 31, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([smooth(maps[row : row + 1], 2.0) for row in range(7)])
    torch.testing.assert_close(alone, smooth(maps, 2.0), rtol=FLOAT32, atol=1e-7)
    assert alone.dtype == torch.float32


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_unusable_widths_are_refused(sigma):
    with pytest.raises(ConfigError, match="sigma"):
        smooth(torch.zeros(1, 4, 4), sigma)
    with pytest.raises(ConfigError, match="sigma"):
        smooth_cells(torch.zeros(1, 4, 4), 8, sigma)


# Image scores from maps


def test_top_mean_and_maximum():
    maps = torch.arange(200.0).view(2, 10, 10)
    assert top_mean(maps, 0.03).tolist() == [98.0, 198.0]
    assert top_mean(maps, 0.001).tolist() == [99.0, 199.0]
    assert top_mean(maps, 1.0).tolist() == [49.5, 149.5]
    assert maximum(maps).tolist() == [99.0, 199.0]


def test_top_mean_does_not_depend_on_the_batch():
    maps = torch.randn(5, 61, 67, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([top_mean(maps[row : row + 1], 0.5) for row in range(5)])
    torch.testing.assert_close(alone, top_mean(maps, 0.5), rtol=FLOAT32, atol=0)


@pytest.mark.parametrize(
    "compute",
    [
        maximum,
        lambda maps: top_mean(maps, 0.1),
        lambda maps: smooth(maps, 1.0),
        lambda maps: smooth_cells(maps, 8, 1.0),
    ],
)
@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 4, 4), (2, 0, 4)])
def test_maps_have_three_axes_and_pixels(compute, shape):
    with pytest.raises(InputError, match=r"expected \[B,H,W\]"):
        compute(torch.zeros(shape))


@pytest.mark.parametrize("smoothed", [0.0, 2.0, 4.0, 6.0])
def test_the_common_post_processing_smooths_to_four_pixels_in_all(smoothed):
    rng = torch.Generator().manual_seed(0)
    raw = torch.rand(2, 64, 64, generator=rng, dtype=torch.float64)
    own = Scores(smooth(raw, smoothed), torch.tensor([5.0, 7.0]))
    found = common(own, smoothed=smoothed)
    expected = smooth(raw, max(4.0, smoothed))
    middle = slice(24, 40)  # two mirrored kernels differ from one at the borders only
    # two discrete, truncated Gaussians in a row are a Gaussian to about 1e-3 of the map's range
    assert torch.allclose(found.anomaly_map[:, middle, middle], expected[:, middle, middle], atol=2e-3)
    assert torch.equal(found.image_score, found.anomaly_map.amax((1, 2)))
