import os
import signal

import pytest
import torch
from torch.nn import functional as F

from umiad import detectors
from umiad.config import TINY, TrainingConfig
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.ikd import IkdConfig
from umiad.errors import ConfigError, InputError, NotFittedError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.nn.student import mine
from umiad.training import TrainingRun, train

SIZE = 64
MARGINS = "margins.values"


def build(preset="quick", *, size=SIZE, **settings):
    config = detectors.preset_config("ikd", preset, size=size, **{"backbone": TINY, **settings})
    return detectors.make("ikd", config.canonical(), None)


@pytest.fixture(scope="module")
def fitted():
    return fit_quickly(build(), clean_images(8, size=SIZE), steps=10)


def unit_pairs(detector, prepared):
    """Maps of both networks as published: scale 3 brought to the grid of scale 2, then fibres of length 1."""
    found = detector.student(prepared["images"])
    pairs = []
    for k in (2, 3):
        both = (found[k - 1], prepared[f"f{k}"])
        wide = [F.interpolate(m, size=(8, 8), mode="bilinear", align_corners=True) for m in both]
        pairs.append([m / m.norm(dim=1, keepdim=True).clamp_min(1e-12) for m in wide])
    return pairs


def test_prepared_are_the_images_and_the_teachers_maps():
    detector = build()
    images = clean_images(2, size=SIZE)
    prepared = detector.prepare(images)
    assert {name: tuple(values.shape) for name, values in prepared.items()} == {
        "images": (2, 3, 64, 64),
        "f2": (2, 128, 8, 8),
        "f3": (2, 256, 4, 4),
    }
    assert torch.equal(prepared["images"], images)
    assert torch.equal(prepared["f3"], detector.pyramid(images, depth=3)[2])


def test_larger_images_are_reduced_before_both_networks_see_them():
    detector = build(size=128, edge=64)
    images = clean_images(1, size=128)
    prepared = detector.prepare(images)
    means = images.reshape(1, 3, 64, 2, 64, 2).mean((3, 5))
    assert torch.allclose(prepared["images"], means, atol=1e-6)
    assert torch.allclose(prepared["f3"], detector.pyramid(means, depth=3)[2], atol=1e-6)
    detector.fitted = True
    assert detector.score(images).anomaly_map.shape == (1, 128, 128)


def test_a_student_that_equals_the_teacher_gives_a_zero_map():
    detector = build()
    detector.student.network.load_state_dict(detector.pyramid.state_dict())
    detector.fitted = True
    scores = detector.score(clean_images(2, size=SIZE))
    assert float(scores.anomaly_map.abs().max()) < 1e-12  # squared rounding: the teacher runs folded
    assert scores.image_score.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_the_student_starts_from_other_weights_than_a_random_teacher():
    detector = build()
    assert not torch.equal(detector.student.network.conv1.weight, detector.pyramid.conv1.weight)
    again = build()
    assert torch.equal(detector.student.network.conv1.weight, again.student.network.conv1.weight)


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_and_the_margins_of_two_steps(shared):
    detector = build(shared_margin=shared, beta=1.0, gamma=3.0)
    prepared = detector.prepare(clean_images(3, size=SIZE))
    detector.module.eval()  # running statistics: both steps see the same maps
    margins = [torch.zeros(())] * (1 if shared else 2)
    for _ in range(2):
        losses = []
        for k, pair in enumerate(unit_pairs(detector, prepared)):
            place = 0 if shared else k
            mined = mine(*pair, margins[place], beta=1.0)
            margins[place] = mined.margin
            losses.append(float((mined.distance + 3 * mined.context).detach()))
        [step] = detector.steps(prepared, torch.Generator())
        assert float(step["total"].detach()) == pytest.approx((losses[0] + 2 * losses[1]) / 3, rel=1e-4)
        assert detector.state()[MARGINS].tolist() == pytest.approx([float(m) for m in margins], rel=1e-4)
    assert len(detector.state()[MARGINS]) == (1 if shared else 2)


def test_a_shared_margin_goes_from_scale_to_scale():
    """Published so: what scale 3 calls previous is the margin that scale 2 has just made."""
    detector = build()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    detector.module.eval()
    distances = [(a - b).square().sum(1).detach() for a, b in unit_pairs(detector, prepared)]
    spread = [float(d.mean() + 2 * d.std()) for d in distances]
    list(detector.steps(prepared, torch.Generator()))
    expected = 0.01 * (0.99 * spread[0]) + 0.99 * spread[1]
    assert detector.state()[MARGINS].tolist() == pytest.approx([expected], rel=1e-4)


def test_the_margin_of_a_step_that_is_not_taken_is_not_kept():
    detector = build()
    prepared = detector.prepare(clean_images(2, size=SIZE))
    for _ in detector.steps(prepared, torch.Generator()):
        break  # as the training does where a loss is not finite
    assert detector.state()[MARGINS].tolist() == [0]


def test_a_loss_without_hard_positions_is_finite():
    detector = build(beta=100.0)
    prepared = detector.prepare(clean_images(2, size=SIZE))
    [step] = detector.steps(prepared, torch.Generator())
    step["total"].backward()
    assert torch.isfinite(step["total"])
    assert float(step["hard_share"]) == pytest.approx(1 / 128)  # one of 2 x 8 x 8 positions in both scales
    assert all(torch.isfinite(p.grad).all() for p in detector.student.parameters())


def test_the_map_is_the_product_over_scales_and_the_score_its_maximum(fitted):
    images = clean_images(2, size=SIZE, seed=9)
    scores = fitted.score(images)
    fitted.module.eval()
    with torch.no_grad():
        pairs = unit_pairs(fitted, fitted.prepare(images))
    first, second = ((a - b).square().sum(1, keepdim=True) for a, b in pairs)
    expected = F.interpolate(first * second, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(scores.anomaly_map, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(scores.image_score, scores.anomaly_map.amax((1, 2)))


def test_scores_do_not_depend_on_how_many_images_pass_together(fitted):
    images = clean_images(11, size=SIZE, seed=3)  # more than pass the student together
    whole = fitted.score(images)
    assert torch.allclose(whole.anomaly_map[9:], fitted.score(images[9:]).anomaly_map, rtol=1e-4, atol=1e-7)


def test_training_lowers_the_distance_and_leaves_the_teacher_alone():
    detector = build(backbone="resnet18")
    images = clean_images(4, size=SIZE)
    prepared = detector.prepare(images)
    before = {key: value.clone() for key, value in detector.pyramid.state_dict().items()}
    detector.module.train()
    first = float(next(detector.steps(prepared, torch.Generator()))["total"].detach())
    fit_quickly(detector, images, steps=12)
    last = float(next(detector.steps(prepared, torch.Generator()))["total"].detach())
    assert last < 0.9 * first
    after = detector.pyramid.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_only_the_scales_that_are_compared_are_built():
    detector = build(scales=[2], scale_weights=[1.0])
    assert not any("layer3" in name for name in detector.student.state_dict())
    prepared = detector.prepare(clean_images(1, size=SIZE))
    assert prepared.keys() == {"images", "f2"}
    [step] = detector.steps(prepared, torch.Generator())
    step["total"].backward()
    assert all(p.grad is not None for p in detector.student.parameters())
    assert detector.score(clean_images(1, size=SIZE)).anomaly_map.shape == (1, SIZE, SIZE)


def test_the_optimiser_decays_weights_as_adamw():
    [group] = build().param_groups()
    assert group["decoupled_weight_decay"] is True
    assert build().config.training.weight_decay == 0.01


def test_the_monitor_is_the_squared_distance_of_unit_fibres_per_channel(fitted):
    prepared = fitted.prepare(clean_images(10, size=SIZE, seed=4))
    fitted.module.eval()
    with torch.no_grad():
        pairs = unit_pairs(fitted, prepared)
    expected = sum(float((a - b).square().mean()) for a, b in pairs) / 2
    assert fitted.monitor(prepared) == {"distance_per_dim": pytest.approx(expected, rel=1e-4)}


def test_the_margin_survives_saving_and_loading(fitted):
    margin = fitted.state()[MARGINS]
    assert float(margin) > 0
    other = build()
    other.load_state({key: value.clone() for key, value in fitted.state().items()})
    assert torch.equal(other.state()[MARGINS], margin)


def test_the_margin_survives_a_resume_which_ends_bit_equal(tmp_path):
    cache = FeatureCache([str(k) for k in range(5)])
    images = enumerate(clean_images(5, size=SIZE).numpy())
    cache.fill(build(), ((str(k), image, (SIZE, SIZE)) for k, image in images))
    training = TrainingConfig(epochs=2, batch_size=2, learning_rate=1e-3, weight_decay=0.01, clip_norm=None)

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
    assert float(state[MARGINS]) != float(first.state()[MARGINS])


def test_calls_at_the_wrong_time_or_with_the_wrong_shape_are_refused():
    detector = build()
    with pytest.raises(NotFittedError, match="ikd"):
        detector.score(clean_images(1, size=SIZE))
    with pytest.raises(InputError, match=r"\(1, 3, 96, 96\), expected \[B,3,64,64\]"):
        detector.prepare(clean_images(1, size=96))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scales": []}, "scales"),
        ({"scales": [3, 2]}, "rising order"),
        ({"scales": [2, 5]}, "from 1 to 4"),
        ({"scales": [2]}, "expected 1 scale_weights"),
        ({"scale_weights": [1.0, 2.0, 3.0]}, "expected 2 scale_weights"),
        ({"scale_weights": [1.0, 0.0]}, "scale_weights"),
        ({"beta": 1e9}, "beta"),
        ({"gamma": -1.0}, "gamma"),
        ({"edge": 100}, "edge"),
        ({"edge": 32}, "edge"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        IkdConfig.parse(values)


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("ikd", "paper")
    assert config == IkdConfig(preset="paper")
    assert (config.scales, config.scale_weights, config.shared_margin) == ((2, 3), (1.0, 2.0), True)
    assert (config.beta, config.gamma, config.sigma, config.edge) == (2.0, 1.0, 0.0, None)
    training = config.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (50, 2, 5e-5)
    assert (training.weight_decay, training.schedule, training.clip_norm) == (0.01, "constant", None)


@pytest.mark.parametrize(("preset", "epochs", "edge"), [("default", 50, None), ("quick", 16, 128)])
def test_what_the_shorter_presets_cut(preset, epochs, edge):
    config = detectors.preset_config("ikd", preset)
    assert (config.training.epochs, config.training.batch_size, config.edge) == (epochs, 8, edge)
    assert config.training.schedule == "cosine"  # the last epoch counts
    published = {"size", "scales", "scale_weights", "beta", "gamma", "shared_margin", "sigma"}
    assert config.model_dump(include=published) == IkdConfig().model_dump(include=published)


def test_the_docstring_tells_the_number_of_parameters():
    detector = build(backbone="resnet18")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.parts().items()}
    assert counts["encoder"] == counts["student"]
    assert round(counts["encoder"] / 1e6, 2) == 2.78
    assert "2.78 M frozen and as many" in " ".join(type(detector).__doc__.split())
