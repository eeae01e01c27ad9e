"""Compare settings of detectors where only normal images exist. For people: `umiad tune`.

The training normals are cut into folds. Each candidate is fitted without a fold and judged on it: the held-out
normals against synthetic anomalies planted in them. These are no lesions: the numbers are a proxy for choosing
settings, no estimate of how well real findings are found.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import umiad
from umiad import api
from umiad.calibration import fit_calibration
from umiad.config import Config, Preprocessing, canonical_json, check_size
from umiad.data import DEFAULT_FILES, DataSet
from umiad.detectors.contract import Detector
from umiad.diskfile import MIB, read_regular, write_atomic
from umiad.duplicates import case_sha256
from umiad.errors import ConfigError, DiskError, InputError, ModelFileError, TrainingError
from umiad.features import device_of
from umiad.fitted import FittedModel
from umiad.fitting import (
    Data,
    as_dataset,
    case_image,
    fit_model,
    resolve_device,
    split_data,
)
from umiad.preprocess import original_size, to_input
from umiad.progress import Reporter, Silent
from umiad.scorer import BATCH_SIZE
from umiad.splits import Split, SplitEntry, fold_numbers
from umiad.strictjson import dump_bytes, load_object
from umiad.training import Row
from umiad.tuning_candidates import Candidate, check_names
from umiad.tuning_folds import Fold, exhibits, judge_fold, make_folds, shown_rows
from umiad.tuning_result import Exhibit, FoldResult, Result, TuneOptions, Tuning, ranked
from umiad.types import NORMAL, Case, FileOptions, Image

__all__ = ["Candidate", "TuneOptions", "Tuning", "tune"]

FORMAT = "umiad-tune-1"
FOLDER, MAX_BYTES = "candidates", 256 * MIB
FPR = 0.05
"""Share of held-out normal images above the line drawn in pictures."""


class _Stored(Config):
    """What a candidate's file holds; `maps_sha256` of the file with the exhibits' maps beside it."""

    format: str
    key: str
    candidate: Candidate
    detector_config: dict[str, Any]
    localises: bool
    folds: tuple[FoldResult, ...]
    map_threshold: float
    map_reference: float
    maps_sha256: str


@dataclass(frozen=True, eq=False)
class _Job:
    """What every candidate's turn needs. `cases`: the training normals in memory, grey at the model's size."""

    name: str
    files: FileOptions
    entries: tuple[SplitEntry, ...]
    cases: tuple[Case, ...]
    folds: tuple[Fold, ...]
    exhibits: tuple[Exhibit, ...]
    options: TuneOptions
    folder: Path | None
    reporter: Reporter

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=self.options.size, equalise=self.options.equalise)

    def image(self, place: int) -> Image:
        """One of the training normals."""
        return case_image(self.cases[place])

    def images(self, fold: Fold) -> Iterator[Image]:
        """The N images of a fold."""
        yield from (self.image(place) for place in fold.held_out)
        yield from (Image(each.pixels[None], each.family) for each in fold.anomalies)


class _Named:
    """A reporter that puts a candidate's name before stages and notes.

    Reading from memory is no stage, and the single epoch of a closed form is none worth a line.
    """

    def __init__(self, inner: Reporter, name: str) -> None:
        self.inner, self.name = inner, name

    def stage(self, name: str, done: int, total: int) -> None:
        if name != "reading images":
            self.inner.stage(f"{self.name}: {name}", done, total)

    def epoch(self, row: Row) -> None:
        if (row.get("epochs") or 0) > 1:
            self.inner.epoch(row)

    def note(self, text: str) -> None:
        self.inner.note(f"{self.name}: {text}")


def tune(
    data: Data,
    candidates: Sequence[Candidate],
    *,
    options: TuneOptions | None = None,
    files: FileOptions = DEFAULT_FILES,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> Tuning:
    """Fit and judge every candidate in cross-validation over the training normals of `data`.

    Abnormal and test images are listed and fingerprinted for the split (that of `umiad fit` with hold-out 0 and
    `seed`) and not used for anything else. `files`: how they are found and opened. With `out` each candidate's
    result is kept in `OUT/candidates` as soon as it is complete, and taken from there when the same is asked for
    again. A candidate whose fit fails is in `Tuning.failures`; the others go on.

    Raises ConfigError for a candidate that cannot be built, InputError when the data cannot be used or has too few
    groups of normal images: all before anything is fitted. `Interrupted` or KeyboardInterrupt after Ctrl-C.

    >>> from umiad.tuning import Candidate, TuneOptions, tune                    # doctest: +SKIP
    >>> pair = [Candidate(name="a", detector="padim"), Candidate(name="b", detector="posgauss")]
    >>> found = tune("DATA", pair, options=TuneOptions(size=128), out="tuned")  # doctest: +SKIP
    >>> found.best.name                                                         # doctest: +SKIP
    """
    options, reporter = options or TuneOptions(), reporter or Silent()
    configs = _configurations(candidates, options)
    dataset = as_dataset(data, files)
    for note in dataset.notes:
        reporter.note(note)
    job, rule = _job(dataset, options, Path(out) / FOLDER if out is not None else None, reporter)
    results, failures = _turns(job, candidates, configs)
    return Tuning(
        options=options,
        results=ranked(results),
        failures=failures,
        data=os.fspath(data) if isinstance(data, (str, os.PathLike)) else "DATA",
        rule=rule,
        folds=tuple(tuple(job.entries[place].name for place in fold.held_out) for fold in job.folds),
        exhibits=job.exhibits,
        notes=tuple(dataset.notes),
        files=dataset.files,
    )


# Before the first fit


def _configurations(candidates: Sequence[Candidate], options: TuneOptions) -> dict[str, dict[str, Any]]:
    """Every candidate's whole configuration; building each once finds what cannot be built."""
    check_size(options.size)
    check_names(candidates)
    found = {}
    for each in candidates:
        try:
            found[each.name] = _build(each, options).config.canonical()
        except ConfigError as error:
            raise ConfigError(f"candidate {each.name!r}: {error}") from error
    return found


def _build(candidate: Candidate, options: TuneOptions) -> Detector:
    return api.build(
        candidate.detector,
        preset=candidate.preset,
        weights=options.weights,
        size=options.size,
        seed=options.seed,
        settings=options.settings(candidate),
    )


def _job(dataset: DataSet, options: TuneOptions, folder: Path | None, reporter: Reporter) -> tuple[_Job, str]:
    """Split, read the training normals, cut folds and plant anomalies; beside it the split's rule."""
    options = options.model_copy(update={"device": resolve_device(options.device)})
    split = split_data(dataset, seed=options.seed, holdout=0.0, reporter=reporter)
    entries = split.part("train")
    fold_numbers(entries, options.folds, seed=options.seed)
    by_name = {dataset.name_of(case): case for case in dataset.cases}
    cases = tuple(_reduced(by_name[entry.name], entry.name, options.size) for entry in entries)
    greys = [case_image(each).pixels[0] for each in cases]
    folds = []
    for fold in make_folds(entries, greys, options):
        folds.append(fold)
        reporter.stage("synthetic anomalies", len(folds), options.folds)
    shown = tuple(exhibits(folds[0], entries, greys))
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{folder}: cannot be written: {error}") from error
    return _Job(
        dataset.name, dataset.files, entries, cases, tuple(folds), shown, options, folder, reporter
    ), split.rule


def _reduced(case: Case, name: str, size: int) -> Case:
    """The case in memory: grey at the model's size, float32 [1,S,S] in 0..1, by the one preprocessing path."""
    plain = Preprocessing(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = to_input(case_image(case), plain)[:1].astype(np.float32)
    return Case(path=Path(name), label=NORMAL, kind="normal", image=Image(pixels, name))


# The candidates in turn


def _turns(
    job: _Job, candidates: Sequence[Candidate], configs: Mapping[str, dict[str, Any]]
) -> tuple[list[Result], dict[str, str]]:
    """The results in the order of the candidates, and why the others failed."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    for number, candidate in enumerate(candidates):
        job.reporter.stage("candidates", number, len(candidates))
        try:
            results.append(_turn(job, candidate, configs[candidate.name]))
        except (TrainingError, InputError, ConfigError) as error:
            failures[candidate.name] = str(error)
            job.reporter.note(f"{candidate.name} failed: {error}")
    job.reporter.stage("candidates", len(candidates), len(candidates))
    return results, failures


def _turn(job: _Job, candidate: Candidate, config: dict[str, Any]) -> Result:
    """One candidate: from its file, or fitted and judged fold by fold, then written to its file."""
    reporter = _Named(job.reporter, candidate.name)
    key = _key(job, candidate, config)
    if job.folder is not None and (stored := _stored(job.folder, candidate, key, reporter)) is not None:
        return stored
    folds: list[FoldResult] = []
    for fold in job.folds:
        detector = _build(candidate, job.options)
        if job.options.epochs is not None and detector.info.closed_form and not folds:
            reporter.note("--epochs has no effect on a closed form")
        started = time.perf_counter()
        model = _fit(job, fold, detector, _Named(reporter, f"fold {fold.number + 1}"))
        seconds = time.perf_counter() - started
        judged, maps = _judged(job, fold, model)
        folds.append(FoldResult(**judged, fit_seconds=round(seconds, 3)))
        if fold.number == 0:
            shown = maps[shown_rows(fold)]
            peaks = maps[: len(fold.held_out)].max(axis=(1, 2)).tolist()
        reporter.stage("folds", fold.number + 1, len(job.folds))
    threshold = fit_calibration(folds[0].normal_scores, peaks, fpr=FPR, source="holdout").map_threshold
    localises = detector.info.localises
    result = Result(candidate, config, localises, tuple(folds), threshold, max(peaks), shown)
    if job.folder is not None:
        _store(job.folder, result, key)
    return result


def _fit(job: _Job, fold: Fold, detector: Detector, reporter: Reporter) -> FittedModel:
    """The detector fitted on all other folds, in memory."""
    cases = tuple(job.cases[place] for place in fold.fitted)
    dataset = DataSet(name=job.name, layout="arrays", root=Path(), cases=cases, stray=(), notes=())
    entries = tuple(SplitEntry(each.name, case_sha256(each), 0, "", "train") for each in cases)
    rule = f"all folds but number {fold.number + 1} of {len(job.folds)}"
    split = Split(job.name, job.options.seed, 0.0, rule, entries)
    return fit_model(detector, dataset, job.options.fitting(), groups=split, reporter=reporter)


def _judged(job: _Job, fold: Fold, model: FittedModel) -> tuple[dict[str, Any], np.ndarray]:
    """What `judge_fold` and `_nats` say of a fitted model, and its maps [N,S,S]."""
    scores = np.empty(len(fold.labels))
    maps = np.empty((len(scores), job.options.size, job.options.size), dtype=np.float32)
    for row, (_, score, small_map) in enumerate(model.score_images(job.images(fold))):
        scores[row], maps[row] = score, small_map
    localises = model.detector.info.localises
    found = judge_fold(fold, scores, maps if localises else None, n_resamples=job.options.resamples)
    found["nats_fitted"] = _nats(job, model, fold.fitted)
    found["nats_held_out"] = _nats(job, model, fold.held_out)
    return found, maps


def _nats(job: _Job, model: FittedModel, places: Sequence[int]) -> float | None:
    """Mean negative log-likelihood of normals in nats per dimension; None where the detector has none."""
    device, total = device_of(model.detector.module), 0.0
    stream = iter(places)
    while batch := [job.image(place) for place in itertools.islice(stream, BATCH_SIZE)]:
        inputs = torch.from_numpy(np.stack([to_input(each, job.preprocessing) for each in batch]))
        sizes = torch.tensor([original_size(each, job.preprocessing) for each in batch])
        with torch.no_grad():
            prepared = model.detector.prepare(inputs.to(device), original_size=sizes.to(device))
            found = model.detector.monitor(prepared).get("nats_per_dim")
        if found is None:
            return None
        total += found * len(batch)
    if not math.isfinite(total):
        raise TrainingError("the likelihood of normal images is not finite")
    return total / len(places)


# Resuming


def _key(job: _Job, candidate: Candidate, config: dict[str, Any]) -> str:
    """SHA-256 of all that decides a candidate's result; its name and the device do not."""
    numbers = {place: fold.number for fold in job.folds for place in fold.held_out}
    facts = {
        "format": FORMAT,
        "umiad": umiad.__version__,
        "detector": candidate.detector,
        "config": config,
        "preprocessing": job.preprocessing.canonical(),
        "reading": asdict(job.files.reading),
        "images": [
            [entry.name, entry.sha256, entry.group, numbers[p]] for p, entry in enumerate(job.entries)
        ],
        "options": [getattr(job.options, name) for name in ("folds", "per_image", "seed", "resamples")],
    }
    return hashlib.sha256(canonical_json(facts).encode("utf-8", errors="backslashreplace")).hexdigest()


def _files(folder: Path, candidate: Candidate) -> tuple[Path, Path]:
    return folder / f"{candidate.name}.json", folder / f"{candidate.name}.npy"


def _store(folder: Path, result: Result, key: str) -> None:
    """Write the maps, then the numbers, each atomically: the second file makes the first valid."""
    numbers, maps = _files(folder, result.candidate)
    buffer = io.BytesIO()
    np.save(buffer, result.maps, allow_pickle=False)
    stored = _Stored(
        format=FORMAT,
        key=key,
        candidate=result.candidate,
        detector_config=result.detector_config,
        localises=result.localises,
        folds=result.folds,
        map_threshold=result.map_threshold,
        map_reference=result.map_reference,
        maps_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    content = dump_bytes(stored.canonical(), source=str(numbers))
    write_atomic(maps, buffer.getvalue())
    write_atomic(numbers, content)


def _stored(folder: Path, candidate: Candidate, key: str, reporter: Reporter) -> Result | None:
    """What an earlier run found, if it is what computing it now would give; a note says what was done."""
    numbers, maps = _files(folder, candidate)
    if not numbers.exists():
        return None
    try:
        values = load_object(read_regular(numbers, limit=MAX_BYTES), source=str(numbers))
        stored = _Stored.parse(values)
        if stored.key != key:
            reporter.note(f"{numbers} is of other settings or images: it is computed again")
            return None
        content = read_regular(maps, limit=MAX_BYTES)
        if hashlib.sha256(content).hexdigest() != stored.maps_sha256:
            raise ModelFileError(f"{maps}: does not belong to {numbers.name}")
        shown = np.load(io.BytesIO(content), allow_pickle=False)
    except (ConfigError, InputError, ModelFileError, ValueError) as error:
        reporter.note(f"{numbers} cannot be used, it is computed again: {error}")
        return None
    reporter.note(f"loaded {numbers}, made before with the same settings on the same images")
    parts = (stored.detector_config, stored.localises, stored.folds)
    scale = (stored.map_threshold, stored.map_reference)
    return Result(candidate, *parts, *scale, shown, loaded=True)
