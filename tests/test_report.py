from __future__ import annotations

import base64
import errno
import html
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umiad.errors import DiskError
from umiad.report import (
    RESEARCH_ONLY,
    Facts,
    Gallery,
    Picture,
    Table,
    Text,
    Warnings,
    evaluation_page,
    p_text,
    percent,
    score_page,
    to_markdown,
    write_page,
)
from umiad.types import Finding, Region

PNG = b"\x89PNG\r\n\x1a\nnot a whole picture"
PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></table></style><svg/onload=alert(1)>",
    "<!-- comment --> <![CDATA[ x ]]>",
    "<iframe src=javascript:alert(1)>",
    "&lt;script&gt;&#60;b&#62;",
    "</title><script src=//evil.example/x.js></script>",
    "javascript:alert(1)//http://evil.example",
    "{{7*7}} ${7*7} <%= 7*7 %>",
    "a\nb\r\tc\x00d\x7f\x85",
    "gpj.\u202enormal.png\u202c",
    "undecodable \udcff\udc80 bytes",
    "صورة سونار 乳腺 🩺.png",
    "=cmd|' /C calc'!A0",
]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page read back: texts, attributes, and whether every element is closed by its own end tag."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def rows_of(path: Path, title: str) -> list[list[str]]:
    """The cells of the table under a heading, header included."""
    section = re.search(
        rf"<h2>{re.escape(title)}</h2>(.*?)</section>", path.read_text(encoding="utf-8"), re.DOTALL
    )
    assert section is not None, f"no section {title!r}"
    rows = re.findall(r"<tr>(.*?)</tr>", section.group(1), re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub(r"</?bdi>", "", cell)) for cell in row] for row in cells]


def finding(name: str, score: float, **changes: Any) -> Finding:
    values: dict[str, Any] = {"p_value": 0.5, "above_threshold": False, "threshold": 2.0, "regions": ()}
    return Finding(name, score, np.zeros((4, 4), np.float32), **{**values, **changes})


FINDINGS = [
    finding("low.png", 1.0, p_value=0.8765),
    finding(
        "high.png",
        7.25,
        p_value=0.0123,
        above_threshold=True,
        regions=(Region((0, 0, 2, 2), 4, 9.0), Region((0, 0, 9, 9), 77, 8.0)),
    ),
    finding("middle.png", 3.5, p_value=0.04, above_threshold=True, notes=("alpha was put on black",)),
]
PROVENANCE = {"detector": "egmf", "weights": "random", "n_train": 120, "holdout": None}


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "findings": FINDINGS,
            "pictures": {each.name: PNG for each in FINDINGS},
            "skipped": [("broken.png", "ends after 12 bytes")],
            "provenance": PROVENANCE,
        }
        return score_page(tmp_path / "report.html", **{**values, **changes})

    return write


def metric(
    value: float | None, ends: tuple[float, float] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"value": value, "ci95": ends and list(ends), "n_resamples": 1000, "reason": reason}


def evaluation(n_normal: int = 34, **metrics: Any) -> dict[str, Any]:
    named = {
        "oracle_dice": metric(0.5, (0.4, 0.6)),
        "seg_aupro": metric(None, None, "no lesion masks"),
        "det_auroc": metric(0.9583, (0.9012, 0.9999)),
    }
    return {
        "metrics": {**named, **metrics},
        "counts": {"n_normal": n_normal, "n_abnormal": 97, "n_masked": 95},
        "provenance": PROVENANCE,
        "notes": ["3 images were left out"],
    }


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., Path]:
    def write(values: dict[str, Any], **pictures: Any) -> Path:
        galleries: dict[str, Any] = {"charts": (), "best": (), "worst": (), **pictures}
        return evaluation_page(tmp_path / "evaluation.html", evaluation=values, **galleries)

    return write


def all_blocks(text: str) -> list[Any]:
    return [
        Facts(text, [(text, text)]),
        Table(text, [text, "n"], [[text, "1"]], caption=text),
        Gallery(text, [Picture(text, PNG, text)], caption=text),
        Text(text, [text, text]),
        Warnings([text], title=text),
    ]


# the builder


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_becomes_markup_anywhere(tmp_path: Path, payload: str) -> None:
    harmless = read(write_page(tmp_path / "a", title="t", lead="t", blocks=all_blocks("t"), footer="t"))
    hostile = read(
        write_page(tmp_path / "b", title=payload, lead=payload, blocks=all_blocks(payload), footer=payload)
    )
    assert hostile.tags == harmless.tags
    assert [a[:2] for a in hostile.attributes] == [a[:2] for a in harmless.attributes]


@given(st.text(st.characters(), min_size=1, max_size=30))
def test_any_text_gives_a_page_in_valid_utf8_of_the_same_shape(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.html"
    harmless = read(write_page(path, title="t", lead="t", blocks=all_blocks("t")))
    assert read(write_page(path, title=text, lead=text, blocks=all_blocks(text))).tags == harmless.tags


def test_ordinary_names_of_any_script_are_shown_unchanged(tmp_path: Path) -> None:
    name = 'صورة 乳腺 🩺 "quoted" & <b>.png'
    assert name in read(write_page(tmp_path / "p", title=name, lead="", blocks=[])).texts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a␊b"),
        ("a\x00b", "a␀b"),
        ("a\udcffb", "a\ufffdb"),
        ("a\x85b", "a\ufffdb"),
        ("a\u202eb", "a[U+202E]b"),
        ("a\u2067b", "a[U+2067]b"),
    ],
)
def test_what_would_vanish_or_reverse_is_made_visible(tmp_path: Path, text: str, shown: str) -> None:
    page = write_page(tmp_path / "p", title="t", lead=text, blocks=[Table("t", ["h"], [[text]])])
    assert read(page).texts.count(shown) == 2


def test_the_page_needs_and_runs_nothing(tmp_path: Path) -> None:
    path = write_page(tmp_path / "p", title="t", lead="l", blocks=all_blocks("x"))
    source, page = path.read_text(encoding="utf-8"), read(path)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert all(
        v.startswith("data:image/png;base64,") for _, name, v in page.attributes if name in {"src", "href"}
    )
    assert not re.search(r"https?:|@import|url\(", source)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]


def test_policy_comes_before_anything_it_governs(tmp_path: Path) -> None:
    source = write_page(tmp_path / "p", title="t", lead="l", blocks=[]).read_text(encoding="utf-8")
    head = source[: source.index("<title>")]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in head
    assert head.index("charset") < head.index("Content-Security-Policy") < source.index("<style>")


@pytest.mark.parametrize(
    "rule", ["color-scheme:light dark", "prefers-color-scheme:dark", "@media print", "width=device-width"]
)
def test_light_dark_print_and_phone(tmp_path: Path, rule: str) -> None:
    assert rule in write_page(tmp_path / "p", title="t", lead="l", blocks=[]).read_text(encoding="utf-8")


def test_every_page_says_research_only(tmp_path: Path) -> None:
    assert RESEARCH_ONLY == "Research use only: unusual regions, not a diagnosis."
    assert RESEARCH_ONLY in read(write_page(tmp_path / "p", title="t", lead="l", blocks=[])).text


def test_pictures_come_back_byte_for_byte_with_a_description(tmp_path: Path) -> None:
    path = write_page(tmp_path / "p", title="t", lead="l", blocks=[Gallery("g", [Picture("c", PNG, "d")])])
    attributes = {name: value for tag, name, value in read(path).attributes if tag == "img"}
    assert base64.b64decode(attributes["src"].partition(",")[2]) == PNG
    assert attributes["alt"] == "c"


def test_columns_of_numbers_are_set_to_the_right(tmp_path: Path) -> None:
    rows = [["a", "1.5", "1e-05", "90.1 to 99.0", "3"], ["b", "-2", "n/a", "undefined", "three"]]
    table = Table("t", ["name", "score", "p", "interval", "mixed"], rows)
    source = write_page(tmp_path / "p", title="t", lead="l", blocks=[table]).read_text(encoding="utf-8")
    right = re.findall(r'<th scope="col" class="number">(\w+)</th>', source)
    assert right == ["score", "p", "interval"]


def test_an_empty_table_keeps_its_header(tmp_path: Path) -> None:
    path = write_page(tmp_path / "p", title="t", lead="l", blocks=[Table("empty", ["a", "b"], [])])
    assert rows_of(path, "empty") == [["a", "b"]]


@pytest.mark.parametrize("row", [["1"], ["1", "2", "3"], []])
def test_a_row_of_another_length_than_the_header_is_refused(row: list[str]) -> None:
    with pytest.raises(ValueError, match=f"All: row 2 has {len(row)} cells, expected 2"):
        Table("All", ["a", "b"], [["1", "2"], row])


def test_disk_full_keeps_the_old_page_and_leaves_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path / "p.html", title="old", lead="l", blocks=[])
    old = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match="No space left"):
            write_page(path, title="new", lead="l", blocks=[])
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="file"):
        write_page(tmp_path / "file" / "p.html", title="t", lead="l", blocks=[])


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_page(tmp_path / "a", title="t", lead="l", blocks=all_blocks("x"))
    assert (
        first.read_bytes()
        == write_page(tmp_path / "b", title="t", lead="l", blocks=all_blocks("x")).read_bytes()
    )


def test_report_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, umiad.report; sys.exit(bool({'torch', 'matplotlib', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Markdown


def test_markdown_holds_everything_but_pictures() -> None:
    blocks = [
        Warnings(["careful", "really"]),
        Facts("Summary", [("images", "3")]),
        Table("All", ["file", "score"], [["a.png", "1.5"]], caption="sorted"),
        Gallery("Pictures", [Picture("c", PNG)]),
        Text("Notes", ["one", "two"]),
    ]
    assert to_markdown(blocks) == (
        "## Read this first\n\n> careful\n>\n> really\n\n"
        "## Summary\n\n| | |\n|---|---|\n| images | 3 |\n\n"
        "## All\n\n| file | score |\n|---|---:|\n| a.png | 1.5 |\n\nsorted\n\n"
        "## Notes\n\none\n\ntwo\n"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("[x](javascript:1)", r"\[x\](javascript:1)"),
        ("<script>", "&lt;script&gt;"),
        ("a_b*c`d", r"a\_b\*c\`d"),
        ("x\ny", "x␊y"),
        ("# title", r"\# title"),
        ("-3.5", "-3.5"),
    ],
)
def test_markdown_shows_texts_as_they_are(text: str, shown: str) -> None:
    assert f"| {shown} |\n" in to_markdown([Table("t", ["h"], [[text]])])


# numbers


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.9583, "95.8"), (0.0, "0.0"), (1.0, "100.0"), (None, "undefined"), (float("nan"), "undefined")],
)
def test_percent(fraction: float | None, shown: str) -> None:
    assert percent(fraction) == shown


@pytest.mark.parametrize(
    ("p_value", "shown"),
    [(1.0, "1.00"), (0.5, "0.50"), (0.0999, "0.10"), (0.0123, "0.012"), (0.00049, "0.00049"), (None, "n/a")],
)
def test_p_values_have_two_sensible_digits(p_value: float | None, shown: str) -> None:
    assert p_text(p_value) == shown


# scored images


def test_all_images_by_score_with_their_numbers(scored: Callable[..., Path]) -> None:
    assert rows_of(scored(), "All images") == [
        ["File", "Score", "p-value", "Above threshold", "Regions", "Largest region (pixels)"],
        ["high.png", "7.25", "0.012", "yes", "2", "77"],
        ["middle.png", "3.5", "0.04", "yes", "0", "n/a"],
        ["low.png", "1", "0.88", "no", "0", "n/a"],
    ]


def test_summary_counts(scored: Callable[..., Path]) -> None:
    assert rows_of(scored(), "Summary") == [
        ["Images scored", "3"],
        ["Above the threshold", "2"],
        ["Threshold", "2"],
        ["Without a threshold", "0"],
        ["Skipped files", "1"],
    ]


def test_skipped_files_come_with_reasons_and_notes_with_counts(scored: Callable[..., Path]) -> None:
    path = scored()
    assert rows_of(path, "Skipped files")[1:] == [["broken.png", "ends after 12 bytes"]]
    assert "1 image: alpha was put on black" in read(path).texts
    assert "Skipped files</h2>" not in scored(skipped=[]).read_text(encoding="utf-8")


def test_without_a_threshold_the_page_says_why_and_claims_nothing(scored: Callable[..., Path]) -> None:
    bare = {
        "p_value": None,
        "above_threshold": None,
        "threshold": None,
        "reason": "no held-out normal images",
    }
    path = scored(findings=[finding("a", 1.0, **bare), finding("b", 2.0, **bare)])
    summary = dict(rows_of(path, "Summary"))
    assert summary["Without a threshold"] == "2; 2 images: no held-out normal images"
    assert summary["Above the threshold"] == "undefined"
    assert summary["Threshold"] == "none"
    assert rows_of(path, "All images")[1] == ["b", "2", "n/a", "n/a", "n/a", "n/a"]


def test_gallery_shows_the_highest_scores_up_to_the_limit(scored: Callable[..., Path]) -> None:
    captions = [value for _, name, value in read(scored(limit=2)).attributes if name == "alt"]
    assert captions == ["high.png", "middle.png"]
    assert "score 7.25, p = 0.012, above the threshold" in read(scored()).texts
    assert "img" not in read(scored(limit=0)).tags


def test_images_without_a_picture_stay_in_the_table_only(scored: Callable[..., Path]) -> None:
    path = scored(pictures={"low.png": PNG})
    assert [value for _, name, value in read(path).attributes if name == "alt"] == ["low.png"]
    assert len(rows_of(path, "All images")) == 4


def test_nothing_scored_is_a_page_too(scored: Callable[..., Path]) -> None:
    path = scored(findings=[], pictures={})
    assert dict(rows_of(path, "Summary"))["Images scored"] == "0"


def test_provenance_is_complete(scored: Callable[..., Path]) -> None:
    expected = [["detector", "egmf"], ["weights", "random"], ["n_train", "120"], ["holdout", "unknown"]]
    assert rows_of(scored(), "Provenance") == expected


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_file_names_in_a_scored_page(scored: Callable[..., Path], payload: str) -> None:
    def page(text: str) -> Page:
        return read(
            scored(
                findings=[finding(text, 1.0, notes=(text,), reason=text)],
                pictures={text: PNG},
                skipped=[(text, text)],
                provenance={text: text},
            )
        )

    assert page(payload).tags == page("x").tags


# evaluations


def test_metrics_in_percent_with_intervals_counts_and_remarks(evaluated: Callable[..., Path]) -> None:
    path = evaluated(evaluation())
    header, *rows = rows_of(path, "Metrics")
    assert header == [
        "Metric",
        "Value (%)",
        "95 % interval (%)",
        "Normal images",
        "Abnormal images",
        "Remark",
    ]
    assert rows == [
        ["Detection AUROC", "95.8", "90.1 to 100.0", "34", "97", ""],
        [
            "Segmentation AUPRO (regions, false-positive rate up to 0.3)",
            "undefined",
            "n/a",
            "34",
            "95",
            "no lesion masks",
        ],
        [
            "Dice at the best threshold",
            "50.0",
            "40.0 to 60.0",
            "34",
            "95",
            "oracle: threshold chosen on the test images",
        ],
    ]
    assert "1000 resamples" in read(path).text
    assert "Detection AUROC 95.8 % on 34 normal images and 97 abnormal." in read(path).texts


def test_unknown_metrics_are_printed_under_their_own_name(evaluated: Callable[..., Path]) -> None:
    rows = rows_of(evaluated(evaluation(oracle_new=metric(0.25, None, "odd"))), "Metrics")
    wanted = ["oracle_new", "25.0", "n/a", "34", "95", "oracle: threshold chosen on the test images; odd"]
    assert rows[-1] == wanted


@pytest.mark.parametrize(
    ("n_normal", "warning"),
    [
        (1, "Only 1 normal test image: one image moves the detection AUROC by up to 100.0 points"),
        (10, "Only 10 normal test images: one image moves the detection AUROC by up to 10.0 points"),
        (19, "Only 19 normal test images: one image moves the detection AUROC by up to 5.3 points"),
        (0, "No normal test image"),
    ],
)
def test_few_normals_are_warned_about(evaluated: Callable[..., Path], n_normal: int, warning: str) -> None:
    assert warning in read(evaluated(evaluation(n_normal))).text


def test_twenty_normals_bring_no_warning_but_notes_stay(evaluated: Callable[..., Path]) -> None:
    text = read(evaluated(evaluation(20))).text
    assert "moves the detection AUROC" not in text
    assert "3 images were left out" in text
    silent = read(evaluated({**evaluation(20), "notes": []}))
    assert "Read this first" not in silent.texts


def test_undefined_detection_is_said_in_the_first_sentence(evaluated: Callable[..., Path]) -> None:
    path = evaluated(evaluation(0, det_auroc=metric(None, None, "no normal image")))
    assert "Detection AUROC undefined on 0 normal images and 97 abnormal." in read(path).texts


def test_a_page_without_any_interval_names_no_resamples(evaluated: Callable[..., Path]) -> None:
    values = {**evaluation(), "metrics": {"det_ap": metric(0.5)}}
    assert "resamples" not in read(evaluated(values)).text


def test_charts_best_and_worst_are_shown_in_reading_order(evaluated: Callable[..., Path]) -> None:
    path = evaluated(
        evaluation(), charts=[Picture("c", PNG)], best=[Picture("b", PNG)], worst=[Picture("w", PNG)]
    )
    assert [value for _, name, value in read(path).attributes if name == "alt"] == ["c", "w", "b"]
    assert "Curves and scores" not in read(evaluated(evaluation())).texts
