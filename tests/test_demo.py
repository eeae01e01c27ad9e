import json

import pytest

from umiad.demo import run_demo
from umiad.errors import InputError


def test_the_demonstration_ends_by_naming_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("UMIAD_CACHE", str(tmp_path / "cache"))
    result = run_demo(tmp_path / "demo", size=64)
    said = "\n".join(result.lines())
    assert "no pretrained weights at hand" in said
    for path in ("evaluation/report.html", "scores/report.html", "overview.png"):
        assert (tmp_path / "demo" / path).stat().st_size > 1000
        assert path in said
    assert len(result.scores) == 8
    assert json.loads((tmp_path / "demo" / "evaluation" / "metrics.json").read_text())["metrics"]
    run_demo(tmp_path / "demo", size=64, weights="random")  # again, over the earlier one


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no earlier demonstration"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
