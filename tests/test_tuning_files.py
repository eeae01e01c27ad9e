"""The files that tuning writes: report, JSON, Markdown, best.toml, pictures."""

import io
import json
import os
import re
import shlex
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from make import tiny_set
from umiad.charts import heat_chart
from umiad.comparison_result import COMPARED
from umiad.errors import DiskError
from umiad.synthetic import FAMILIES
from umiad.tuning import Candidate, TuneOptions, tune
from umiad.tuning_candidates import read_candidates
from umiad.tuning_files import tuning_blocks, write_tuning
from umiad.tuning_result import JUDGED, PARTS

QUICK = TuneOptions(weights="random", size=64, per_image=4, resamples=20, device="cpu")
CANDIDATES = [
    Candidate(name="smooth", detector="intensity"),
    Candidate(name="sharp", detector="intensity", settings={"sigma": 0.0, "tail": "dark"}),
    Candidate(name="file", detector="size"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    data = tiny_set(tmp_path_factory.mktemp("data") / "it's here", n_normal=16, n_abnormal=4, size=80)
    return tune(data, CANDIDATES, options=QUICK)


@pytest.fixture(scope="module")
def out(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "t"
    assert write_tuning(found, folder) == folder / "report.html"
    return folder


def without(found, *names):
    """The same with some candidates failed."""
    return replace(
        found,
        results=tuple(each for each in found.results if each.name not in names),
        failures={name: "no luck" for name in names},
    )


def test_the_report_stands_alone_and_holds_every_part(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    assert "<script" not in page
    assert "<link" not in page
    pictures = os.listdir(out / "pictures")
    assert page.count("data:image/png;base64,") == len(pictures)
    for words in (
        "Synthetic anomalies are no lesions",
        "never as an estimate of accuracy",
        "Only normal images of the training part were used",
        "By family and size",
        "The best against each other",
        "Chosen without looking at any result",
        "does not localise: not ranked",
        "Random backbone weights",
        "A fold holds only 4 normal images",
        "so file saw no file&#x27;s size here",
        "umiad fit",
    ):
        assert words in page
    assert "not an estimate of accuracy" in (out / "best.toml").read_text()


def test_the_pictures_are_one_of_each_family_normals_and_heat_maps(out, found):
    names = sorted(os.listdir(out / "pictures"))
    shown = [each.family for each in found.exhibits]
    assert set(shown) <= {*FAMILIES, "normal"}
    assert shown.count("normal") == 2
    assert [name for name in names if not name.startswith("parts-")] == [
        f"{number:02d}-{family}.png" for number, family in enumerate(shown, start=1)
    ]
    assert {name for name in names if name.startswith("parts-")} == {f"parts-{m}.png" for m in COMPARED}
    with PIL.Image.open(out / "pictures" / names[0]) as opened:
        pixels = np.asarray(opened).astype(int)
    green = (pixels == (0, 230, 64)).all(axis=2)
    assert green[:, :256].any()  # the outline, in the image and beside it on the map
    assert green[:, 256:].any()


def test_the_json_holds_every_number(out, found):
    values = json.loads((out / "tuning.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in values["candidates"]] == [each.name for each in found.results]
    best = values["candidates"][0]
    assert best["rank_score"] == {
        "value": found.results[0].rank_score,
        "ci95": list(found.results[0].interval("rank_score")),
    }
    assert set(best["parts"]) == set(PARTS)
    assert len(best["folds"]) == 3
    assert "draws" not in best["folds"][0]
    assert values["best"]["name"] == best["name"]
    assert values["candidates"][-1]["reason"] == "does not localise: not ranked"
    assert {each["metric"] for each in values["differences"]} == set(JUDGED)
    assert "proxy" in values["what"]


def test_the_markdown_holds_the_tables_and_the_caution(out):
    text = (out / "tuning.md").read_text(encoding="utf-8")
    for words in (
        "# Tuning",
        "> Synthetic anomalies are no lesions",
        "## Candidates",
        "| smooth |",
        "| sharp |",
    ):
        assert words in text


def test_the_best_is_a_file_of_candidates_with_its_command(out, found):
    [best] = read_candidates(out / "best.toml")
    assert best == found.best.candidate
    [line] = [x for x in (out / "best.toml").read_text().splitlines() if "umiad fit" in x]
    words = shlex.split(line.removeprefix("#"))
    assert words[:3] == ["umiad", "fit", found.data]
    assert "it's here" in words[2]


def test_failures_are_named_and_the_others_are_shown(found, tmp_path):
    page = write_tuning(without(found, "sharp"), tmp_path).read_text(encoding="utf-8")
    assert "sharp failed: no luck" in page
    assert json.loads((tmp_path / "tuning.json").read_text())["failures"] == {"sharp": "no luck"}


def test_without_a_ranked_candidate_there_is_a_report_and_no_best(found, tmp_path):
    (tmp_path / "best.toml").write_text("old")
    for names in (("smooth", "sharp"), ("smooth", "sharp", "file")):
        page = write_tuning(without(found, *names), tmp_path).read_text(encoding="utf-8")
        assert "no candidate could be ranked" in page
        assert not (tmp_path / "best.toml").exists()
        assert json.loads((tmp_path / "tuning.json").read_text())["best"] is None


def test_a_folder_that_cannot_be_written_is_a_disk_error(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        write_tuning(found, tmp_path / "file" / "t")
    (tmp_path / "t" / "best.toml" / "mine").mkdir(parents=True)
    with pytest.raises(DiskError, match="best.toml"):
        write_tuning(without(found, "smooth", "sharp"), tmp_path / "t")


def test_every_part_has_its_column_and_every_number_is_percent(found):
    table = next(each for each in tuning_blocks(found) if each.title == "By family and size")
    assert len(table.header) == 2 + len(PARTS)
    order = [each.name for each in found.results]
    assert order[-1] == "file"
    assert [row[0] for row in table.rows] == [*(n for n in order[:-1] for _ in COMPARED), "file"]
    for row in table.rows:
        assert all(cell == "n/a" or 0 <= float(cell) <= 100 for cell in row[2:])


def test_heat_chart_draws_gaps_and_nothing():
    png = heat_chart([[0.2, None], [0.9, 1.0]], ["a $x$", "b"], ["one", "two_three"], "Title $5", low=0.5)
    with PIL.Image.open(io.BytesIO(png)) as opened:
        assert opened.width > opened.height > 100
    assert heat_chart([], [], [], "empty").startswith(b"\x89PNG")
