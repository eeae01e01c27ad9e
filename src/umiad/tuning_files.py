"""Writing what `tune` found: report.html, tuning.json, tuning.md, best.toml and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import umiad
from umiad.charts import heat_chart
from umiad.comparison_files import SHORT, metric_cell, points, verdict, write_pictures
from umiad.comparison_result import COMPARED
from umiad.detectors import detector_class
from umiad.diskfile import write_atomic
from umiad.errors import DiskError
from umiad.overlay import colour_scale, draw_image, draw_overlay, png_bytes
from umiad.report import (
    FEW_NORMALS,
    NONE,
    Block,
    Facts,
    Gallery,
    Picture,
    Table,
    Text,
    Warnings,
    percent,
    to_markdown,
    write_page,
)
from umiad.tuning_candidates import as_toml, setting_texts
from umiad.tuning_result import JUDGED, NO_MAP, PARTS, RANK, SIZES, Result, Tuning
from umiad.types import Image

REPORT, RESULT, MARKDOWN, BEST = "report.html", "tuning.json", "tuning.md", "best.toml"
TITLES = {RANK: "rank_score", **SHORT}
PROXY = (
    "Synthetic anomalies are no lesions. They are patches altered by a computer, and how well a detector finds them "
    "says little about how well it finds real findings. Use these numbers to choose between settings, never as an "
    "estimate of accuracy; judge what you chose on real cases (`umiad evaluate`) before you rely on it."
)
READING = (
    "rank_score is the mean of detection AUROC, pixel AUROC and AUPRO; candidates are ranked by it. Every number is "
    "the mean over the folds.",
    "Intervals: 95 %, bootstrap over source images within each fold: a normal image (with its near-duplicates or its "
    "patient's others) and all anomalies planted in it are drawn together, and all candidates get the same draws. They "
    "hold for the models as fitted: another seed of a detector, other folds or other anomalies are not in them.",
    "Gap: nats per dimension by which held-out normal images are less likely than the fitted ones, for detectors "
    "with a likelihood. Near 0 the model generalises; a large gap is overfitting. Compare it within one detector only.",
    "Where the difference from the best is 'no difference shown', the cheaper setting is as good a choice.",
)
EXHIBITED = (
    "Chosen without looking at any result: of each family the anomaly next to 3 % of the image in the first fold, and "
    "two normal images. Dashed green: what was altered. Beside it the map of the best candidate, fitted without these "
    "images; white-and-black line: above the threshold that 95 % of that fold's normal images stay below, as far as "
    "there are enough of them (only drawn here, not used for any number)."
)


def write_tuning(tuning: Tuning, out: str | os.PathLike[str]) -> Path:
    """Write `report.html`, `tuning.json`, `tuning.md`, `best.toml` and `pictures/` into `out`; returns the report.

    Without a ranked candidate there is no `best.toml`, and an older one is removed. Raises DiskError.
    """
    out = Path(out)
    charts, shown = _charts(tuning), _gallery(tuning)
    write_pictures(out, {f"{name}.png": each.png for name, each in (charts | shown).items()})
    blocks = tuning_blocks(tuning)
    text = json.dumps(tuning.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomic(out / RESULT, text.encode("utf-8", errors="backslashreplace"))
    write_atomic(out / MARKDOWN, ("# Tuning\n\n" + to_markdown(blocks)).encode("utf-8"))
    _write_best(tuning, out / BEST)
    pictures: list[Block] = []
    if charts:
        pictures.append(
            Gallery("Families and sizes at a glance", list(charts.values()), "Percent.", wide=True)
        )
    if shown:
        pictures.append(Gallery("Synthetic anomalies", list(shown.values()), EXHIBITED, wide=True))
    page = [*blocks[:-1], *pictures, blocks[-1]]
    return write_page(
        out / REPORT, title="Settings compared on synthetic anomalies", lead=_lead(tuning), blocks=page
    )


def tuning_blocks(tuning: Tuning) -> list[Block]:
    """The report without pictures: cautions, what was done, ranking, differences, parts; provenance last."""
    return [
        Warnings([PROXY, *_cautions(tuning)]),
        Text("What was done", [_done(tuning), *READING]),
        _ranking(tuning),
        _use(tuning),
        _differences(tuning),
        _parts(tuning),
        _provenance(tuning),
    ]


def _lead(tuning: Tuning) -> str:
    best = tuning.best
    chosen = "no candidate could be ranked" if best is None else f"highest rank_score: {best.name}"
    return f"{len(tuning.results) + len(tuning.failures)} candidates, {_counts(tuning)}: {chosen}."


def _counts(tuning: Tuning) -> str:
    return f"{sum(map(len, tuning.folds))} normal images, {tuning.n_synthetic} synthetic anomalies"


def _done(tuning: Tuning) -> str:
    options = tuning.options
    return (
        f"Only normal images of the training part were used ({tuning.rule}); abnormal and test images were "
        f"fingerprinted for the split and not used. The {sum(map(len, tuning.folds))} normal images, grey and "
        f"{options.size} x {options.size} pixels, were cut into {len(tuning.folds)} folds "
        f"({', '.join(str(len(names)) for names in tuning.folds)} images), near-duplicates and patients together. Each "
        f"candidate was fitted without a fold and then scored that fold's normal images and {options.per_image} "
        "synthetic anomalies planted in each of them: seven families of alterations, 0.3 to 30 % of the image. The "
        "anomalies are the same for all candidates."
    )


def _cautions(tuning: Tuning) -> Iterator[str]:
    yield from (f"{name} failed: {reason}" for name, reason in tuning.failures.items())
    if (fewest := min(map(len, tuning.folds))) < FEW_NORMALS:
        yield f"A fold holds only {fewest} normal images: numbers are coarse, look at the intervals and differences."
    blind = [each.name for each in tuning.results if detector_class(each.candidate.detector).info.uses_size]
    if blind:
        yield f"All images were brought to one size before fitting, so {', '.join(blind)} saw no file's size here."
    if tuning.options.weights == "random":
        yield "Random backbone weights: settings that are best here need not be best with trained weights."
    yield from tuning.notes


def _ranking(tuning: Tuning) -> Table:
    header = (
        "Candidate",
        *(TITLES[metric] for metric in JUDGED),
        "Gap (nats/dim)",
        "Held out (nats/dim)",
        "Fitted (nats/dim)",
        "Fit (s)",
        "Detector and settings",
    )
    rows = []
    for each in tuning.results:
        cells = [_cell(each, metric) for metric in JUDGED]
        nats = (each.gap, each.mean("nats_held_out"), each.mean("nats_fitted"))
        numbers = (NONE if value is None else f"{value:.4f}" for value in nats)
        rows.append((each.name, *cells, *numbers, f"{each.fit_seconds:.1f}", _what(each)))
    rows += [(name, *[NONE] * 8, f"failed: {reason}") for name, reason in tuning.failures.items()]
    return Table("Candidates", header, rows, "Percent, with the 95 % interval. Fit: seconds per fold.")


def _cell(result: Result, metric: str) -> str:
    return metric_cell({"value": result.value(metric), "ci95": result.interval(metric)})


def _what(result: Result) -> str:
    candidate = result.candidate
    words = ", ".join(
        [f"{candidate.detector}, preset {candidate.preset}", *setting_texts(candidate.settings)]
    )
    return words if result.localises else f"{words}; {NO_MAP}"


def _use(tuning: Tuning) -> Facts:
    """The command line of the best candidate, or why there is none."""
    best = tuning.best
    if best is None:
        return Facts("To use the best", [("none", "no candidate could be ranked")])
    return Facts(
        "To use the best", [("candidate", best.name), ("command", tuning.command(best)), ("file", BEST)]
    )


def _differences(tuning: Tuning) -> Table:
    rows = [
        (
            TITLES[each.metric],
            each.first,
            each.second,
            NONE if each.value is None else points(each.value),
            NONE if each.ci95 is None else f"{points(each.ci95[0])} to {points(each.ci95[1])}",
            verdict(each),
        )
        for each in tuning.against_best()
    ]
    header = ("Metric", "Best", "Other", "Difference (points)", "95 % interval", "Verdict")
    caption = (
        "Paired bootstrap. The best was picked on these very images and several differences are looked at, so an "
        "interval that barely leaves out 0 is weak evidence. All pairs are in tuning.json."
    )
    return Table("The best against each other", header, rows, caption)


def _parts(tuning: Tuning) -> Table:
    rows = [
        (each.name, SHORT[metric], *(_part(each, part, metric) for part in PARTS))
        for each in tuning.results
        for metric in (COMPARED if each.localises else COMPARED[:1])
    ]
    sizes = {"small": "below 1 %", "medium": "1 to 5 %", "large": "above 5 %"}
    header = ("Candidate", "Metric", *(f"{p} ({sizes[p]})" if p in SIZES else p for p in PARTS))
    counts = ", ".join(f"{part} {_count(tuning, part)}" for part in PARTS) if tuning.results else "none"
    caption = f"Percent. Each family and size class against all held-out normal images. Anomalies: {counts}."
    return Table("By family and size", header, rows, caption)


def _part(result: Result, part: str, metric: str) -> str:
    value = result.part(part, metric)
    return NONE if value is None else percent(value)


def _count(tuning: Tuning, part: str) -> int:
    return sum(fold.counts[part] for fold in tuning.results[0].folds)


def _provenance(tuning: Tuning) -> Facts:
    options = tuning.options.canonical()
    rows = [
        ("data", tuning.data),
        ("split", tuning.rule),
        *((name, "none" if value is None else str(value)) for name, value in options.items()),
        ("umiad", umiad.__version__),
        *((f"candidate {each.name}", "loaded" if each.loaded else "computed") for each in tuning.results),
    ]
    return Facts("Provenance", rows)


def _write_best(tuning: Tuning, path: Path) -> None:
    """The best candidate as a file that `--candidates` reads, with the command that fits it as a comment."""
    best = tuning.best
    if best is None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{path}: cannot be removed: {error}") from error
        return
    comments = (
        f"Highest rank_score ({percent(best.rank_score)} %) of {len(tuning.results)}, on synthetic anomalies:",
        "a proxy for choosing settings, not an estimate of accuracy.",
        "To fit it on all training images:",
        "  " + tuning.command(best),
    )
    lines = [f"# {line}" for text in comments for line in text.splitlines()]
    write_atomic(
        path, ("\n".join(lines) + "\n\n" + as_toml(best.candidate)).encode("utf-8", errors="replace")
    )


# Pictures


def _charts(tuning: Tuning) -> dict[str, Picture]:
    """A heat map per metric: candidates down, families and size classes across."""
    found = {}
    for metric in COMPARED:
        results = [each for each in tuning.results if each.localises or metric == COMPARED[0]]
        if results:
            values = [[each.part(part, metric) for part in PARTS] for each in results]
            low = 0.0 if metric == "seg_aupro" else 0.5
            names = [each.name for each in results]
            png = heat_chart(values, names, PARTS, f"{SHORT[metric]} (%)", low=low)
            found[f"parts-{metric}"] = Picture(f"{SHORT[metric]} by family and size of the anomaly", png)
    return found


def _gallery(tuning: Tuning) -> dict[str, Picture]:
    """Every exhibit with its outline and, beside it, the best candidate's map: name of the file -> picture."""
    found, best = {}, tuning.best
    for number, exhibit in enumerate(tuning.exhibits):
        image = Image(exhibit.pixels[None], exhibit.source)
        if best is None:
            drawn, beside = draw_image(image, mask=exhibit.mask), ""
        else:
            scale = colour_scale(best.map_threshold, best.map_reference)
            drawn = draw_overlay(image, best.maps[number], scale=scale, mask=exhibit.mask)
            beside = f"; map: {best.name}"
        area = "" if exhibit.mask is None else f", {percent(exhibit.area)} % of the image"
        detail = f"in {exhibit.source}{beside}"
        name = f"{number + 1:02d}-{exhibit.family}"
        found[name] = Picture(exhibit.family + area, png_bytes(drawn), detail)
    return found
