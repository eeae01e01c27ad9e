"""Writing what `evaluate` found: metrics.json, pictures of telling cases, curves and report.html."""

from __future__ import annotations

import json
from pathlib import Path

from umiad.charts import pro_chart, roc_chart, score_histogram
from umiad.errors import DiskError
from umiad.evaluation import Evaluation
from umiad.fitted import FittedModel
from umiad.fitting import case_image
from umiad.io import read_mask
from umiad.overlay import colour_scale, draw_overlay, png_bytes
from umiad.report import Picture, evaluation_page
from umiad.types import Case


def write_evaluation(model: FittedModel, evaluation: Evaluation, out: Path) -> Path:
    """Write `metrics.json`, `pictures/` and `report.html` into `out`; returns the report's path.

    Raises DiskError when the folder cannot be written.
    """
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        text = json.dumps(evaluation.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        (out / "metrics.json").write_text(text, encoding="utf-8")
        charts = _charts(model, evaluation)
        for chart in charts:
            (out / "pictures" / f"{chart.caption.split()[0].lower()}.png").write_bytes(chart.png)
        galleries = {
            title: [_picture(model, case) for case in cases] for title, cases in evaluation.examples.items()
        }
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error}") from error
    best = [each for title, found in galleries.items() if not _is_worst(title) for each in found]
    worst = [each for title, found in galleries.items() if _is_worst(title) for each in found]
    for number, each in enumerate(worst + best, start=1):
        (out / "pictures" / f"case-{number:02d}.png").write_bytes(each.png)
    return evaluation_page(
        out / "report.html", evaluation=evaluation.to_json(), charts=charts, best=best, worst=worst
    )


def _is_worst(title: str) -> bool:
    return title.endswith(")")


def _charts(model: FittedModel, evaluation: Evaluation) -> list[Picture]:
    calibration = model.config.calibration
    scores = [case.image_score for case in evaluation.cases]
    labels = [case.label for case in evaluation.cases]
    threshold = calibration.image_threshold if calibration else None
    charts = [
        Picture("Scores of normal and abnormal test images", score_histogram(scores, labels, threshold))
    ]
    if evaluation.roc:
        charts.append(Picture("ROC: true against false positives", roc_chart(evaluation.roc, "ROC")))
    if evaluation.pro is not None:
        charts.append(Picture("PRO: overlap of lesions against false positives", pro_chart(*evaluation.pro)))
    return charts


def _picture(model: FittedModel, case: Case) -> Picture:
    image = case_image(case)
    calibration = model.config.calibration
    [(_, score, small_map)] = model.score_images([image])
    finding = model.finding(image, score, small_map)
    scale = colour_scale(calibration.map_threshold if calibration else None, model.config.map_reference)
    mask = read_mask(case.masks, size=image.size) if case.masks else None
    overlay = draw_overlay(image, finding.anomaly_map, scale=scale, regions=finding.regions, mask=mask)
    p_value = "" if finding.p_value is None else f", p = {finding.p_value:.3g}"
    kind = case.kind or ("abnormal" if case.label else "normal")
    return Picture(f"{case.path.name} ({kind})", png_bytes(overlay), f"score {score:.5g}{p_value}")
