"""The results of a scoring run as people get them: scores.jsonl as it grows, then summary.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from umiad.diskfile import write_atomic
from umiad.errors import InputError
from umiad.filerecord import FileRecord
from umiad.journal import Memory, ShardFacts
from umiad.report import score_page
from umiad.types import Finding

SCORES, SUMMARY, REPORT = "scores.jsonl", "summary.json", "report.html"
PICTURES_IN_REPORT = 60


@dataclass
class Summary:
    """What came of a scoring run; `skipped` are (file, reason), `volumes` a summary for each file of several frames.

    `png16_full_scale`: the map value that 65535 stands for in 16-bit PNG maps (None for other formats).
    `peak_memory`: megabytes that this process, and the largest decoding process, held at most (None where unknown);
    of merged shards `shard_memory` holds one for each. `precision`: what the backbone ran in.
    """

    folder: Path
    model: dict[str, str | int | float | None]
    findings: list[Finding] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    volumes: list[dict[str, object]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    aliased: int = 0
    png16_full_scale: float | None = None
    peak_memory: Memory | None = None
    shard_memory: Sequence[Memory | None] = ()
    precision: str = "float32"

    @property
    def above(self) -> int:
        """Images above the threshold."""
        return sum(finding.above_threshold is True for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        """Counts, skipped files and the model's provenance, as plain values."""
        own = None if self.peak_memory is None else list(self.peak_memory)
        each = [None if memory is None else list(memory) for memory in self.shard_memory]
        return {
            "model": self.model,
            "scored": len(self.findings),
            "above_threshold": self.above,
            "without_threshold": sum(finding.above_threshold is None for finding in self.findings),
            "png16_full_scale": self.png16_full_scale,
            "skipped": [{"file": name, "reason": reason} for name, reason in self.skipped],
            "volumes": self.volumes,
            "precision": self.precision,
            "peak_memory_mb": each or own,
        }


class Book:
    """Takes up file after file, in the order of the list, and writes what was found in all of them.

    `lines`: where scores.jsonl is written to. Methods raise OSError or DiskError when the disk does not take it.
    """

    def __init__(self, folder: Path, facts: ShardFacts, lines: IO[str]) -> None:
        self.summary = Summary(
            folder,
            dict(facts.model),
            png16_full_scale=facts.png16_full_scale,
            precision=str(facts.options["precision"]),
        )
        self._facts, self._lines = facts, lines
        self._pictures: dict[str, Path] = {}

    def add(self, record: FileRecord, name: str, stem: str) -> None:
        """Write a file's lines under its `name` and remember it; its outputs have the `stem`."""
        self.summary.aliased += record.aliased
        if record.error is not None:
            reason, hint = record.error
            self.summary.skipped.append((name, str(InputError(name, reason, hint))))
            return
        named, shown = record.named(stem), record.highest
        for image in record.images:
            finding = image.finding(name)
            picture = named["picture"] if image is shown else None
            line = {**finding.to_json(), "map": named["map"], "picture": picture}
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self.summary.findings.append(finding)
            if picture is not None:
                self._pictures[finding.name] = self.summary.folder / picture
        if record.frames is not None:
            self.summary.volumes.append(self._volume(record, name, named))

    def finish(self) -> Summary:
        """Write summary.json and report.html; returns the summary, whose memory must have been set."""
        summary = self.summary
        summary.pictures = list(self._pictures.values())
        text = json.dumps(summary.to_json(), indent=1, allow_nan=False)
        write_atomic(summary.folder / SUMMARY, text.encode("ascii"))
        ranked = sorted(summary.findings, key=lambda finding: -finding.image_score)
        shown = [each.name for each in ranked if each.name in self._pictures][:PICTURES_IN_REPORT]
        score_page(
            summary.folder / REPORT,
            findings=summary.findings,
            pictures={name: self._pictures[name].read_bytes() for name in shown},
            skipped=summary.skipped,
            provenance={key: str(value) for key, value in summary.model.items() if value is not None},
            limit=PICTURES_IN_REPORT,
        )
        return summary

    def _volume(self, record: FileRecord, name: str, named: dict[str, str | None]) -> dict[str, object]:
        """One volume in a few words. Its score is its highest slice's, which no threshold was calibrated for."""
        scored, fpr = len(record.images), self._facts.fpr
        above = [image.frame for image in record.images if image.above_threshold]
        return {
            "file": name,
            "frames": record.frames,
            "scored": scored,
            "highest_frame": record.highest.frame,
            "highest_score": record.highest.image_score,
            "above_threshold": None if fpr is None else above,
            "expected_above_if_normal": None if fpr is None else round(fpr * scored, 2),
            **named,
        }
