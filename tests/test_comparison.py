"""Comparing detectors: paired differences, the gallery's rule, one split for all, resuming, and the report."""

import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import umiad
from make import grey_png, tiny_set
from umiad import comparison, detectors
from umiad.bootstrap import NO_INTERVAL, resample_scores
from umiad.comparison import CompareOptions, compare
from umiad.comparison_files import comparison_blocks, write_comparison
from umiad.comparison_result import COMPARED, Comparison, Cost, Result, choose_gallery, paired_difference
from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.errors import ConfigError, DiskError, InputError, TrainingError
from umiad.evaluation import CaseResult, Evaluation
from umiad.interrupt import Interrupted
from umiad.overlay import colour_scale
from umiad.progress import Silent
from umiad.report import to_markdown
from umiad.splits import Split
from umiad.types import Scores

QUICK = CompareOptions(preset="quick", weights="random", size=64, epochs=2, resamples=20, device="cpu")
HERE = "test_comparison"


class Tiny:
    """A trained detector without a backbone: the squared distance to a learned mean image of 16 x 16."""

    info = DetectorInfo(name="tiny", summary="a learned mean image", reference="for tests")
    Config = DetectorConfig
    presets: ClassVar = {
        name: {"training": {"learning_rate": 0.05}} for name in ("paper", "default", "quick")
    }

    def __init__(self, config, backbone):
        self.config, self.fitted = config, False
        self.module = torch.nn.Module()
        self.module.centre = torch.nn.Parameter(torch.zeros(1, 16, 16))

    def prepare(self, images, *, original_size=None):
        return {"image": torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 16)}

    def steps(self, prepared, rng):
        self.fitted = True
        yield {"total": self._distance(prepared).mean()}

    def param_groups(self):
        return [{"params": list(self.module.parameters())}]

    def monitor(self, prepared):
        return {}

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


class Blind(Tiny):
    """A detector with a constant map, no one-class method in its own paper."""

    info = replace(Tiny.info, name="blind", localises=False, uses_pixels=False, fidelity="adapted")

    def score_prepared(self, prepared):
        scores = super().score_prepared(prepared)
        flat = scores.image_score[:, None, None].expand_as(scores.anomaly_map).clone()
        return Scores(flat, scores.image_score)


class Listening(Silent):
    """A reporter that remembers stages and notes."""

    def __init__(self):
        self.stages, self.notes = [], []

    def stage(self, name, done, total):
        self.stages.append(name)

    def note(self, text):
        self.notes.append(text)


STUBS = (Tiny, Broken, Nan, Blind)


@pytest.fixture(autouse=True)
def _stubs(monkeypatch):
    for each in STUBS:
        monkeypatch.setitem(detectors.REGISTRY, each.info.name, f"{HERE}:{each.__name__}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=24, n_abnormal=7, size=80)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A finished comparison of a closed form and a trained detector, and where it is written."""
    out = tmp_path_factory.mktemp("made") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(detectors.REGISTRY, "tiny", f"{HERE}:Tiny")
        found = compare(["padim", "tiny"], data, options=QUICK, out=out)
        write_comparison(found, out)
    return found, out


def result(name, values, draws, *, digest="d" * 64, case="a.png"):
    """A result with the given metrics and resamples, and one test image."""
    metrics = {m: {"value": values.get(m), "ci95": None, "n_resamples": 0, "reason": "why"} for m in COMPARED}
    cases = (CaseResult(case, "normal", 0, "", 1.0, None, None, False),)
    drawn = {metric: np.asarray(each, dtype=float) for metric, each in draws.items()}
    return Result(
        name=name,
        info=Tiny.info,
        evaluation=Evaluation(metrics, {"n_masked": 0}, {}, (), cases, draws=drawn),
        common=metrics,
        common_draws=drawn,
        common_scores=np.zeros(1),
        cost=Cost("fitted", 1.0, 10, 0, 0.2, 0.1),
        digest=digest,
        scale=colour_scale(None, 1.0),
        maps=np.zeros((0, 8, 8)),
    )


def difference(first, second):
    a = result("a", {"det_auroc": 0.9}, {"det_auroc": first})
    b = result("b", {"det_auroc": 0.8}, {"det_auroc": second})
    return paired_difference("det_auroc", a, b, post="official")


def test_the_interval_is_the_percentiles_of_the_differences_resample_by_resample():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(0, 0.1, 4000), rng.normal(0, 0.001, 4000)
    found = difference(0.9 + shared + own, 0.8 + shared)
    assert found.value == pytest.approx(0.1)
    assert found.ci95 == pytest.approx(tuple(np.percentile(0.1 + own, (2.5, 97.5))), abs=1e-12)
    assert found.ci95[1] - found.ci95[0] < 0.01  # what both share cancels: unpaired it would be 0.55 wide
    assert found.verdict == "better"
    assert found.n_resamples == 4000


def test_a_difference_turned_around_changes_its_sign_and_its_verdict():
    first, second = np.linspace(0.8, 0.9, 50), np.linspace(0.7, 0.75, 50)
    a, b = (
        result("a", {"det_auroc": 0.9}, {"det_auroc": first}),
        result("b", {"det_auroc": 0.7}, {"det_auroc": second}),
    )
    there, back = (paired_difference("det_auroc", *pair, post="common") for pair in ((a, b), (b, a)))
    assert (there.verdict, back.verdict) == ("better", "worse")
    assert back.value == -there.value
    assert back.ci95 == pytest.approx((-there.ci95[1], -there.ci95[0]))


def test_equal_detectors_and_an_interval_that_touches_zero_show_no_difference():
    same = np.linspace(0.5, 0.9, 30)
    assert difference(same, same).verdict == "no difference shown"
    assert difference(same, same).ci95 == (0.0, 0.0)
    assert difference(same + 0.1, same[::-1]).verdict == "no difference shown"


def test_undefined_resamples_are_left_out_and_undefined_metrics_say_why():
    found = difference([0.9, np.nan, 0.9], [0.8, 0.8, np.nan])
    assert found.n_resamples == 1
    a, b = result("a", {"det_auroc": 0.9}, {"det_auroc": [0.9]}), result("b", {}, {})
    gap = paired_difference("det_auroc", a, b, post="official")
    assert (gap.value, gap.verdict, gap.reason) == (None, None, "b: why")
    alone = paired_difference("det_auroc", a, result("c", {"det_auroc": 0.5}, {}), post="official")
    assert (alone.ci95, alone.verdict, alone.reason) == (None, None, NO_INTERVAL)


def test_resamples_of_two_detectors_on_one_test_part_are_paired():
    rng = np.random.default_rng(1)
    labels, groups = np.repeat([0, 1], 30), [""] * 60
    scores = rng.normal(size=60) + labels
    one, other = (
        resample_scores(each, labels, groups, None, None, n_resamples=50)[1]["det_auroc"]
        for each in (scores, 3 * scores + 1)
    )
    assert np.array_equal(one, other)


def test_the_best_is_set_against_each_other_and_all_pairs_are_kept():
    values = {"a": 0.7, "b": 0.9, "c": 0.8}
    rows = [result(n, {"det_auroc": v}, {"det_auroc": [v, v]}) for n, v in values.items()]
    found = made_of(rows)
    assert [(d.first, d.second) for d in found.against_best("official")] == [("b", "c"), ("b", "a")]
    assert len(found.differences("official")) == 3 * len(COMPARED)


def made_of(rows, digest="d" * 64):
    split = type("FakeSplit", (), {"digest": digest})()
    return Comparison(QUICK, tuple(r.name for r in rows), tuple(rows), {}, split, (), ())


def test_results_of_another_split_or_of_other_images_are_not_compared():
    with pytest.raises(ConfigError, match="b: judged on split eeee"):
        made_of([result("a", {}, {}), result("b", {}, {}, digest="e" * 64)])
    with pytest.raises(ConfigError, match="same 1 images as a"):
        made_of([result("a", {}, {}), result("b", {}, {}, case="other.png")])


def test_the_gallery_spans_lesion_sizes_and_places_whatever_the_scores():
    labels = [1] * 9 + [0] * 7
    sizes = [0.09, 0.01, 0.05, 0.03, 0.07, 0.02, 0.08, 0.04, 0.06] + [0.0] * 7
    rows = choose_gallery(labels, sizes, [""] * 16)
    assert [sizes[row] for row in rows[:5]] == [0.01, 0.03, 0.05, 0.07, 0.09]
    assert rows[5:] == [9, 12, 15]


def test_the_gallery_without_masks_goes_by_place_and_shows_a_group_once():
    labels = [1, 1, 1, 1, 0, 0]
    assert choose_gallery(labels, [None] * 4 + [0.0] * 2, ["p", "p", "", "", "q", "q"]) == [0, 2, 3, 4]
    partly = choose_gallery(labels, [None, 0.2, 0.1, None, 0.0, 0.0], [""] * 6)
    assert partly == [2, 1, 4, 5]
    assert choose_gallery([], [], []) == []


def test_a_comparison_gives_what_evaluating_each_model_alone_gives(made, data):
    found, out = made
    for each in found.results:
        model = umiad.load(out / "models" / each.name)
        alone = umiad.evaluate(model, data, n_resamples=20)
        assert alone.metrics == each.metrics("official")
        assert model.split.digest == found.split.digest
    assert [each.cost.origin for each in found.results] == ["fitted", "fitted"]
    assert all(each.cost.fit_seconds > 0 and each.cost.ratio > 0 for each in found.results)


def test_common_metrics_come_from_the_common_scores(made):
    found, _ = made
    padim, tiny = found.results
    assert (
        padim.common["det_auroc"] == padim.evaluation.metrics["det_auroc"]
    )  # its own rule is the common one
    assert not np.array_equal(tiny.common_scores, [case.image_score for case in tiny.evaluation.cases])
    assert padim.common["det_sensitivity"]["reason"] == "no image threshold"


def test_the_report_stands_alone_and_holds_every_part(made):
    found, out = made
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in (
        "ROC curves",
        "Paired bootstrap",
        "never by a result",
        "Parameters",
        "AUPRO",
        found.split.digest,
    ):
        assert words in page
    assert "<script" not in page
    assert 'src="http' not in page
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert page.count("data:image/png;base64,") == len(pictures) == 2 + 8 * 3
    assert {"roc-images.png", "roc-pixels.png", "image-01-original.png", "image-08-tiny.png"} <= set(pictures)
    text = (out / "comparison.md").read_text(encoding="utf-8")
    assert "| padim |" in text
    assert "## The best against each other" in text


def test_the_json_holds_every_number_and_every_score(made):
    found, out = made
    values = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert values["split"]["digest"] == found.split.digest
    assert len(values["cases"]) == values["split"]["test"] == len(found.results[0].evaluation.cases)
    assert set(values["cases"][0]["scores"]) == {"padim", "tiny"}
    assert {each["metric"] for each in values["differences"]["common"]} == set(COMPARED)
    tiny = values["detectors"][1]
    assert tiny["cost"]["trainable"] > 0
    assert {"official", "common"} == set(tiny["metrics"])
    assert tiny["provenance"]["split_digest"] == found.split.digest
    assert len(values["gallery"]) == 8


def test_repeating_loads_what_is_there_and_adds_what_is_new(made, data, tmp_path):
    shutil.copytree(made[1], tmp_path / "r")
    listening = Listening()
    again = compare(["tiny", "padim", "blind"], data, options=QUICK, out=tmp_path / "r", reporter=listening)
    assert [each.cost.origin for each in again.results] == ["loaded", "loaded", "fitted"]
    assert again.results[0].cost.fit_seconds == pytest.approx(made[0].results[1].cost.fit_seconds, abs=1e-3)
    assert again.results[0].evaluation.metrics == made[0].results[1].evaluation.metrics
    assert sum("fitted before with the same settings" in note for note in listening.notes) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "settings, split"), ({"equalise": 32}, "preprocessing"), ({"holdout": 0.3}, "split")],
)
def test_a_model_fitted_otherwise_is_replaced(made, data, tmp_path, change, said):
    shutil.copytree(made[1] / "models" / "tiny", tmp_path / "models" / "tiny")
    listening = Listening()
    options = QUICK.model_copy(update=change)
    found = compare(["tiny"], data, options=options, out=tmp_path, reporter=listening)
    assert found.results[0].cost.origin == "fitted"
    assert any(f"differs in {said}: it is replaced" in note for note in listening.notes)


def test_a_damaged_model_is_fitted_again_and_an_unknown_fit_time_is_none(made, data, tmp_path):
    shutil.copytree(made[1] / "models" / "tiny", tmp_path / "models" / "tiny")
    loaded = compare(["tiny"], data, options=QUICK, out=tmp_path)
    assert (loaded.results[0].cost.origin, loaded.results[0].cost.fit_seconds) == ("loaded", None)
    weights = tmp_path / "models" / "tiny" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    listening = Listening()
    found = compare(["tiny"], data, options=QUICK, out=tmp_path, reporter=listening)
    assert found.results[0].cost.origin == "fitted"
    assert any("cannot be used" in note for note in listening.notes)


def test_an_interrupted_fit_is_resumed_and_ends_as_an_uninterrupted_one(made, data, tmp_path):
    class Stopping(Silent):
        def epoch(self, row):
            if row["epochs"] == 2 and row["epoch"] == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        compare(["padim", "tiny"], data, options=QUICK, out=tmp_path, reporter=Stopping())
    found = compare(["padim", "tiny"], data, options=QUICK, out=tmp_path)
    assert [each.cost.origin for each in found.results] == ["loaded", "resumed"]
    kept = [(root / "models" / "tiny" / "weights.safetensors").read_bytes() for root in (made[1], tmp_path)]
    assert kept[0] == kept[1]
    assert not (tmp_path / "models" / "tiny.work").exists()


def test_an_interrupted_fit_of_another_run_is_not_resumed(data, tmp_path):
    (tmp_path / "models" / "tiny.work").mkdir(parents=True)
    (tmp_path / "models" / "tiny.work" / "run.json").write_text('{"detector":"tiny"}')
    listening = Listening()
    found = compare(["tiny"], data, options=QUICK, out=tmp_path, reporter=listening)
    assert found.results[0].cost.origin == "fitted"
    assert any("of another run" in note for note in listening.notes)


def test_failing_detectors_are_reported_and_the_others_go_on(data, tmp_path):
    found = compare(["broken", "nan", "tiny", "tiny"], data, options=QUICK)
    assert found.names == ("broken", "nan", "tiny")
    assert found.failures["broken"] == "nothing can be learned from these images"
    assert "cannot be judged" in found.failures["nan"]
    assert [each.name for each in found.results] == ["tiny"]
    assert "tiny was given more than once" in found.notes
    page = write_comparison(found, tmp_path).read_text(encoding="utf-8")
    assert "failed: nothing can be learned" in page
    assert "roc-images.png" in os.listdir(tmp_path / "pictures")
    assert json.loads((tmp_path / "comparison.json").read_text())["detectors"][0]["failed"]


def test_a_comparison_in_which_all_fail_still_has_its_report(data, tmp_path):
    found = compare(["broken"], data, options=QUICK)
    assert not found.results
    assert "broken failed" in write_comparison(found, tmp_path).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "comparison.json").read_text())["counts"] is None


def test_a_detector_that_does_not_localise_has_no_pixel_metric_and_no_overlay(data, tmp_path):
    found = compare(["tiny", "blind"], data, options=QUICK)
    blind = found.results[1]
    for post in ("official", "common"):
        assert blind.metrics(post)["seg_aupro"]["reason"] == "does not localise"
        assert blind.metrics(post)["det_auroc"]["value"] is not None
        assert {d.metric for d in found.against_best(post)} == {"det_auroc"}
    assert "pixels" not in blind.evaluation.roc
    page = write_comparison(found, tmp_path).read_text(encoding="utf-8")
    for words in (
        "n/a: does not localise",
        "Not shown, since it does not localise",
        "blind (adapted)",
        "a control",
    ):
        assert words in page
    assert not list((tmp_path / "pictures").glob("*-blind.png"))


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (["padim", "padin"], {}, "did you mean 'padim'"),
        ([], {}, "no detector given"),
        (["padim"], {"preset": "quik"}, "did you mean 'quick'"),
        (["padim"], {"size": 70}, "nearest is 64"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_read(monkeypatch, names, change, said):
    monkeypatch.setattr(comparison, "split_data", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(ConfigError, match=said):
        compare(names, "nowhere", options=QUICK.model_copy(update=change))


def test_data_without_a_test_image_is_refused_before_anything_is_fitted(monkeypatch, tmp_path):
    only = tiny_set(tmp_path / "only", n_normal=10, n_abnormal=0, size=64)
    shutil.rmtree(only / "abnormal")
    monkeypatch.setattr(comparison, "fit_model", lambda *_, **__: pytest.fail("something was fitted"))
    with pytest.raises(InputError, match="no test image"):
        compare(["padim"], only, options=QUICK)


def test_an_official_test_part_of_normals_only_leaves_detection_undefined(tmp_path):
    with (tmp_path / "set.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number in range(12):
            name = f"{number}.png"
            grey_png(tmp_path / name, (72, 72), seed=number)
            rows.writerow([name, "normal", "train" if number < 9 else "test"])
    found = compare(["tiny"], tmp_path / "set.csv", options=QUICK)
    assert found.results[0].metrics("official")["det_auroc"]["value"] is None
    page = write_comparison(found, tmp_path / "r").read_text(encoding="utf-8")
    assert "No abnormal test image: detection cannot be judged." in page
    assert os.listdir(tmp_path / "r" / "pictures")


def test_unreadable_files_and_foreign_folders_are_refused_before_anything_is_fitted(
    data, monkeypatch, tmp_path
):
    monkeypatch.setattr(comparison, "fit_model", lambda *_, **__: pytest.fail("something was fitted"))
    (tmp_path / "models" / "padim").mkdir(parents=True)
    (tmp_path / "models" / "padim" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"padim: is a folder without a readable umiad model"):
        compare(["padim"], data, options=QUICK, out=tmp_path)
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    (bad / "normal" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 unreadable files: .*broken.png"):
        compare(["padim"], bad, options=QUICK)


def test_a_folder_that_cannot_be_written_is_a_disk_error(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        write_comparison(made[0], tmp_path / "file" / "r")


def test_stages_and_notes_carry_the_detectors_name(data):
    listening = Listening()
    compare(["padim"], data, options=QUICK, reporter=listening)
    assert {"padim: frozen features", "padim: scoring", "detectors", "reading images"} <= set(
        listening.stages
    )
    assert any(note.startswith("padim: --epochs has no effect") for note in listening.notes)


def test_markdown_leaves_pictures_out_and_keeps_the_split(made):
    text = to_markdown(comparison_blocks(made[0]))
    assert made[0].split.digest in text
    assert "![" not in text
    assert isinstance(made[0].split, Split)
