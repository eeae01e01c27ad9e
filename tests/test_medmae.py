import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from umiad import detectors
from umiad.detectors import medmae
from umiad.detectors.check import clean_images, fit_quickly, with_blob
from umiad.detectors.medmae import MedMae, MedMaeConfig
from umiad.errors import ConfigError, InputError, ModelFileError, NotFittedError, TrainingError
from umiad.nn.mae import masked_loss, partitions
from umiad.nn.vit import patchify
from umiad.scoring import smooth

SIZE = 64
SMALL = {
    "edge": 32,
    "patch": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "decoder_width": 8,
    "decoder_depth": 1,
    "decoder_heads": 1,
}
"""16 patches of 64 values: small enough to be followed by hand."""


def build(**settings):
    config = detectors.preset_config("medmae", "quick", size=SIZE, **{**SMALL, **settings})
    return detectors.make("medmae", config.canonical(), None)


class Recorder(torch.nn.Module):
    """In place of the network: predicts a constant and keeps what it was shown."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.visible = value, []

    def forward(self, patches, visible):
        self.visible.append(visible)
        return torch.full_like(patches, self.value)


def recorded(detector, value=0.0):
    detector.network = Recorder(value)
    detector.module["network"] = detector.network
    return detector


@pytest.mark.parametrize(("sets", "rounds"), [(4, 3), (2, 1), (16, 2)])
def test_every_patch_is_judged_in_sets_minus_1_passes_of_each_round_and_unseen_in_each(sets, rounds):
    detector = recorded(build(sets=sets, rounds=rounds))
    detector._residual(detector.prepare(clean_images(3, size=SIZE))["image"])
    passes = detector.network.visible
    assert len(passes) == sets * rounds
    judged = torch.zeros(3, 16, dtype=torch.long)
    for visible in passes:
        judged += torch.ones(3, 16, dtype=torch.long).scatter(1, visible, 0)
    assert judged.unique().tolist() == [(sets - 1) * rounds]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_residual_is_the_mean_squared_error_over_those_passes(channels):
    detector = build(rounds=2, channels=channels)
    images = detector.prepare(clean_images(2, size=SIZE, seed=3))["image"]
    patches = patchify(images, 8)
    expected = np.zeros((2, 32, 32))
    with torch.no_grad():
        for visible in detector.sets:
            error = detector.network(patches, visible.expand(2, -1)) - patches
            squares = error.reshape(2, 16, 64, channels).square().mean(3).double().numpy()
            for cell in set(range(16)) - set(visible.tolist()):
                rows, columns = 8 * (cell // 4), 8 * (cell % 4)
                expected[:, rows : rows + 8, columns : columns + 8] += squares[:, cell].reshape(2, 8, 8)
    found = detector._residual(images).numpy()
    np.testing.assert_allclose(found, expected / 6, rtol=1e-5)


@torch.no_grad()
def test_a_patch_is_never_judged_by_a_pass_that_saw_it():
    """What a visible patch holds moves the predictions of others, never its own error in that pass."""
    detector = build(rounds=1)
    images = detector.prepare(clean_images(1, size=SIZE))["image"]
    cell, changed = 5, images.clone()
    changed[..., 8:16, 8:16] += 2.0  # row 1, column 1 of 4 x 4 patches
    patches, other = patchify(images, 8), patchify(changed, 8)
    for visible in detector.sets:
        before, after = (detector.network(each, visible[None]) for each in (patches, other))
        assert torch.equal(before, after) == (cell not in visible.tolist())


def test_map_and_image_score_by_hand():
    detector = fit_quickly(build(top_fraction=0.02), clean_images(4, size=SIZE), steps=3)
    prepared = detector.prepare(clean_images(2, size=SIZE, seed=9))
    scores = detector.score_prepared(prepared)
    ratio = detector._residual(prepared["image"]) / detector.normal.level.double()
    wide = F.interpolate(ratio[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    expected = smooth(wide, 4.0)
    assert torch.allclose(scores.anomaly_map.double(), expected, rtol=1e-5)
    highest = expected.flatten(1).sort(1, descending=True).values[:, : round(0.02 * SIZE * SIZE)]
    assert torch.allclose(scores.image_score.double(), highest.mean(1), rtol=1e-5)


def test_the_normal_residual_is_the_mean_over_the_fitted_images():
    detector = fit_quickly(build(), clean_images(5, size=SIZE), steps=3)
    prepared = detector.prepare(clean_images(5, size=SIZE))
    level = detector._residual(prepared["image"]).mean(0)
    level = level.clamp_min(0.5 * float(level.mean()))
    assert torch.allclose(detector.normal.level.double(), level, rtol=1e-5)
    for part in (slice(0, 2), slice(2, 5)):  # batches of unequal length count by their images
        detector.collect({"image": prepared["image"][part]})
    detector.finish(torch.Generator())
    assert torch.allclose(detector.normal.level.double(), level, rtol=1e-5)


@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_the_normal_residual_has_a_floor(floor):
    """Images of which all but one patch are predicted without any error."""
    detector = recorded(build(floor=floor))
    image = torch.zeros(1, 1, 32, 32)
    image[..., :8, :8] = 2.0
    detector.collect({"image": image})
    detector.finish(torch.Generator())
    level = detector.normal.level
    assert torch.allclose(level[:8, :8], torch.full((8, 8), 4.0))
    assert level[8:].unique().tolist() == [pytest.approx(floor * 4.0 / 16)]


def test_a_high_floor_divides_all_pixels_alike():
    """Scores are then the residual in units that a fit decides, pixel by pixel the same."""
    detector = fit_quickly(build(floor=100, sigma=0), clean_images(4, size=SIZE), steps=3)
    assert len(detector.normal.level.unique()) == 1


def test_a_normal_residual_of_zero_gives_finite_scores():
    detector = fit_quickly(build(), clean_images(2, size=SIZE), steps=1)
    state = {key: value.clone() for key, value in detector.state().items()}
    state["normal.level"].zero_()  # as after a fit on images predicted without any error, or from a stranger
    detector.load_state(state)
    scores = detector.score(clean_images(1, size=SIZE))
    assert torch.isfinite(scores.anomaly_map).all()
    assert torch.isfinite(scores.image_score).all()


def test_finish_needs_an_image():
    with pytest.raises(TrainingError, match="at least 1 normal image"):
        build().finish(torch.Generator())


def test_sets_do_not_depend_on_the_batch_or_on_global_states():
    detector = recorded(build())
    rows = detector.prepare(clean_images(5, size=SIZE))
    detector.collect(rows)
    first, detector.network.visible = detector.network.visible, []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        detector.collect({"image": rows["image"][3:4]})
    config = detector.config
    drawn = list(partitions(16, sets=config.sets, rounds=config.rounds, seed=config.seed))
    assert [each[0].tolist() for each in first] == [each.tolist() for each in drawn]
    for a, b in zip(first, detector.network.visible, strict=True):
        assert torch.equal(a[3:4], b)
        assert len(a.unique(dim=0)) == 1  # all images of a pass show the same
    other = recorded(build(seed=1))
    other.collect(rows)
    assert not torch.equal(other.network.visible[0], first[0])


def test_few_images_pass_together(monkeypatch):
    """16 patches of 16 channels each: 640 values are 2 images. The residual does not depend on it."""
    detector = build()
    images = detector.prepare(clean_images(5, size=SIZE))["image"]
    whole = detector._residual(images)
    monkeypatch.setattr(medmae, "VALUES_AT_ONCE", 640)
    assert torch.allclose(detector._residual(images), whole, rtol=1e-5)
    recorded(detector)._residual(images)
    assert {len(each) for each in detector.network.visible} == {1, 2}
    monkeypatch.setattr(medmae, "VALUES_AT_ONCE", 1)
    assert torch.allclose(build()._residual(images), whole, rtol=1e-5)


def test_the_monitor_is_the_loss_with_the_first_set(monkeypatch):
    detector = build()
    rows = detector.prepare(clean_images(5, size=SIZE))
    patches, shown = patchify(rows["image"], 8), detector.sets[0].expand(5, -1)
    with torch.no_grad():
        expected = float(masked_loss(patches, detector.network(patches, shown), shown))
    assert detector.monitor(rows) == {"residual_per_dim": pytest.approx(expected, rel=1e-5)}
    monkeypatch.setattr(medmae, "VALUES_AT_ONCE", 640)  # in portions of 2, 2 and 1
    assert detector.monitor(rows) == {"residual_per_dim": pytest.approx(expected, rel=1e-5)}


def test_a_step_shows_each_image_its_own_quarter_drawn_from_the_generator():
    detector = recorded(build())
    rows = detector.prepare(clean_images(6, size=SIZE))
    for seed in (0, 0, 1):
        list(detector.steps(rows, torch.Generator().manual_seed(seed)))
    first, again, other = detector.network.visible
    assert first.shape == (6, 4)
    assert len(first.sort(1).values.unique(dim=0)) > 3
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_loss_of_a_step_is_that_of_the_masked_patches():
    detector = recorded(build(), value=0.5)
    rows = detector.prepare(clean_images(2, size=SIZE))
    [step] = detector.steps(rows, torch.Generator().manual_seed(0))
    [visible] = detector.network.visible
    squares = []
    for image, shown in zip(patchify(rows["image"], 8), visible.tolist(), strict=True):
        squares += [(image[cell] - 0.5) ** 2 for cell in range(16) if cell not in shown]
    assert float(step["total"]) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)


def test_training_lowers_the_error_of_masked_patches():
    detector, images = build(), clean_images(8, size=SIZE)
    rows = detector.prepare(images)
    before = detector.monitor(rows)["residual_per_dim"]
    fit_quickly(detector, images, steps=60)
    assert detector.monitor(rows)["residual_per_dim"] < 0.7 * before


def test_a_blob_raises_map_and_score():
    detector = fit_quickly(build(), clean_images(8, size=SIZE), steps=40)
    images = clean_images(3, size=SIZE, seed=4)
    clean, marked = detector.score(images), detector.score(with_blob(images))
    assert marked.image_score.min() > clean.image_score.max()
    inside = marked.anomaly_map[:, 26:38, 26:38].mean((1, 2))
    assert (inside > 2 * marked.anomaly_map.mean((1, 2))).all()


def test_prepare_reduces_and_keeps_what_the_configuration_names():
    images = clean_images(2, size=SIZE) + torch.tensor([0.3, -0.1, 0.4])[:, None, None]
    grey = build().prepare(images)["image"]
    assert torch.allclose(grey, F.avg_pool2d(images.mean(1, keepdim=True), 2), atol=1e-6)
    colour = build(channels=3).prepare(images)["image"]
    assert torch.allclose(colour, F.avg_pool2d(images, 2), atol=1e-6)
    for edge in (None, 64, 128):  # never enlarged
        assert torch.equal(build(edge=edge, channels=3).prepare(images)["image"], images)


def test_parameter_groups_are_adamws_and_vectors_do_not_decay():
    detector = build()
    matrices, vectors = detector.param_groups()
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    trained = sum(p.numel() for p in detector.module.parameters())
    assert sum(p.numel() for group in (matrices, vectors) for p in group["params"]) == trained
    assert "weight_decay" not in matrices  # the configuration's
    assert vectors["weight_decay"] == 0.0
    for group in (matrices, vectors):
        assert group["betas"] == (0.9, 0.95)
        assert group["decoupled_weight_decay"] is True


def test_sizes_that_do_not_divide_evenly():
    """96 px in patches of 32 are 9 patches in 4 sets: 2 or 3 visible ones."""
    detector = MedMae(
        MedMaeConfig.parse({**SMALL, "size": 96, "edge": None, "patch": 32, "channels": 1}), None
    )
    assert sorted(len(each) for each in detector.sets[:4]) == [2, 2, 2, 3]
    fit_quickly(detector, clean_images(2, size=96), steps=2)
    assert detector.score(clean_images(1, size=96)).anomaly_map.shape == (1, 96, 96)


def test_scores_need_a_fit_and_images_of_the_size():
    with pytest.raises(NotFittedError, match="medmae is not fitted"):
        build().score(clean_images(1, size=SIZE))
    with pytest.raises(InputError, match=r"\(1, 3, 96, 96\), expected \[B,3,64,64\]"):
        build().prepare(clean_images(1, size=96))
    with pytest.raises(ModelFileError, match=r"normal\.level"):
        build().load_state({k: v for k, v in build().state().items() if k != "normal.level"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"edge": 100}, "multiple of 32"),
        ({"edge": 4096}, "edge"),
        ({"patch": 7}, "patch"),
        ({"channels": 2}, "channels"),
        ({"heads": 5}, "width 768 is not a multiple of 5 heads"),
        ({"decoder_heads": 3}, "width 512 is not a multiple of 3 heads"),
        ({"width": 770}, "multiple of 4"),
        ({"patch": 4, "edge": 512, "size": 512}, "512 pixels make 16384 patches of 4, expected 4 .* to 4096"),
        ({"patch": 32, "edge": 64, "sets": 8}, "64 pixels make 4 patches of 32, expected 8"),
        ({"size": 4096, "edge": None}, "65536 patches"),
        ({"width": 1024, "heads": 16}, "numbers, expected at most 134217728"),
        ({"width": 4096, "depth": 64, "heads": 1}, "numbers, expected at most"),
        ({"depth": 0}, "depth"),
        ({"sets": 1}, "sets"),
        ({"rounds": 1000}, "rounds"),
        ({"floor": 0}, "floor"),
        ({"top_fraction": 0}, "top_fraction"),
        ({"sigma": -1}, "sigma"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        MedMaeConfig.parse(values)


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("medmae", "paper", size=224)
    assert config == MedMaeConfig(size=224, preset="paper")
    assert (config.working_edge, config.patch, config.side, config.channels) == (224, 16, 14, 3)
    assert (config.width, config.depth, config.heads) == (768, 12, 12)
    assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    assert (config.sets, config.rounds, config.floor, config.top_fraction) == (4, 4, 0.5, 0.02)
    training = config.training
    assert (training.epochs, training.warmup_epochs, training.schedule) == (1000, 40, "cosine")
    assert (training.weight_decay, training.clip_norm) == (0.05, None)
    assert math.isclose(training.learning_rate, 1.5e-4 * training.batch_size / 256)
    assert detectors.preset_config("medmae", "paper", size=256).working_edge == 224


def test_the_paper_preset_builds_the_published_network():
    with torch.device("meta"):
        detector = MedMae(detectors.preset_config("medmae", "paper", size=224), None)
    assert sum(p.numel() for p in detector.parts()["autoencoder"].parameters()) == 111_655_680
