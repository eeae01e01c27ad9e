"""Writing what `compare` found: report.html, comparison.json, comparison.md and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umiad import detectors
from umiad.cases import case_masks
from umiad.charts import roc_chart
from umiad.comparison_result import (
    BETTER,
    POSTS,
    SAME,
    WORSE,
    Comparison,
    Difference,
    Exhibit,
    Post,
    Result,
)
from umiad.diskfile import write_atomic
from umiad.errors import DiskError
from umiad.fitting import case_image
from umiad.overlay import draw_image, draw_overlay, png_bytes
from umiad.preprocess import resize_map
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
    p_text,
    percent,
    to_markdown,
    write_page,
)

REPORT, RESULT, MARKDOWN, PICTURES = "report.html", "comparison.json", "comparison.md", "pictures"
CONSTANT = "n/a: does not localise"
SHORT = {
    "det_auroc": "Detection AUROC",
    "det_ap": "Detection AP",
    "seg_auroc": "Pixel AUROC",
    "seg_ap": "Pixel AP",
    "seg_aupro": "AUPRO",
}
INTERVALS = "Percent, with the 95 % interval of the bootstrap."
RULES = ("det_sensitivity", "det_specificity", "precision", "recall", "dice")
POST_NAMES: dict[Post, str] = {
    "official": "each detector's own post-processing",
    "common": "common post-processing",
}
COMMON = (
    "Own: each detector's published smoothing and image score. Common: the same for all (map smoothed until it has had "
    "a Gaussian of 4 pixels, image score = its maximum), since those choices alone move figures by several points."
)
CHOICE = (
    "The images were chosen from labels and lesion sizes alone, never by a result: five abnormal ones from the "
    "smallest lesion to the largest, evenly spaced by rank (without masks: by place in the test part), and three "
    "normal ones evenly spaced by place. Dashed green: the lesion's mask. Colours: each detector's own scale, tied to "
    "its threshold (white-and-black line: above it); compare places, not colours, between detectors."
)


def write_comparison(comparison: Comparison, out: str | os.PathLike[str]) -> Path:
    """Write `report.html`, `comparison.json`, `comparison.md` and `pictures/` into `out`; returns the report's path.

    Raises DiskError when the folder cannot be written.
    """
    out = Path(out)
    charts = _charts(comparison)
    galleries = [_gallery(comparison, number) for number in range(len(comparison.gallery))]
    text = json.dumps(comparison.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
    files = {f"{name}.png": chart.png for name, chart in charts.items()}
    for gallery in galleries:
        files |= {f"{name}.png": picture.png for name, picture in gallery.items()}
    write_pictures(out, files)
    blocks = comparison_blocks(comparison)
    write_atomic(out / RESULT, text.encode("utf-8", errors="backslashreplace"))
    write_atomic(out / MARKDOWN, ("# Comparison\n\n" + to_markdown(blocks)).encode("utf-8"))
    pictures: list[Block] = [Gallery("ROC curves", list(charts.values()), wide=True)] if charts else []
    if galleries:
        pictures.append(
            Text("The same test images under each detector", [CHOICE, *_without_maps(comparison)])
        )
    titles = (_exhibit_title(each) for each in comparison.gallery)
    pictures += [Gallery(t, list(g.values())) for t, g in zip(titles, galleries, strict=True)]
    page = [*blocks[:-2], *pictures, *blocks[-2:]]
    return write_page(out / REPORT, title="Comparison of detectors", lead=_lead(comparison), blocks=page)


def write_pictures(out: Path, files: Mapping[str, bytes]) -> None:
    """Write PNG files (name -> content) into `out/pictures`. Raises DiskError."""
    try:
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / PICTURES / name).write_bytes(content)
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error}") from error


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """The report without pictures: cautions, tables of metrics, costs and differences; provenance last."""
    cautions = list(_cautions(comparison))
    blocks: list[Block] = [Warnings(cautions)] if cautions else []
    blocks.append(Text("How to read the tables", [COMMON]))
    blocks.append(_metric_table("Detection (images)", comparison, ("det_auroc", "det_ap")))
    if comparison.has_masks:
        pixels = ("seg_auroc", "seg_ap", "seg_aupro")
        blocks.append(_metric_table("Localisation (pixels of lesions with masks)", comparison, pixels))
    blocks += [_rule_table(comparison), _cost_table(comparison)]
    blocks += [_difference_table(comparison, post) for post in POSTS]
    blocks += [_methods(comparison), _provenance(comparison)]
    return blocks


def _lead(comparison: Comparison) -> str:
    split = comparison.split
    tested = len(split.part("test"))
    return (
        f"{len(comparison.names)} detectors on {split.dataset}: the same {len(split.part('train'))} normal images "
        f"fitted, the same {tested} test images judged. Split {split.digest[:12]}."
    )


def _cautions(comparison: Comparison) -> Iterator[str]:
    yield from (f"{name} failed: {reason}" for name, reason in comparison.failures.items())
    if comparison.results:
        counts = comparison.results[0].evaluation.counts
        if not counts["n_normal"] or not counts["n_abnormal"]:
            missing = "normal" if counts["n_abnormal"] else "abnormal"
            yield f"No {missing} test image: detection cannot be judged."
        elif counts["n_normal"] < FEW_NORMALS:
            yield (
                f"Only {counts['n_normal']} normal test images: one of them moves a detection AUROC by up to "
                f"{percent(1 / counts['n_normal'])} points. Look at the intervals and at the differences."
            )
    if any(each.evaluation.provenance.get("weights") == "random" for each in comparison.results):
        yield "Random backbone weights: detectors that rest on the backbone are far below what they can do."
    yield from comparison.notes


def _title(name: str) -> str:
    adapted = detectors.detector_class(name).info.fidelity == "adapted"
    return f"{name} (adapted)" if adapted else name


def _metric_table(title: str, comparison: Comparison, names: Sequence[str]) -> Table:
    """Each metric under both post-processings, side by side."""
    found = {each.name: each for each in comparison.results}
    columns = [(metric, post) for metric in names for post in POSTS]
    words = {"official": "own", "common": "common"}
    header = ["Detector", *(f"{SHORT[metric]}, {words[post]}" for metric, post in columns)]
    rows, remarks = [], []
    for name in comparison.names:
        result = found.get(name)
        rows.append(
            [
                _title(name),
                *(NONE if result is None else metric_cell(result.metrics(p)[m]) for m, p in columns),
            ]
        )
        remarks.append(_remark(comparison, result, name, names))
    if any(remarks):
        header.append("Remark")
        rows = [[*row, remark] for row, remark in zip(rows, remarks, strict=True)]
    return Table(title, header, rows, INTERVALS)


def _remark(comparison: Comparison, result: Result | None, name: str, metrics: Sequence[str]) -> str:
    if result is None:
        return f"failed: {comparison.failures[name]}"
    if not result.info.localises and metrics[0].startswith("seg_"):
        return CONSTANT
    reasons = (result.metrics(post)[metric]["reason"] for post in POSTS for metric in metrics)
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def metric_cell(metric: dict[str, Any]) -> str:
    """A metric in percent with its interval; "n/a" where it is undefined."""
    if metric["value"] is None:
        return NONE
    ends = metric["ci95"]
    return percent(metric["value"]) + (
        "" if ends is None else f" ({percent(ends[0])}\u00a0to\u00a0{percent(ends[1])})"
    )


def _rule_table(comparison: Comparison) -> Table:
    names = RULES if comparison.has_masks else RULES[:2]
    header = ["Detector", "Image threshold", *(name.removeprefix("det_").capitalize() for name in names)]
    rows = []
    for each in comparison.results:
        threshold = each.evaluation.provenance["image_threshold"]
        cells = (metric_cell(each.evaluation.metrics[name]) for name in names)
        rows.append([_title(each.name), NONE if threshold is None else f"{threshold:.5g}", *cells])
    rules = dict.fromkeys(str(each.evaluation.provenance["threshold_rule"]) for each in comparison.results)
    what = "Sensitivity and specificity count images; precision, recall and Dice count pixels."
    caption = " ".join([INTERVALS, what, *(f"Threshold: {rule}." for rule in rules)])
    return Table("At each detector's own threshold", header, rows, caption)


def _cost_table(comparison: Comparison) -> Table:
    header = (
        "Detector",
        "Fidelity",
        "Parameters (million)",
        "Trainable (million)",
        "Fit (s)",
        "ms per image",
        "x bare backbone",
    )
    found = {each.name: each for each in comparison.results}
    rows = []
    for name in comparison.names:
        info = comparison.info(name)
        if name not in found:
            rows.append((name, info.fidelity, *[NONE] * 5, "failed"))
            continue
        cost = found[name].cost
        seconds = NONE if cost.fit_seconds is None else f"{cost.fit_seconds:.1f}"
        parameters = (f"{number / 1e6:.2f}" for number in (cost.parameters, cost.trainable))
        numbers = (*parameters, seconds, f"{1000 * cost.image_seconds:.1f}")
        rows.append((name, info.fidelity, *numbers, f"{cost.ratio:.2f}", cost.origin))
    caption = (
        f"Times: this machine, {comparison.options.size} px, batches of 8. x bare backbone: seconds per image as a "
        f"multiple of the bare {comparison.options.backbone} (four stages), measured in turn. Adapted: no one-class "
        "detector in its own paper. Loaded: fitted by an earlier run, whose seconds are shown."
    )
    return Table("What each detector is and costs", (*header, "Model"), rows, caption)


def _methods(comparison: Comparison) -> Facts:
    rows = []
    for name in comparison.names:
        info = comparison.info(name)
        blind = "" if info.uses_pixels else "; a control: does not look at what is in the image"
        rows.append((name, f"{info.summary}; {info.reference}{blind}"))
    return Facts("Methods", rows)


def _difference_table(comparison: Comparison, post: Post) -> Table:
    rows = [
        (
            SHORT[each.metric],
            each.first,
            each.second,
            NONE if each.value is None else points(each.value),
            NONE if each.ci95 is None else f"{points(each.ci95[0])} to {points(each.ci95[1])}",
            verdict(each),
        )
        for each in comparison.against_best(post)
    ]
    header = ("Metric", "Best", "Other", "Difference (points)", "95 % interval", "Verdict")
    caption = (
        "Paired bootstrap: both detectors on the same resampled images. The best was picked on these very images and "
        "several differences are looked at, so an interval that barely leaves out 0 is weak evidence. "
        "All pairs are in comparison.json."
    )
    return Table(f"The best against each other, {POST_NAMES[post]}", header, rows, caption)


def verdict(difference: Difference) -> str:
    """Which of the two is better, in words, or that no difference is shown."""
    words = {
        BETTER: f"{difference.first} better",
        WORSE: f"{difference.second} better",
        SAME: SAME,
        None: f"{NONE}: {difference.reason}",
    }
    return words[difference.verdict]


def points(fraction: float) -> str:
    """Percentage points with one decimal; no minus sign before a zero."""
    return percent(round(fraction, 3) + 0.0)


def _provenance(comparison: Comparison) -> Facts:
    split, options = comparison.split, comparison.options
    rows = [
        ("data", split.dataset),
        ("split", split.rule),
        ("split digest, the same for all", split.digest),
        *((f"images, {part}", str(len(split.part(part)))) for part in ("train", "holdout", "test")),
        *((name, "none" if value is None else str(value)) for name, value in options.canonical().items()),
    ]
    if comparison.results:
        known = comparison.results[0].evaluation.provenance
        counts = comparison.results[0].evaluation.counts
        rows += [(name, str(known[name])) for name in ("test_part", "bootstrap_seed", "umiad", "torch")]
        rows += [(f"test images, {name.removeprefix('n_')}", str(number)) for name, number in counts.items()]
        labels = sorted({str(each.evaluation.provenance["weights"]) for each in comparison.results})
        rows.append(("backbone weights, by content", ", ".join(labels)))
    return Facts("Provenance", rows)


# Pictures


def _charts(comparison: Comparison) -> dict[str, Picture]:
    """ROC curves of all detectors: of images and, where there are masks, of pixels."""
    charts = {}
    for kind, metric in (("images", "det_auroc"), ("pixels", "seg_auroc")):
        curves = {
            f"{_title(each.name)} {percent(each.evaluation.metrics[metric]['value'])}": each.evaluation.roc[
                kind
            ]
            for each in comparison.results
            if kind in each.evaluation.roc
        }
        if curves:
            caption = f"ROC of {kind}, own post-processing; numbers: area in percent"
            charts[f"roc-{kind}"] = Picture(caption, roc_chart(curves, f"ROC, {kind}"))
    return charts


def _without_maps(comparison: Comparison) -> list[str]:
    names = [each.name for each in comparison.results if not each.info.localises]
    return (
        [f"Not shown, since it does not localise (its map is constant): {', '.join(names)}."] if names else []
    )


def _exhibit_title(exhibit: Exhibit) -> str:
    kind = exhibit.case.kind or ("abnormal" if exhibit.case.label else "normal")
    lesion = "" if exhibit.lesion is None else f", lesion {percent(exhibit.lesion)} % of the image"
    return f"{exhibit.case.alias or exhibit.case.path.name} ({kind}{lesion})"


def _gallery(comparison: Comparison, number: int) -> dict[str, Picture]:
    """One test image and its overlay by every detector that localises: name of the file -> picture."""
    exhibit = comparison.gallery[number]
    image = case_image(exhibit.case)
    mask = case_masks(exhibit.case, image.size) if exhibit.case.masks else None
    drawn = [("original", draw_image(image, mask=mask), "")]
    for each in comparison.results:
        if not each.info.localises:
            continue
        anomaly_map = resize_map(each.maps[number], image.size)
        overlay = draw_overlay(image, anomaly_map, scale=each.scale, mask=mask, beside=False)
        case = each.evaluation.cases[exhibit.row]
        above = {True: ", above its threshold", False: ", not above its threshold", None: ""}[
            case.above_threshold
        ]
        p_value = "" if case.p_value is None else f", p = {p_text(case.p_value)}"
        drawn.append((each.name, overlay, f"score {case.image_score:.5g}{p_value}{above}"))
    height, width = (max(picture.shape[axis] for _, picture, _ in drawn) for axis in (0, 1))
    pictures = {}
    for name, picture, detail in drawn:
        page = np.full((height, width, 3), 255, dtype=np.uint8)
        page[: picture.shape[0], : picture.shape[1]] = picture
        caption = name if name == "original" else _title(name)
        pictures[f"image-{number + 1:02d}-{name}"] = Picture(caption, png_bytes(page), detail)
    return pictures
