"""The figures on phantoms: what is chosen, what is measured, and that every picture is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from make import tiny_set

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = 64


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import figure_common
    import figure_gates
    import figure_maps
    import figures
    import paper_protocol
    import results_store

    for module in (figures, paper_protocol, results_store):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figure_common, "IMAGES", tmp_path / "images")
    return SimpleNamespace(
        common=figure_common, gates=figure_gates, maps=figure_maps, figures=figures, store=results_store
    )


@pytest.fixture
def job(scripts, tmp_path):
    """A set of phantoms under the name of busi, in small."""
    tiny_set(tmp_path / "data" / "busi", n_normal=14, n_abnormal=8, size=SIZE)
    (tmp_path / "models").mkdir()
    return scripts.common.Job(tmp_path / "data", "random", tmp_path / "models", size=SIZE)


def without_masks(job):
    for mask in (job.data / "busi" / "masks").iterdir():
        mask.unlink()


def test_images_are_chosen_by_label_and_lesion_size_alone(scripts, job):
    parts = scripts.common.Parts(job, "busi")
    small, large, normal = parts.chosen()
    shares = [scripts.common.shown_case("", case).share for case in parts.abnormal]
    assert shares == sorted(shares)
    assert small.share == shares[round(len(shares) / 8 - 1 / 8)]
    assert large.share > small.share
    assert (normal.role, normal.mask) == ("normal", None)
    train = {case.path for case in parts.cases("train")}
    assert not train & {each.case.path for each in (small, large, normal)}
    assert small.mask_at(32).shape == (32, 32)
    assert not normal.mask_at(32).any()


def test_without_masks_the_order_of_files_decides(scripts, job):
    without_masks(job)
    parts = scripts.common.Parts(job, "busi")
    small, _, _ = parts.chosen()
    assert [case.path for case in parts.abnormal] == sorted(case.path for case in parts.abnormal)
    assert (small.role, small.share) == ("abnormal", None)
    assert small.facts() == {"image": small.name, "role": "abnormal", "lesion_share": None}


def test_figure_3_is_drawn_and_measures_agreement_with_edges(scripts, job, tmp_path):
    found = scripts.figures.figure3(job, ["busi"])
    assert (found["weights"], found["size"]) == ("random", SIZE)
    rows = found["sets"]["busi"]["r_with_sobel_on_normal"]
    assert list(rows) == ["F1", "F2", "F3", "F4"]
    assert all(-1 <= row["mean"] <= 1 and row["n"] > 2 for row in rows.values())
    check_picture(tmp_path / "images" / "paper-fig3-features.png")


def check_picture(path):
    picture = PIL.Image.open(path)
    assert picture.width <= 1600
    assert path.stat().st_size < 600_000
    assert len(np.unique(np.asarray(picture.convert("L")))) > 8  # something is drawn


def test_agreement_is_a_correlation_without_the_outermost_cells(scripts):
    edges = np.random.default_rng(0).random((1, 16, 16)).astype(np.float32)
    same, ringed = edges.copy(), edges.copy()
    ringed[:, 0] = 50.0
    for scale in (same, ringed):
        assert scripts.figures._agreement([scale], edges)[0][0] == pytest.approx(1.0)


def result(dataset, detector, preset, seed, value):
    metric = {"value": value, "ci95": [value - 0.1, value + 0.05] if seed == 0 else None}
    return {
        "dataset": dataset,
        "detector": detector,
        "preset": preset,
        "variant": "main",
        "size": 256,
        "seed": seed,
        "weights": "random",
        "epochs": 0,
        "commit": "abc",
        "localises": True,
        "metrics": {name: metric for name in ("det_auroc", "seg_auroc", "seg_aupro")},
    }


def test_figure_8_traces_results_and_printed_values(scripts, tmp_path):
    runs = [result("busi", "padim", "default", seed, 0.8 + 0.02 * seed) for seed in (0, 1)]
    found = scripts.figures.figure8([*runs, result("busi", "egmf", "paper", 0, 0.7)])
    panel = found["panels"]["busi det_auroc"]
    assert panel["padim"]["ours"] == {
        "seed0": 80.0,
        "ci95": [70.0, 85.0],
        "over_seeds": [80.0, 82.0],
        "n_seeds": 2,
    }
    assert panel["padim"]["paper"] is None
    printed = {row["method"]: row for row in scripts.store.paper_table(3) if row["dataset"] == "busi"}
    paper = panel["egmf, preset paper"]
    assert paper["paper"]["printed"] == float(printed["UMIAD-EGMF"]["det_auroc"])
    assert paper["ours"]["seed0"] == 70.0
    assert panel["egmf"] == {"ours": None, "paper": None}
    assert panel["medmae"]["ours"] is None
    assert panel["MSFlow" if "MSFlow" in panel else "msflow"]["paper"]["suspect"]
    assert found["panels"]["head_ct det_auroc"]["padim"]["ours"] is None
    assert (found["weights"], found["commits_of_runs"]) == (["random"], ["abc"])
    check_picture(tmp_path / "images" / "paper-fig8-performance.png")


def test_a_detector_without_a_map_has_no_pixel_figures(scripts):
    runs = [{**result("busi", "size", "default", 0, 0.9), "localises": False}]
    found = scripts.figures.figure8(runs)["panels"]
    assert found["busi det_auroc"]["size"]["ours"] is not None
    assert found["busi seg_auroc"]["size"]["ours"] is None


def test_figure_9_shows_every_detector_and_keeps_its_model(scripts, job, tmp_path):
    detectors = [("intensity", "default"), ("padim", "default")]
    found = scripts.maps.figure9(job, ["busi"], detectors)
    assert set(found["detectors"]) == {"intensity, default", "padim, default"}
    rows = found["sets"]["busi"]["padim, default"]
    assert len(rows["images"]) == 3
    for row in rows["images"]:
        assert (row["outlined_share"] > 0) == (row["map_maximum"] > rows["pixel_threshold"])
        assert row["flagged"] == (row["image_score"] > rows["image_threshold"])
    assert rows["images"][0]["dice"] is not None
    assert rows["images"][2]["dice"] is None  # a normal image has no lesion to hit
    check_picture(tmp_path / "images" / "paper-fig9-busi.png")
    kept = sorted(path.name for path in job.models.iterdir())
    assert kept == ["busi-intensity-default", "busi-padim-default"]
    assert scripts.maps.figure9(job, ["busi"], detectors) == found


def test_the_border_is_a_band_and_only_it_is_blurred(scripts):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[16:48, 16:48] = True
    band = scripts.gates.border(mask)
    assert band[16, 30]
    assert not band[32, 32]
    assert not band[2, 2]
    image = np.random.default_rng(0).random((3, SIZE, SIZE)).astype(np.float32)
    after = scripts.gates.blurred(image, mask)
    assert after.dtype == np.float32
    assert np.abs(after - image)[:, band].mean() > 0.1
    np.testing.assert_allclose(
        after[:, 32, 32], image[:, 32, 32], atol=1e-3
    )  # 14 px from the band, sigma 0.8 px
    np.testing.assert_array_equal(scripts.gates.blurred(image, np.zeros_like(mask)), image)


def test_cells_at_the_border_and_elsewhere_do_not_meet(scripts):
    mask = np.zeros((256, 256), dtype=bool)
    mask[96:160, 96:160] = True
    at, away = scripts.gates.cells(mask, 32)
    assert at.any()
    assert away.any()
    assert not (at & away).any()


@pytest.mark.slow
def test_gates_are_drawn_and_add_up_to_one(scripts, job, tmp_path):
    job = scripts.common.Job(
        job.data, "random", job.models, size=SIZE, settings={"blocks": 2, "training": {"epochs": 1}}
    )
    found = scripts.gates.gates(job, "busi", "ablation")
    assert (found["epochs"], found["weights"], found["preset"]) == (1, "random", "ablation")
    for name in ("trained", "untrained"):
        assert found[name]["sobel change at border"]["mean"] < 0  # blurring takes edges away
        assert 0 <= found[name]["gate_fine at border"]["mean"] <= 1
    check_picture(tmp_path / "images" / "paper-gates-blurred-border.png")
    detector = job.model("busi", "egmf", "ablation").detector
    fields = scripts.gates.fields(detector, torch.rand(3, SIZE, SIZE).numpy())
    np.testing.assert_allclose(fields["gate_fine"] + fields["gate_coarse"], 1.0, atol=1e-6)  # float32 softmax


def test_gates_need_lesions(scripts, job):
    without_masks(job)
    with pytest.raises(SystemExit, match="no lesion masks"):
        scripts.gates.gates(job, "busi", "ablation")


@pytest.mark.slow
def test_the_script_records_one_figure_beside_the_others(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.figures, "load_results", lambda: [result("busi", "padim", "default", 0, 0.8)])
    scripts.figures.record("3", {"weights": "random"})
    words = ["figures.py", "--data", str(tmp_path), "--weights", "random", "8"]
    monkeypatch.setattr(sys, "argv", words)
    scripts.figures.main()
    known = json.loads((tmp_path / "results" / "figures.json").read_text())
    assert set(known) == {"figure 3", "figure 8"}
    assert set(known["figure 8"]) >= {"commit", "weights", "seed", "epochs", "panels"}
    monkeypatch.setattr(sys, "argv", [*words, "7"])
    with pytest.raises(SystemExit):
        scripts.figures.main()


@pytest.mark.slow
def test_a_picture_that_is_too_large_loses_colours_or_is_refused(scripts, monkeypatch, tmp_path):
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    monkeypatch.setattr(scripts.common, "MAX_BYTES", 120_000)
    target = scripts.common.save(noise, "noise", folder=tmp_path)
    assert target.stat().st_size < 120_000
    monkeypatch.setattr(scripts.common, "MAX_BYTES", 1_000)
    with pytest.raises(SystemExit, match="bytes in 64 colours"):
        scripts.common.save(noise, "noise", folder=tmp_path)
    with pytest.raises(SystemExit, match="px wide"):
        scripts.common.save(PIL.Image.new("RGB", (1700, 4)), "wide", folder=tmp_path)


def test_intervals_need_two_values(scripts):
    assert scripts.common.interval([0.5]) == {"mean": 0.5, "ci95": None, "n": 1}
    found = scripts.common.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx([-0.484, 4.484], abs=1e-3)  # 4.303 / sqrt(3)
    assert scripts.common.span(found, 1) == "2.0 [-0.5, 4.5]"
