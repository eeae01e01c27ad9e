"""Tuning: candidates, folds, judging on synthetic anomalies, resuming, and what is never looked at."""

import json
import os
import shutil
import signal
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from make import grey_array, grey_png, tiny_set
from umiad import detectors, metrics, tuning
from umiad.cli.settings import parse_settings
from umiad.comparison_result import COMPARED
from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.errors import ConfigError, DiskError, InputError, TrainingError
from umiad.interrupt import Interrupted
from umiad.phantoms import draw_phantom
from umiad.progress import Silent
from umiad.splits import SplitEntry, fold_numbers
from umiad.synthetic import FAMILIES
from umiad.tuning import Candidate, TuneOptions, tune
from umiad.tuning_candidates import as_toml, preset_candidates, read_candidates, setting_texts
from umiad.tuning_folds import exhibits, judge_fold, make_folds, shown_rows
from umiad.tuning_result import JUDGED, PARTS, SIZES
from umiad.types import Scores

QUICK = TuneOptions(weights="random", size=64, per_image=2, resamples=20, device="cpu")
HERE = "test_tuning"
SMOOTH = Candidate(name="smooth", detector="intensity")
SHARP = Candidate(name="sharp", detector="intensity", settings={"sigma": 0.0})


class Tiny:
    """A trained detector without a backbone: the squared distance to a learned mean image of 16 x 16."""

    info = DetectorInfo(name="tiny", summary="a learned mean image", reference="for tests")
    Config = DetectorConfig
    presets: ClassVar = {
        name: {"training": {"learning_rate": 0.05, "epochs": 3}} for name in ("paper", "default", "quick")
    }

    def __init__(self, config, backbone):
        self.config = config
        self.module = torch.nn.Module()
        self.module.centre = torch.nn.Parameter(torch.zeros(1, 16, 16))

    def prepare(self, images, *, original_size=None):
        return {"image": torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 16)}

    def steps(self, prepared, rng):
        yield {"total": self._distance(prepared).mean()}

    def param_groups(self):
        return [{"params": list(self.module.parameters())}]

    def monitor(self, prepared):
        return {"nats_per_dim": float(self._distance(prepared).detach().mean())}

    def score(self, images, *, original_size=None):
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared):
        with torch.no_grad():
            size = (self.config.size, self.config.size)
            maps = torch.nn.functional.interpolate(self._distance(prepared), size=size)[:, 0]
            return Scores(maps, maps.mean((1, 2)))

    def parts(self):
        return {"centre": self.module}

    def state(self):
        return dict(self.module.state_dict())

    def load_state(self, state):
        self.module.load_state_dict(dict(state))

    def _distance(self, prepared):
        return (prepared["image"] - self.module.centre).square()


class Broken(Tiny):
    """A detector whose fit fails."""

    info = replace(Tiny.info, name="broken")

    def steps(self, prepared, rng):
        raise TrainingError("nothing can be learned from these images")


class Nan(Tiny):
    """A detector whose scores are of no use."""

    info = replace(Tiny.info, name="nan")

    def score(self, images, *, original_size=None):
        scores = super().score(images)
        return Scores(scores.anomaly_map, scores.image_score * float("nan"))


class Unlikely(Tiny):
    """A detector whose likelihood is of no use."""

    info = replace(Tiny.info, name="unlikely")

    def monitor(self, prepared):
        return {"nats_per_dim": float("inf")}


class Blind(Tiny):
    """A detector with a constant map and no likelihood."""

    info = replace(Tiny.info, name="blind", localises=False)

    def monitor(self, prepared):
        return {}


@pytest.fixture(autouse=True)
def _stubs(monkeypatch):
    for each in (Tiny, Broken, Nan, Unlikely, Blind):
        monkeypatch.setitem(detectors.REGISTRY, each.info.name, f"{HERE}:{each.__name__}")


class Listening(Silent):
    """A reporter that remembers stages, epochs and notes."""

    def __init__(self):
        self.stages, self.notes, self.epochs = [], [], 0

    def stage(self, name, done, total):
        self.stages.append(name)

    def epoch(self, row):
        self.epochs += 1

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=16, n_abnormal=4, size=80)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Two candidates tuned once, and where their results lie."""
    out = tmp_path_factory.mktemp("made") / "t"
    return tune(data, [SHARP, SMOOTH], options=QUICK, out=out), out


def numbers(result):
    """Everything of a result but the clock."""
    own = [fold.model_dump(exclude={"fit_seconds"}) for fold in result.folds]
    return own, result.map_threshold, result.map_reference, result.maps.tolist()


def entries_of(groups):
    """Entries of images 0, 1, ... in the given groups ("" = alone)."""
    return [SplitEntry(f"{i:03}.png", "0" * 64, 0, group, "train") for i, group in enumerate(groups)]


# Candidates


def test_candidates_without_a_file_are_the_presets_that_differ_and_one_for_each_setting():
    found = preset_candidates("padim", variants=[{"channels": 20}, {"scales": [1, 2]}])
    names = ["default", "paper", "quick", "default+channels=20", "default+scales=1_2"]
    assert [each.name for each in found] == names
    assert found[4].settings == {"scales": [1, 2]}
    assert [each.name for each in preset_candidates("posgauss")] == ["default", "quick"]
    assert [each.name for each in preset_candidates("intensity")] == ["default"]
    based = preset_candidates("padim", preset="quick", variants=[{"channels": 20}])
    assert (based[0].name, based[-1].name, based[-1].preset) == ("quick", "quick+channels=20", "quick")


def test_names_made_from_settings_are_distinct_and_can_be_files():
    odd = [{"a": "x/y"}, {"a": "x?y"}, {"a": "x y" * 90}, {"a": "x y" * 90}, {"a": "../é"}]
    names = [each.name for each in preset_candidates("intensity", variants=odd)]
    assert len({name.lower() for name in names}) == len(names) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789+=_.-") for name in names)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "a", "detector": "posgaus"}, "did you mean 'posgauss'"),
        ({"name": "a", "detector": "padim", "preset": "quik"}, "did you mean 'quick'"),
        ({"name": "a", "detecto": "padim"}, "unknown key 'detecto' (did you mean 'detector'?)"),
        ({"name": "a/b", "detector": "padim"}, "letters, digits"),
        ({"name": ".a", "detector": "padim"}, "letters, digits"),
        ({"name": "a" * 65, "detector": "padim"}, "64 letters"),
        ({"name": "a", "detector": "padim", "settings": {"size": 64}}, "'size' is no setting"),
        ({"name": "a", "detector": "padim", "settings": {"training": 5}}, "'training' is no table"),
        ({"detector": "padim"}, "name"),
    ],
)
def test_a_candidate_that_makes_no_sense_says_why(values, said):
    with pytest.raises(ConfigError) as raised:
        Candidate.parse(values)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", ConfigError, "no candidate"),
        ("candidate = 3", ConfigError, "no candidate"),
        ("[[candidates]]", ConfigError, "did you mean 'candidate'"),
        ("[[candidate]]\nname = 'a'\ndetector = 'padin'", ConfigError, "candidate 1: .*'padim'"),
        ("[[candidate]]\nname = 'a'\ndetector = 1979-05-27", ConfigError, "candidate 1"),
        ("[[candidate]\n", InputError, "no TOML"),
        ("\udcff", InputError, "no TOML"),
        (
            "[[candidate]]\nname='a'\ndetector='size'\n[[candidate]]\nname='A'\ndetector='size'",
            ConfigError,
            "two candidates are named 'a' and 'A'",
        ),
    ],
)
def test_a_file_of_candidates_that_cannot_be_used_is_named(tmp_path, text, error, said):
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(error, match=said) as raised:
        read_candidates(path)
    assert "c.toml" in str(raised.value) or "two candidates" in said


def test_a_missing_file_and_a_folder_are_input_errors(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError):
            read_candidates(path)


def test_the_example_file_can_be_read():
    found = read_candidates(Path(__file__).parents[1] / "examples" / "tune.toml")
    assert [each.name for each in found] == ["padim-quick", "posgauss-sharp", "posgauss-smooth", "brightness"]
    assert found[1].settings == {"epsilon": 0.01, "sigma": 2.0}


SCALAR = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
WORD = st.text("abc_1", min_size=1)
SETTINGS = st.recursive(
    st.dictionaries(WORD, st.one_of(SCALAR, st.lists(st.integers(0, 9)))),
    lambda inner: st.dictionaries(WORD, st.one_of(SCALAR, inner.filter(bool))),
    max_leaves=6,
)


@given(SETTINGS.filter(lambda values: "training" not in values))
def test_settings_come_back_from_the_command_line_and_from_toml(settings):
    assert parse_settings(setting_texts(settings)) == settings
    candidate = Candidate(name="a", detector="padim", settings=settings)
    [row] = tomllib.loads(as_toml(candidate))["candidate"]
    assert row.get("settings", {}) == settings


def test_null_has_no_form_in_toml_and_becomes_a_comment():
    text = as_toml(Candidate(name="a", detector="posgauss", settings={"epsilon": None, "flips": False}))
    assert "# epsilon=null" in text
    assert tomllib.loads(text)["candidate"][0]["settings"] == {"flips": False}


# Folds


@given(
    st.lists(st.sampled_from(["", "", "", "p", "q", "r"]), min_size=4, max_size=40),
    st.integers(2, 4),
    st.integers(0, 5),
)
def test_folds_keep_groups_together_and_hold_two_groups_or_more(groups, folds, seed):
    entries = entries_of(groups)
    n_groups = len({each.group or each.name for each in entries})
    if n_groups < 2 * folds:
        with pytest.raises(InputError, match=f"in {n_groups} groups.* at least {2 * folds}"):
            fold_numbers(entries, folds, seed=seed)
        return
    found = fold_numbers(entries, folds, seed=seed)
    inside = [
        {e.group or e.name for e, n in zip(entries, found, strict=True) if n == k} for k in range(folds)
    ]
    assert sum(map(len, inside)) == n_groups
    assert max(map(len, inside)) - min(map(len, inside)) <= 1
    assert min(map(len, inside)) >= 2
    assert found == fold_numbers(entries, folds, seed=seed)


def test_folds_of_single_images_are_even_and_another_seed_cuts_otherwise():
    found = fold_numbers(entries_of([""] * 20), 3, seed=0)
    assert sorted(found.count(k) for k in range(3)) == [6, 7, 7]
    assert found != fold_numbers(entries_of([""] * 20), 3, seed=1)


def folds_of(n=8, *, options=QUICK, groups=None):
    entries = entries_of(groups or [""] * n)
    greys = [grey_array((64, 64), seed).astype(np.float32) / 255 for seed in range(len(entries))]
    return entries, greys, list(make_folds(entries, greys, options))


def test_anomalies_are_planted_in_held_out_images_and_move_with_their_source():
    entries, greys, folds = folds_of(groups=["a.png", "a.png", *[""] * 7])
    for fold in folds:
        assert not set(fold.fitted) & set(fold.held_out)
        assert len(fold.fitted) + len(fold.held_out) == len(entries)
        n = len(fold.held_out)
        assert len(fold.anomalies) == 2 * n
        assert fold.labels.tolist() == [0] * n + [1] * 2 * n
        assert fold.groups[n:] == [group for group in fold.groups[:n] for _ in range(2)]
        assert not fold.masks[:n].any()
        for number, each in enumerate(fold.anomalies):
            source = greys[fold.held_out[number // 2]]
            assert np.array_equal(fold.masks[n + number], each.mask)
            assert np.abs(each.pixels - source)[each.mask].mean() > 0
            assert (each.pixels == source).mean() > 0.2
    assert any("a.png" in fold.groups for fold in folds)
    assert not np.array_equal(folds[0].anomalies[0].mask, folds[1].anomalies[0].mask)


def test_what_is_shown_is_chosen_by_family_and_size_and_named_by_its_source():
    entries, greys, [fold, _, _] = folds_of(24)
    rows = shown_rows(fold)
    shown = list(exhibits(fold, entries, greys))
    assert [each.family for each in shown] == [*FAMILIES, "normal", "normal"]
    for row, each in zip(rows, shown, strict=True):
        source = greys[int(each.source[:3])]
        assert each.source == entries[fold.held_out[row if each.mask is None else (row - 8) // 2]].name
        same = each.pixels == source
        assert same.all() if each.mask is None else not same[each.mask].all()


def test_a_perfect_map_gets_one_and_a_constant_map_gets_chance():
    _, _, [fold, *_] = folds_of(24)
    perfect = judge_fold(fold, fold.labels.astype(float), fold.masks.astype(np.float32), n_resamples=10)
    assert perfect["metrics"] == {"det_auroc": 1.0, "seg_auroc": 1.0, "seg_aupro": pytest.approx(1.0)}
    flat = judge_fold(fold, np.zeros(24), np.zeros(fold.masks.shape, dtype=np.float32), n_resamples=10)
    assert flat["metrics"] == {"det_auroc": 0.5, "seg_auroc": 0.5, "seg_aupro": pytest.approx(0.15)}
    assert set(perfect["parts"]) == set(PARTS)
    assert sum(perfect["counts"][family] for family in FAMILIES) == len(fold.anomalies)
    assert sum(perfect["counts"][size] for size in SIZES) == len(fold.anomalies)
    without = judge_fold(fold, fold.labels.astype(float), None, n_resamples=10)
    assert without["metrics"] == {"det_auroc": 1.0, "seg_auroc": None, "seg_aupro": None}
    assert set(without["draws"]) == {"det_auroc"}


def test_metrics_and_parts_are_those_of_the_exact_functions():
    _, _, [fold, *_] = folds_of(24)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=24) + fold.labels
    maps = (rng.normal(size=fold.masks.shape) + fold.masks).astype(np.float32)
    found = judge_fold(fold, scores, maps, n_resamples=0)
    assert found["metrics"]["seg_aupro"] == metrics.aupro(maps, fold.masks)
    assert found["metrics"]["det_auroc"] == metrics.det_auroc(scores, fold.labels)
    dark = [*range(8), *(8 + i for i, each in enumerate(fold.anomalies) if each.family == "dark")]
    assert found["counts"]["dark"] == len(dark) - 8 > 0
    part = found["parts"]["dark"]
    assert part["det_auroc"] == metrics.det_auroc(scores[dark], fold.labels[dark])
    assert part["seg_auroc"] == metrics.seg_auroc(maps[dark], fold.masks[dark])
    assert part["seg_aupro"] == metrics.aupro(maps[dark], fold.masks[dark])
    small = [each.area < 0.01 for each in fold.anomalies]
    assert found["counts"]["small"] == sum(small)


def test_a_part_without_anomalies_is_undefined():
    _, _, [fold, *_] = folds_of(6, options=QUICK.model_copy(update={"per_image": 1}))
    found = judge_fold(fold, fold.labels.astype(float), None, n_resamples=0)
    empty = [part for part in PARTS if not found["counts"][part]]
    assert empty
    assert all(found["parts"][part] == dict.fromkeys(COMPARED) for part in empty)


# The whole


def test_candidates_are_ranked_by_the_mean_of_three_metrics(made):
    found, _ = made
    assert [each.name for each in found.results] == ["smooth", "sharp"]
    for each in found.results:
        values = [each.value(metric) for metric in COMPARED]
        assert each.rank_score == pytest.approx(np.mean(values))
        assert values[0] == pytest.approx(np.mean([fold.metrics["det_auroc"] for fold in each.folds]))
        for metric in JUDGED:
            low, high = each.interval(metric)
            assert 0 <= low <= each.value(metric) <= high <= 1
    assert found.best.name == "smooth"
    assert found.n_synthetic == 2 * sum(map(len, found.folds))


def test_differences_are_paired_and_centred_on_the_difference(made):
    found, _ = made
    best, other = found.results
    [rank, *_] = found.against_best()
    assert (rank.metric, rank.first, rank.second) == ("rank_score", "smooth", "sharp")
    assert rank.value == pytest.approx(best.rank_score - other.rank_score)
    assert (best.draws("rank_score") - other.draws("rank_score")).mean() == pytest.approx(rank.value)
    assert rank.ci95[0] <= rank.value <= rank.ci95[1]
    assert len(found.differences()) == len(JUDGED)


def test_equal_candidates_are_equal_to_the_last_bit(data):
    twin = SMOOTH.model_copy(update={"name": "twin"})
    found = tune(data, [SMOOTH, twin], options=QUICK)
    assert numbers(found.results[0]) == numbers(found.results[1])
    assert all(each.ci95 == (0.0, 0.0) for each in found.differences())


def test_only_normal_images_of_the_training_part_are_looked_at(data, made, tmp_path, monkeypatch):
    """Other abnormal images change nothing, and no test image is read after the fingerprints."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    shutil.rmtree(other / "masks")
    for number, path in enumerate(sorted((other / "abnormal").iterdir())):
        grey_png(path, (96, 70), seed=100 + number)
    seen = []
    real = tuning.case_image
    monkeypatch.setattr(tuning, "case_image", lambda case: seen.append(case.path) or real(case))
    found = tune(other, [SHARP, SMOOTH], options=QUICK)
    assert [numbers(each) for each in found.results] == [numbers(each) for each in made[0].results]
    held_out = [name for names in found.folds for name in names]
    files = {path for path in seen if path.is_absolute()}
    assert len(files) == len(held_out) == len(set(held_out)) < 16
    assert {str(path.relative_to(other)) for path in files} == set(held_out)
    assert all(name.startswith("normal") for name in held_out)


def test_held_out_normals_are_not_fitted_and_all_folds_are_judged(data, monkeypatch):
    fits = []
    real = tuning.fit_model

    def fit_model(detector, dataset, options, **rest):
        fits.append({case.name for case in dataset.cases})
        assert {entry.part for entry in rest["groups"].entries} == {"train"}
        return real(detector, dataset, options, **rest)

    monkeypatch.setattr(tuning, "fit_model", fit_model)
    found = tune(data, [SMOOTH], options=QUICK)
    every = {name for names in found.folds for name in names}
    assert fits == [every - set(names) for names in found.folds]


def test_the_gap_is_held_out_minus_fitted_and_missing_without_a_likelihood(data):
    tiny = Candidate(name="t", detector="tiny")
    listening = Listening()
    found = tune(data, [tiny, SMOOTH], options=QUICK, reporter=listening)
    trained = next(each for each in found.results if each.name == "t")
    assert trained.gap == pytest.approx(trained.mean("nats_held_out") - trained.mean("nats_fitted"))
    assert trained.gap > 0
    assert next(each for each in found.results if each.name == "smooth").gap is None
    assert listening.epochs == 3 * 3  # three folds of three epochs; the closed form's single one is not told
    assert "t: fold 1: frozen features" in listening.stages
    assert "t: fold 1: reading images" not in listening.stages


def test_epochs_hold_for_all_that_train_and_are_part_of_the_command(data):
    listening = Listening()
    options = QUICK.model_copy(update={"epochs": 1, "equalise": 32})
    slow = Candidate(name="t", detector="tiny", settings={"training": {"epochs": 9, "batch_size": 4}})
    found = tune(data, [slow, SMOOTH], options=options, reporter=listening)
    trained = next(each for each in found.results if each.name == "t")
    assert trained.detector_config["training"]["epochs"] == 1
    assert trained.detector_config["training"]["batch_size"] == 4
    assert "smooth: --epochs has no effect on a closed form" in listening.notes
    command = found.command(trained)
    assert command.startswith(
        f"umiad fit {data} --out MODEL --detector tiny --preset default --set training.epochs=9"
    )
    assert "--epochs 1 --equalise 32" in command


def test_equalising_changes_what_is_scored(data, made):
    found = tune(data, [SHARP], options=QUICK.model_copy(update={"equalise": 32}))
    plain = next(each for each in made[0].results if each.name == "sharp")
    assert found.results[0].rank_score != plain.rank_score


def test_a_detector_that_does_not_localise_is_last_and_not_ranked(data):
    found = tune(data, [Candidate(name="b", detector="blind"), SHARP], options=QUICK)
    assert [each.name for each in found.results] == ["sharp", "b"]
    blind = found.results[1]
    assert (blind.rank_score, blind.interval("rank_score"), blind.value("seg_auroc")) == (None, None, None)
    assert blind.value("det_auroc") is not None
    verdicts = {each.metric: each.verdict for each in found.against_best()}
    assert verdicts["rank_score"] is None
    assert verdicts["det_auroc"] is not None
    alone = tune(data, [Candidate(name="b", detector="blind")], options=QUICK)
    assert alone.best is None
    assert alone.against_best() == []


def test_a_candidate_that_fails_is_reported_and_the_others_go_on(data, tmp_path):
    names = ("broken", "nan", "unlikely")
    bad = [Candidate(name=name, detector=name) for name in names]
    found = tune(data, [*bad, SMOOTH], options=QUICK, out=tmp_path)
    assert found.failures["broken"] == "nothing can be learned from these images"
    assert "NaN" in found.failures["nan"]
    assert "not finite" in found.failures["unlikely"]
    assert [each.name for each in found.results] == ["smooth"]
    assert sorted(os.listdir(tmp_path / "candidates")) == ["smooth.json", "smooth.npy"]


def test_arrays_are_all_normal():
    images = [draw_phantom(np.random.default_rng(seed), size=64, lesions=0)[0] for seed in range(8)]
    found = tune(images, [SMOOTH], options=QUICK)
    assert sum(map(len, found.folds)) == 8
    assert "umiad fit DATA" in found.command(found.best)


# Resuming


def test_what_was_computed_is_loaded_and_the_same(data, made, tmp_path, monkeypatch):
    shutil.copytree(made[1], tmp_path / "t")
    monkeypatch.setattr(tuning, "fit_model", lambda *_, **__: pytest.fail("something was fitted"))
    listening = Listening()
    found = tune(data, [SMOOTH, SHARP], options=QUICK, out=tmp_path / "t", reporter=listening)
    assert [numbers(each) for each in found.results] == [numbers(each) for each in made[0].results]
    assert [each.fit_seconds for each in found.results] == [each.fit_seconds for each in made[0].results]
    assert all(each.loaded for each in found.results)
    assert sum("made before with the same settings" in note for note in listening.notes) == 2


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"folds": 2}, {"per_image": 1}, {"equalise": 32}, {"resamples": 30}]
)
def test_other_options_compute_again(data, made, tmp_path, change):
    shutil.copytree(made[1], tmp_path / "t")
    listening = Listening()
    options = QUICK.model_copy(update=change)
    found = tune(data, [SMOOTH], options=options, out=tmp_path / "t", reporter=listening)
    assert not found.results[0].loaded
    assert any("smooth.json is of other settings or images" in note for note in listening.notes)
    again = tune(data, [SMOOTH], options=options, out=tmp_path / "t")
    assert again.results[0].loaded


def test_other_settings_and_other_images_compute_again(data, made, tmp_path):
    shutil.copytree(made[1], tmp_path / "t")
    other = Candidate(name="smooth", detector="intensity", settings={"sigma": 3.0})
    assert not tune(data, [other], options=QUICK, out=tmp_path / "t").results[0].loaded
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    grey_png(changed / made[0].folds[0][0], seed=5)
    assert not tune(changed, [SHARP], options=QUICK, out=tmp_path / "t").results[0].loaded


def test_other_abnormal_images_leave_the_results_valid(data, made, tmp_path):
    shutil.copytree(made[1], tmp_path / "t")
    shutil.copytree(data, tmp_path / "data")
    for number, path in enumerate(sorted((tmp_path / "data" / "abnormal").iterdir())):
        grey_png(path, (80, 80), seed=200 + number)
    assert tune(tmp_path / "data", [SHARP], options=QUICK, out=tmp_path / "t").results[0].loaded


@pytest.mark.parametrize("damage", ["json", "npy", "lost", "foreign"])
def test_a_damaged_result_is_computed_again_with_a_note(data, made, tmp_path, damage):
    shutil.copytree(made[1], tmp_path / "t")
    folder = tmp_path / "t" / "candidates"
    if damage == "json":
        (folder / "smooth.json").write_text('{"format": NaN}')
    elif damage == "npy":
        (folder / "smooth.npy").write_bytes(b"\x80\x04.")
    elif damage == "lost":
        (folder / "smooth.npy").unlink()
    else:
        (folder / "smooth.json").write_text('{"name": "mine"}')
    listening = Listening()
    found = tune(data, [SMOOTH], options=QUICK, out=tmp_path / "t", reporter=listening)
    assert numbers(found.results[0]) == numbers(made[0].results[0])
    assert any("cannot be used, it is computed again" in note for note in listening.notes)
    assert tune(data, [SMOOTH], options=QUICK, out=tmp_path / "t").results[0].loaded


def test_after_ctrl_c_finished_candidates_are_kept(data, tmp_path):
    class Stopping(Silent):
        def epoch(self, row):
            os.kill(os.getpid(), signal.SIGINT)

    pair = [SMOOTH, Candidate(name="t", detector="tiny")]
    with pytest.raises(Interrupted):
        tune(data, pair, options=QUICK, out=tmp_path, reporter=Stopping())
    assert sorted(os.listdir(tmp_path / "candidates")) == ["smooth.json", "smooth.npy"]
    found = tune(data, pair, options=QUICK, out=tmp_path)
    assert {each.name: each.loaded for each in found.results} == {"smooth": True, "t": False}


def test_a_result_file_holds_scores_and_no_path_of_the_data(data, made):
    text = (made[1] / "candidates" / "smooth.json").read_text()
    values = json.loads(text)
    assert values["candidate"]["name"] == "smooth"
    assert len(values["folds"][0]["synthetic_scores"]) == 2 * len(values["folds"][0]["normal_scores"])
    assert str(data) not in text


# Errors


@pytest.mark.parametrize(
    ("candidate", "change", "said"),
    [
        ({"detector": "posgauss", "settings": {"epsilo": 1}}, {}, "candidate 'x': .*did you mean 'epsilon'"),
        ({"detector": "posgauss", "settings": {"epsilon": -1}}, {}, "candidate 'x': .*epsilon"),
        ({"detector": "posgaus"}, {}, "did you mean 'posgauss'"),
        ({"detector": "padim", "preset": "quik"}, {}, "did you mean 'quick'"),
        ({"detector": "padim"}, {"size": 70}, "nearest is 64"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_read(monkeypatch, candidate, change, said):
    monkeypatch.setattr(tuning, "as_dataset", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ConfigError, match=said):
        tune("nowhere", [Candidate(name="x", **candidate)], options=QUICK.model_copy(update=change))


def test_no_candidates_and_equal_names_are_refused():
    with pytest.raises(ConfigError, match="no candidate"):
        tune("nowhere", [], options=QUICK)
    with pytest.raises(ConfigError, match="'smooth' and 'Smooth'"):
        tune("nowhere", [SMOOTH, SMOOTH.model_copy(update={"name": "Smooth"})], options=QUICK)


def test_too_few_normal_images_say_how_many_there_are_and_are_needed(tmp_path):
    few = tiny_set(tmp_path / "few", n_normal=5, n_abnormal=0, size=64)
    with pytest.raises(InputError, match=r"5 normal images .* in 5 groups .* 3 folds need at least 6"):
        tune(few, [SMOOTH], options=QUICK, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_files_are_named_and_a_folder_that_is_a_file_is_a_disk_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "fit_model", lambda *_, **__: pytest.fail("something was fitted"))
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "normal" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 unreadable files: .*broken.png"):
        tune(tmp_path / "data", [SMOOTH], options=QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        tune(data, [SMOOTH], options=QUICK, out=tmp_path / "file" / "out")
