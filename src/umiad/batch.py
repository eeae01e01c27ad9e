"""Scoring many files into a folder: a JSON line, a map and a picture per image, a report at the end."""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from umiad.cases import alias_of
from umiad.errors import ConfigError, DiskError, InputError
from umiad.exported import ExportedModel
from umiad.filerecord import FileRecord, ImageRecord, Names, by_index
from umiad.io import open_frames, pool
from umiad.journal import UNFINISHED, Journal, Memory, Naming, ShardFacts, shard_folder, whole
from umiad.outputs import Outputs, Volume, Writer, full_scale
from umiad.preprocess import check_usable
from umiad.progress import Reporter, Silent
from umiad.scorebook import REPORT, SCORES, SUMMARY, Book, Summary
from umiad.scorer import Scorer
from umiad.types import FileOptions, Image, framed
from umiad.worklist import Shard, WorkList, find_work

if TYPE_CHECKING:
    from umiad.bfloat16 import Precision
    from umiad.fitted import FittedModel

READ_AHEAD = 16
MEGABYTE = 1_000_000
DEFAULT_FILES = FileOptions(frames="all")

__all__ = ["FileScorer", "Outputs", "ShardSummary", "Summary", "score_files"]


@dataclass(frozen=True)
class ShardSummary:
    """What came of one shard: its files and images, and `skipped` as in `Summary`; `aliased` of the files."""

    folder: Path
    shard: Shard
    files: int
    images: int
    skipped: tuple[tuple[str, str], ...]
    aliased: int

    def to_json(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "shard": str(self.shard),
            "files": self.files,
            "scored": self.images,
            "skipped": [{"file": name, "reason": reason} for name, reason in self.skipped],
        }


@dataclass(frozen=True, eq=False)
class _Step:
    """What the reader has come to: an image, the end of a file (no image, no error), or an error."""

    index: int
    name: str
    aliased: bool
    image: Image | None = None
    volume: Volume | None = None
    error: InputError | None = None


def score_files(
    model: Scorer,
    paths: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    outputs: Outputs | None = None,
    files: FileOptions = DEFAULT_FILES,
    reporter: Reporter | None = None,
) -> Summary:
    """Score every image among `paths` into the folder `out`, from the start; see `FileScorer.run`."""
    return FileScorer(model, outputs=outputs, files=files, reporter=reporter).run(paths, out)


class FileScorer:
    """Scores files with one model and one set of options.

    `files.frames` chooses among frames; windows and axes are the model's. A file of several frames or slices is scored
    frame by frame and comes back as one map and one picture, of its highest frame. Unreadable files are skipped, named
    and counted; of a file that breaks off nothing is kept. `precision` of the backbone while it runs: see
    `umiad.bfloat16`; a few images of the whole list are tried, so that shards decide alike, and the outcome is noted.
    """

    def __init__(
        self,
        model: Scorer,
        *,
        outputs: Outputs | None = None,
        files: FileOptions = DEFAULT_FILES,
        reporter: Reporter | None = None,
        precision: Precision = "float32",
    ) -> None:
        self._model, self._outputs = model, outputs or Outputs()
        self._files, self._reporter = files, reporter or Silent()
        self._wanted, self._precision = precision, "float32"

    def run(self, paths: Sequence[str | os.PathLike[str]], out: Path, *, resume: bool = False) -> Summary:
        """Score every image among `paths` (files and folders) into the folder `out`.

        Writes `scores.jsonl` (a line per image), `maps/`, `pictures/`, `summary.json` and `report.html`; until these
        are whole, `score.work/` holds what `resume` needs to go on after a run that was cut off. Raises InputError when
        there is no image at all or another run works there, ConfigError when there is nothing to resume, DiskError
        when the folder cannot be written.
        """
        if resume:
            self._check_known("--resume")
        work = self._find(paths)
        with self._running(work):
            return self._run(work, out, resume=resume)

    def _run(self, work: WorkList, out: Path, *, resume: bool) -> Summary:
        facts, names = self._facts(work, Shard()), Names()
        journal = Journal(out / UNFINISHED, facts, resume=resume, on_note=self._reporter.note)
        try:
            with journal:
                journal.keep(whole(journal.done, out, Names().of))
                for name in (SUMMARY, REPORT):  # of an earlier run: they would not fit to what is written now
                    (out / name).unlink(missing_ok=True)
                with (out / SCORES).open("w", encoding="utf-8") as lines:
                    book = Book(out, facts, lines)
                    for record in journal.done:
                        book.add(record, *names.of(record))
                    for record, name, stem in self._score(work, journal, out, names.of):
                        book.add(record, name, stem)
                book.summary.peak_memory = _peak_memory()
                summary = book.finish()
                journal.remove()
        except OSError as error:
            raise DiskError(f"{out}: cannot be written: {error}") from error
        return summary

    def run_shard(self, paths: Sequence[str | os.PathLike[str]], out: Path, shard: Shard) -> ShardSummary:
        """Score one share of the images among `paths` into `out/shards/`, going on where an earlier start ended.

        Every shard is to be given the same paths; `merging.merge_shards` makes one set of results of all. Raises as
        `run` does, and ConfigError for a model that was not loaded from its folder.
        """
        self._check_known("--shard")
        work = self._find(paths)
        with self._running(work):
            return self._run_shard(work, shard_folder(out, shard), shard)

    def _run_shard(self, work: WorkList, folder: Path, shard: Shard) -> ShardSummary:
        journal = Journal(folder, self._facts(work, shard), resume=None, on_note=self._reporter.note)
        try:
            with journal:
                journal.keep(whole(journal.done, folder, by_index))
                records = list(journal.done)
                records += [record for record, _, _ in self._score(work, journal, folder, by_index)]
                journal.finish(_peak_memory())
        except OSError as error:
            raise DiskError(f"{folder}: cannot be written: {error}") from error
        failed = [(record.name, *record.error) for record in records if record.error is not None]
        return ShardSummary(
            folder=folder,
            shard=shard,
            files=len(records),
            images=sum(len(record.images) for record in records),
            skipped=tuple((name, str(InputError(name, *why))) for name, *why in failed),
            aliased=sum(record.aliased for record in records),
        )

    def _check_known(self, option: str) -> None:
        if not self._model.manifest_sha256:
            raise ConfigError(f"{option}: the model was not loaded from a folder; save it and load it first")

    def _find(self, paths: Sequence[str | os.PathLike[str]]) -> WorkList:
        notes: list[str] = []
        work = find_work(paths, follow=self._files.follow, notes=notes)
        for note in notes:
            self._reporter.note(note)
        return work

    @contextmanager
    def _running(self, work: WorkList) -> Iterator[None]:
        """Run the backbone in what `bfloat16.choose` decides, and say what that is; afterwards as it was fitted."""
        if isinstance(self._model, ExportedModel):
            if self._wanted != "float32":
                self._reporter.note("backbone in float32: an exported model keeps what it was exported in")
            yield
            return
        from umiad import bfloat16  # imports torch, which an exported model does without

        model = cast("FittedModel", self._model)
        probes = [] if self._wanted == "float32" else list(self._probes(work, bfloat16.PROBES))
        choice = bfloat16.choose(model, probes, self._wanted)  # whatever was chosen for the model before
        if self._wanted != "float32":
            self._reporter.note(f"backbone in {choice.precision}: {choice.reason}")
        self._precision = choice.precision
        try:
            yield
        finally:
            bfloat16.choose(model, [], "float32")

    def _probes(self, work: WorkList, count: int) -> Iterator[Image]:
        """The first image of each of `count` files, evenly spaced in the list; what cannot be read is passed over."""
        options = self._model.file_options(self._files)
        for file in work.files[:: -(-len(work.files) // count)]:
            with suppress(InputError):
                _, images = open_frames(file, frames=options.frames, reading=options.reading)
                for image in itertools.islice(images, 1):
                    check_usable(image)
                    yield image

    def _facts(self, work: WorkList, shard: Shard) -> ShardFacts:
        outputs, calibration = self._outputs, self._model.config.calibration
        return ShardFacts(
            number=shard.number,
            of=shard.of,
            files=len(work.files),
            list_sha256=work.sha256,
            model_sha256=self._model.manifest_sha256,
            options={
                "pictures": outputs.pictures,
                "maps": outputs.maps,
                "min_area": outputs.min_area,
                "frame": self._files.frames,
                "show_names": self._files.show_names,
                "precision": self._precision,
            },
            model=tuple(self._model.info.items()),
            fpr=calibration.fpr if calibration else None,
            png16_full_scale=full_scale(self._model) if outputs.maps == "png16" else None,
        )

    def _score(
        self, work: WorkList, journal: Journal, root: Path, naming: Naming
    ) -> Iterator[tuple[FileRecord, str, str]]:
        """Score what `journal` has not; yield each file's record, name and stem once its results are written."""
        own = journal.facts.shard.indices(len(work.files))
        done, total = len(journal.done), len(own)
        todo = [(index, work.files[index]) for index in own[done:]]
        writer = Writer(self._model, root, self._outputs)
        steps = _ahead(_steps(todo, self._model.file_options(self._files)))
        for step in _finished(self._model, steps, self._outputs.min_area):
            record = _record(step)
            name, stem = naming(record)
            if step.volume is not None and step.error is None:
                record = writer.write(record, step.volume, stem)
            journal.add(record)
            yield record, name, stem
            done += 1
            self._reporter.stage("scoring", done, total)


def _finished(model: Scorer, steps: Iterator[_Step], min_area: int) -> Iterator[_Step]:
    """The last step of every file, once its images are scored, in batches across files."""
    waiting: deque[_Step] = deque()
    failed: dict[int, InputError] = {}

    def images() -> Iterator[Image]:
        for step in steps:
            waiting.append(step)
            if step.image is not None:
                yield step.image

    for image, value, small_map in itertools.chain(model.score_images(images()), [(None, 0.0, None)]):
        while waiting and waiting[0].image is None:
            last = waiting.popleft()
            yield replace(last, error=last.error or failed.pop(last.index, None))
        if image is None or small_map is None:
            break
        step = waiting.popleft()
        if step.volume is not None:
            try:
                found = model.finding(image, value, small_map, min_area=min_area)
            except InputError as error:  # a score that is not finite: this file's, not the run's
                failed.setdefault(step.index, error)
            else:
                step.volume.add(image, found, small_map)


def _record(step: _Step) -> FileRecord:
    """What is known of a file before its results are written."""
    record = FileRecord(step.index, step.name, step.aliased)
    if step.error is not None:
        return replace(record, error=(step.error.reason, step.error.hint))
    if step.volume is None:
        return record
    images = tuple(ImageRecord.of(finding) for finding in step.volume.findings)
    return replace(record, frames=step.volume.count, images=images)


def _steps(files: Iterable[tuple[int, Path]], options: FileOptions) -> Iterator[_Step]:
    """Read file after file, image after image."""
    for index, file in files:
        alias = "" if options.show_names else alias_of(file)
        own = _Step(index, alias or str(file), bool(alias))
        try:
            stack, images = open_frames(file, frames=options.frames, reading=options.reading)
            volume = Volume(None if stack.single else stack.count, stack.geometry)
            for image in images:
                check_usable(image)
                yield replace(own, image=replace(image, name=framed(own.name, image.frame)), volume=volume)
        except InputError as error:
            yield replace(own, error=error)
        else:
            yield replace(own, volume=volume)


def _ahead(steps: Iterator[_Step]) -> Iterator[_Step]:
    """The same steps, made by a thread that is up to READ_AHEAD of them ahead."""
    ready: queue.Queue[_Step | BaseException | None] = queue.Queue(maxsize=READ_AHEAD)
    stopped = threading.Event()

    def put(item: _Step | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for step in steps:
                if not put(step):
                    return
            put(None)
        except BaseException as error:
            put(error)

    reader = threading.Thread(target=read, name="umiad-reader", daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        if threading.current_thread() is not reader:  # it may be what collects a run that was given up
            reader.join()


def _peak_memory() -> Memory | None:
    """Megabytes at most: of this process, and of the largest decoding process (None where unknown)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1 << 10
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // MEGABYTE
    children = pool.current().peak
    return own, None if children is None else children // MEGABYTE
