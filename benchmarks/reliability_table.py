"""Render docs/reliability.md: which hostile files, faults and models were tried, and what came of it.

    pytest -m 'slow or not slow' --reliability benchmarks/results/reliability.json     (`make slow`)
    python benchmarks/reliability_table.py

The numbers are those of that session; ceilings are read from the code.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umiad import diskfile, manifest, modelfile, tensorfile, weights
from umiad.io import Limits
from umiad.io.source import MIB, UNSUSPICIOUS

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
GROUPS = {
    "D": "Determinism and correctness",
    "I": "Input files",
    "M": "Model files",
    "T": "Faults while training and saving",
    "R": "The rule for every file",
}
TRIED: dict[str, str] = {
    "D1": "the same seed again, whole fits from files: scores and maps bit-equal",
    "D2": "batches of 1, 7 and 32 images give the same scores within rounding, and the same AUROC",
    "D3": "1, 2 and 4 threads, and files given in another order: scores equal by name",
    "D4": "scores on a CPU and on an accelerator",
    "D5": "flows: log-determinants against automatic differentiation in float64, inverses, density of a known Gaussian",
    "D6": "AUROC and AUPRO against slow definitions with ties, under monotone maps and large offsets; one class only",
    "D7": "no way for labels into a fit; labels that mean nothing give an AUROC of one half; `oracle` where it is one",
    "D8": "saved and loaded, and interrupted and resumed: bit-equal",
    "D9": "intervals: coverage of a known AUROC, whole patients resampled, seeds and images together",
    "I1": "good files cut short: an error, or every pixel; no grey for missing rows",
    "I2": "public collections of damaged and odd files: an image or one `InputError`",
    "I3": "good files with one byte changed",
    "I4": "16-bit ramps keep their depth and stay linear",
    "I5": "colour spaces, transparency, palettes, 1 bit to 32 bits, float: golden values",
    "I6": "EXIF orientations 1 to 8 of image and mask",
    "I7": "images of a few pixels",
    "I8": "bombs: a small file that declares or becomes a huge image; ceilings before decoding",
    "I9": "NIfTI that lies: NaN, dimensions, offsets, slopes, affines, 4-D, colours",
    "I10": "multi-frame files: frame k is that frame, and only what was asked for is decoded",
    "I11": "DICOM grey values: rescale, tables, windows, MONOCHROME1, signed, 12 in 16 bits, palettes, YBR",
    "I12": "DICOM that lies: pixels missing or too short, a million frames, deep nesting, no image at all",
    "I13": "names that lie, folders, pipes, sockets and devices with the names of images",
    "I14": "links in loops, links out of the folder, very deep folders, ten thousand links",
    "I15": "names that are markup, options, right-to-left, not Unicode",
    "I16": "files that cannot be read, change or vanish while they are read; skipped ones are named and counted",
    "I17": "masks: other size, absent, empty, soft, label numbers, coloured, several of one image",
    "I18": "the same image or patient in training and test; a class without images",
    "M1": "pickles and archives of all kinds, renamed and combined: refused, and a canary that is never executed",
    "M2": "tensor files cut, flipped, lying about sizes, with holes, overlaps, names given twice, NaN",
    "M3": "configurations of something else, or of something enormous: refused before memory is taken",
    "M4": "formats newer, older and missing; models of every format so far score as they did",
    "M5": "manifests that name files elsewhere: paths, links, hard links, devices, names equal but for case",
    "M6": "exported graphs altered, with loops, calls, data in other files or unknown operators: refused as bytes",
    "M7": "a manifest altered together with its files: found where its hash is pinned, and only there",
    "M8": "backbone weights from the network: wrong hash, redirect, pickle, no network",
    "T1": "killed at seeded points, also while saving, and resumed: the end is bit-equal",
    "T2": "disk full, read-only, failing at write, flush and rename: the old state loads",
    "T3": "checkpoints and run files cut or zeroed: the newest whole one is chosen, the other named",
    "T4": "losses, gradients, features and moments that are not finite: the run stops and names them",
    "T5": "unreadable images in a data set: refused before fitting, or left out and named",
    "T6": "signals: saved, with the exit code of the signal; a second one stops at once",
    "T7": "no worker processes load training data, so none can die or hang",
    "T8": "two runs in one folder; locks that are stale, damaged or of another machine",
    "T9": "hash seeds, time zones, locales, clocks, `python -O`",
    "T10": "ten times longer: memory, open files and kept checkpoints do not grow",
    "R0": "decoders that crash, hang, grow or raise whatever they like: one error for the file, and the next file",
}
"""Case -> what is tried, in words."""


def load() -> dict[str, Any]:
    """The committed result."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def page(found: Mapping[str, Any]) -> str:
    """Markdown of the whole page."""
    parts = [_head(found), "## What was promised", RULES, _ceilings(), "## What was tried", READING]
    for letter, title in GROUPS.items():
        parts.append(_table(title, [each for each in found["cases"] if each["case"][0] == letter]))
    return "\n\n".join([*parts, RUNNING, MISSING]) + "\n"


def _head(found: Mapping[str, Any]) -> str:
    tried, failed, skipped = (
        sum(each[key] for each in found["cases"]) for key in ("tried", "failed", "skipped")
    )
    where = f"Python {found['python']}, torch {found['torch']}, {found['platform']}"
    return (
        "# Reliability: what was tried\n\n"
        f"{tried:,} tries, of which {failed:,} failed; {skipped:,} tests were skipped. From a session of "
        f"{found['ran']:,} tests ({found['selection']}) on {found['when']}, commit {found['commit']}, {where}.\n\n"
        "Made by `benchmarks/reliability_table.py` from `benchmarks/results/reliability.json`, which `make slow` "
        "writes; nothing here is typed by hand but the words. The threat model is in [SECURITY.md](../SECURITY.md), "
        "hazards to people in [risks.md](risks.md)."
    )


RULES = """**R0, for every input file:** the process survives; the outcome is an image or exactly one `InputError` with
file, reason and remedy; the command line shows no stack trace and ends with exit code 3; nothing half-done is kept;
no text from the header of a medical file stands in the message. The order: regular file, size, first bytes, header,
declared size, and only then decoding, in a child process.

**For every model file:** `ModelFileError` (exit code 5) or a model that is what its manifest says. Nothing is
unpickled, nothing is executed, no path from inside a file is followed, and building takes no more memory than follows
from the tensors that are there.

**For every fit:** killed, interrupted or out of disk, what was saved before still loads; resuming ends bit-equal."""
READING = """A test belongs to the cases in its name (`test_I8_...`); some belong by a list, `tests/reliability.py`. One
test is one try, unless it says how many files, cuts or changes it tried. "Left out": tests that the session did not
select."""
RUNNING = """## How to run it

`make slow` runs everything and writes the numbers; `python benchmarks/reliability_table.py` makes this page of them.
The attacks are generated by `attacks/` (all of it harmless); the collections of files are looked for in
`../shared/corpora` and skipped with a reason where absent, pydicom's come with its package. One case:
`pytest -m 'slow or not slow' -k I8`."""
MISSING = """## What this does not show

- That there is no other hostile file. These are the ones that we knew how to make or to find.
- Anything about a service or a viewer: there is none yet, so its cases (S1 to S12) do not exist.
- Times. Ceilings of processor time are enforced; how long anything takes is not asserted.
- Limits by the operating system on Windows: address space, processor time and open files are limited on POSIX systems
  only. There a decoder still runs in a process of its own, and one that is silent for too long is ended.
- Accelerators, unless the line of D4 has numbers: scores on a GPU are not bit-equal to those on a CPU.
- Bit-equal scores in batches of another size (D2). A batch of one goes through other convolution code; the difference
  is rounding, 2e-6 of the score at most for new images. Where few images at few pixels gave the covariance (`egmf`,
  `padim`, `posgauss` at 64 pixels), or for the very images that a model was fitted on, it is magnified (5e-5 allowed in
  the tests of new images). The order of files changes which image is alone in the last batch, and nothing else.
- Whether findings are right. That is what [results.md](results.md) is about."""


def _ceilings() -> str:
    limits = Limits()
    rows = [
        ("a file", f"{limits.max_bytes // MIB} MiB"),
        ("one image, as declared", f"{limits.max_pixels:,} pixels"),
        ("frames of a DICOM file", f"{limits.max_frames:,}"),
        ("a volume", f"{limits.max_voxels:,} voxels"),
        (
            "a compressed file, inflated",
            f"{limits.max_inflated // MIB} MiB, and {limits.max_ratio} times its own size beyond "
            f"{UNSUSPICIOUS // MIB} MiB",
        ),
        ("decoding, per file and frame", f"{limits.child_seconds} s of processor time"),
        ("decoding, address space", f"{limits.child_memory // MIB:,} MiB"),
        ("a model's tensor file", f"{tensorfile.MAX_FILE_BYTES // MIB:,} MiB"),
        ("a tensor file's header", f"{tensorfile.MAX_HEADER_BYTES // MIB} MiB"),
        ("manifest, configuration, card", f"{manifest.MAX_JSON_BYTES // MIB} MiB each"),
        (
            "any other file of a model",
            f"{manifest.MAX_OTHER_BYTES // MIB} MiB, {manifest.MAX_FILES} files in all",
        ),
        (
            "building a model",
            f"2 times its tensors and {modelfile.SPARE_BYTES // diskfile.MIB} MiB, "
            f"{modelfile.MAX_BUILD_BYTES // MIB:,} MiB at most",
        ),
        ("a file of backbone weights", f"{weights.MAX_BYTES // MIB} MiB"),
    ]
    lines = ["| ceiling on | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _table(title: str, cases: Sequence[Mapping[str, Any]]) -> str:
    head = [
        f"### {title}",
        "",
        "| case | what is tried | passed | counted | tests |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(row(each) for each in cases)])


def row(entry: Mapping[str, Any]) -> str:
    """One line of a table."""
    notes = [f"**{entry['failed']:,} failed**"] if entry["failed"] else []
    notes += [f"{entry[key]:,} {key.replace('_', ' ')}" for key in ("skipped", "left_out") if entry[key]]
    passed = f"{entry['passed']:,} of {entry['tried']:,}" if entry["tried"] else "-"
    passed = ": ".join([passed, ", ".join(notes)]) if notes else passed
    files = Counter(test.split("::")[0] for test in entry["tests"])
    named = ", ".join(f"`{name}` ({count})" for name, count in sorted(files.items())) or "-"
    words = TRIED.get(entry["case"], "")
    return f"| {entry['case']} | {words} | {passed} | {entry['what']} | {named} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(load()), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
