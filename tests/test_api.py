"""The main job from Python, end to end on small phantoms with random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import umiad
from make import save_array, tiny_set
from umiad.api import FitOptions
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.fitting import resolve_device
from umiad.progress import Silent
from umiad.splits import Split

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=30, n_abnormal=6, size=80)


@pytest.fixture(scope="module")
def model(data):
    return umiad.fit(umiad.build("padim", preset="quick", weights="random", size=SIZE), data)


def fit(data, tmp_path, **options):
    detector = umiad.build("padim", preset="quick", weights="random", size=SIZE)
    return umiad.fit(detector, data, options=FitOptions(**options), out=tmp_path / "model")


def image(seed=0, shape=(70, 90)):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("preset", "settings"), [("default", {}), ("paper", {"blocks": 1, "training": {"epochs": 1}})]
)
def test_five_lines(preset, settings, data, tmp_path):
    detector = umiad.build("egmf", preset=preset, weights="random", size=SIZE, settings=settings)
    model = umiad.fit(detector, data)
    findings = umiad.score(model, sorted((data / "abnormal").iterdir())[:2])
    result = umiad.evaluate(model, data, n_resamples=20)
    umiad.save(model, tmp_path / "model")
    again = umiad.load(tmp_path / "model")
    assert [f.image_score for f in again.score([f.name for f in findings])] == [
        f.image_score for f in findings
    ]
    assert 0 <= result.metrics["det_auroc"]["value"] <= 1


def test_a_finding_is_in_the_original_images_pixels(model):
    [finding] = model.score(image(shape=(50, 120)))
    assert finding.anomaly_map.shape == (50, 120)
    assert finding.anomaly_map.dtype == np.float32
    assert 0 < finding.p_value <= 1
    assert isinstance(finding.above_threshold, bool)
    for region in finding.regions:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= 120
        assert 0 <= y0 < y1 <= 50
        assert region.peak > model.config.calibration.map_threshold


def test_every_form_of_the_same_image_gets_the_same_score(model, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (64, 72), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    forms = [
        pixels,
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        np.repeat(pixels[:, :, None], 3, axis=2),
        tmp_path / "scan.png",
        str(tmp_path / "scan.png"),
        umiad.read_image(tmp_path / "scan.png"),
    ]
    scores = [model.score(form)[0].image_score for form in forms]
    assert np.allclose(scores, scores[0], rtol=1e-5)
    stacked = model.score(np.stack([pixels, pixels]))
    assert len(stacked) == 2
    mixed = model.score([pixels, image(2), tmp_path / "scan.png"])
    assert [f.anomaly_map.shape for f in mixed] == [(64, 72), (70, 90), (64, 72)]


@pytest.mark.parametrize(
    "bad", [3, {"a": 1}, [3], torch.zeros(64, 64), "nowhere.png", np.zeros((64, 64), np.int32)]
)
def test_anything_else_is_an_input_error(model, bad):
    with pytest.raises(InputError):
        model.score(bad)


def test_scores_do_not_depend_on_how_many_are_scored_together(model):
    images = [image(seed) for seed in range(11)]
    together = [f.image_score for f in model.score(images)]
    alone = [model.score(each)[0].image_score for each in images]
    assert np.allclose(together, alone, rtol=1e-5)


def test_fitting_never_looks_at_abnormal_images(data, tmp_path):
    from make import tiny_set as make_set

    other = make_set(tmp_path / "set", n_normal=30, n_abnormal=6, size=80)
    for path in (other / "abnormal").iterdir():
        path.write_bytes(next((data / "abnormal").iterdir()).read_bytes())
    first = umiad.fit(umiad.build("padim", preset="quick", weights="random", size=SIZE), data)
    second = umiad.fit(umiad.build("padim", preset="quick", weights="random", size=SIZE), other)
    if set(first.split.hashes("train")) == set(second.split.hashes("train")):
        assert all(torch.equal(second.detector.state()[k], v) for k, v in first.detector.state().items())


def test_without_a_hold_out_there_is_no_threshold_and_a_reason(data, tmp_path):
    model = fit(data, tmp_path, holdout=0.0)
    [finding] = model.score(image())
    assert (finding.p_value, finding.above_threshold, finding.threshold) == (None, None, None)
    assert "held-out" in finding.reason
    assert finding.regions == ()
    result = umiad.evaluate(model, data, n_resamples=20)
    assert result.metrics["dice"]["value"] is None
    assert result.metrics["dice"]["reason"]
    assert result.metrics["oracle_dice"]["value"] is not None


def test_the_split_of_a_model_reproduces_the_fit(data, tmp_path):
    model = fit(data, tmp_path, seed=4)
    model.split.write(tmp_path / "split.json")
    detector = umiad.build("padim", preset="quick", weights="random", size=SIZE)
    (tmp_path / "renamed" / "normal").mkdir(parents=True)
    for number, path in enumerate(sorted((data / "normal").iterdir())):
        (tmp_path / "renamed" / "normal" / f"{number:05d}.png").write_bytes(path.read_bytes())
    again = umiad.fit(detector, tmp_path / "renamed", groups=Split.read(tmp_path / "split.json"))
    assert again.split.digest == model.split.digest
    assert all(torch.equal(again.detector.state()[k], v) for k, v in model.detector.state().items())


def test_a_split_that_would_fit_abnormal_images_is_refused(data, model):
    entries = tuple(replace(e, part="train") if e.label == 1 else e for e in model.split.entries)
    detector = umiad.build("padim", preset="quick", weights="random", size=SIZE)
    with pytest.raises(InputError, match="6 images of the given split are to be fitted but not normal"):
        umiad.fit(detector, data, groups=replace(model.split, entries=entries))


def test_a_split_of_other_data_is_refused(data, model, tmp_path):
    other = tiny_set(tmp_path / "set", n_normal=12, n_abnormal=2, size=80, seed=9)
    detector = umiad.build("padim", preset="quick", weights="random", size=SIZE)
    with pytest.raises(InputError, match="images of the given split are not there"):
        umiad.fit(detector, other, groups=model.split)


def test_arrays_can_be_fitted_on():
    stack = np.random.default_rng(0).random((24, 64, 64), dtype=np.float32)
    model = umiad.fit(umiad.build("padim", preset="quick", weights="random", size=SIZE), stack)
    assert model.info["layout"] == "arrays"
    assert len(model.score(stack[:2])) == 2


def test_an_unreadable_file_refuses_before_fitting_or_is_left_out(tmp_path):
    data = tiny_set(tmp_path / "set", n_normal=20, n_abnormal=2, size=64)
    (data / "normal" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(InputError, match=r"1 unreadable files: .*broken.png.*--on-error skip"):
        fit(data, tmp_path)
    assert not (tmp_path / "model").exists()
    assert fit(data, tmp_path, on_error="skip").info["n_train"] > 0


@pytest.mark.parametrize("damaged", [10])
def test_T5_skip_leaves_out_one_in_a_hundred_and_says_so(damaged, tmp_path):
    for index in range(1000):
        save_array(tmp_path / "set" / f"n{index:04d}.png", random_array(index))
    for index in range(damaged):
        (tmp_path / "set" / f"n{index * 37:04d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    notes: list[str] = []
    model = fit_intensity(tmp_path / "set", notes)
    assert model.info["n_train"] == 1000 - damaged
    assert f"{damaged} of 1000 files were left out" in notes
    assert sum(note.startswith("left out: ") for note in notes) == damaged


def test_T5_more_than_one_in_a_hundred_are_refused_before_fitting(tmp_path):
    for index in range(200):
        save_array(tmp_path / "set" / f"n{index:04d}.png", random_array(index))
    for index in range(3):
        (tmp_path / "set" / f"n{index * 37:04d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(InputError, match=r"3 of 200 files are unreadable, --on-error skip allows 1%"):
        fit_intensity(tmp_path / "set", [])


def random_array(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)


def fit_intensity(folder, notes):
    class Notes(Silent):
        def note(self, text):
            notes.append(text)

    options = FitOptions(holdout=0.0, on_error="skip")
    return umiad.fit(umiad.build("intensity", size=SIZE), folder, options=options, reporter=Notes())


def test_compact_features_change_a_closed_form_by_rounding_alone(model, data, tmp_path):
    compact = fit(data, tmp_path, compact_features=True)
    exact, found = model.score(image())[0].image_score, compact.score(image())[0].image_score
    assert found != exact
    assert found == pytest.approx(exact, rel=2e-3)


def test_calibrating_on_other_normals_moves_the_threshold_only(model, data, tmp_path):
    site = tiny_set(tmp_path / "set", n_normal=20, n_abnormal=0, size=80, seed=5)
    fresh = umiad.calibrate(model, site / "normal", fpr=0.1)
    assert fresh.info["threshold_rule"] != model.info["threshold_rule"]
    assert fresh.score(image())[0].image_score == model.score(image())[0].image_score
    with pytest.raises(InputError, match="were used to fit"):
        umiad.calibrate(model, data / "normal")
    with pytest.raises(ConfigError):
        umiad.calibrate(model, site / "normal", fpr=0.0)


def test_calibration_images_in_the_test_part_are_an_error(model, data):
    names = {c.name for c in umiad.evaluate(model, data, n_resamples=10).cases if c.label == 0}
    fresh = umiad.calibrate(model, sorted(names))
    with pytest.raises(InputError, match="calibrated on, expected none"):
        umiad.evaluate(fresh, data)


def test_evaluation_uses_the_stored_split_by_content(model, data, tmp_path):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    first = umiad.evaluate(model, data, n_resamples=10)
    second = umiad.evaluate(model, moved, n_resamples=10)
    assert second.metrics == first.metrics
    assert {c.label for c in first.cases} == {0, 1}
    assert first.counts["n_masked"] == 6
    foreign = tiny_set(tmp_path / "set", n_normal=5, n_abnormal=2, size=64, seed=8)
    assert umiad.evaluate(model, foreign, n_resamples=10).counts["n_normal"] == 5


def test_a_fitted_image_in_an_official_test_part_is_an_error(model, data, tmp_path):
    good = tmp_path / "mvtec" / "test" / "good"
    good.mkdir(parents=True)
    train = tmp_path / "mvtec" / "train" / "good"
    train.mkdir(parents=True)
    fitted = data / model.split.part("train")[0].name
    (good / "leak.png").write_bytes(fitted.read_bytes())
    (train / "a.png").write_bytes((data / model.split.part("train")[1].name).read_bytes())
    with pytest.raises(InputError, match=r"leak.png: 1 images of the test part were fitted"):
        umiad.evaluate(model, tmp_path / "mvtec")


def test_nothing_to_test_is_an_error(model, data, tmp_path):
    only = tmp_path / "normal"
    only.mkdir()
    for entry in model.split.part("train")[:3]:
        (only / entry.name.rsplit("/")[-1]).write_bytes((data / entry.name).read_bytes())
    with pytest.raises(InputError, match="no labelled image belongs to the test part"):
        umiad.evaluate(model, tmp_path)


def test_a_saved_model_with_an_unknown_setting_is_a_model_file_error(model, tmp_path):
    from umiad import modelfile

    config = {**model.config.canonical(), "surprise": 1}
    modelfile.save(
        tmp_path / "m", config=config, tensors=model.detector.state(), split=model.split.to_json(), card=""
    )
    with pytest.raises(ModelFileError, match="unknown key 'surprise'"):
        umiad.load(tmp_path / "m")
    modelfile.update(tmp_path / "m", config=model.config.canonical(), split={"entries": 3})
    with pytest.raises(ModelFileError, match=r"split\.json"):
        umiad.load(tmp_path / "m")


def test_the_card_says_what_the_model_is_not_for(model):
    assert "no diagnosis" in model.card()
    assert model.info["weights"] in model.card()
    assert "padim" in repr(model)


def test_build_checks_names_before_anything_is_read():
    with pytest.raises(ConfigError, match="nearest is 256"):
        umiad.build(size=250)
    with pytest.raises(ConfigError, match="did you mean 'egmf'"):
        umiad.build("egmv", weights="random")
    with pytest.raises(ConfigError, match="unknown preset"):
        umiad.build("egmf", preset="fast", weights="random")


def test_devices():
    assert resolve_device("auto") in {"cpu", "cuda", "mps"}
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(InputError, match="expected one of: auto, cpu"):
        resolve_device("tpu")


def test_a_detector_without_a_backbone_needs_no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("UMIAD_CACHE", str(tmp_path))
    built = umiad.build("size", weights="imagenet", size=SIZE)  # neither cached nor to be had without network
    assert built.config.weights == "random"


def test_another_backbone_is_built_saved_and_loaded(data, tmp_path):
    settings = {"backbone": "resnet50", "scales": [2], "channels": 8}
    detector = umiad.build("padim", preset="quick", weights="random", size=SIZE, settings=settings)
    model = umiad.fit(detector, data, out=tmp_path / "model")
    assert sum(p.numel() for p in detector.parts()["encoder"].parameters()) == 25_557_032 - 2_049_000
    pixels = image()
    again = umiad.load(tmp_path / "model")
    assert again.score(pixels)[0].image_score == model.score(pixels)[0].image_score
    with pytest.raises(ConfigError, match="choose resnet18 or resnet34"):
        umiad.build("egmf", weights="random", size=SIZE, settings={"backbone": "resnet50"})
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        umiad.build("padim", weights="random", size=SIZE, settings={"backbone": "resnet19"})
