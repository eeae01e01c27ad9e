import json
import os
import signal

import pytest
import torch

from umiad import detectors
from umiad.checkpoint import CHECKPOINTS
from umiad.config import TrainingConfig
from umiad.detectors.check import clean_images
from umiad.errors import TrainingError, UmiadError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.training import LOG, TrainingRun, import_lightning, train

SIZE = 64


def build(name="egmf", **settings):
    preset, flows = ("paper", {"blocks": 1}) if name == "egmf" else ("quick", {})  # egmf: the trained network
    config = detectors.preset_config(name, preset, size=SIZE, **flows, **settings)
    return detectors.make(name, config.canonical(), None)


def cached(detector, count=6):
    images = clean_images(count, size=SIZE).numpy()
    keys = [f"image{k}" for k in range(count)]
    return FeatureCache(keys).fill(
        detector, ((key, image, (SIZE, SIZE)) for key, image in zip(keys, images, strict=True))
    )


def run_of(detector, *, folder=None, epochs=4, on_epoch=None, cache=None):
    training = TrainingConfig(epochs=epochs, batch_size=3, learning_rate=1e-3)
    cache = cache or cached(detector)
    return TrainingRun(
        cache, train=range(5), holdout=[5], training=training, seed=1, folder=folder, on_epoch=on_epoch
    )


def test_one_row_per_epoch_with_loss_likelihood_and_monitors(tmp_path):
    detector, told = build(), []
    rows = train(detector, run_of(detector, folder=tmp_path, on_epoch=told.append))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert told == rows
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == rows
    wanted = {
        "loss",
        "nats_per_dim",
        "holdout_nats_per_dim",
        "var_ratio",
        "min_eigenvalue",
        "var_y",
        "var_yf",
    }
    assert wanted <= rows[-1].keys()
    assert rows[-1]["nats_per_dim"] < rows[0]["nats_per_dim"]
    assert rows[-1]["seconds_left"] == 0


def test_the_same_seed_trains_bit_equal_and_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = []
    for _ in range(2):
        detector = build()
        train(detector, run_of(detector, epochs=2))
        states.append(detector.state())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def interrupt_after(epoch, number=signal.SIGINT):
    def send(row):
        if row["epoch"] == epoch:
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_a_resumed_run_ends_bit_equal(tmp_path, number, code):
    whole = build()
    expected_rows = train(whole, run_of(whole))
    first = build()
    with pytest.raises(Interrupted, match="after epoch 2.*--resume") as caught:
        train(first, run_of(first, folder=tmp_path, on_epoch=interrupt_after(2, number)))
    assert caught.value.exit_code == code
    resumed = build()
    rows = train(resumed, run_of(resumed, folder=tmp_path), resume=True)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == expected_rows[-1]["loss"]
    state = whole.state()
    assert all(torch.equal(state[key], value) for key, value in resumed.state().items())


def test_log_lines_newer_than_the_checkpoint_are_written_again(tmp_path):
    first = build()
    with pytest.raises(Interrupted):
        train(first, run_of(first, folder=tmp_path, on_epoch=interrupt_after(2)))
    with (tmp_path / LOG).open("a") as file:
        file.write(json.dumps({"epoch": 3, "epochs": 4}) + "\n")
    resumed = build()
    train(resumed, run_of(resumed, folder=tmp_path), resume=True)
    lines = [json.loads(line)["epoch"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


def test_the_checkpoint_leaves_the_frozen_encoder_out(tmp_path):
    detector = build()
    with pytest.raises(Interrupted):
        train(detector, run_of(detector, folder=tmp_path, on_epoch=interrupt_after(1)))
    size = (tmp_path / CHECKPOINTS / "epoch-000001" / "tensors.safetensors").stat().st_size
    trainable = sum(p.numel() for p in detector.module.parameters() if p.requires_grad)
    assert size < 4 * 3.2 * trainable  # weights and Adam's two moments, float32


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    detector = build()
    cache = cached(detector)
    cache._store["f2"][2] = float("nan")
    before = {k: v.clone() for k, v in detector.state().items()}
    with pytest.raises(TrainingError, match="epoch 1: .*not finite.*image") as caught:
        train(detector, TrainingRun(cache, train=range(5), training=TrainingConfig(epochs=1, batch_size=8)))
    assert "content hashes" in str(caught.value)
    parameters = dict(detector.module.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in before.items() if key in parameters)


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(TrainingError, match="no normal images"):
        train(build(), TrainingRun(FeatureCache([]), train=[]))


def test_a_closed_form_collects_and_finishes_in_one_pass():
    detector = build("padim")
    rows = train(detector, run_of(detector, epochs=7))
    assert [row["epoch"] for row in rows] == [1]
    assert detector.fitted


def test_a_broken_torchvision_is_named(monkeypatch):
    import builtins

    original = builtins.__import__

    def broken(name, *rest):
        if name.startswith("lightning"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UmiadError, match="pip uninstall torchvision"):
        import_lightning()


class Counting:
    """A trained detector that also collects: what it is shown after the last epoch is written down."""

    def __init__(self, inner):
        self.inner, self.collected, self.finished, self.rates = inner, [], 0, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def collect(self, prepared):
        assert not self.finished
        self.collected.append(len(prepared["f1"]))

    def finish(self, rng):
        self.finished += 1


def test_a_trained_detector_that_collects_sees_all_images_once_more_at_the_end():
    detector = Counting(build())
    train(detector, run_of(detector, epochs=2))
    assert (sum(detector.collected), detector.finished) == (5, 1)


def test_the_schedule_governs_the_learning_rate_also_after_a_resume(tmp_path, monkeypatch):
    seen = []
    original = torch.optim.Adam.step

    def noting(self, *rest, **named):
        seen.append(self.param_groups[0]["lr"])
        return original(self, *rest, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    settings = TrainingConfig(
        epochs=4, batch_size=5, learning_rate=1e-3, schedule="linear", warmup_epochs=1, clip_norm=None
    )
    cache = cached(build())

    def stop_after_two(row):
        if row["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    run = TrainingRun(cache, range(5), training=settings, folder=tmp_path, on_epoch=stop_after_two)
    with pytest.raises(Interrupted):
        train(build(), run)
    train(build(), TrainingRun(cache, range(5), training=settings, folder=tmp_path), resume=True)
    # one step an epoch: 0.1 of the rate, then the line 1 - 0.6 t at t = 1/4, 2/4, 3/4
    assert seen == pytest.approx([1e-4, 8.5e-4, 7e-4, 5.5e-4])
