import os
import signal

import pytest
import torch
from torch.nn import functional as F

from umiad import detectors
from umiad.config import TINY, TrainingConfig
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.rd4ad import LOSSES, Rd4adConfig, cosine_distance
from umiad.errors import ConfigError, InputError, NotFittedError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.scoring import smooth
from umiad.training import TrainingRun, train

SIZE = 64


def build(preset="quick", *, size=SIZE, **settings):
    config = detectors.preset_config("rd4ad", preset, size=size, **{"backbone": TINY, **settings})
    return detectors.make("rd4ad", config.canonical(), None)


@pytest.fixture(scope="module")
def fitted():
    return fit_quickly(build(), clean_images(8, size=SIZE), steps=10)


def test_prepared_maps_are_the_teachers():
    detector = build()
    images = clean_images(2, size=SIZE)
    prepared = detector.prepare(images)
    assert [tuple(prepared[name].shape) for name in ("f1", "f2", "f3")] == [
        (2, 64, 16, 16),
        (2, 128, 8, 8),
        (2, 256, 4, 4),
    ]
    expected = detector.pyramid(images, depth=3)
    assert all(torch.equal(a, b) for a, b in zip(prepared.values(), expected, strict=True))


def test_larger_images_are_reduced_before_the_teacher_sees_them():
    detector = build(size=128, edge=64)
    images = clean_images(1, size=128)
    prepared = detector.prepare(images)
    assert prepared["f1"].shape == (1, 64, 16, 16)
    means = images.reshape(1, 3, 64, 2, 64, 2).mean((3, 5))
    assert torch.allclose(prepared["f3"], detector.pyramid(means, depth=3)[2], atol=1e-6)
    detector.fitted = True
    assert detector.score(images).anomaly_map.shape == (1, 128, 128)


def test_the_loss_whole_has_one_cosine_per_image_and_level():
    detector = build()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    detector.module.eval()
    [step] = detector.steps(prepared, torch.Generator())
    wanted = [prepared[f"f{k}"] for k in (1, 2, 3)]
    expected = []
    for found, teacher in zip(detector.network(wanted), wanted, strict=True):
        a, b = found.detach().double().flatten(1), teacher.double().flatten(1)
        expected.append(float((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()))
    assert float(step["total"].detach()) == pytest.approx(sum(expected), rel=1e-5)
    assert [float(step[f"level{k}"].detach()) for k in (1, 2, 3)] == pytest.approx(expected, rel=1e-4)


def test_the_loss_position_has_one_cosine_per_position():
    rng = torch.Generator().manual_seed(0)
    found, wanted = torch.rand(2, 2, 5, 3, 4, generator=rng, dtype=torch.float64)
    expected = 0.0
    for image in range(2):
        for row in range(3):
            for column in range(4):
                a, b = (each[image, :, row, column] for each in (found, wanted))
                expected += float(1 - a @ b / (a.norm() * b.norm())) / 24
    assert float(LOSSES["position"](found, wanted)) == pytest.approx(expected, rel=1e-12)
    assert float(LOSSES["whole"](found, wanted)) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_are_zero_where_maps_are_equal_but_for_a_factor(loss):
    maps = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(LOSSES[loss](3 * maps, maps)) == pytest.approx(0, abs=1e-12)


def test_the_configured_loss_is_taken():
    prepared = build().prepare(clean_images(2, size=SIZE))
    totals = [
        float(next(build(loss=loss).steps(prepared, torch.Generator()))["total"].detach()) for loss in LOSSES
    ]
    assert totals[0] != pytest.approx(totals[1], rel=1e-3)


def test_maps_that_are_restored_exactly_give_a_zero_map(monkeypatch):
    detector = build()
    detector.fitted = True
    monkeypatch.setattr(detector.network, "forward", lambda features: [2 * each for each in features])
    scores = detector.score(clean_images(2, size=SIZE) + 0.5)
    assert float(scores.anomaly_map.abs().max()) < 1e-12
    assert float(scores.image_score.abs().max()) < 1e-12


def test_the_map_is_the_smoothed_sum_over_levels_and_the_score_its_maximum(fitted):
    images = clean_images(2, size=SIZE, seed=9)
    prepared = fitted.prepare(images)
    scores = fitted.score(images)
    fitted.module.eval()
    wanted = [prepared[f"f{k}"] for k in (1, 2, 3)]
    total = torch.zeros(2, SIZE, SIZE, dtype=torch.float64)
    for found, teacher in zip(fitted.network(wanted), wanted, strict=True):
        level = 1 - (F.normalize(found.detach().double()) * F.normalize(teacher.double())).sum(
            1, keepdim=True
        )
        total += F.interpolate(level, size=(SIZE, SIZE), mode="bilinear", align_corners=True)[:, 0]
    expected = smooth(total, 4.0)
    assert torch.allclose(scores.anomaly_map.double(), expected, atol=1e-6)
    assert torch.equal(scores.image_score, scores.anomaly_map.amax((1, 2)))


def test_the_cosine_distance_of_opposite_fibres_is_two():
    ones = torch.ones(1, 3, 2, 2)
    assert cosine_distance(ones, -ones).unique().tolist() == [pytest.approx(2)]
    assert cosine_distance(ones, 2 * ones).unique().tolist() == [pytest.approx(0, abs=1e-12)]


def test_scores_do_not_depend_on_how_many_images_pass_together(fitted):
    images = clean_images(11, size=SIZE, seed=3)  # more than pass the network together
    whole = fitted.score(images)
    assert torch.allclose(whole.anomaly_map[9:], fitted.score(images[9:]).anomaly_map, atol=1e-6)


def test_training_lowers_the_loss_and_leaves_the_teachers_statistics_alone():
    detector = build()
    images = clean_images(8, size=SIZE)
    before = {key: value.clone() for key, value in detector.pyramid.state_dict().items()}
    detector.module.train()
    first = float(next(detector.steps(detector.prepare(images), torch.Generator()))["total"].detach())
    fit_quickly(detector, images, steps=10)
    last = float(next(detector.steps(detector.prepare(images), torch.Generator()))["total"].detach())
    assert last < 0.7 * first
    assert any(key.endswith("running_mean") for key in before)
    after = detector.pyramid.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not detector.pyramid.training


def test_a_batch_of_one_trains_at_the_smallest_size():
    detector = build(size=64)
    detector.module.train()
    [step] = detector.steps(detector.prepare(clean_images(1, size=64)), torch.Generator())
    step["total"].backward()
    assert torch.isfinite(step["total"])


def test_the_optimiser_gets_the_published_betas_and_all_that_is_trainable():
    detector = build()
    [group] = detector.param_groups()
    assert group["betas"] == (0.5, 0.999)
    trainable = {id(p) for p in detector.module.parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == trainable


def test_the_monitor_is_the_squared_distance_of_unit_fibres_per_channel(fitted):
    prepared = fitted.prepare(clean_images(10, size=SIZE, seed=4))
    fitted.module.eval()
    wanted = [prepared[f"f{k}"] for k in (1, 2, 3)]
    expected = 0.0
    for found, teacher in zip(fitted.network(wanted), wanted, strict=True):
        error = F.normalize(found.detach()) - F.normalize(teacher)
        expected += float(error.square().mean()) / 3
    assert fitted.monitor(prepared) == {"distance_per_dim": pytest.approx(expected, rel=1e-4)}


def test_a_resumed_run_ends_bit_equal(tmp_path):
    cache = FeatureCache([str(k) for k in range(5)])
    images = enumerate(clean_images(5, size=SIZE).numpy())
    cache.fill(build(), ((str(k), image, (SIZE, SIZE)) for k, image in images))
    training = TrainingConfig(epochs=2, batch_size=2, learning_rate=1e-3, clip_norm=None)

    def stop(row):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole, first, resumed = build(), build(), build()
    train(whole, TrainingRun(cache, range(5), training=training))
    with pytest.raises(Interrupted):
        train(first, TrainingRun(cache, range(5), training=training, folder=tmp_path, on_epoch=stop))
    train(resumed, TrainingRun(cache, range(5), training=training, folder=tmp_path), resume=True)
    state = resumed.state()
    assert all(torch.equal(value, state[key]) for key, value in whole.state().items())


def test_calls_at_the_wrong_time_or_with_the_wrong_shape_are_refused():
    detector = build()
    with pytest.raises(NotFittedError, match="rd4ad"):
        detector.score(clean_images(1, size=SIZE))
    with pytest.raises(InputError, match=r"\(1, 3, 96, 96\), expected \[B,3,64,64\]"):
        detector.prepare(clean_images(1, size=96))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": "pixel"}, "loss"),
        ({"edge": 100}, "edge"),
        ({"edge": 32}, "edge"),
        ({"edge": 8192}, "edge"),
        ({"sigma": -1.0}, "sigma"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        Rd4adConfig.parse(values)


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("rd4ad", "paper")
    assert config == Rd4adConfig(preset="paper")
    assert (config.loss, config.edge, config.sigma) == ("whole", None, 4.0)
    training = config.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (200, 16, 5e-3)
    assert (training.schedule, training.clip_norm, training.weight_decay) == ("constant", None, 0)


@pytest.mark.parametrize(("preset", "epochs", "edge"), [("default", 30, None), ("quick", 10, 128)])
def test_what_the_shorter_presets_cut(preset, epochs, edge):
    config = detectors.preset_config("rd4ad", preset)
    assert (config.training.epochs, config.training.batch_size, config.edge) == (epochs, 8, edge)
    assert config.training.schedule == "cosine"  # the last epoch counts
    assert (config.loss, config.sigma, config.size) == ("whole", 4.0, 256)


def test_the_docstring_tells_the_number_of_parameters():
    detector = build(backbone="resnet18")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.parts().items()}
    assert round(counts["encoder"] / 1e6, 2) == 2.78
    assert round((counts["embedding"] + counts["decoder"]) / 1e6, 2) == 15.38
    assert "2.78 M frozen and 15.38 M trained" in type(detector).__doc__
