"""Writing what `evaluate` found: metrics.json, pictures of telling cases, curves and report.html."""

from __future__ import annotations

import json
from pathlib import Path

from umiad.cases import case_masks
from umiad.charts import pro_chart, roc_chart, score_histogram
from umiad.errors import DiskError
from umiad.evaluation import Evaluation
from umiad.fitted import FittedModel
from umiad.fitting import case_image
from umiad.overlay import colour_scale, draw_overlay, png_bytes
from umiad.report import Picture, evaluation_page, p_text
from umiad.types import Case


def write_evaluation(model: FittedModel, evaluation: Evaluation, out: Path) -> Path:
    """Write `metrics.json`, `pictures/` and `report.html` into `out`; returns the report's path.

    Raises DiskError when the folder cannot be written.
    """
    charts = _charts(model, evaluation)
    best, worst = ([_picture(model, case) for case in cases] for cases in (evaluation.best, evaluation.worst))
    text = json.dumps(evaluation.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
    files = {f"{name}.png": chart.png for name, chart in charts.items()}
    files |= {f"worst-{number:02d}.png": each.png for number, each in enumerate(worst, start=1)}
    files |= {f"best-{number:02d}.png": each.png for number, each in enumerate(best, start=1)}
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (out / "pictures" / name).write_bytes(content)
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error}") from error
    shown = list(charts.values())
    return evaluation_page(
        out / "report.html", evaluation=evaluation.to_json(), charts=shown, best=best, worst=worst
    )


def _charts(model: FittedModel, evaluation: Evaluation) -> dict[str, Picture]:
    calibration = model.config.calibration
    scores = [case.image_score for case in evaluation.cases]
    labels = [case.label for case in evaluation.cases]
    histogram = score_histogram(scores, labels, calibration.image_threshold if calibration else None)
    charts = {"scores": Picture("Scores of normal and abnormal test images", histogram)}
    if evaluation.roc:
        charts["roc"] = Picture("ROC: true against false positives", roc_chart(evaluation.roc, "ROC"))
    if evaluation.pro is not None:
        charts["pro"] = Picture("PRO: overlap of lesions against false positives", pro_chart(*evaluation.pro))
    return charts


def _picture(model: FittedModel, case: Case) -> Picture:
    image = case_image(case)
    calibration = model.config.calibration
    [(_, score, small_map)] = model.score_images([image])
    finding = model.finding(image, score, small_map)
    scale = colour_scale(calibration.map_threshold if calibration else None, model.config.map_reference)
    mask = case_masks(case, image.size) if case.masks else None
    overlay = draw_overlay(image, finding.anomaly_map, scale=scale, regions=finding.regions, mask=mask)
    p_value = "" if finding.p_value is None else f", p = {p_text(finding.p_value)}"
    kind = case.kind or ("abnormal" if case.label else "normal")
    return Picture(
        f"{case.alias or case.path.name} ({kind})", png_bytes(overlay), f"score {score:.5g}{p_value}"
    )
