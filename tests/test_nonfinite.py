"""T4: what is not finite stops a fit within one step, is named, and is never saved."""

import json

import pytest
import torch

from test_faults import SMALL
from test_training import SIZE, build, cached
from umiad import training
from umiad.checkpoint import CHECKPOINTS, newest_valid
from umiad.config import TrainingConfig
from umiad.detectors.check import clean_images
from umiad.errors import ConfigError, TrainingError
from umiad.features import FeatureCache
from umiad.nonfinite import NonFiniteError, named
from umiad.training import TrainingRun, train


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    """Checkpoints after every epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)


def spoiled(detector, *, at, value=float("nan"), name="total"):
    """The detector with the losses of step number `at` (from 1) multiplied by a value that is not finite."""
    original, count = detector.steps, [0]

    def steps(prepared, rng):
        for losses in original(prepared, rng):
            count[0] += 1
            yield {k: v * value if count[0] == at and k == name else v for k, v in losses.items()}

    detector.steps = steps
    return detector


def noted(cache, folder=None, *, epochs=3, skip=0):
    notes = []
    training_config = TrainingConfig(epochs=epochs, batch_size=3, learning_rate=1e-3)
    run = TrainingRun(
        cache,
        range(5),
        [5],
        training_config,
        seed=1,
        folder=folder,
        on_note=notes.append,
        skip_nonfinite=skip,
    )
    return run, notes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_T4_a_loss_not_finite_at_step_k_stops_there_and_is_never_saved(tmp_path, at, value):
    steps = []
    detector = spoiled(build(**SMALL), at=at, value=value)
    cache = cached(detector)
    original = torch.optim.Adam.step

    def counting(self, *rest, **named):
        steps.append(True)
        return original(self, *rest, **named)

    run, _ = noted(cache, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", counting)
        with pytest.raises(TrainingError, match="loss total not finite.*content hashes image") as caught:
            train(detector, run)
    assert f"epoch {(at + 1) // 2}:" in str(caught.value)  # two steps an epoch
    assert len(steps) == at - 1
    saved, skipped = newest_valid(tmp_path / CHECKPOINTS)
    assert (saved and saved.name, skipped) == ({1: None, 2: None, 4: "epoch-000001"}[at], [])
    assert all(value.isfinite().all() for value in detector.state().values())


@pytest.mark.parametrize("scale", [1, 3])
def test_T4_an_exploding_log_det_names_its_scale(scale):
    detector = build(**SMALL)
    cache = cached(detector)
    for parameter in detector.parts()[f"flow{scale}"].parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, 1e30)
    run, _ = noted(cache)
    with pytest.raises(TrainingError, match=f"not finite on a batch of 3 images.*first in flow{scale}"):
        train(detector, run)


def test_T4_a_gradient_that_is_not_finite_names_its_part():
    detector = build(**SMALL)
    parameter = next(each for each in detector.parts()["flow2"].parameters() if each.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    run, _ = noted(cached(detector))
    with pytest.raises(TrainingError, match="epoch 1: gradient not finite in flow2 on a batch of 3"):
        train(detector, run)


@pytest.mark.parametrize("name", ["egmf", "cflow", "padim", "fastflow"])
def test_T4_an_all_zero_image_fits_or_stops_but_never_ends_as_nan(name):
    detector = build(name, **(SMALL if name == "egmf" else {}))
    images = clean_images(6, size=SIZE)
    images[1:3] = 0.0
    keys = [f"image{k}" for k in range(6)]
    items = [(key, image, (SIZE, SIZE)) for key, image in zip(keys, images.numpy(), strict=True)]
    cache = FeatureCache(keys).fill(detector, items)
    run, _ = noted(cache, epochs=2)
    rows = train(detector, run)
    assert all(value.isfinite().all() for value in detector.state().values())
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("name", ["egmf", "padim"])
def test_T4_features_that_are_not_finite_name_the_images_also_held_out_ones(name):
    for row, wanted in (
        (2, "features f2 not finite for 1 of .*image2"),
        (5, "not finite for 1 of 1 .*image5"),
    ):
        detector = build(name, **(SMALL if name == "egmf" else {}))
        cache = cached(detector)
        key = "f2" if "f2" in cache._store else next(iter(cache._store))
        cache._store[key].view(6, -1)[row, 7] = float("inf")
        run, _ = noted(cache)
        with pytest.raises(TrainingError, match=wanted.replace("f2", key)):
            train(detector, run)


def test_T4_moments_that_overflow_are_not_saved(tmp_path, monkeypatch):
    original = torch.optim.Adam.step

    def overflowing(self, *rest, **named):
        result = original(self, *rest, **named)
        next(iter(self.state.values()))["exp_avg_sq"].fill_(float("inf"))
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", overflowing)
    detector = build(**SMALL)
    run, _ = noted(cached(detector), tmp_path)
    with pytest.raises(NonFiniteError, match="epoch 1: the optimiser's exp_avg_sq of parameter 0"):
        train(detector, run)
    assert newest_valid(tmp_path / CHECKPOINTS) == (None, [])


def test_T4_monitors_that_are_not_finite_stop_the_run():
    detector = build(**SMALL)
    detector.monitor = lambda prepared: {"nats_per_dim": float("nan")}
    run, _ = noted(cached(detector))
    with pytest.raises(TrainingError, match="epoch 1: nats_per_dim, holdout_nats_per_dim not finite"):
        train(detector, run)


def test_T4_monitors_that_cannot_be_computed_stop_the_run():
    detector = build(**SMALL)

    def monitor(prepared):
        return {"min_eigenvalue": float(torch.linalg.eigvalsh(torch.full((3, 3), float("nan"))).min())}

    detector.monitor = monitor
    run, _ = noted(cached(detector))
    with pytest.raises(TrainingError, match="epoch 1: the monitors cannot be computed"):
        train(detector, run)


def test_T4_skipping_leaves_a_batch_out_and_reports_it():
    detector = spoiled(build(**SMALL), at=2)
    run, notes = noted(cached(detector), skip=1)
    rows = train(detector, run)
    assert [row["skipped"] for row in rows] == [1, 1, 1]
    assert len(notes) == 1
    assert notes[0].startswith("batch skipped (1 of at most 1): epoch 1: loss total not finite")


def test_T4_more_bad_batches_than_may_be_skipped_stop_the_run_also_across_a_resume(tmp_path):
    detector = build(**SMALL)
    cache = cached(detector)
    cache._store["f2"][2] = float("nan")  # one bad batch in every epoch
    run, notes = noted(cache, tmp_path, epochs=9, skip=2)
    with pytest.raises(TrainingError, match="epoch 3: features f2 not finite for 1 of"):
        train(detector, run)
    assert len(notes) == 2
    again = build(**SMALL)
    run, notes = noted(cache, tmp_path, epochs=9, skip=2)
    with pytest.raises(TrainingError, match="epoch 3:"):
        train(again, run, resume=True)
    assert notes == []


@pytest.mark.parametrize("count", [-1, 4])
def test_T4_at_most_three_batches_may_be_skipped(count):
    with pytest.raises(ConfigError, match=f"skip_nonfinite is {count}, expected 0 to 3"):
        noted(FeatureCache([]), skip=count)


def test_only_some_images_are_named():
    assert named(["a" * 64, "b" * 64]) == "a" * 12 + ", " + "b" * 12
    assert named(["a" * 64] * 9).endswith("a, ...")
