"""What the figures share: which images are shown, fitted models, and pictures of a bounded size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from umiad.api import FitOptions, FittedModel, build, fit, load
from umiad.cases import case_masks
from umiad.data import DataSet, load_data
from umiad.duplicates import case_sha256
from umiad.fitting import case_image, split_data
from umiad.preprocess import resize_mask
from umiad.progress import Reporter, Silent
from umiad.splits import Split
from umiad.types import ABNORMAL, Case, Image

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES, MAX_WIDTH, DPI = 600_000, 1600, 120
HOLDOUT, SEED = 0.2, 0
SMALL, LARGE = 1 / 8, 7 / 8
"""Ranks of the lesions shown: the medians of the smallest and of the largest quarter."""


@dataclass(frozen=True)
class Job:
    """Where data and models are, and how detectors are built."""

    data: Path
    weights: str
    models: Path
    size: int = 256
    settings: Mapping[str, Any] = field(default_factory=dict)
    reporter: Reporter = field(default_factory=Silent)

    def model(self, dataset: str, detector: str, preset: str) -> FittedModel:
        """The model kept in `models`, or one fitted on the set's normal images and kept there."""
        target = self.models / f"{dataset}-{detector}-{preset}"
        if target.is_dir():
            return load(target)
        made = build(
            detector,
            preset=preset,
            weights=self.weights,
            size=self.size,
            seed=SEED,
            settings=self.settings,
        )
        options = FitOptions(holdout=HOLDOUT, seed=SEED)
        return fit(made, load_data(self.data / dataset), options=options, out=target, reporter=self.reporter)


@dataclass(frozen=True, eq=False)
class Shown:
    """A case of the test part with its picture; `mask` bool [H,W], None where nobody drew one or it is empty."""

    role: str
    case: Case
    image: Image
    mask: np.ndarray | None

    @property
    def name(self) -> str:
        """Folder and file."""
        return f"{self.case.path.parent.name}/{self.case.path.name}"

    @property
    def share(self) -> float | None:
        """Lesion pixels over all pixels."""
        return None if self.mask is None else float(self.mask.mean())

    def facts(self) -> dict[str, Any]:
        """For the results file."""
        share = None if self.share is None else round(self.share, 5)
        return {"image": self.name, "role": self.role, "lesion_share": share}

    def mask_at(self, size: int) -> np.ndarray:
        """The mask bool [size,size], all False without one."""
        return (
            np.zeros((size, size), dtype=bool) if self.mask is None else resize_mask(self.mask, (size, size))
        )


class Parts:
    """A data set, its split as every model here has it, and the test part in order."""

    def __init__(self, job: Job, name: str) -> None:
        self.dataset: DataSet = load_data(job.data / name)
        self.split: Split = split_data(self.dataset, seed=SEED, holdout=HOLDOUT, reporter=job.reporter)

    def cases(self, part: str) -> list[Case]:
        """The cases of "train", "holdout" or "test", one per group of near-duplicates, in the order of the data."""
        entries = {entry.sha256: entry for entry in self.split.entries if entry.part == part}
        found: dict[str, Case] = {}
        for case in self.dataset.cases:
            if (entry := entries.get(case_sha256(case))) is not None:
                found.setdefault(entry.group or entry.sha256, case)
        return list(found.values())

    @cached_property
    def abnormal(self) -> list[Case]:
        """Abnormal test images from the smallest lesion to the largest; in the order of files where none is drawn."""
        cases = [case for case in self.cases("test") if case.label == ABNORMAL]
        shares = {case: shown_case("", case).share for case in cases}
        drawn = [case for case in cases if shares[case] is not None]
        return sorted(drawn, key=lambda case: (shares[case], str(case.path))) or cases

    def at(self, rank: float, role: str) -> Shown:
        """The abnormal image at `rank` 0..1 of that order."""
        return shown_case(role, self.abnormal[round(rank * (len(self.abnormal) - 1))])

    def chosen(self) -> list[Shown]:
        """Small lesion, large lesion, normal: by labels and lesion sizes alone."""
        drawn = self.at(LARGE, "").mask is not None
        roles = ("small lesion", "large lesion") if drawn else ("abnormal", "abnormal")
        normal = [case for case in self.cases("test") if case.label != ABNORMAL]
        middle = shown_case("normal", normal[len(normal) // 2])
        return [self.at(SMALL, roles[0]), self.at(LARGE, roles[1]), middle]


def shown_case(role: str, case: Case) -> Shown:
    """Read a case's image and mask. Raises InputError."""
    image = case_image(case)
    mask = case_masks(case, image.size) if case.masks else None
    return Shown(role, case, image, mask if mask is not None and mask.any() else None)


def canvas(width: int, height: int) -> Figure:
    """An empty matplotlib figure of so many pixels."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def grey(image: Image) -> np.ndarray:
    """The picture as [H,W] in 0..1."""
    return image.pixels.mean(0)


def save(picture: Figure | PIL.Image.Image, name: str, *, folder: Path | None = None) -> Path:
    """Write docs/images/paper-NAME.png, in all its colours or as many as fit into `MAX_BYTES`. Else SystemExit."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png")
        picture = PIL.Image.open(buffer).convert("RGB")
    if picture.width > MAX_WIDTH:
        raise SystemExit(f"{name}: {picture.width} px wide, expected {MAX_WIDTH} at most")
    target = (folder or IMAGES) / f"paper-{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    for colours in (None, 256, 192, 128, 96, 64):
        out, stored = io.BytesIO(), picture
        if colours is not None:
            stored = picture.quantize(colours, method=PIL.Image.Quantize.MAXCOVERAGE, kmeans=1)
        stored.save(out, format="png", optimize=True)
        if out.tell() < MAX_BYTES:
            target.write_bytes(out.getvalue())
            return target
    raise SystemExit(f"{name}: {out.tell()} bytes in 64 colours, expected fewer than {MAX_BYTES}")


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over images with Student's 95 % interval: {"mean", "ci95", "n"}."""
    from scipy import stats

    found = np.asarray(values, dtype=float)
    mean, n = float(found.mean()), len(found)
    if n < 2:
        return {"mean": mean, "ci95": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * found.std(ddof=1) / np.sqrt(n))
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": n}


def span(found: Mapping[str, Any], digits: int = 2) -> str:
    """Mean with its interval in words: "0.31 [0.28, 0.34]"."""
    ends = found["ci95"]
    words = f"{found['mean']:.{digits}f}"
    return words if ends is None else f"{words} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
