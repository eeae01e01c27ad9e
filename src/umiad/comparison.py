"""Fit (or load), judge and time several detectors on one split of one data set. For people: `umiad compare`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import umiad
from umiad import api, detectors, modelfile
from umiad.bootstrap import PIXEL, Draws, resample_scores
from umiad.comparison_result import CompareOptions, Comparison, Cost, Exhibit, Result, choose_gallery
from umiad.config import Preprocessing, check_size
from umiad.data import DataSet
from umiad.detectors.contract import Detector
from umiad.diskfile import read_regular, write_atomic
from umiad.errors import ConfigError, InputError, ModelFileError, TrainingError
from umiad.evaluation import Evaluation, ScoredTest, judge, score_test
from umiad.fitted import FittedModel, load
from umiad.fitting import (
    Data,
    as_dataset,
    case_image,
    fit_model,
    resolve_device,
    split_data,
)
from umiad.nn.encoder import yardstick
from umiad.nn.resnet import ResNet
from umiad.overlay import colour_scale
from umiad.parameters import count
from umiad.preprocess import original_size, to_input
from umiad.progress import Reporter, Silent
from umiad.splits import Split
from umiad.strictjson import dump_bytes, load_object
from umiad.training import LOG, Row
from umiad.workfolder import RUN, WorkFolder

__all__ = ["CompareOptions", "Comparison", "compare"]

TIMED, REPEATS = 8, 3
"""Images in the batch that is timed, and how often."""
FITS, MAX_BYTES = "fits.json", 1 << 20
"""File beside the models that remembers how long each fit took."""


@dataclass(frozen=True)
class _Job:
    """What every detector's turn needs; `normals`: the images to be fitted or held out, `folder` of the models."""

    dataset: DataSet
    normals: DataSet
    split: Split
    options: CompareOptions
    folder: Path | None
    reporter: Reporter
    encoder: ResNet

    @property
    def preprocessing(self) -> Preprocessing:
        files = self.dataset.files
        return Preprocessing(
            size=self.options.size,
            equalise=self.options.equalise,
            reading=files.reading,
            frames=files.frames,
        )


class _Named:
    """A reporter that puts the detector's name before stages and notes, and adds up the epochs' seconds."""

    def __init__(self, inner: Reporter, name: str) -> None:
        self.inner, self.name, self.seconds = inner, name, 0.0

    def stage(self, name: str, done: int, total: int) -> None:
        self.inner.stage(f"{self.name}: {name}", done, total)

    def epoch(self, row: Row) -> None:
        self.seconds += float(row.get("seconds") or 0.0)
        self.inner.epoch(row)

    def note(self, text: str) -> None:
        self.inner.note(f"{self.name}: {text}")


def compare(
    names: Sequence[str],
    data: Data,
    *,
    options: CompareOptions | None = None,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Fit the detectors `names` on the normal images of `data` and judge each on the same test images.

    With `out` each model is written to `OUT/models/NAME`; one that lies there already, fitted with the same
    settings on the same split by this version, is loaded instead, and an interrupted fit is resumed. A name given
    twice counts once. A detector whose fit fails is in `Comparison.failures`; the others go on.

    Raises ConfigError for an unknown name, preset or size, InputError when the data cannot be used or has no test
    image: all before anything is fitted. `Interrupted` after Ctrl-C; finished models are kept.

    >>> from umiad.comparison import compare                                    # doctest: +SKIP
    >>> from umiad.comparison_files import write_comparison                     # doctest: +SKIP
    >>> found = compare(["padim", "egmf"], "DATA", out="result")                # doctest: +SKIP
    >>> write_comparison(found, "result")                                       # doctest: +SKIP
    """
    options, reporter = options or CompareOptions(), reporter or Silent()
    chosen = _check_names(names, options)
    folder = Path(out) / "models" if out is not None else None
    if folder is not None:
        for name in chosen:
            modelfile.check_target(folder / name)
    dataset = as_dataset(data)
    notes = [*dataset.notes, *_repeated(names)]
    for note in notes:
        reporter.note(note)
    job = _job(dataset, options, folder, reporter)
    results: list[Result] = []
    failures: dict[str, str] = {}
    gallery: tuple[Exhibit, ...] = ()
    for number, name in enumerate(chosen):
        reporter.stage("detectors", number, len(chosen))
        try:
            result, gallery = _turn(job, name)
            results.append(result)
        except TrainingError as error:
            failures[name] = str(error)
            reporter.note(f"{name} failed: {error}")
    reporter.stage("detectors", len(chosen), len(chosen))
    return Comparison(options, chosen, tuple(results), failures, job.split, gallery, tuple(notes))


def _check_names(names: Sequence[str], options: CompareOptions) -> tuple[str, ...]:
    """The names, each once. Raises ConfigError for what cannot be built, before anything is."""
    if not names:
        raise ConfigError(f"no detector given (known: {', '.join(detectors.names())})")
    check_size(options.size)
    for name in names:
        detectors.preset_config(name, options.preset, size=options.size, backbone=options.backbone)
    return tuple(dict.fromkeys(names))


def _repeated(names: Sequence[str]) -> list[str]:
    return [f"{name} was given more than once" for name in dict.fromkeys(names) if names.count(name) > 1]


def _job(dataset: DataSet, options: CompareOptions, folder: Path | None, reporter: Reporter) -> _Job:
    """Split the data once; the fits see its normal images only, so that nothing else is read again."""
    options = options.model_copy(update={"device": resolve_device(options.device)})
    split = split_data(dataset, seed=options.seed, holdout=options.holdout, reporter=reporter)
    if not split.part("test"):
        raise InputError(
            dataset.root, f"no test image: {split.rule}", "a comparison needs abnormal images, or a test part"
        )
    fitted = {*split.names("train"), *split.names("holdout")}
    normals = tuple(case for case in dataset.cases if dataset.name_of(case) in fitted)
    encoder = yardstick(options.backbone)
    encoder.to(options.device)
    reduced = replace(dataset, cases=normals, notes=())
    return _Job(dataset, reduced, split, options, folder, reporter, encoder)


def _turn(job: _Job, name: str) -> tuple[Result, tuple[Exhibit, ...]]:
    """One detector: fit or load, score, judge, time. Raises TrainingError, also for scores of no use."""
    reporter = _Named(job.reporter, name)
    model, origin, seconds = _obtain(job, name, reporter)
    scored = score_test(model, job.dataset, reporter=reporter)
    localises, wanted = model.detector.info.localises, job.options.resamples
    calibration = model.config.calibration
    try:
        evaluation = judge(model, scored, n_resamples=wanted, reporter=reporter)
        common = scored.common(smoothed=model.detector.config.sigma)
        maps = common.maps if localises else None
        metrics, draws = resample_scores(
            common.image_scores, scored.labels, scored.groups, maps, scored.masks, n_resamples=wanted
        )
        scale = colour_scale(calibration.map_threshold if calibration else None, model.config.map_reference)
    except InputError as error:
        raise TrainingError(f"its scores cannot be judged: {error}") from error
    gallery = _gallery(scored)
    result = Result(
        name=name,
        info=model.detector.info,
        evaluation=evaluation if localises else _without_pixels(evaluation),
        common=metrics if localises else _no_pixels(metrics, draws)[0],
        common_draws=draws,
        common_scores=common.image_scores,
        cost=_cost(job, model, scored, origin=origin, seconds=seconds),
        digest=model.split.digest,
        scale=scale,
        maps=scored.maps[[each.row for each in gallery]],
    )
    return result, gallery


def _without_pixels(evaluation: Evaluation) -> Evaluation:
    """The evaluation of a detector whose map is constant."""
    metrics, draws = _no_pixels(evaluation.metrics, evaluation.draws)
    images = {name: curve for name, curve in evaluation.roc.items() if name == "images"}
    return replace(evaluation, metrics=metrics, draws=draws, roc=images, pro=None)


def _no_pixels(
    metrics: Mapping[str, dict[str, Any]], draws: Draws
) -> tuple[dict[str, dict[str, Any]], Draws]:
    none = {"value": None, "ci95": None, "n_resamples": 0, "reason": "does not localise"}
    kept = {name: each for name, each in draws.items() if name not in PIXEL}
    return {name: none if name in PIXEL else each for name, each in metrics.items()}, kept


def _gallery(scored: ScoredTest) -> tuple[Exhibit, ...]:
    lesions = [None if mask is None else float(mask.mean()) for mask in scored.masks]
    rows = choose_gallery(scored.labels.tolist(), lesions, scored.groups)
    return tuple(Exhibit(scored.cases[row], row, lesions[row] or None) for row in rows)


# Fitting, loading, resuming


def _obtain(job: _Job, name: str, reporter: _Named) -> tuple[FittedModel, str, float | None]:
    """The fitted model, where it comes from, and the seconds its fit took (None: unknown)."""
    options = job.options
    detector = api.build(
        name,
        preset=options.preset,
        weights=options.weights,
        size=options.size,
        seed=options.seed,
        settings=options.settings(),
    )
    if options.epochs is not None and detector.info.closed_form:
        reporter.note("--epochs has no effect on a closed form")
    target = job.folder / name if job.folder else None
    if target is not None and (model := _existing(job, target, detector, reporter)) is not None:
        reporter.note(f"loaded {target}, fitted before with the same settings on the same split")
        return model.to(options.device), "loaded", _remembered(target, model)
    started = time.perf_counter()
    model, resumed = _fit(job, detector, target, reporter)
    seconds = time.perf_counter() - started
    if resumed:
        seconds += max(0.0, _logged_seconds(model) - reporter.seconds)
    if target is not None:
        _remember(target, model, seconds)
    return model, "resumed" if resumed else "fitted", seconds


def _existing(job: _Job, target: Path, detector: Detector, reporter: Reporter) -> FittedModel | None:
    """The model at `target` if it is what fitting `detector` now would give."""
    if not target.exists():
        return None
    try:
        model = load(target)
    except (ModelFileError, InputError) as error:
        reporter.note(f"the model there cannot be used, it is fitted again: {error}")
        return None
    pairs = {
        "detector": (model.config.detector, detector.info.name),
        "settings": (model.config.detector_config, detector.config.canonical()),
        "preprocessing": (model.config.preprocessing, job.preprocessing),
        "split": (model.split.digest, job.split.digest),
        "version of umiad": (model.config.provenance.get("umiad"), umiad.__version__),
    }
    if differing := [what for what, (found, wanted) in pairs.items() if found != wanted]:
        reporter.note(f"{target} differs in {', '.join(differing)}: it is replaced")
        return None
    return model


def _fit(job: _Job, detector: Detector, target: Path | None, reporter: Reporter) -> tuple[FittedModel, bool]:
    """Fit, going on where an equal fit was interrupted; returns the model and whether that was so."""

    def run(*, resume: bool) -> FittedModel:
        options = job.options.fitting()
        return fit_model(
            detector, job.normals, options, groups=job.split, out=target, resume=resume, reporter=reporter
        )

    if target is None or not (WorkFolder(target, {}, resume=False).path / RUN).exists():
        return run(resume=False), False
    try:
        return run(resume=True), True
    except ConfigError as error:
        reporter.note(f"an interrupted fit is there, but of another run ({error}): started anew")
        return run(resume=False), False


def _logged_seconds(model: FittedModel) -> float:
    """Seconds of all epochs, by the training log that the model holds."""
    lines = model.extras.get(LOG, b"").decode("utf-8").splitlines()
    rows = (load_object(line, source=LOG) for line in lines if line)
    return sum(float(str(row.get("seconds") or 0.0)) for row in rows)


def _fits(target: Path) -> dict[str, object]:
    """Detector -> [time stamp of the model, seconds]; empty where nothing usable is there."""
    path = target.with_name(FITS)
    try:
        return load_object(read_regular(path, limit=MAX_BYTES), source=str(path))
    except (InputError, ModelFileError):
        return {}


def _remember(target: Path, model: FittedModel, seconds: float) -> None:
    known = {**_fits(target), target.name: [model.config.provenance["fitted_at"], round(seconds, 3)]}
    write_atomic(target.with_name(FITS), dump_bytes(known, source=FITS))


def _remembered(target: Path, model: FittedModel) -> float | None:
    """How long the fit of that very model took; None where that is unknown."""
    match _fits(target).get(target.name):
        case [stamp, int() | float() as seconds] if stamp == model.config.provenance.get("fitted_at"):
            return float(seconds)
    return None


# Timing


def _cost(job: _Job, model: FittedModel, scored: ScoredTest, *, origin: str, seconds: float | None) -> Cost:
    """Parameters, and the time of a batch: detector and bare backbone in turn, the fastest of three each."""
    images = [case_image(case) for case in scored.cases[:TIMED]]
    inputs = np.stack([to_input(each, job.preprocessing) for each in images])
    sizes = [original_size(each, job.preprocessing) for each in images]
    batch = torch.from_numpy(inputs).to(job.options.device)

    def encode() -> None:
        with torch.no_grad():
            job.encoder(batch)[-1].cpu()

    def detect() -> None:
        model.score_inputs(inputs, sizes)

    encode_seconds, detect_seconds = _side_by_side(encode, detect)
    parameters = count(model.detector.module)
    return Cost(
        origin=origin,
        fit_seconds=seconds,
        parameters=parameters["total"],
        trainable=parameters["trainable"],
        image_seconds=detect_seconds / len(images),
        encoder_seconds=encode_seconds / len(images),
    )


def _side_by_side(*works: Callable[[], None]) -> list[float]:
    """The shortest of `REPEATS` times of each, in turn, after one that does not count."""
    best = [float("inf")] * len(works)
    for repeat in range(REPEATS + 1):
        for number, work in enumerate(works):
            started = time.perf_counter()
            work()
            if repeat:
                best[number] = min(best[number], time.perf_counter() - started)
    return best
