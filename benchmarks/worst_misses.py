"""The images that the default of egmf ranks worst, to be looked at: docs/images/misses-SET.png and a table as JSON.

python benchmarks/worst_misses.py --data ../shared/data --weights FILE

Seed 0, hold-out 0. How wrong an image is ranked: for an abnormal one the share of normal test images that score
higher, for a normal one the share of abnormal images that score lower. This looks at labels and is for learning, not
for choosing: nothing was changed after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageDraw
from rich.console import Console

from paper_protocol import CODE, RESULTS, write
from umiad.api import FitOptions, build, fit
from umiad.data import load_data
from umiad.evaluation import ScoredTest, score_test
from umiad.fitting import case_image
from umiad.overlay import colour_scale, draw_overlay
from umiad.preprocess import resize_map, resize_mask
from umiad.progress import RichReporter

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WORST, COLUMNS, CELL = 10, 2, (420, 210)


def wrongness(test: ScoredTest) -> np.ndarray:
    """Share of the images of the other class that a test image is ordered wrongly against, [N]; ties count half."""
    scores, labels = test.image_scores, test.labels
    sign = np.where(labels == 1, 1.0, -1.0)
    wrong = np.zeros(len(scores))
    for k, score in enumerate(scores):
        margin = sign[k] * (score - scores[labels != labels[k]])
        wrong[k] = float((margin < 0).mean() + 0.5 * (margin == 0).mean())
    return wrong


def facts(test: ScoredTest, row: int, wrong: float) -> dict[str, object]:
    """What may explain a miss: class, size of the lesion and of the file, brightness against all test images."""
    case, mask = test.cases[row], test.masks[row]
    pixels = case_image(case).pixels
    area = None if mask is None or not mask.any() else round(float(mask.mean()), 4)
    return {
        "image": f"{case.path.parent.name}/{case.path.name}",
        "kind": case.kind,
        "label": int(test.labels[row]),
        "wrong_share": round(wrong, 3),
        "lesion_share": area,
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "mean_brightness": round(float(pixels.mean()), 3),
    }


def picture(
    test: ScoredTest, rows: list[int], lines: list[dict[str, object]], reference: float
) -> PIL.Image.Image:
    """Image and map of each row side by side, with its name and how wrong it is."""
    width, height = CELL
    sheet = PIL.Image.new("RGB", (COLUMNS * width, -(-len(rows) // COLUMNS) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (row, line) in enumerate(zip(rows, lines, strict=True)):
        image, mask = case_image(test.cases[row]), test.masks[row]
        shown = draw_overlay(
            image,
            resize_map(test.maps[row], image.size),
            scale=colour_scale(None, reference),
            mask=None if mask is None or not mask.any() else resize_mask(mask, image.size),
        )
        cell = PIL.Image.fromarray(shown)
        cell.thumbnail(CELL)
        x, y = place % COLUMNS * width, place // COLUMNS * (height + 18)
        sheet.paste(cell, (x, y + 18))
        text = f"{line['image']}: ranked wrongly against {100 * float(str(line['wrong_share'])):.0f} %"
        draw.text((x + 2, y + 3), text, fill="black")
    return sheet


def main() -> None:
    """One picture and one table per set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=["head_ct", "brain_mri", "busi"])
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    options = parser.parse_args()
    for name in options.sets:
        if (target := RESULTS / f"misses-{name}.json").exists():
            continue
        dataset = load_data(options.data / name)
        with RichReporter(Console(stderr=True)) as reporter:
            detector = build("egmf", weights=options.weights)
            model = fit(detector, dataset, options=FitOptions(holdout=0.0), reporter=reporter)
            test = score_test(model, dataset, reporter=reporter)
        wrong = wrongness(test)
        rows = [int(k) for k in np.lexsort((np.arange(len(wrong)), -wrong))[:WORST]]
        lines = [facts(test, row, float(wrong[row])) for row in rows]
        reference = float(np.quantile(test.maps[test.labels == 0], 0.999))
        picture(test, rows, lines, reference).quantize(128).save(IMAGES / f"misses-{name}.png", optimize=True)
        known = {"dataset": name, "seed": 0, "weights": detector.config.weights, "commit": CODE}
        write(target, {**known, "rows": lines})


if __name__ == "__main__":
    main()
