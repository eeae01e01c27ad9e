"""A list of blocks and pictures as Markdown for the repository, and as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from results_store import ROOT
from umiad.report import Block, Gallery, Picture, Text, to_markdown, write_page

IMAGES = ROOT / "docs" / "images"
FIGURES = {
    "paper-": (
        "Figures of the paper, and one that it lacks",
        "Made by benchmarks/figures.py from fitted detectors; what was chosen how stands in the pictures.",
    ),
    "curves-": ("Training curves", "The run of variant holdout: fitted normal images against held-out ones."),
    "misses-": (
        "Worst misses of egmf's default",
        "Seed 0; made by benchmarks/worst_misses.py, looked at after all was decided.",
    ),
}
"""How the names of shown figures start, in their order -> title and caption."""


@dataclass(frozen=True)
class Shown:
    """A picture of docs/images with its caption."""

    file: str
    caption: str


@dataclass(frozen=True)
class Album:
    """Pictures under one heading."""

    title: str
    caption: str
    pictures: tuple[Shown, ...]


Item = Block | Shown | Album


def markdown(items: Sequence[Item], *, title: str | None = None) -> str:
    """Items as Markdown; pictures are links into images/."""
    head = [f"# {title}\n"] if title else []
    return "\n".join([*head, *(_markdown(item) for item in items)])


def _markdown(item: Item) -> str:
    if isinstance(item, Shown):
        return f"![{item.caption}](images/{item.file})\n"
    if isinstance(item, Album):
        return "\n".join([to_markdown([Text(item.title, [item.caption])]), *map(_markdown, item.pictures)])
    return to_markdown([item])


def write_html(path: Path, items: Sequence[Item], *, title: str, lead: str, images: Path = IMAGES) -> Path:
    """Write the items as one page, pictures inside it; one that is not there is said to be missing.

    Creates the folder. Raises DiskError when the page cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_page(path, title=title, lead=lead, blocks=[_block(item, images) for item in items])


def _block(item: Item, images: Path) -> Block:
    if isinstance(item, Shown):
        item = Album(item.caption, "", (item,))
    if not isinstance(item, Album):
        return item
    absent = [each.file for each in item.pictures if not (images / each.file).is_file()]
    if absent:
        return Text(item.title, [f"Missing in docs/images: {', '.join(absent)}."])
    pictures = [Picture(each.caption, (images / each.file).read_bytes()) for each in item.pictures]
    return Gallery(item.title, pictures, item.caption, wide=True)


def figures(images: Path = IMAGES) -> Iterator[Album]:
    """One album per kind of figure that is there."""
    for start, (title, caption) in FIGURES.items():
        files = sorted(images.glob(f"{start}*.png"))
        if files:
            shown = (Shown(file.name, file.stem.replace("-", " ")) for file in files)
            yield Album(title, caption, tuple(shown))
