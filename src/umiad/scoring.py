"""From log-likelihoods per position to an anomaly map and an image score; higher = more anomalous, always.

The letters follow the paper: l_k [B,h,w] is the log-likelihood of scale k in nats per dimension, without the
constant 0.5 ln(2 pi), which moves no rank. No result of an image depends on the others of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from umiad.errors import ConfigError, InputError
from umiad.nn.precision import exact
from umiad.types import Scores

KERNEL_RADIUS = 4.0
"""A Gaussian kernel ends after this many standard deviations (6e-5 of its mass is cut off)."""

COMMON_SIGMA = 4.0
"""Standard deviation in pixels of the smoothing in `common`."""

PositionLikelihood = Callable[[Tensor, Tensor | None], Tensor]


def position_log_likelihood(u: Tensor, log_det: Tensor | None) -> Tensor:
    """-0.5 mean_c u^2 + log_det / C at every position: u [B,C,h,w], log_det [B,h,w] or None -> [B,h,w].

    In nats per dimension. `log_det` is the natural log of abs(det du/dz) of that position's C dimensions;
    None stands for 0. Paper, section "Anomaly scoring". Raises InputError on other shapes.
    """
    if u.ndim != 4:
        raise InputError("latent u", f"shape {list(u.shape)}, expected [B,C,h,w]")
    energy = -0.5 * u.square().mean(dim=1)
    if log_det is None:
        return energy
    if log_det.shape != energy.shape:
        raise InputError(
            "log_det", f"shape {list(log_det.shape)}, expected {list(energy.shape)} as the latents"
        )
    return energy + log_det / u.shape[1]


def latent_log_likelihood(u: Tensor, log_det: Tensor | None) -> Tensor:
    """The latent part alone, -0.5 mean_c u^2 (MSFlow, and the paper's description); ignores `log_det`."""
    del log_det
    return position_log_likelihood(u, None)


def full_log_likelihood(u: Tensor, log_det: Tensor | None) -> Tensor:
    """The density of the position, with its log-determinant.

    Detection on seed 0 is 1 to 4 points higher with it than with the latent part for egmf's preset "paper", and up to
    1.5 for "default" in the mean of five seeds (variant full-likelihood in benchmarks/results); outlines of "paper"
    on BUSI are worse.

    Not bounded by 0: scores built on it may be negative. Raises InputError when `log_det` is None.
    """
    if log_det is None:
        raise InputError("log_det", 'None, expected [B,h,w]: likelihood "full" needs a flow that returns it')
    return position_log_likelihood(u, log_det)


LIKELIHOODS: Mapping[str, PositionLikelihood] = MappingProxyType(
    {"latent": latent_log_likelihood, "full": full_log_likelihood}
)


def combine(levels: Sequence[Tensor], size: int, *, top_fraction: float = 0.03) -> Scores:
    """Log-likelihoods l_k [B,h_k,w_k] of all scales -> map [B,size,size] and image score [B], float32.

    Each l_k is upsampled bilinearly (align_corners=True). anomaly_map = sum_k (1 - exp l_k). The image score
    comes from the product over scales, 1 - exp(sum_k l_k), by its top N = round(top_fraction * size^2) pixels
    (1,966 at 256 px). Paper, section "Anomaly scoring".

    Deviation: the paper's image score s, the mean of those N values, is returned as -log(1 - s), in nats.
    The order of images is the same in exact arithmetic; in float32 s itself reaches 1.0 once all N sums are
    below -17, and then very abnormal images would tie. The map keeps the paper's form: float32 cannot tell
    pixels apart where every l_k is below about -16.

    Raises InputError on no levels or other shapes, ConfigError when `top_fraction` is not in (0, 1].
    """
    count = _top_count(size * size, top_fraction)
    _check_levels(levels, size)
    upsampled = [
        F.interpolate(each.float()[:, None], size=(size, size), mode="bilinear", align_corners=True)[:, 0]
        for each in levels
    ]
    anomaly_map = torch.zeros_like(upsampled[0])
    product = torch.zeros_like(upsampled[0])
    for each in upsampled:
        anomaly_map -= torch.expm1(each)
        product += each
    lowest = product.flatten(1).topk(count, dim=1, largest=False).values
    image_score = math.log(count) - exact(lowest).logsumexp(dim=1)
    return Scores(anomaly_map=anomaly_map, image_score=image_score.float().to(product.device))


def common(scores: Scores, *, smoothed: float) -> Scores:
    """The post-processing that tables use for all detectors alike: one smoothing, one image score.

    The map is smoothed until it has had a Gaussian of 4 pixels in all (`smoothed` of them in the detector's own
    post-processing), and the image score is its maximum. Published methods differ in both, which by itself moves
    their figures by several points. PaDiM's convention (Defard et al., 2021).
    """
    rest = math.sqrt(max(0.0, COMMON_SIGMA**2 - smoothed**2))
    maps = smooth(scores.anomaly_map, rest)
    return Scores(maps, maximum(maps))


def _check_levels(levels: Sequence[Tensor], size: int) -> None:
    shapes = [list(each.shape) for each in levels]
    if not shapes or any(len(shape) != 3 or shape[0] != shapes[0][0] for shape in shapes):
        raise InputError("log-likelihoods", f"shapes {shapes}, expected at least one [B,h,w], all of one B")
    if size < 1:
        raise ConfigError(f"size {size}, expected at least 1 pixel")


def _top_count(pixels: int, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise ConfigError(f"top fraction {fraction}, expected above 0 and at most 1")
    return max(1, round(fraction * pixels))


def _check_maps(maps: Tensor) -> None:
    if maps.ndim != 3 or not maps.shape[1] * maps.shape[2]:
        raise InputError("anomaly maps", f"shape {list(maps.shape)}, expected [B,H,W]")


def _check_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"sigma {sigma}, expected 0 or more pixels")


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Convolve maps [B,H,W] with a Gaussian of `sigma` pixels, mirrored at the borders; 0 changes nothing.

    The kernel ends at 4 sigma, or at H - 1 (W - 1) where the map is smaller, and sums to 1. Sums run in
    float64, so that rounding to the maps' type hides the order in which a batch is added up.

    Raises InputError on another shape, ConfigError when `sigma` is negative or not finite.
    """
    _check_maps(maps)
    _check_sigma(sigma)
    if sigma == 0:
        return maps
    wide = exact(maps)
    rows, columns = (_gaussian(length, sigma).to(wide) for length in maps.shape[1:])
    return (rows @ wide @ columns.mT).to(maps)


def smooth_cells(cells: Tensor, size: int, sigma: float) -> Tensor:
    """Values per position [B,h,w] -> maps [B,size,size]: bilinear (align_corners=False), then `smooth`, at one go.

    Both are linear, so that their product, [size,h] for the rows, is applied to the small grid: the same up to
    rounding, without ever smoothing size x size pixels. Raises as `smooth` does.
    """
    _check_maps(cells)
    _check_sigma(sigma)
    wide = exact(cells)
    h, w = cells.shape[1:]
    rows = _smoothed_bilinear(h, size, sigma).to(wide)
    columns = rows if w == h else _smoothed_bilinear(w, size, sigma).to(wide)
    return (rows @ wide @ columns.mT).to(cells)


def _smoothed_bilinear(length: int, size: int, sigma: float) -> Tensor:
    bilinear = _bilinear(length, size)
    return _gaussian(size, sigma) @ bilinear if sigma else bilinear


def _bilinear(length: int, size: int) -> Tensor:
    """Interpolation of `length` values at `size` pixels as a matrix [size,length] (align_corners=False)."""
    at = (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5
    return (1 - (at.clamp(0, length - 1)[:, None] - torch.arange(length)).abs()).clamp_min(0)


def _gaussian(length: int, sigma: float) -> Tensor:
    """The convolution of `length` values as a matrix [length,length]: mirrored borders, rows sum to 1."""
    radius = min(math.ceil(KERNEL_RADIUS * sigma), length - 1)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    source = (torch.arange(length)[:, None] + offsets).abs()  # mirrored at the first value,
    source = (length - 1) - ((length - 1) - source).abs()  # and at the last
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(length, -1))


def top_mean(maps: Tensor, fraction: float) -> Tensor:
    """Mean of the highest round(fraction * H * W) values, at least one, of maps [B,H,W] -> float32 [B].

    Raises InputError on another shape, ConfigError when `fraction` is not in (0, 1].
    """
    _check_maps(maps)
    values = maps.flatten(1)
    highest = values.topk(_top_count(values.shape[1], fraction), dim=1).values
    return exact(highest).mean(dim=1).to(maps.device, torch.float32)


def maximum(maps: Tensor) -> Tensor:
    """The highest value of maps [B,H,W] -> [B]. Raises InputError on another shape."""
    _check_maps(maps)
    return maps.amax(dim=(1, 2))
