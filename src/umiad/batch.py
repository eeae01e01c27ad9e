"""Scoring many files into a folder: a JSON line, a map and a picture per image, a report at the end."""

from __future__ import annotations

import itertools
import json
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from umiad.cases import Aliases
from umiad.data import list_images
from umiad.errors import DiskError, InputError
from umiad.fitted import FittedModel
from umiad.fitting import Reporter, Silent
from umiad.io import READABLE, open_frames, pool
from umiad.outputs import Outputs, Volume, Writer, without_map
from umiad.preprocess import check_usable
from umiad.report import score_page
from umiad.types import FileOptions, Finding, Image, framed

READ_AHEAD = 16
PICTURES_IN_REPORT = 60
MEGABYTE = 1_000_000
DEFAULT_FILES = FileOptions(frames="all")

__all__ = ["Outputs", "Summary", "score_files"]


@dataclass
class Summary:
    """What came of a scoring run; `skipped` are (file, reason), `volumes` a summary for each file of several frames.

    `png16_full_scale`: the map value that 65535 stands for in 16-bit PNG maps (None for other formats).
    `peak_memory`: megabytes that this process, and the largest decoding process, held at most (None where unknown).
    """

    folder: Path
    model: dict[str, str | int | float | None]
    findings: list[Finding] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    volumes: list[dict[str, object]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    aliased: int = 0
    png16_full_scale: float | None = None
    peak_memory: tuple[int, int | None] | None = None

    @property
    def above(self) -> int:
        """Images above the threshold."""
        return sum(finding.above_threshold is True for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        """Counts, skipped files and the model's provenance, as plain values."""
        return {
            "model": self.model,
            "scored": len(self.findings),
            "above_threshold": self.above,
            "without_threshold": sum(finding.above_threshold is None for finding in self.findings),
            "png16_full_scale": self.png16_full_scale,
            "skipped": [{"file": name, "reason": reason} for name, reason in self.skipped],
            "volumes": self.volumes,
            "peak_memory_mb": None if self.peak_memory is None else list(self.peak_memory),
        }


@dataclass(frozen=True, eq=False)
class _Step:
    """What the reader has come to: an image, the end of a file (no image, no error), or an error."""

    file: Path
    name: str
    image: Image | None = None
    volume: Volume | None = None
    error: InputError | None = None


def score_files(
    model: FittedModel,
    paths: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    outputs: Outputs | None = None,
    files: FileOptions = DEFAULT_FILES,
    reporter: Reporter | None = None,
) -> Summary:
    """Score every image among `paths` (files and folders) into the folder `out`.

    Writes `scores.jsonl` (a line per image), `maps/`, `pictures/`, `summary.json` and `report.html`. A file of several
    frames or slices is scored frame by frame and comes back as one map and one picture, of its highest frame.
    `files.frames` chooses among frames; windows and axes are the model's. Unreadable files are skipped, named and
    counted; of a volume that breaks off nothing is kept. Raises InputError when there is no image at all,
    DiskError when the folder cannot be written.
    """
    outputs, reporter = outputs or Outputs(), reporter or Silent()
    notes: list[str] = []
    found, stray = list_images(paths, follow=files.follow, notes=notes)
    if not found:
        first = os.fspath(paths[0]) if paths else "paths"
        raise InputError(first, "no images found", f"umiad reads {READABLE}")
    if stray:
        notes.append(f"{len(stray)} files are no images to score and were ignored: {stray[0].name}, ...")
    for note in notes:
        reporter.note(note)
    summary = Summary(out, model.info)
    writer = Writer(model, out, outputs)
    summary.png16_full_scale = writer.full_scale if outputs.maps == "png16" else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "scores.jsonl").open("w", encoding="utf-8") as lines:
            run = _Run(model, writer, summary, lines, outputs.min_area)
            steps = _ahead(_steps(found, model.file_options(files)))
            for done in run.follow(steps):
                reporter.stage("scoring", done, len(found))
        summary.pictures = list(writer.pictures.values())
        summary.peak_memory = _peak_memory()
        text = json.dumps(summary.to_json(), indent=1, allow_nan=False)
        (out / "summary.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error}") from error
    ranked = sorted(summary.findings, key=lambda finding: -finding.image_score)
    shown = [each.name for each in ranked if each.name in writer.pictures][:PICTURES_IN_REPORT]
    score_page(
        out / "report.html",
        findings=summary.findings,
        pictures={name: writer.pictures[name].read_bytes() for name in shown},
        skipped=summary.skipped,
        provenance={key: str(value) for key, value in model.info.items() if value is not None},
        limit=PICTURES_IN_REPORT,
    )
    return summary


class _Run:
    """Scores what the reader brings, in batches across files, and writes each file's results once it is whole."""

    def __init__(
        self, model: FittedModel, writer: Writer, summary: Summary, lines: IO[str], min_area: int
    ) -> None:
        self._model, self._writer, self._summary = model, writer, summary
        self._lines, self._min_area = lines, min_area
        self._waiting: deque[_Step] = deque()

    def follow(self, steps: Iterator[_Step]) -> Iterator[int]:
        """Yield the number of files that are done, after each step of the reader."""
        done = 0
        results = self._model.score_images(self._images(steps))
        for image, value, small_map in itertools.chain(results, [(None, 0.0, None)]):
            while self._waiting and self._waiting[0].image is None:
                done += self._end(self._waiting.popleft())
            if image is None or small_map is None:
                break
            step = self._waiting.popleft()
            finding = self._model.finding(image, value, small_map, min_area=self._min_area)
            if step.volume is not None:
                step.volume.add(image, finding, small_map)
            else:
                self._write(finding, self._writer.image(image, finding))
            yield done
        yield done

    def _images(self, steps: Iterator[_Step]) -> Iterator[Image]:
        for step in steps:
            self._waiting.append(step)
            if step.image is not None:
                yield step.image

    def _write(self, finding: Finding, named: dict[str, str | None]) -> None:
        self._lines.write(json.dumps({**finding.to_json(), **named}, allow_nan=False) + "\n")
        self._summary.findings.append(without_map(finding))

    def _end(self, step: _Step) -> int:
        """A file's end: its volume is written, or its error noted."""
        self._summary.aliased += step.name != str(step.file)
        if step.error is not None:
            shown = InputError(step.name, step.error.reason, step.error.hint)
            self._summary.skipped.append((step.name, str(shown)))
        elif step.volume is not None:
            named = self._writer.volume(step.volume)
            for finding in step.volume.findings:
                own = named["picture"] if finding.name in self._writer.pictures else None
                self._write(finding, {"map": named["map"], "picture": own})
            self._summary.volumes.append(_volume_facts(step.volume, named, self._model))
        return 1


def _steps(files: Sequence[Path], options: FileOptions) -> Iterator[_Step]:
    """Read file after file, image after image."""
    aliases = Aliases(show_names=options.show_names)
    for file in files:
        name = aliases.of(file) or str(file)
        volume: Volume | None = None
        try:
            stack, images = open_frames(file, frames=options.frames, reading=options.reading)
            if not stack.single:
                volume = Volume(name, stack.count, stack.geometry)
            for image in images:
                check_usable(image)
                yield _Step(file, name, replace(image, name=framed(name, image.frame)), volume)
        except InputError as error:
            yield _Step(file, name, error=error)
        else:
            yield _Step(file, name, volume=volume)


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
        reader.join()


def _volume_facts(volume: Volume, named: dict[str, str | None], model: FittedModel) -> dict[str, object]:
    """One volume in a few words. Its score is its highest slice's, which no threshold was calibrated for."""
    scores = {finding.frame: finding.image_score for finding in volume.findings}
    highest = max(scores, key=lambda frame: scores[frame])
    calibration = model.config.calibration
    above = [finding.frame for finding in volume.findings if finding.above_threshold]
    return {
        "file": volume.name,
        "frames": volume.count,
        "scored": len(scores),
        "highest_frame": highest,
        "highest_score": scores[highest],
        "above_threshold": above if calibration else None,
        "expected_above_if_normal": round(calibration.fpr * len(scores), 2) if calibration else None,
        **named,
    }


def _peak_memory() -> tuple[int, int | None] | None:
    """Megabytes at most: of this process, and of the largest decoding process (None where unknown)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1 << 10
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // MEGABYTE
    children = pool.current().peak
    return own, None if children is None else children // MEGABYTE
