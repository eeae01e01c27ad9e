"""A data set on disk as a list of cases: which files are images, which are masks, which class each one has.

Only this file knows the public sets and layouts by name. Nothing here decodes pixels.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from umiad.cases import expand
from umiad.config import nearest
from umiad.errors import InputError
from umiad.types import ABNORMAL, NORMAL, Case, FileOptions, framed
from umiad.walk import Walk, natural_key

NORMAL_KINDS = frozenset({"normal", "no", "good", "healthy", "ok"})
ABNORMAL_KINDS = frozenset(
    {"abnormal", "yes", "benign", "malignant", "hemorrhage", "haemorrhage", "anomaly", "anomalies"}
    | {"anomalous", "lesion", "lesions", "defect", "defects", "defective", "bad", "ungood", "unhealthy"}
    | {"tumor", "tumour", "cancer", "disease", "diseased", "pathology", "pathological", "positive"}
)
KIND_OF = {NORMAL: "normal", ABNORMAL: "abnormal", None: "unknown"}
MASK_FOLDERS = frozenset({"masks", "mask", "ground_truth"})
COLUMNS = ("path", "label", "mask", "patient", "split")
LAYOUTS = (
    "normal/ and abnormal/ folders (or benign, malignant, yes, no, hemorrhage, ...; masks beside the images "
    "or in masks/), train/good + test/* + ground_truth/*, only a normal/ folder, a flat folder of normal "
    "images, or a .csv file with the columns path,label[,mask,patient,split]"
)

DEFAULT_FILES = FileOptions()

# Class folders that identify the paper's sets, and the paper's training normals: (used, of how many).
PAPER_FOLDERS = {
    frozenset({"benign", "malignant", "normal"}): "busi",
    frozenset({"yes", "no"}): "brain_mri",
    frozenset({"hemorrhage", "normal"}): "head_ct",
}
PAPER_TRAIN = {"busi": (99, 133), "brain_mri": (88, 98), "head_ct": (90, 100)}
GENERIC_TRAIN = (80, 100)

_MASK_NAME = re.compile(r"^(?P<stem>.+?)_mask(_\d+)?$", re.IGNORECASE)
_NUMBERED = re.compile(r"^(?P<stem>.+)_\d+$")


@dataclass(frozen=True)
class DataSet:
    """The cases of one data set, in natural order, and what was found beside them.

    `layout` is "busi", "brain_mri", "head_ct", "mvtec", "folders", "normal_only", "flat" or "csv"; `root` is
    the folder that names are relative to; `stray` lists files that are no images (read once, ignored);
    `notes` are sentences a user should see; `files`: how the files were found and opened.
    """

    name: str
    layout: str
    root: Path
    cases: tuple[Case, ...]
    stray: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    files: FileOptions = DEFAULT_FILES

    def name_of(self, case: Case) -> str:
        r"""The case's path relative to the root, with forward slashes: the same on every machine.

        Bytes of a file name that are no UTF-8 become `\xNN`. A case with an alias is called by it; frame k of
        a file is `name#k`.
        """
        return framed(case.alias or self.path_of(case), case.frame)

    def path_of(self, case: Case) -> str:
        """The path relative to the root in any case, for looking up what users wrote down."""
        relative = Path(os.path.relpath(case.path, self.root)).as_posix()
        return os.fsencode(relative).decode("utf-8", errors="backslashreplace")

    @property
    def train_normals(self) -> int:
        """How many normals train when the data has no official split.

        The paper's count for its three sets (99 of 133, 88 of 98, 90 of 100), the same fraction of a subset
        of one of them, 80 % of any other; at least one, and one is left over for the test where possible.
        """
        total = sum(case.label == NORMAL for case in self.cases)
        used, of = PAPER_TRAIN.get(self.layout, GENERIC_TRAIN)
        count = (2 * total * used + of) // (2 * of)  # rounded half up, in integers
        return min(max(count, 1), max(total - 1, 1)) if total else 0


def load_data(path: str | os.PathLike[str], *, files: FileOptions = DEFAULT_FILES) -> DataSet:
    """Read a data set's structure from a folder, or from a manifest if `path` is a .csv file.

    Raises:
        InputError: nothing there, no images, or a structure that is none of the layouts understood.
    """
    root = Path(path)
    if not os.path.exists(root):
        raise InputError(root, "does not exist, expected a folder or a .csv file", "check the spelling")
    if root.is_file():
        if root.suffix.lower() == ".csv":
            data = _load_csv(root)
            return replace(data, cases=expand(data.cases, files), files=files)
        raise InputError(
            root, "is a single file, expected a folder or a .csv file", "give the folder it lies in"
        )
    found = Walk(root, follow=files.follow)
    folders = {entry.name.lower(): entry for entry in found.folders_of(root)}
    data_set = _load_mvtec(found, folders) or _load_classes(found, folders) or _load_flat(found)
    if data_set is None:
        raise InputError(root, f"unrecognised structure: {_describe(found)}", f"expected {LAYOUTS}")
    if not data_set.cases:
        raise InputError(
            root, f"has the structure '{data_set.layout}' but holds no images", f"expected {LAYOUTS}"
        )
    cases = expand(data_set.cases, files)
    notes = data_set.notes + found.remarks()
    return replace(data_set, cases=cases, stray=tuple(found.stray), notes=notes, files=files)


def list_images(
    paths: Sequence[str | os.PathLike[str]], *, follow: bool = False, notes: list[str] | None = None
) -> tuple[list[Path], list[Path]]:
    """Images and stray files under any mix of files and folders, each once, in natural order per folder.

    A file given explicitly is always taken. Folders are searched recursively; a `*_mask*` file whose image
    lies beside it, and a file in a mask folder, is stray there. `follow` as in `FileOptions`; what was passed
    over is appended to `notes`.

    Raises:
        InputError: a path that does not exist.
    """
    images: dict[Path, None] = {}
    stray: dict[Path, None] = {}
    for given in map(Path, paths):
        if not os.path.exists(given):
            raise InputError(given, "does not exist, expected an image or a folder", "check the spelling")
        if not given.is_dir():
            images[given] = None
            continue
        found = Walk(given, follow=follow)
        files = list(found.images_under(given))
        beside = {(file.parent, _stem(file)) for file in files}
        for file in files:
            match = _MASK_NAME.match(_stem(file))
            is_mask = match is not None and (file.parent, match["stem"]) in beside
            is_mask = is_mask or bool(found.inside(file) & MASK_FOLDERS)
            (stray if is_mask else images)[file] = None
        stray.update(dict.fromkeys(found.stray))
        if notes is not None:
            notes.extend(found.remarks())
    return list(images), [file for file in stray if file not in images]


def _stem(path: Path) -> str:
    """File name without its image suffix ("scan.nii.gz" -> "scan")."""
    name = path.name
    return name[:-7] if name.lower().endswith(".nii.gz") else path.stem


def _label(kind: str) -> int | None:
    name = kind.strip().lower()
    return NORMAL if name in NORMAL_KINDS else ABNORMAL if name in ABNORMAL_KINDS else None


def _load_mvtec(found: Walk, folders: dict[str, Path]) -> DataSet | None:
    """`train/good`, `test/<kind>`, `ground_truth/<kind>`: a test kind without a normal name is abnormal."""
    if not {"train", "test"} <= folders.keys():
        return None
    cases, files = [], []
    for part in ("train", "test"):
        _loose(found, folders[part])
        for folder in found.folders_of(folders[part]):
            label = NORMAL if _label(folder.name) == NORMAL else ABNORMAL
            images, beside = _apart(found, found.images_under(folder))
            cases += [Case(image, label=label, kind=folder.name, split=part) for image in images]
            files += beside
    files += [m for name in sorted(MASK_FOLDERS & folders.keys()) for m in found.images_under(folders[name])]
    _loose(found, found.root)
    _ignore(found, folders.keys() - {"train", "test"} - MASK_FOLDERS)
    return DataSet(found.root.resolve().name, "mvtec", found.root, _with_masks(found, cases, files))


def _load_classes(found: Walk, folders: dict[str, Path]) -> DataSet | None:
    """One folder per class, at least one with a normal name; a folder of unknown name stays unlabelled."""
    labels = {name: _label(name) for name in folders.keys() - MASK_FOLDERS}
    if NORMAL not in labels.values():
        return None
    cases, masks = [], []
    for name in sorted(labels, key=natural_key):
        images, beside = _apart(found, found.images_under(folders[name]))
        cases += [Case(image, label=labels[name], kind=folders[name].name) for image in images]
        masks += beside
        if labels[name] is None and images:
            found.notes.append(
                f"folder '{name}': not a known class name; its {len(images)} images are not used"
            )
    masks += [m for name in sorted(MASK_FOLDERS & folders.keys()) for m in found.images_under(folders[name])]
    _loose(found, found.root)
    known = frozenset(name for name, label in labels.items() if label is not None)
    layout = PAPER_FOLDERS.get(known) or ("folders" if ABNORMAL in labels.values() else "normal_only")
    title = layout if layout in PAPER_TRAIN else found.root.resolve().name
    return DataSet(title, layout, found.root, _with_masks(found, cases, masks))


def _load_flat(found: Walk) -> DataSet | None:
    """Images directly in the folder: all are taken as normal, and said so."""
    images, masks = _apart(found, found.images_in(found.root))
    if not images:
        return None
    folders = {folder.name.lower(): folder for folder in found.folders_of(found.root)}
    masks += [m for name in sorted(MASK_FOLDERS & folders.keys()) for m in found.images_under(folders[name])]
    _ignore(found, folders.keys() - MASK_FOLDERS)
    cases = [Case(image, label=NORMAL, kind="normal") for image in images]
    found.notes.append(f"a flat folder: all {len(cases)} images are taken as normal")
    return DataSet(found.root.resolve().name, "flat", found.root, _with_masks(found, cases, masks))


def _loose(found: Walk, folder: Path) -> None:
    """Note the images of a folder that should hold class folders only."""
    if images := found.images_in(folder):
        found.notes.append(
            f"{len(images)} images beside the class folders were ignored: {found.short(images[0])}"
        )


def _ignore(found: Walk, names: Iterable[str]) -> None:
    found.notes.extend(f"folder '{name}' is no part of this layout and was ignored" for name in sorted(names))


def _apart(found: Walk, files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Images and masks: a mask is named `*_mask` or `*_mask_N`, or lies in a mask folder."""
    images: list[Path] = []
    masks: list[Path] = []
    for file in files:
        is_mask = _MASK_NAME.match(_stem(file)) is not None or bool(found.inside(file) & MASK_FOLDERS)
        (masks if is_mask else images).append(file)
    return images, masks


def _with_masks(found: Walk, cases: list[Case], masks: list[Path]) -> tuple[Case, ...]:
    """Give every mask to its image, and sort the cases; masks without an image become one note."""
    by_stem: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        by_stem.setdefault(_stem(case.path), []).append(index)
    owned: dict[int, list[Path]] = {}
    lost = []
    for mask in sorted(masks, key=natural_key):
        owner = _owner(found, mask, cases, by_stem)
        if owner is None:
            lost.append(found.short(mask))
        else:
            owned.setdefault(owner, []).append(mask)
    if lost:
        found.notes.append(f"{len(lost)} masks without exactly one image: {', '.join(lost[:5])}")
    united = [replace(case, masks=tuple(owned.get(index, ()))) for index, case in enumerate(cases)]
    return tuple(sorted(united, key=lambda case: natural_key(case.path)))


def _owner(found: Walk, mask: Path, cases: list[Case], by_stem: dict[str, list[int]]) -> int | None:
    """The one image a mask belongs to: by stem, then class and folder names shared, then abnormal, test."""
    own = _stem(mask)
    stems = [own] + [match["stem"] for rule in (_MASK_NAME, _NUMBERED) if (match := rule.match(own))]
    candidates = next((by_stem[stem] for stem in stems if stem in by_stem), [])
    around = found.inside(mask)
    if not around & MASK_FOLDERS:
        candidates = [i for i in candidates if cases[i].path.parent == mask.parent]
    kinds = around & {case.kind.lower() for case in cases}
    candidates = [i for i in candidates if not kinds or cases[i].kind.lower() in kinds]

    def fit(index: int) -> tuple[int, bool, bool]:
        case = cases[index]
        return len(found.inside(case.path) & around), case.label == ABNORMAL, case.split == "test"

    best = max(map(fit, candidates), default=None)
    winners = [index for index in candidates if fit(index) == best]
    return winners[0] if len(winners) == 1 else None


def _describe(found: Walk) -> str:
    """What lies in the root, in a few words."""
    folders = [folder.name for folder in found.folders_of(found.root)]
    files = sorted({path.suffix.lower() or path.name for path in found.stray})
    text = f"folders {', '.join(folders[:8]) or 'none'}" + (" ..." if len(folders) > 8 else "")
    return text + f"; images directly inside: none; other files: {', '.join(files[:8]) or 'none'}"


def _load_csv(path: Path) -> DataSet:
    """A manifest: one row per image, paths relative to the CSV, several masks separated by `;`."""
    cases: dict[str, Case] = {}
    for number, row in _rows(path):
        key = os.path.normpath(row["path"])
        if key in cases:
            raise InputError(path, f"row {number}: {row['path']!r} is listed twice", "keep one row per image")
        cases[key] = _case(path, number, row)
    if not cases:
        raise InputError(path, "has a header but no rows, expected one row per image")
    ordered = sorted(cases.values(), key=lambda case: natural_key(case.path))
    return DataSet(path.stem, "csv", path.parent, tuple(ordered))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line number in the file; every known column is present, missing ones are empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            for column in header:
                if header.count(column) > 1:
                    raise InputError(path, f"column {column!r} appears twice, expected once")
                if column not in COLUMNS:
                    raise InputError(path, f"unknown column {column!r}{nearest(column, list(COLUMNS))}")
            for column in COLUMNS[:2]:
                if column not in header:
                    raise InputError(path, f"no column {column!r}; found {', '.join(header) or 'nothing'}")
            for row in reader:
                if None in row:
                    raise InputError(path, f"row {reader.line_num}: more cells than columns", "quote commas")
                yield reader.line_num, {name: (row.get(name) or "").strip() for name in COLUMNS}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            path, f"cannot be read as CSV: {error}", "save it as UTF-8 text with commas"
        ) from error


def _case(path: Path, number: int, row: dict[str, str]) -> Case:
    text = row["label"].lower()
    label = {"0": NORMAL, "1": ABNORMAL, "": None}.get(text, _label(text))
    if label is None and text:
        known = ["0", "1", *sorted(NORMAL_KINDS | ABNORMAL_KINDS)]
        raise InputError(path, f"row {number}: unknown label {text!r}{nearest(text, known)}")
    if row["split"].lower() not in ("", "train", "test"):
        raise InputError(path, f"row {number}: split {row['split']!r}, expected train, test or empty")
    masks = [path.parent / name.strip() for name in row["mask"].split(";") if name.strip()]
    image = path.parent / row["path"]
    for file in (image, *masks):
        if not row["path"] or not os.path.isfile(file):
            raise InputError(
                path, f"row {number}: no such file {str(file)!r}", "paths are relative to the CSV"
            )
    kind = text if _label(text) is not None else KIND_OF[label]
    return Case(image, label, tuple(masks), kind, group=row["patient"], split=row["split"].lower())
