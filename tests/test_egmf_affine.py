"""The affine design of egmf: its choices, its two views, its errors; 64 px and random weights."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from combinations import combinations
from umiad import detectors
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.egmf import EGMF, EGMFConfig
from umiad.detectors.egmf_affine import GUIDES, TRANSFORMS, AffineConfig, AffineEGMF
from umiad.detectors.egmf_network import NetworkConfig, NetworkEGMF
from umiad.errors import ConfigError, NotFittedError, TrainingError
from umiad.nn.affine import RIDGE
from umiad.nn.encoder import CHANNELS
from umiad.scoring import top_mean

SIZE = 64
VIEWS = (["position"], ["mirror"], ["position", "mirror"])
SMALL = {"aggregate": "ignore"}
"""F3 alone: 256 channels instead of 448, for what does not depend on the edge features."""


def build(preset="default", **settings):
    config = detectors.preset_config("egmf", preset, **{"size": SIZE, **settings})
    return detectors.make("egmf", config.canonical(), None)


def symmetric(images):
    return (images + images.flip(-1)) / 2


def sharing(detector, **settings):
    """A detector of other settings with the flows of `detector` that it has."""
    other = build(**{**detector.config.canonical(), **settings})
    state = detector.state()
    other.load_state({key: state[key] for key in other.state()})
    return other


@pytest.fixture(scope="module")
def images():
    return clean_images(6, size=SIZE)


@pytest.fixture(scope="module")
def new_images():
    return clean_images(3, size=SIZE, seed=9)


@pytest.fixture(scope="module")
def fitted(images):
    """Both views; nobody changes it."""
    return fit_quickly(build(), images)


@pytest.mark.parametrize(
    ("preset", "design", "views"),
    [
        ("paper", NetworkEGMF, None),
        ("default", AffineEGMF, ["position", "mirror"]),
        ("quick", AffineEGMF, ["position"]),
    ],
)
def test_presets_choose_the_design(preset, design, views):
    detector = build(preset, **({"blocks": 1} if design is NetworkEGMF else {}))
    assert type(detector) is design
    assert type(detector.config) is design.Config
    assert detector.config.preset == preset
    assert detector.info.closed_form == (design is AffineEGMF)
    if views:
        assert list(detector.flows) == list(detector.config.views) == views


def test_a_configuration_without_a_design_is_a_networks_as_saved_models_have_it():
    old = NetworkConfig(size=SIZE, blocks=1).canonical()
    assert "design" not in old
    assert type(EGMFConfig.parse(old)) is NetworkConfig
    assert type(detectors.make("egmf", old, None)) is NetworkEGMF
    new = AffineConfig(size=SIZE).canonical()
    assert new["design"] == "affine"
    assert type(detectors.make("egmf", new, None)) is AffineEGMF
    assert type(EGMF(EGMFConfig.parse(new), None)) is AffineEGMF


PARTS = combinations(GUIDES, ("join", "ignore"), TRANSFORMS, ("joint", "none"))


@pytest.mark.parametrize("parts", PARTS)
def test_every_combination_fits_and_scores(parts, images, new_images):
    """One fit for all views and likelihoods: each view's flow is fitted for itself, as another test shows."""
    chosen = dict(zip(("edge", "aggregate", "transform", "fusion"), parts, strict=True))
    detector = fit_quickly(build(**chosen), images)
    for views, likelihood in itertools.product(VIEWS, ("latent", "full")):
        scores = sharing(detector, views=views, likelihood=likelihood).score(new_images)
        assert scores.anomaly_map.shape == (3, SIZE, SIZE)
        assert torch.isfinite(scores.anomaly_map).all()
        assert torch.isfinite(scores.image_score).all()
        assert float(scores.anomaly_map.std()) > 0
    assert all(math.isfinite(value) for value in detector.monitor(detector.prepare(new_images)).values())


@pytest.mark.parametrize("views", VIEWS[:2], ids="-".join)
def test_a_view_alone_is_fitted_as_beside_the_other(views, images):
    both, alone = (fit_quickly(build(**SMALL, views=each), images) for each in (VIEWS[2], views))
    state = both.state()
    assert all(torch.equal(value, state[key]) for key, value in alone.state().items())
    assert len(alone.state()) < len(state)


@pytest.mark.parametrize("likelihood", ["latent", "full"])
@pytest.mark.parametrize("sigma", [0.0, 4.0])
def test_views_add_up(fitted, new_images, likelihood, sigma):
    """Interpolation and smoothing are linear."""
    chosen = {"likelihood": likelihood, "sigma": sigma}
    first, second, both = (
        sharing(fitted, views=views, **chosen).score(new_images).anomaly_map for views in VIEWS
    )
    torch.testing.assert_close(both, first + second, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    assert not torch.allclose(first, second, rtol=1e-2)


def test_the_score_is_the_mean_of_the_maps_top(fitted, new_images):
    for fraction in (0.03, 0.5):
        scores = sharing(fitted, top_fraction=fraction).score(new_images)
        assert torch.equal(scores.image_score, top_mean(scores.anomaly_map, fraction))


def test_full_adds_a_constant_to_every_cell(fitted, new_images):
    """The log-determinant of an affine flow is the same for all images."""
    latent, full = (sharing(fitted, likelihood=each, sigma=0.0) for each in ("latent", "full"))
    difference = full.score(new_images).anomaly_map - latent.score(new_images).anomaly_map
    largest = float(latent.score(new_images).anomaly_map.abs().max())
    torch.testing.assert_close(difference[1:], difference[:1].expand(2, -1, -1), rtol=0, atol=1e-5 * largest)
    assert float(difference.abs().max()) > 0.1


def test_the_view_position_ignores_twins(fitted, new_images):
    prepared = fitted.prepare(new_images)
    spoilt = {**prepared, "twins": torch.full_like(prepared["twins"], torch.nan)}
    alone = sharing(fitted, views=["position"])
    expected = alone.score_prepared(prepared).anomaly_map
    assert torch.equal(alone.score_prepared(spoilt).anomaly_map, expected)
    assert torch.equal(alone.score_prepared({"fibres": prepared["fibres"]}).anomaly_map, expected)
    mirror = sharing(fitted, views=["mirror"])
    assert not torch.isfinite(mirror.score_prepared(spoilt).anomaly_map).any()


@pytest.mark.parametrize(("views", "runs"), [(VIEWS[0], 1), (VIEWS[1], 2), (VIEWS[2], 2)])
def test_only_the_view_mirror_runs_the_mirror_image(views, runs, fitted, new_images):
    detector, seen = sharing(fitted, views=views), []
    detector.pyramid.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    detector.score(new_images)
    assert len(seen) == runs
    assert torch.equal(seen[0], new_images)
    assert torch.equal(seen[-1], new_images.flip(-1)) == (runs == 2)


def test_twins_are_the_fibres_of_the_mirror_image(fitted, new_images):
    there, back = fitted.prepare(new_images), fitted.prepare(new_images.flip(-1))
    assert there["fibres"].shape == (3, (SIZE // 16) ** 2, CHANNELS[2] + CHANNELS[0] + CHANNELS[1])
    assert torch.equal(there["twins"], back["fibres"])
    assert torch.equal(there["fibres"], back["twins"])
    even = fitted.prepare(symmetric(new_images))
    assert torch.equal(even["fibres"], even["twins"])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("edge", [None, *GUIDES])
def test_fibres_are_the_transformed_scales_on_f3s_grid(edge, transform, new_images):
    """F3 over 3 x 3 cells (fewer at the border), then the edge part's maps averaged to the same cells."""
    parts = SMALL if edge is None else {"edge": edge}
    detector = build(**parts, transform=transform)
    f1, f2, f3 = (TRANSFORMS[transform](each) for each in detector.pyramid(new_images, depth=3))
    side = SIZE // 16
    cells = [(row, column) for row in range(side) for column in range(side)]
    near = [f3[:, :, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean((2, 3)) for r, c in cells]
    expected = torch.stack(near, dim=1)
    if edge is not None:
        edges = GUIDES[edge][0](seed=detector.config.seed).eval()(f1, f2).detach()
        means = [edges[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((2, 3)) for r, c in cells]
        expected = torch.cat([expected, torch.stack(means, dim=1)], dim=2)
    # float32 sums in another order
    torch.testing.assert_close(detector.prepare(new_images)["fibres"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["joint", "none"])
def test_scales_are_independent_where_they_are_not_fused(fusion, images, new_images):
    """Then, and only then, what changes in both scales costs what it costs in each."""
    detector = fit_quickly(build("quick", fusion=fusion), images)
    fibres = detector.prepare(new_images)["fibres"]
    far = detector.prepare(clean_images(3, size=SIZE, seed=10))["fibres"]
    deep = torch.arange(fibres.shape[2]) < CHANNELS[2]

    def energy(rows):
        u, _ = detector.flows["position"](rows, rows)
        return u.double().square().sum(-1)

    neither, both = energy(fibres), energy(far)
    coarse, fine = (energy(torch.where(which, far, fibres)) for which in (deep, ~deep))
    error = (both + neither - coarse - fine).abs() / both
    assert (float(error.max()) < 1e-4) == (fusion == "none")  # float32


def test_a_fit_on_mirror_images_is_the_same_fit(images):
    """A pair is taken in both orders; half of the images turned round change nothing but the order of sums."""
    turned = torch.where((torch.arange(len(images)) % 2 == 0)[:, None, None, None], images, images.flip(-1))
    first, second = (fit_quickly(build(**SMALL, rank=1000), each) for each in (images, turned))
    assert_alike(first, second, clean_images(3, size=SIZE, seed=9))


def assert_alike(first, second, images):
    """Maps that differ by rounding only: float32 buffers, and covariances that rounding of features enters."""
    one, other = (each.score(images).anomaly_map for each in (first, second))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


def test_neither_order_nor_batches_of_the_images_change_the_fit(images):
    whole, pieces = build(**SMALL, rank=1000), build(**SMALL, rank=1000)
    whole.collect(whole.prepare(images))
    for part in (slice(4, 6), slice(3, 4), slice(0, 3)):
        pieces.collect(pieces.prepare(images[part].flip(0)))
    for detector in (whole, pieces):
        detector.finish(torch.Generator())
    assert_alike(whole, pieces, clean_images(3, size=SIZE, seed=9))


def test_the_view_mirror_sees_that_two_usual_sides_do_not_belong_together():
    """Fitted on symmetric images; every side of the new ones is usual, their combination is not."""
    normal = symmetric(clean_images(24, size=SIZE))
    even, other = (symmetric(clean_images(6, size=SIZE, seed=seed)) for seed in (9, 10))
    odd = even.clone()
    odd[..., SIZE // 2 :] = other[..., SIZE // 2 :]
    detector = fit_quickly(build(**SMALL), normal)
    rises = {}
    for views in VIEWS[:2]:
        alone = sharing(detector, views=views)
        rises[views[0]] = float((alone.score(odd).image_score / alone.score(even).image_score).min())
    assert rises["mirror"] > 10
    assert rises["mirror"] > 10 * rises["position"]


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("views", VIEWS, ids="-".join)
def test_a_bright_blob_is_found_on_its_side(blob_detector, views, side):
    """The view mirror by itself marks both sides, as neither fits the other; beside the other it does not."""
    size = blob_detector.config.size
    detector = sharing(blob_detector, views=views)
    images = clean_images(4, size=size, seed=5)
    clean = detector.score(images)
    middle, half = size // 2 + side * size // 4, size // 8
    window = (slice(size // 2 - half, size // 2 + half), slice(middle - half, middle + half))
    images[:, :, *window] += 2.0
    marked = detector.score(images)
    here, usual = (each.anomaly_map[:, *window].mean((1, 2)) for each in (marked, clean))
    across = marked.anomaly_map.flip(-1)[:, *window].mean((1, 2))
    assert bool((here > 2 * usual).all())
    assert bool((marked.image_score > 2 * clean.image_score).all())
    if "position" in views:
        assert bool((here > across).all())


@pytest.fixture(scope="module")
def blob_detector():
    """96 px: 6 x 6 cells, of which a side has three."""
    return fit_quickly(build(size=96), clean_images(24, size=96))


def test_nats_per_dim_are_those_of_the_naive_gaussians(images, new_images):
    """Full rank, float64 flows; the density of every view and position by scipy, the regression by hand."""
    settings = {**SMALL, "rank": 256, "prior": 7.0, "epsilon": 0.3}
    detector = build(**settings)
    detector.module["flows"].double()
    prepared = {key: value.double() for key, value in detector.prepare(images).items()}
    detector.collect(prepared)
    detector.finish(torch.Generator())
    held = {key: value.double() for key, value in detector.prepare(new_images).items()}
    found = detector.monitor(held)
    every, across = (
        torch.cat([prepared[k] for k in keys]).numpy() for keys in (("fibres", "twins"), ("twins", "fibres"))
    )
    n, positions, channels = every.shape
    mean = every.mean(0)
    y, x = ((each - mean).reshape(-1, channels) for each in (every, across))
    ridge = RIDGE * np.square(y).mean() * np.eye(channels)
    regressions = {
        "position": np.zeros((channels, channels)),
        "mirror": np.linalg.solve(x.T @ x / len(x) + ridge, x.T @ y / len(x)).T,
    }
    for view, by in regressions.items():
        residual = (y - x @ by.T).reshape(n, positions, channels)
        own = np.einsum("bpc,bpd->pcd", residual, residual) / n
        shared = own.mean(0)
        base = 0.3 * np.trace(shared) / channels * np.eye(channels)
        total = 0.0
        for p in range(positions):
            covariance = (n * own[p] + 7.0 * shared) / (n + 7.0) + base
            centre = mean[p] + (held["twins"][:, p].numpy() - mean[p]) @ by.T
            apart = held["fibres"][:, p].numpy() - centre
            total -= multivariate_normal(np.zeros(channels), covariance).logpdf(apart).mean()
        assert found[f"nats_{view}"] == pytest.approx(total / positions / channels, rel=1e-6)
    assert found["nats_per_dim"] == pytest.approx((found["nats_position"] + found["nats_mirror"]) / 2)


def test_fibres_at_another_position_are_less_likely(fitted, new_images):
    prepared = fitted.prepare(new_images)
    order = torch.randperm(prepared["fibres"].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[:, order] for key, value in prepared.items()}
    usual, unusual = fitted.monitor(prepared), fitted.monitor(shuffled)
    assert unusual["nats_position"] > usual["nats_position"]


def test_the_monitor_is_silent_before_the_fit_and_scoring_is_an_error(images):
    detector = build(**SMALL)
    assert detector.monitor(detector.prepare(images)) == {}
    with pytest.raises(NotFittedError):
        detector.score(images)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count, images):
    detector = build(**SMALL)
    if count:
        detector.collect(detector.prepare(images[:count]))
    with pytest.raises(TrainingError, match=f"at least 2 normal images, got {count}"):
        detector.finish(torch.Generator())
    assert not detector.fitted


@pytest.mark.parametrize("kind", ["equal", "symmetric", "mirrored", "constant"])
def test_equal_images_are_refused_also_where_they_differ_from_their_mirror_image(kind, images):
    one = images[:1]
    each = {
        "equal": [one, one, one],
        "symmetric": [symmetric(one)] * 3,
        "mirrored": [one, one.flip(-1), one],
        "constant": [torch.zeros_like(one)] * 3,
    }[kind]
    detector = build(**SMALL)
    detector.collect(detector.prepare(torch.cat(each[:2])))
    detector.collect(detector.prepare(each[2]))
    with pytest.raises(TrainingError, match="that differ, got 3"):
        detector.finish(torch.Generator())


def test_two_images_are_enough(images, new_images):
    detector = fit_quickly(build(), images[:2])
    assert torch.isfinite(detector.score(new_images).anomaly_map).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"edge": "fien"}, "did you mean 'fine'"),
        ({"edge": "none"}, "edge: .*unknown part.*known: egm, fine, prewitt"),
        ({"views": ["mirror", "mirror"]}, "every view counts once"),
        ({"views": []}, "views"),
        ({"views": ["left"]}, "views.*'position' or 'mirror'"),
        ({"backbone": "resnet50"}, "choose resnet18 or resnet34"),
        ({"aggregate": "eam"}, "aggregate.*'join' or 'ignore'"),
        ({"transform": "log"}, "transform.*'sqrt' or 'identity'"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"prior": -1.0}, "prior"),
        ({"rank": 0}, "rank"),
        ({"top_fraction": 1.5}, "top_fraction"),
        ({"design": "network"}, "design.*'affine'"),
        ({"view": ["mirror"]}, "unknown key 'view'.*did you mean 'views'"),
        ({"blocks": 8}, "unknown key 'blocks'"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_wrong_settings_say_what_to_do(settings, said):
    with pytest.raises(ConfigError, match=said):
        build(**settings)


def test_layer_4_is_not_saved_and_the_backbone_has_the_channels_of_the_edge_parts():
    detector = build()
    assert not [key for key in detector.state() if "layer4" in key]
    assert sum(p.numel() for p in detector.parts()["encoder"].parameters()) == 2_782_784
    sizes = [
        sum(value.numel() * value.element_size() for value in each.state().values())
        for each in (detector, build("paper"))
    ]
    assert sizes[0] < 0.25 * sizes[1]
    assert detector.parts().keys() == {"encoder", "edge", "flow position", "flow mirror"}


def test_nothing_is_trainable_whatever_the_edge_part():
    for edge in GUIDES:
        detector = build(edge=edge)
        assert not [p for p in detector.module.parameters() if p.requires_grad]
        assert detector.param_groups() == []
        assert not detector.edge.training


def test_sums_that_no_memory_holds_are_refused_before_they_are_made(images, monkeypatch):
    monkeypatch.setattr("umiad.detectors.egmf_affine.total_memory", lambda: 10**6)
    detector = build()
    prepared = detector.prepare(images)
    with pytest.raises(
        TrainingError, match=r"egmf at 64 px holds 0\.1 GB of sums .* this machine has 0\.0 GB"
    ):
        detector.collect(prepared)
    # where nothing is known nothing is refused
    monkeypatch.setattr("umiad.detectors.egmf_affine.total_memory", lambda: None)
    detector.collect(prepared)
