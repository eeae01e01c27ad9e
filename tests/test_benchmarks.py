"""The protocol and its tables on phantoms: numbers are traced from JSON to the rendered cell."""

import json
import sys
from pathlib import Path

import pytest

from make import tiny_set

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_protocol
    import tables

    monkeypatch.setattr(paper_protocol, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return paper_protocol, tables


def write_list(path):
    path.write_text(
        '[[run]]\ndetector = "padim"\npreset = "paper"\ndatasets = ["busi", "head_ct"]\nseeds = [0]\nsize = 64\n'
    )
    return path


def test_a_grid_runs_resumes_and_renders(scripts, tmp_path, monkeypatch, capsys):
    protocol, tables = scripts
    tiny_set(tmp_path / "data" / "busi", n_normal=16, n_abnormal=4)
    runs = write_list(tmp_path / "runs.toml")
    words = ["paper_protocol.py", "--data", str(tmp_path / "data"), "--weights", "random", str(runs)]
    monkeypatch.setattr(sys, "argv", words)
    protocol.main()
    [result] = (tmp_path / "results").glob("*.json")
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
        "metrics",
    }
    assert named <= record.keys()
    assert "head_ct" in capsys.readouterr().err  # the set that is not there is named
    before = result.stat().st_mtime_ns
    protocol.main()
    assert result.stat().st_mtime_ns == before
    assert "done before" in capsys.readouterr().err
    text = tables.results_table(tables.load_results())
    assert tables.cell(record["metrics"]["det_auroc"]) in text
    assert "95.83" in text  # the paper's printed value stands beside


def test_rescored_variants_share_the_fit(scripts, tmp_path):
    protocol, _ = scripts
    data = tiny_set(tmp_path / "data", n_normal=12, n_abnormal=3)
    run = {
        "detector": "egmf",
        "dataset": "busi",
        "preset": "quick",
        "variant": "main",
        "seed": 0,
        "holdout": 0.0,
        "size": 64,
        "settings": {"blocks": 1, "training": {"epochs": 1}},
        "rescore": {"full": {"likelihood": "full"}},
    }
    written = protocol.execute(run, data, "random", scratch=None)
    records = {r["variant"]: r for r in (json.loads(path.read_text()) for path in written)}
    assert records.keys() == {"main", "full"}
    assert records["main"]["log"]
    assert not records["full"]["log"]
    assert records["full"]["config"]["likelihood"] == "full"


def test_undefined_cells_are_dashes_and_missing_markers_an_error(scripts):
    _, tables = scripts
    assert tables.cell({"value": None, "ci95": None}) == "-"
    with pytest.raises(SystemExit, match="markers"):
        tables.replace_between("no markers", "results", "x")
    text = "a\n<!-- results:start -->\nold\n<!-- results:end -->\nb"
    assert "old" not in tables.replace_between(text, "results", "new")


def test_the_parameter_page_names_every_part(scripts):
    _, tables = scripts
    page = tables.parameters_page()
    for part in ("encoder", "flow4", "fusion", "statistics", "14 M"):
        assert part in page
