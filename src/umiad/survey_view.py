"""The data check for people: tables of classes and split, then the problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from umiad.leaks import LABELS, Problem
from umiad.survey import ClassSummary, Survey

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
CLASS_COLUMNS = (
    *("class", "label", "images", "patients", "height", "width", "mode", "bits", "colour", "text", "masks"),
)


def render(found: Survey, console: Console) -> None:
    """Write the survey for a person: classes, split, duplicates and leaks, then the problems."""
    from rich.text import Text

    twins, leaks = found.duplicates, found.leaks
    title = f"{found.name} (layout {found.layout}; sizes are minimum..median..maximum, masks: all (empty, several))"
    console.print(Text(_visible(title), style="bold"))
    _print_table(console, CLASS_COLUMNS, [_class_cells(each) for each in found.classes])
    if found.split is not None:
        rows = [[part, *map(str, counts.values())] for part, counts in found.split.counts.items()]
        _print_table(console, ("part", *LABELS.values()), rows)
        console.print(Text(f"split: {found.split.rule}; {found.split.groups} groups kept together"))
    console.print(
        f"duplicate groups: {len(twins.content)} equal bytes, {len(twins.pixels)} equal pixels, "
        f"{len(twins.near)} nearly equal; {len(twins.across)} across classes"
    )
    forms = ", ".join(
        f"{name.replace('_', ' ')} {'-' if value is None else f'{value:.2f}'}"
        for name, value in leaks.aurocs()
    )
    console.print(f"AUROC of one number alone: {forms}")
    for problem in found.problems or (Problem("note", "no problems found"),):
        shown = ", ".join(problem.files[:3]) + (", ..." if len(problem.files) > 3 else "")
        text = f" {problem.text}: {shown}" if shown else f" {problem.text}"
        console.print(Text.assemble((problem.level, STYLES[problem.level]), _visible(text)))


def _visible(text: str) -> str:
    """Control characters as escapes: a file name must not steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _print_table(console: Console, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich import box, table, text

    shown = table.Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(text.Text(_visible(cell)) for cell in row))
    console.print(shown)


def _class_cells(each: ClassSummary) -> list[str]:
    sizes = ["-" if s is None else f"{s[0]:g}..{s[1]:g}..{s[2]:g}" for s in (each.heights, each.widths)]
    modes = ", ".join(f"{name} {count}" for name, count in each.modes.items())
    bits = ", ".join(map(str, each.bits))
    masks = f"{each.masks.with_mask} ({len(each.masks.empty)}, {len(each.masks.several)})"
    patients = "-" if each.patients is None else str(each.patients)
    texts = (str(each.coloured), str(each.burnt_in), masks)
    return [each.kind, each.label, str(each.count), patients, *sizes, modes, bits, *texts]
