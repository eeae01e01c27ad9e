"""From a folder of images to a fitted model: read, split, prepare, train, calibrate."""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field

import umiad
from umiad import modelfile
from umiad.calibration import fit_calibration
from umiad.cases import case_images, case_pixels
from umiad.config import Config, Preprocessing
from umiad.data import DEFAULT_FILES, DataSet, load_data
from umiad.detectors.contract import Detector
from umiad.duplicates import Fingerprint, fingerprints
from umiad.errors import ConfigError, InputError
from umiad.features import MEMORY_LIMIT, FeatureCache, Item
from umiad.fitted import FittedModel, SavedConfig
from umiad.inputs import iter_images
from umiad.preprocess import check_usable, original_size, to_input
from umiad.progress import Reporter, Silent
from umiad.splits import Split, fold_numbers, make_split
from umiad.training import LOG, Row, TrainingRun, train
from umiad.types import NORMAL, Case, FileOptions, Image
from umiad.workfolder import WorkFolder

MOST_UNREADABLE = 0.01
"""Share of files that `on_error` "skip" leaves out at most; a single one always."""

Data: TypeAlias = str | os.PathLike[str] | DataSet | np.ndarray | Sequence[np.ndarray]


class FitOptions(Config):
    """How `fit` treats the data; the detector's own settings are in its configuration.

    `holdout`: share of the training normals set aside for the threshold (0 = none). `folds`: instead, fit on all of
    them, and take the threshold from as many further fits, each of which scores the fold that it does without (0 =
    none; closed forms only; not together with `holdout`). `fpr`: false-positive rate of the threshold. `on_error`
    "fail" refuses unreadable files, "skip" leaves them out and names them. `equalise`: see `Preprocessing`.
    `skip_nonfinite`: so many batches with a loss that is not finite are left out and named before training stops.
    `files`: how files are found and opened. `memory_limit`: bytes of features kept in memory before they go to disk;
    `compact_features`: keep them in float16, half the room (see `FeatureCache`).
    """

    holdout: float = Field(default=0.2, ge=0, lt=0.9)
    folds: int = Field(default=0, ge=0, le=100)
    seed: int = Field(default=0, ge=0)
    fpr: float = Field(default=0.05, gt=0, lt=1)
    colour: Literal["grey", "rgb"] = "grey"
    intensity: Literal["full", "percentile"] = "full"
    equalise: int | None = Field(default=None, ge=32)
    on_error: Literal["fail", "skip"] = "fail"
    skip_nonfinite: int = Field(default=0, ge=0, le=3)
    device: str = "auto"
    files: FileOptions = FileOptions()
    memory_limit: int = Field(default=MEMORY_LIMIT, ge=0)
    compact_features: bool = False

    @property
    def held_out(self) -> float:
        """Share of the training normals that the split sets aside."""
        return 0.0 if self.folds else self.holdout


@dataclass(frozen=True)
class _Job:
    """What every stage of a fit needs to know."""

    detector: Detector
    options: FitOptions
    preprocessing: Preprocessing
    reporter: Reporter


@dataclass(frozen=True)
class _Material:
    """The readable part of a data set, its split, its cases by content hash, and the fold of each training image."""

    dataset: DataSet
    split: Split
    cases: Mapping[str, Case]
    folds: Sequence[int] = ()


def resolve_device(name: str) -> str:
    """The best device present for "auto", else `name`. Raises InputError when it is not there."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if present[device])
    if not present.get(name, False):
        found = ", ".join(device for device, there in present.items() if there)
        raise InputError("--device", f"{name!r} is not available, expected one of: auto, {found}")
    return name


def fit_model(
    detector: Detector,
    data: Data,
    options: FitOptions,
    *,
    groups: Mapping[str, str] | Split | None = None,
    out: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> FittedModel:
    """Fit `detector` on the normal images of `data` and calibrate it on those held out.

    `groups`: extra groups (image name -> group) or a whole split to reproduce. With `out` the state is kept
    in `OUT.work` while fitting, so that `resume` can go on. No abnormal and no test image is shown to the
    detector. Raises InputError before the first epoch when the data cannot be used, ConfigError where `folds` make no
    sense.
    """
    reporter = reporter or Silent()
    _check_folds(detector, options)
    if out is not None:
        if detector.info.not_saved:
            raise ConfigError(detector.info.not_saved)
        modelfile.check_target(out)
    dataset = as_dataset(data, options.files)
    preprocessing = Preprocessing(
        size=detector.config.size,
        colour=options.colour,
        intensity=options.intensity,
        equalise=options.equalise,
        reading=dataset.files.reading,
        frames=dataset.files.frames,
    )
    job = _Job(detector, replace_device(options), preprocessing, reporter)
    dataset, prints = _readable(dataset, job)
    split = _split(dataset, prints, options, groups)
    by_hash = {each.sha256: case for each, case in zip(prints, dataset.cases, strict=True)}
    folds = fold_numbers(split.part("train"), options.folds, seed=options.seed) if options.folds else ()
    material = _Material(dataset, split, by_hash, folds)
    if out is None:
        return _fit(job, material, folder=None, resume=False)
    with WorkFolder(out, _run_facts(job, split), resume=resume, on_note=reporter.note) as work:
        model = _fit(job, material, folder=work.path, resume=resume)
        model.save(out)
        work.remove()
    return model


def _check_folds(detector: Detector, options: FitOptions) -> None:
    """Raise ConfigError where folds make no sense, beside a hold-out, or for a detector that is trained."""
    if options.folds == 1:
        raise ConfigError("folds 1: without its only fold a fit has no image; expected 0, or 2 and more")
    if options.folds and options.holdout and "holdout" in options.model_fields_set:
        raise ConfigError(
            f"folds {options.folds} and holdout {options.holdout:g}: the threshold comes from one of them; give one"
        )
    if options.folds and not detector.info.closed_form:
        raise ConfigError(
            f"folds {options.folds}: {detector.info.name} is trained, and would be trained {options.folds + 1} times; "
            "folds are for closed forms, use a hold-out"
        )


def replace_device(options: FitOptions) -> FitOptions:
    """`options` with "auto" replaced by the device it stands for."""
    return options.model_copy(update={"device": resolve_device(options.device)})


def as_dataset(data: Data, files: FileOptions = DEFAULT_FILES) -> DataSet:
    """A data set from a path, opened as `files` says, or from arrays that are all taken as normal."""
    if isinstance(data, DataSet):
        return data
    if isinstance(data, (str, os.PathLike)):
        return load_data(data, files=files)
    images = list(iter_images(data, name="normal"))
    cases = tuple(Case(path=Path(image.name), label=NORMAL, kind="normal", image=image) for image in images)
    return DataSet(name="arrays", layout="arrays", root=Path(), cases=cases, stray=(), notes=())


def case_image(case: Case) -> Image:
    """The pixels of a case, large enough to be scored. Raises InputError."""
    image = case_pixels(case)
    check_usable(image)
    return image


def usable_images(cases: Iterable[Case]) -> Iterator[Image]:
    """The pixels of cases as `case_image` gives them; a file of many slices is read once. Raises InputError."""
    for image in case_images(cases):
        if isinstance(image, InputError):
            raise image
        check_usable(image)
        yield image


def split_data(dataset: DataSet, *, seed: int, holdout: float, reporter: Reporter) -> Split:
    """Read every file once, for its fingerprint, and split. Raises InputError where one cannot be read."""
    found = fingerprints(dataset.cases, progress=lambda n, of: reporter.stage("reading images", n, of))
    if bad := [each for each in found if isinstance(each, InputError)]:
        listing = "; ".join(str(each) for each in bad[:5])
        raise InputError(
            dataset.root, f"{len(bad)} unreadable files: {listing}", "`umiad check-data` lists them all"
        )
    return make_split(dataset, found, seed=seed, holdout=holdout)


def _readable(dataset: DataSet, job: _Job) -> tuple[DataSet, list[Fingerprint]]:
    """Read every file once; unreadable ones are an error or, with on_error "skip", left out, named and counted.

    More than one in a hundred (and more than one) are an error in any case: such data are not what they should be.
    """
    found = fingerprints(
        dataset.cases, progress=lambda done, total: job.reporter.stage("reading images", done, total)
    )
    bad = [each for each in found if isinstance(each, InputError)]
    for note in dataset.notes:
        job.reporter.note(note)
    if bad and job.options.on_error == "fail":
        listing = "; ".join(str(each) for each in bad[:5]) + (
            f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        )
        raise InputError(
            dataset.root, f"{len(bad)} unreadable files: {listing}", "--on-error skip leaves them out"
        )
    if len(bad) > max(1, round(MOST_UNREADABLE * len(found))):
        raise InputError(
            dataset.root,
            f"{len(bad)} of {len(found)} files are unreadable, --on-error skip allows {MOST_UNREADABLE:.0%}",
            "repair or remove them; `umiad check-data` lists them all",
        )
    for each in bad:
        job.reporter.note(f"left out: {each}")
    if bad:
        job.reporter.note(f"{len(bad)} of {len(found)} files were left out")
    kept = [(c, f) for c, f in zip(dataset.cases, found, strict=True) if isinstance(f, Fingerprint)]
    return replace(dataset, cases=tuple(case for case, _ in kept)), [each for _, each in kept]


def _split(
    dataset: DataSet,
    prints: Sequence[Fingerprint],
    options: FitOptions,
    groups: Mapping[str, str] | Split | None,
) -> Split:
    if isinstance(groups, Split):
        fitted = groups.part("train") + groups.part("holdout")
        if wrong := [entry.name for entry in fitted if entry.label != NORMAL]:
            raise InputError(
                wrong[0],
                f"{len(wrong)} images of the given split are to be fitted but not normal, expected none",
            )
        known = {each.sha256 for each in prints}
        if missing := [name for name in ("train", "holdout") for h in groups.hashes(name) if h not in known]:
            raise InputError(
                dataset.root, f"{len(missing)} images of the given split are not there (compared by content)"
            )
        if options.folds and (kept := len(groups.part("holdout"))):
            raise InputError(
                dataset.root,
                f"folds {options.folds}, but the given split holds {kept} images out; expected one that holds none",
                "make it with --holdout 0, or fit without folds",
            )
        return groups
    return make_split(dataset, prints, seed=options.seed, holdout=options.held_out, groups=groups)


def _run_facts(job: _Job, split: Split) -> dict[str, object]:
    """What must be equal for a run to be resumed; `device` and memory may change."""
    return {
        "detector": job.detector.info.name,
        "config": job.detector.config.canonical(),
        "preprocessing": job.preprocessing.canonical(),
        "split": split.digest,
        "compact_features": job.options.compact_features,
        **({"folds": job.options.folds} if job.options.folds else {}),
    }


def _fit(job: _Job, material: _Material, *, folder: Path | None, resume: bool) -> FittedModel:
    train_keys, holdout_keys = material.split.hashes("train"), material.split.hashes("holdout")
    keys, n_train = [*train_keys, *holdout_keys], len(train_keys)
    job.detector.module.to(job.options.device)
    options = job.options
    with FeatureCache(keys, memory_limit=options.memory_limit, compact=options.compact_features) as cache:
        cache.fill(
            job.detector,
            _items(keys, material, job.preprocessing),
            progress=lambda done, total: job.reporter.stage("frozen features", done, total),
        )
        run = TrainingRun(
            cache=cache,
            train=range(n_train),
            holdout=range(n_train, len(keys)),
            training=job.detector.config.training,
            seed=job.detector.config.seed,
            folder=folder,
            device=job.options.device,
            on_epoch=job.reporter.epoch,
            on_note=job.reporter.note,
            skip_nonfinite=job.options.skip_nonfinite,
        )
        unseen = _scores_by_folds(job, material, run) if options.folds else []
        rows = train(job.detector, run, resume=resume)
        job.detector.module.to(job.options.device)
        return _assemble(job, material, run, rows, unseen)


def _items(keys: Sequence[str], material: _Material, preprocessing: Preprocessing) -> Iterator[Item]:
    """What the cache of features is filled from."""
    for key, image in zip(keys, usable_images(material.cases[key] for key in keys), strict=True):
        yield key, to_input(image, preprocessing), original_size(image, preprocessing)


def _scores_by_folds(job: _Job, material: _Material, run: TrainingRun) -> list[tuple[float, float]]:
    """(image score, map maximum) of every image to fit on, by a copy of the detector fitted without its fold."""
    folds, numbers = job.options.folds, material.folds
    found = [(0.0, 0.0)] * len(numbers)
    for fold in range(folds):
        job.reporter.stage("fits for the threshold", fold, folds)
        detector = copy.deepcopy(job.detector)
        left_out = [place for place, number in enumerate(numbers) if number == fold]
        fitted = [place for place, number in enumerate(numbers) if number != fold]
        train(detector, replace(run, train=fitted, holdout=(), folder=None, on_epoch=None))
        detector.module.to(job.options.device)
        for place, scores in zip(left_out, _raw_scores(detector, run, left_out), strict=True):
            found[place] = scores
    job.reporter.stage("fits for the threshold", folds, folds)
    return found


def _assemble(
    job: _Job,
    material: _Material,
    run: TrainingRun,
    rows: list[Row],
    unseen: Sequence[tuple[float, float]],
) -> FittedModel:
    """Calibrate on the scores `unseen` by folds, or on the held-out normals, and put the model together."""
    held_out = unseen or _raw_scores(job.detector, run, run.holdout)
    calibration = None
    if held_out:
        calibration = fit_calibration(
            [score for score, _ in held_out],
            [peak for _, peak in held_out],
            fpr=job.options.fpr,
            source="folds" if unseen else "holdout",
        )
        if calibration.fpr_bound is not None:
            job.reporter.note(
                f"{len(held_out)} unseen normal images bound the false-positive rate at "
                f"{calibration.fpr_bound:.3f}, not {job.options.fpr}: more normal images are needed"
            )
    config = SavedConfig(
        detector=job.detector.info.name,
        detector_config=job.detector.config.canonical(),
        preprocessing=job.preprocessing,
        calibration=calibration,
        map_reference=max(peak for _, peak in held_out or _raw_scores(job.detector, run, run.train)),
        provenance=_provenance(job, material, rows),
    )
    return FittedModel(job.detector, config, material.split, extras=_log_files(run, rows))


def _raw_scores(detector: Detector, run: TrainingRun, indices: Sequence[int]) -> list[tuple[float, float]]:
    """(image score, map maximum) of cached images, by the one scoring path."""
    found: list[tuple[float, float]] = []
    for start in range(0, len(indices), 8):
        prepared = run.cache.rows(indices[start : start + 8])
        scores = detector.score_prepared({k: v.to(run.device) for k, v in prepared.items()})
        peaks = scores.anomaly_map.flatten(1).amax(1).tolist()
        found += zip(scores.image_score.tolist(), peaks, strict=True)
    return found


def _provenance(job: _Job, material: _Material, rows: list[Row]) -> dict[str, str | int | float | None]:
    config, dataset, split = job.detector.config, material.dataset, material.split
    return {
        "preset": config.preset,
        "weights": config.weights,
        "data": dataset.name,
        "layout": dataset.layout,
        "n_train": len(split.part("train")),
        "n_holdout": len(split.part("holdout")),
        **({"folds": job.options.folds} if job.options.folds else {}),
        "epochs": 0 if job.detector.info.closed_form else config.training.epochs,
        "seed": config.seed,
        "split_seed": split.seed,
        "split_digest": split.digest,
        "train_nats_per_dim": rows[-1].get("nats_per_dim") if rows else None,
        "holdout_nats_per_dim": rows[-1].get("holdout_nats_per_dim") if rows else None,
        "umiad": umiad.__version__,
        "torch": torch.__version__,
        "fitted_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _log_files(run: TrainingRun, rows: list[Row]) -> dict[str, bytes]:
    """The training log and the picture of its curves, kept in the model directory."""
    from umiad.charts import training_curves

    if run.folder is None or not rows:
        return {}
    extras = {LOG: (run.folder / LOG).read_bytes()}
    if any("nats_per_dim" in row for row in rows):
        extras["curves.png"] = training_curves(rows)
    return extras
