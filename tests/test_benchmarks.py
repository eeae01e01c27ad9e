"""The protocol and its tables on phantoms: numbers are traced from JSON to the rendered cell."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from make import tiny_set
from make_sam import sam_checkpoint
from umiad.report import to_markdown

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_protocol
    import results_store
    import table3
    import table4
    import tables

    for module in (paper_protocol, results_store):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return SimpleNamespace(
        protocol=paper_protocol, store=results_store, tables=tables, table3=table3, table4=table4
    )


def write_list(path, *, detectors=("padim",), more=""):
    names = json.dumps(list(detectors))
    path.write_text(
        f'[[run]]\ndetectors = {names}\ndatasets = ["busi", "head_ct"]\nseeds = [0]\nsize = 64\n{more}'
    )
    return path


def run(scripts, monkeypatch, tmp_path, *words):
    listed = [str(tmp_path / "runs.toml"), "--data", str(tmp_path / "data"), "--weights", "random"]
    monkeypatch.setattr(sys, "argv", ["paper_protocol.py", *listed, *words])
    scripts.protocol.main()


@pytest.fixture
def result(scripts, tmp_path, monkeypatch):
    """One padim run on phantoms under the name of busi; head_ct is not there."""
    tiny_set(tmp_path / "data" / "busi", n_normal=16, n_abnormal=4)
    write_list(tmp_path / "runs.toml")
    run(scripts, monkeypatch, tmp_path)
    [path] = (tmp_path / "results").glob("*.json")
    return path


def test_a_grid_runs_and_resumes(scripts, tmp_path, monkeypatch, capsys, result):
    record = json.loads(result.read_text())
    named = {
        "detector",
        "dataset",
        "preset",
        "variant",
        "seed",
        "holdout",
        "n_train",
        "weights",
        "size",
        "commit",
    }
    assert named | {"metrics", "metrics_common", "thresholds", "cases", "equalise"} <= record.keys()
    assert "head_ct is not there" in capsys.readouterr().err
    before = result.stat().st_mtime_ns
    run(scripts, monkeypatch, tmp_path)
    assert result.stat().st_mtime_ns == before
    assert "done before" in capsys.readouterr().err
    run(scripts, monkeypatch, tmp_path, "--dry-run")
    assert capsys.readouterr().out.split()[0] == "done"


def test_scores_of_every_case_are_kept_and_give_the_metrics(result):
    from sklearn.metrics import roc_auc_score

    record = json.loads(result.read_text())
    labels = [int(digit) for digit in record["cases"]["labels"]]
    for metrics, scores in (("metrics", "image_scores"), ("metrics_common", "image_scores_common")):
        value = roc_auc_score(labels, record["cases"][scores])
        assert record[metrics]["det_auroc"]["value"] == pytest.approx(value)
    # padim's own post-processing is the common one
    assert record["metrics"]["seg_auroc"] == record["metrics_common"]["seg_auroc"]


def test_the_threshold_rule_lets_the_stated_share_of_fitted_normals_through(scripts):
    scores = list(range(100))
    limit = scripts.protocol.quantile(scores)
    assert sum(score > limit for score in scores) <= 100 * scripts.protocol.FPR
    assert "fitted normal" in scripts.protocol.THRESHOLD_RULE


def test_numbers_are_traced_from_json_to_the_cell(scripts, result):
    record = json.loads(result.read_text())
    results = scripts.store.load_results()
    shown = scripts.store.cell(record["metrics"]["det_auroc"])
    assert shown in scripts.tables.results_table(results)
    rows = scripts.table3.accuracy(results, "busi").rows
    [own] = [row for row in rows if row[:2] == ("padim (ours)", "official")]
    assert own[2] == shown
    assert own[5] == scripts.store.cell(record["metrics"]["seg_aupro"])
    page = to_markdown(scripts.table3.table3(results))
    assert "95.83" in page  # the paper's printed value stands beside
    assert any("CFlow (paper)" in line and "(suspect)" in line for line in page.splitlines())
    lines = list(scripts.table3.best_lines(results))
    assert any("highest det_auroc padim" in line for line in lines)


def test_an_equalised_run_is_a_variant_of_its_own(scripts, tmp_path, monkeypatch, result):
    write_list(tmp_path / "runs.toml", more='variant = "equalised"\nequalise = 32\n')
    run(scripts, monkeypatch, tmp_path)
    results = scripts.store.load_results()
    assert sorted(r["variant"] for r in results) == ["equalised", "main"]
    equalised = next(r for r in results if r["variant"] == "equalised")
    rows = scripts.table3.accuracy(results, "busi").rows
    [row] = [row for row in rows if row[:2] == ("padim (ours)", "official")]
    assert scripts.store.cell(equalised["metrics"]["det_auroc"]) == row[8]


def test_with_a_hold_out_thresholds_are_those_of_the_fitted_model(scripts, tmp_path, monkeypatch, result):
    set_ = []
    fit = scripts.protocol.fit

    def noted(*given, **options):
        set_.append(fit(*given, **options))
        return set_[-1]

    monkeypatch.setattr(scripts.protocol, "fit", noted)
    write_list(tmp_path / "runs.toml", more='variant = "holdout"\nholdout = 0.3\n')
    run(scripts, monkeypatch, tmp_path)
    [record] = [r for r in scripts.store.load_results() if r["variant"] == "holdout"]
    found, calibration = record["thresholds"]["official"], set_[0].config.calibration
    assert found["image_threshold"] == pytest.approx(calibration.image_threshold, rel=1e-5)
    assert found["map_threshold"] == pytest.approx(calibration.map_threshold, rel=1e-5)
    assert found["threshold_rule"] == calibration.rule


def test_two_results_for_one_seed_are_an_error(scripts, result):
    (result.parent / "copy.json").write_text(result.read_text())
    with pytest.raises(SystemExit, match="two results for one seed"):
        scripts.tables.results_table(scripts.store.load_results())


def test_every_preset_of_egmf_has_a_row_of_its_own(scripts, result):
    record = json.loads(result.read_text()) | {"detector": "egmf"}
    runs = [
        record
        | {"preset": preset, "metrics": record["metrics"] | {"det_auroc": {"value": value, "ci95": None}}}
        for preset, value in (("default", 0.812), ("paper", 0.634))
    ]
    cells = {"default": "81.2", "paper": "63.4"}
    titles = {"default": "egmf (ours)", "paper": "egmf, preset paper (ours)"}
    for shown in (("default", "paper"), ("default",), ("paper",)):
        given = [run for run in runs if run["preset"] in shown]
        rows = [row for row in scripts.table3.accuracy(given, "busi").rows if row[1] == "official"]
        assert [row[:3] for row in rows] == [(titles[p], "official", cells[p]) for p in shown]
        page = scripts.tables.results_table(given)
        for preset in cells:
            line = f"egmf, preset {preset} | {cells[preset]} |"
            assert (line in page) == (preset in shown)
        points = scripts.table3.operating_points(given, "busi").rows
        assert {row[0] for row in points if "ours" in row[0]} == {titles[p] for p in shown}
        first = next(iter(scripts.table3.best_lines(given)))
        assert f"highest det_auroc {titles[shown[0]].removesuffix(' (ours)')} {cells[shown[0]]}" in first


def test_a_detector_without_a_map_has_dashes_for_pixels(scripts, result):
    record = json.loads(result.read_text()) | {"localises": False}
    [row] = [r for r in scripts.table3.accuracy([record], "busi").rows if r[1] == "official"]
    assert row[4:6] == ("-", "-")
    assert record["metrics"]["seg_auroc"]["value"] is not None


def test_rescored_variants_share_the_fit(scripts, tmp_path):
    data = tiny_set(tmp_path / "data", n_normal=12, n_abnormal=3)
    job = scripts.protocol.DEFAULTS | {
        "detector": "egmf",
        "dataset": "busi",
        "preset": "quick",
        "seed": 0,
        "size": 64,
        "rescore": {"full": {"likelihood": "full"}},
    }
    written = scripts.protocol.execute(job, data, "random", scratch=None)
    records = {r["variant"]: r for r in (json.loads(path.read_text()) for path in written)}
    assert records.keys() == {"main", "full"}
    assert records["main"]["log"]
    assert not records["full"]["log"]
    assert records["full"]["config"]["likelihood"] == "full"


SAM_ROW = """variant = "sam"
settings = { edge = "sam", aggregate = "add", fusion = "none", blocks = 2, training = { epochs = 1 } }
preset = "ablation"
"""


def test_without_a_checkpoint_sams_row_is_not_run_and_says_so(scripts, tmp_path, monkeypatch, capsys):
    write_list(tmp_path / "runs.toml", detectors=["egmf"], more=SAM_ROW)
    run(scripts, monkeypatch, tmp_path)
    told = capsys.readouterr().err.splitlines()
    expected = "not run: busi egmf ablation sam 0: no SAM checkpoint, name one with --sam FOLDER"
    assert told == [expected, expected.replace("busi", "head_ct")]
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_runs_sams_row(scripts, tmp_path, monkeypatch):
    folder = sam_checkpoint(tmp_path / "sam", size=64)
    tiny_set(tmp_path / "data" / "busi", n_normal=14, n_abnormal=2)
    more = SAM_ROW.replace("blocks = 2", "blocks = 2, sam_points = 3")
    write_list(tmp_path / "runs.toml", detectors=["egmf"], more=more)
    run(scripts, monkeypatch, tmp_path, "--sam", str(folder))
    [path] = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["variant"], record["config"]["edge"]) == ("sam", "sam")
    assert record["config"]["sam"].startswith("file:")
    assert str(tmp_path) not in path.read_text()
    before = path.stat().st_mtime_ns
    run(scripts, monkeypatch, tmp_path, "--sam", str(folder))
    assert path.stat().st_mtime_ns == before


def test_a_lead_is_judged_in_pairs(scripts, result):
    record = json.loads(result.read_text())
    labels = [int(digit) for digit in record["cases"]["labels"]]
    perfect, reverse = ([sign * label + 0.001 * k for k, label in enumerate(labels)] for sign in (1.0, -1.0))
    runs = []
    for name, value, scores in (("padim", 1.0, perfect), ("posgauss", 0.0, reverse)):
        metrics = record["metrics"] | {"det_auroc": {"value": value, "ci95": None}}
        cases = record["cases"] | {"image_scores": scores, "image_scores_common": scores}
        runs.append(
            record | {"detector": name, "metrics": metrics, "metrics_common": metrics, "cases": cases}
        )
    line = next(iter(scripts.table3.best_lines(runs)))
    assert "padim 100.0 (next posgauss; paired difference 100.0 to 100.0: ahead)" in line
    runs[1] = runs[0] | {"detector": "posgauss"}
    assert "no difference shown" in next(iter(scripts.table3.best_lines(runs)))
    single = record["cases"] | {"groups": ["one"] * len(labels)}
    alone = [run | {"cases": single} for run in runs]
    assert "(next posgauss; no interval)" in next(iter(scripts.table3.best_lines(alone)))
    runs[1] |= {"split_digest": "other"}
    with pytest.raises(SystemExit, match="different test images"):
        list(scripts.table3.best_lines(runs))


def test_undefined_cells_are_dashes_and_missing_markers_an_error(scripts):
    assert scripts.store.cell({"value": None, "ci95": None}) == "-"
    assert scripts.store.spread([0.5]) == "-"
    assert scripts.store.spread([0.5, 0.7]) == "60.0 (50.0 to 70.0, n = 2)"
    with pytest.raises(SystemExit, match="markers"):
        scripts.tables.replace_between("no markers", "results", "x")
    text = "a\n<!-- results:start -->\nold\n<!-- results:end -->\nb"
    assert "old" not in scripts.tables.replace_between(text, "results", "new")


ROWS = [
    {
        "name": "egmf",
        "preset": "default",
        "parts": {"encoder": {"total": 2782784, "trainable": 0}},
        "total": 2782784,
        "used": 2782784,
        "trainable": 0,
    },
    {
        "name": "egmf",
        "preset": "paper",
        "parts": {
            "encoder": {"total": 11176512, "trainable": 0},
            "fusion": {"total": 462000, "trainable": 462000},
        },
        "total": 25204212,
        "used": 25203570,
        "trainable": 14012340,
    },
    {
        "name": "msflow",
        "preset": "paper",
        "parts": {"encoder": {"total": 11176512, "trainable": 0}},
        "total": 21590000,
        "used": 13200000,
        "trainable": 9190000,
    },
]


def write_speed(folder, name="speed_scoring.json", **rows):
    folder.mkdir(exist_ok=True)
    facts = {"detectors": rows, "threads": 2, "commit": "abc"}
    (folder / name).write_text(json.dumps(facts))


def test_parameters_and_times_stand_beside_the_papers(scripts, tmp_path):
    page = scripts.tables.parameters_page(ROWS)
    for part in ("encoder", "fusion", "14 M", "25,203,570"):
        assert part in page
    shown = {line.split("|")[1].strip(): line for line in page.splitlines() if "| all |" in line}
    assert "14 M" in shown["egmf, preset paper"]
    assert "14 M" not in shown["egmf"]
    speed = {"egmf": {"preset": "paper", "ratio": 2.544}, "msflow": {"preset": "default", "ratio": 1.7}}
    write_speed(tmp_path / "results", **speed)
    table = scripts.table4.table4(ROWS)[0]
    own, paper, msflow = table.rows[:3]
    assert own == ("egmf", "2.78", "2.78", "0.00", "-", "-", "default", "-")
    assert paper[:7] == ("egmf, preset paper", "25.20", "25.20", "14.01", "14 (suspect)", "2.54", "paper")
    assert msflow == ("msflow", "21.59", "13.20", "9.19", "15 (suspect)", "1.70", "default", "51.7")
    missing = {row[0]: row for row in table.rows[3:]}  # of the paper's methods those that are not built here
    assert missing["MedViTV2, not built yet"][4:] == ("29.6", "-", "-", "57.0")
    assert "2 threads, commit abc" in table.caption


def test_times_of_both_presets_are_kept_apart(scripts, tmp_path):
    folder = tmp_path / "results"
    assert "not measured yet" in scripts.table4.table4(ROWS)[0].caption
    speed = {
        "egmf": {"preset": "default", "ratio": 1.4, "model_mb": 90.0},
        "egmf, preset paper": {"preset": "paper", "ratio": 2.5, "model_mb": 100.0},
    }
    write_speed(folder, **speed)
    assert [row[5] for row in scripts.table4.table4(ROWS)[0].rows[:3]] == ["1.40", "2.50", "-"]
    write_speed(folder, "speed_scoring-2.json", egmf={"preset": "default", "ratio": 9.0})
    with pytest.raises(SystemExit, match="egmf is timed twice"):
        scripts.store.load_speed()


def test_counted_rows_add_the_presets_that_tables_show(scripts, monkeypatch):
    def counted(*, preset="paper", names=("cflow", "egmf")):
        return [{"name": name, "preset": preset} for name in names]

    monkeypatch.setattr(scripts.table4, "parameter_table", counted)
    names = [(row["name"], row["preset"]) for row in scripts.table4.counted_rows()]
    assert names == [("cflow", "paper"), ("egmf", "default"), ("egmf", "paper")]


def test_speed_is_measured_for_every_named_detector(scripts, tmp_path, monkeypatch, capsys):
    import scoring_speed

    monkeypatch.setattr(scoring_speed, "TARGET", tmp_path / "speed.json")
    monkeypatch.setattr(scoring_speed, "N_TRAIN", 4)
    words = ["scoring_speed.py", "--detectors", "padim", "--size", "64", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", words)
    scoring_speed.main()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["detectors"]["padim"]["ratio"] > 0
    # the encoder down to layer 3 alone has 2.78 M parameters of 4 bytes
    assert found["detectors"]["padim"]["model_mb"] > 11
    assert "times the encoder" in capsys.readouterr().out
