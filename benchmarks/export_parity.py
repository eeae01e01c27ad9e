"""How far every detector's export is from the detector, on real images, for both runtimes; for docs/performance.md.

    python benchmarks/export_parity.py --data ../shared/data --weights FILE [--only padim,egmf]

Fitted on 60 normal images of busi at 128 px by preset "quick" (egmf also by "default" and "paper"), trained ones for
two epochs, since only what exporting changes is looked at; compared on 24 others, normal and abnormal. What is refused
is a row too, with its reason. Results are written after each row and kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_protocol import CODE
from umiad import api, detectors
from umiad.data import list_images
from umiad.errors import ConfigError
from umiad.export import export_model
from umiad.runtimes import Runtime

TARGET = Path(__file__).parent / "results" / "export_parity.json"
RUNTIMES: tuple[Runtime, ...] = ("onnx", "openvino")
DESIGNS = (*((name, "quick") for name in detectors.names()), ("egmf", "default"), ("egmf", "paper"))
FITTED, COMPARED, SIZE, EPOCHS = 60, 12, 128, 2
"""Normal images fitted; images compared of each kind; pixels; epochs (two, since fanogan has two phases)."""


def images(folder: Path, kind: str) -> list[str]:
    """The images of a kind in name order, without masks."""
    found, _ = list_images([folder / kind])
    return [str(path) for path in found if "_mask" not in path.name]


def compare(
    name: str, preset: str, weights: str, fitted: Sequence[str], checked: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per runtime."""
    built = api.build(name, preset=preset, weights=weights, size=SIZE)
    if not built.info.closed_form:
        settings = {"training": {"epochs": EPOCHS}}
        built = api.build(name, preset=preset, weights=weights, size=SIZE, settings=settings)
    model = api.fit(built, list(fitted))
    rows = []
    for runtime in RUNTIMES:
        row: dict[str, Any] = {"detector": name, "preset": preset, "runtime": runtime}
        with tempfile.TemporaryDirectory() as out:
            try:
                parity = export_model(model, Path(out) / "export", to=runtime, check=checked).parity
                row["parity"] = parity.canonical()
            except ConfigError as error:
                row["refused"] = str(error)
        rows.append({**row, "weights": model.info["weights"], "commit": CODE})
    return rows


def main() -> None:
    """Compare what has no rows yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with busi")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--only", help="detectors, with commas between: their rows are made anew")
    given = parser.parse_args()
    rows = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else []
    wanted = set(given.only.split(",")) if given.only else set()
    rows = [row for row in rows if row["detector"] not in wanted]
    done = {(row["detector"], row["preset"]) for row in rows}
    normal, abnormal = (images(given.data / "busi", kind) for kind in ("normal", "malignant"))
    checked = normal[FITTED : FITTED + COMPARED] + abnormal[:COMPARED]
    for name, preset in DESIGNS:
        if (name, preset) in done or (wanted and name not in wanted):
            continue
        rows += compare(name, preset, given.weights, normal[:FITTED], checked)
        TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        for row in rows[-len(RUNTIMES) :]:
            print(name, preset, row["runtime"], row.get("refused") or row["parity"], flush=True)


if __name__ == "__main__":
    main()
