import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from umiad import detectors
from umiad.detectors.cflow import CEILING, LOSSES, Cflow, CflowConfig, CflowNetwork, as_fibres
from umiad.detectors.check import clean_images, fit_quickly
from umiad.errors import ConfigError, TrainingError
from umiad.nn.encoder import BACKBONES
from umiad.nn.flow import position_encoding

SIZE = 64
CELLS = {1: 16, 2: 8, 3: 4, 4: 2}
"""Edge of each scale's grid at 64 px."""


def build(**settings):
    config = detectors.preset_config("cflow", "quick", size=SIZE, **{"blocks": 2, **settings})
    return detectors.make("cflow", config.canonical(), None)


def shaken(network, amount=0.2):
    """Weights at which every coupling scales and shifts."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(amount * torch.randn(parameter.shape, dtype=parameter.dtype, generator=rng))
    return network


def collected(detector, images):
    detector.collect(detector.prepare(images))
    detector.finish(torch.Generator())
    return detector


@pytest.fixture(scope="module")
def fitted():
    images = clean_images(6, size=SIZE)
    return collected(fit_quickly(build(), images, steps=6), images)


def test_the_log_likelihood_of_a_fibre_is_exact():
    """Against the Jacobian by autograd, in float64; scale 1 has the smallest fibres."""
    config = CflowConfig(
        size=SIZE, scales=(1,), blocks=3, hidden_ratio=0.1, condition_channels=8, permutation="hard"
    )
    network = shaken(CflowNetwork(config).double())
    rng = torch.Generator().manual_seed(2)
    fibres, index = torch.randn(3, 64, dtype=torch.float64, generator=rng), torch.tensor([0, 17, 300])
    codes = position_encoding(8, 16, 16).flatten(1).T[index % 256].double()
    with torch.no_grad():
        found = network(0, fibres, index)
    for k in range(3):
        code = codes[k : k + 1]
        flow = network.flows[0]
        jacobian = torch.autograd.functional.jacobian(lambda z, c=code, f=flow: f(z, c)[0], fibres[k : k + 1])
        log_det = np.linalg.slogdet(jacobian.reshape(64, 64).numpy())[1]
        with torch.no_grad():
            u = network.flows[0](fibres[k : k + 1], code)[0][0].numpy()
        expected = multivariate_normal(np.zeros(64)).logpdf(u) + log_det
        assert abs(found[k].item() * 64 - expected) < 1e-10
        assert abs(log_det) > 0.1


@pytest.mark.parametrize("scale", [1, 3])
def test_the_condition_of_a_cell_is_the_position_encoding_of_its_row_and_column(scale):
    network = build(scales=[scale], condition_channels=16).network
    seen = []
    network.flows[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    side, channels = CELLS[scale], BACKBONES["resnet18"][scale - 1]
    features = torch.arange(2 * channels * side * side).view(2, channels, side, side).float()
    with torch.no_grad():
        network.log_likelihood(0, features)
    [(fibres, codes)] = seen
    encoding = position_encoding(16, side, side)
    for image, row, column in ((0, 0, 0), (0, 1, 3), (1, 2, 1), (1, side - 1, side - 2)):
        place = (image * side + row) * side + column
        assert torch.equal(fibres[place], features[image, :, row, column])
        assert torch.equal(codes[place], encoding[:, row, column])


def test_the_same_fibre_at_another_position_is_scored_differently(fitted):
    prepared = fitted.prepare(clean_images(1, size=SIZE, seed=3))
    same = {name: values[:, :, :1, :1].expand_as(values).contiguous() for name, values in prepared.items()}
    with torch.no_grad():
        cells = fitted.network.log_likelihood(0, same["f2"])[0]
    assert float((cells - cells[0, 0]).abs().flatten()[1:].min()) > 0


def test_every_fibre_is_used_exactly_once_per_pass_and_no_step_is_tiny():
    detector = build(fibres_per_step=50)
    seen = []
    detector.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    prepared = detector.prepare(clean_images(3, size=SIZE))
    steps = sum(1 for _ in detector.steps(prepared, torch.Generator().manual_seed(4)))
    assert steps == len(seen) == 4 + 1 + 1  # 192, 48 and 12 fibres
    for level, scale in enumerate((2, 3, 4)):
        used = torch.cat([index for of, _, index in seen if of == level])
        assert torch.equal(used.sort().values, torch.arange(3 * CELLS[scale] ** 2))
        assert not torch.equal(used, used.sort().values)
        fibres = as_fibres(prepared[f"f{scale}"])
        assert all(torch.equal(taken, fibres[index]) for of, taken, index in seen if of == level)
    assert [len(index) for of, _, index in seen if of == 0] == [48, 48, 48, 48]


def test_the_generator_decides_the_order():
    def order(seed):
        seen = []
        handle = detector.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
        list(detector.steps(prepared, torch.Generator().manual_seed(seed)))
        handle.remove()
        return torch.cat(seen)

    detector = build()
    prepared = detector.prepare(clean_images(2, size=SIZE))
    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


@pytest.mark.parametrize("loss", ["logsigmoid", "nll"])
def test_the_loss_equals_the_published_formula(loss):
    detector = build(loss=loss, fibres_per_step=10_000)
    shaken(detector.network)
    prepared = detector.prepare(clean_images(2, size=SIZE))
    for (scale, flow), step in zip(
        ((k, detector.parts()[f"flow{k}"]) for k in (2, 3, 4)),
        detector.steps(prepared, torch.Generator()),
        strict=True,
    ):
        features = prepared[f"f{scale}"].double()
        channels, side = features.shape[1], features.shape[2]
        code = position_encoding(128, side, side).double()
        flow = flow.double()
        per_dim = []
        with torch.no_grad():
            for image, row, column in np.ndindex(2, side, side):
                u, log_det = flow(features[image, :, row, column][None], code[:, row, column][None])
                log_p = -channels * 0.5 * math.log(2 * math.pi) - 0.5 * float((u**2).sum()) + float(log_det)
                per_dim.append(log_p / channels)
        per_dim = np.array(per_dim)
        expected = np.log1p(np.exp(-per_dim)).mean() if loss == "logsigmoid" else -per_dim.mean()
        # the detector works in float32
        assert float(step["total"].detach()) == pytest.approx(expected, rel=1e-4)
        assert float(step["nats_per_dim"].detach()) == pytest.approx(-per_dim.mean(), rel=1e-4, abs=1e-4)


def test_both_losses_fall_with_the_likelihood_and_logsigmoid_cares_less_for_likely_fibres():
    values = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    slopes = {}
    for name, loss in LOSSES.items():
        [slopes[name]] = torch.autograd.grad(loss(values), values)
        assert (slopes[name] < 0).all()
    assert slopes["logsigmoid"][0] < slopes["logsigmoid"][1] < slopes["logsigmoid"][2]
    assert slopes["nll"].unique().numel() == 1


def test_a_level_gets_gradients_from_its_own_loss_only():
    detector = build(fibres_per_step=10_000)
    prepared = detector.prepare(clean_images(2, size=SIZE))
    for level, step in enumerate(detector.steps(prepared, torch.Generator())):
        detector.module.zero_grad()
        step["total"].backward()
        for other, flow in enumerate(detector.network.flows):
            trainable = [p for p in flow.parameters() if p.requires_grad]
            assert trainable
            assert all((p.grad is not None) == (other == level) for p in trainable)


def test_images_of_a_batch_do_not_touch_each_other(fitted):
    images = clean_images(4, size=SIZE, seed=5)
    before = fitted.score(images)
    order = [2, 0, 3, 1]
    mixed = fitted.score(images[order])
    # single float32 sums may differ by the place in the batch
    assert torch.allclose(mixed.anomaly_map, before.anomaly_map[order], atol=1e-6, rtol=1e-6)
    assert torch.allclose(mixed.image_score, before.image_score[order], atol=1e-5, rtol=1e-5)
    images[1] = 5 * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
    after = fitted.score(images)
    others = [0, 2, 3]
    assert torch.allclose(after.anomaly_map[others], before.anomaly_map[others], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after.anomaly_map[1], before.anomaly_map[1], atol=1e-2)


@torch.no_grad()
def test_the_order_of_fibres_does_not_change_their_likelihood(fitted):
    fibres = as_fibres(fitted.prepare(clean_images(2, size=SIZE, seed=5))["f2"])
    order = torch.randperm(len(fibres), generator=torch.Generator().manual_seed(7))
    straight = fitted.network(0, fibres, torch.arange(len(fibres)))
    assert torch.allclose(fitted.network(0, fibres[order], order), straight[order], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_reference_is_the_highest_likelihood_on_the_normal_images():
    detector = build()
    images = clean_images(5, size=SIZE)
    whole = detector.prepare(images)
    assert torch.equal(detector.network.reference, torch.zeros(3))
    for start in (0, 3):
        detector.collect({name: values[start : start + 3] for name, values in whole.items()})
    detector.finish(torch.Generator())
    for level, features in enumerate(whole.values()):
        excess = detector.network.log_likelihood(level, features) - detector.network.reference[level]
        assert float(excess.max()) == pytest.approx(0, abs=1e-6)  # float32, another split into batches


def test_a_second_collection_starts_anew_and_none_is_an_error():
    detector = build()
    some, others = clean_images(2, size=SIZE), clean_images(2, size=SIZE, seed=8) + 1
    first = collected(detector, some).network.reference.clone()
    second = collected(detector, others).network.reference.clone()
    assert not torch.equal(first, second)
    assert torch.equal(collected(detector, some).network.reference, first)
    with pytest.raises(TrainingError, match="at least 1 normal image for its reference, got 0"):
        detector.finish(torch.Generator())


@torch.no_grad()
def test_the_map_is_the_sum_over_scales_of_one_minus_the_likelihood_by_the_references(fitted):
    prepared = fitted.prepare(clean_images(2, size=SIZE, seed=9))
    scores = fitted.score_prepared(prepared)
    expected = torch.zeros(2, SIZE, SIZE)
    for level, features in enumerate(prepared.values()):
        each = (fitted.network.log_likelihood(level, features) - fitted.network.reference[level]).exp()
        wide = torch.nn.functional.interpolate(
            each[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=True
        )
        expected += 1 - wide[:, 0]
    assert torch.allclose(scores.anomaly_map, expected, atol=1e-5)
    highest = scores.anomaly_map.double().amax((1, 2))
    assert torch.allclose(scores.image_score.double(), -torch.log(1 - highest / 3), rtol=1e-3)


def test_images_are_told_apart_where_the_map_is_saturated(fitted):
    prepared = fitted.prepare(clean_images(2, size=SIZE, seed=9))
    try:
        kept = fitted.network.reference.clone()
        fitted.network.reference.fill_(60)
        scores = fitted.score_prepared(prepared)
    finally:
        fitted.network.reference.copy_(kept)
    assert scores.anomaly_map.unique().tolist() == [3]
    assert scores.image_score[0] != scores.image_score[1]
    usual = fitted.score_prepared(prepared).image_score
    assert (scores.image_score[0] < scores.image_score[1]) == (usual[0] < usual[1])


@pytest.mark.parametrize("reference", [-1e4, 1e4])
def test_scores_are_finite_however_far_from_the_reference(reference):
    detector = build(scales=[3])
    detector.fitted = True
    detector.network.reference.fill_(reference)
    scores = detector.score(clean_images(1, size=SIZE))
    assert torch.isfinite(scores.anomaly_map).all()
    assert torch.isfinite(scores.image_score).all()
    limit = 1 if reference > 0 else 1 - math.exp(CEILING)
    assert scores.anomaly_map.unique().tolist() == pytest.approx([limit])


def test_the_monitor_is_the_mean_over_all_dimensions_of_all_scales():
    detector = build()
    prepared = detector.prepare(clean_images(10, size=SIZE))  # more than pass a flow together
    nats = dimensions = 0.0
    with torch.no_grad():
        for level, features in enumerate(prepared.values()):
            fibres = as_fibres(features).double()
            cells = torch.arange(len(fibres))
            per_dim = detector.network.double()(level, fibres, cells)
            nats -= float(per_dim.sum()) * features.shape[1]
            dimensions += features.numel()
            detector.network.float()
    # the position codes are rounded to float32 either way
    assert detector.monitor(prepared) == {"nats_per_dim": pytest.approx(nats / dimensions, rel=1e-4)}


def test_training_lowers_the_negative_log_likelihood():
    detector = build()
    images = clean_images(8, size=SIZE)
    prepared = detector.prepare(images)
    before = detector.monitor(prepared)["nats_per_dim"]
    fit_quickly(detector, images, steps=15)
    assert detector.monitor(prepared)["nats_per_dim"] < before - 0.05


@pytest.mark.parametrize("scales", [[], [2, 2], [3, 2], [0, 1], [4, 5]])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(ConfigError, match="scales"):
        CflowConfig.parse({"scales": scales})


def test_another_set_of_scales_runs_only_what_it_needs():
    detector = build(scales=[1, 3])
    prepared = detector.prepare(clean_images(1, size=SIZE))
    assert {name: tuple(values.shape) for name, values in prepared.items()} == {
        "f1": (1, 64, 16, 16),
        "f3": (1, 256, 4, 4),
    }
    assert list(detector.parts()) == ["encoder", "flow1", "flow3"]


def test_the_paper_preset_has_the_published_constants_and_parameters():
    config = detectors.preset_config("cflow", "paper", size=SIZE)
    assert config == CflowConfig(size=SIZE, preset="paper")
    detector = Cflow(config, None)
    trainable = sum(
        p.numel() for part in detector.parts().values() for p in part.parameters() if p.requires_grad
    )
    assert round(trainable / 1e6, 2) == 8.62  # as counted on the official model for ResNet18
