"""The command that compares detectors on one data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from umiad.cli.app import app, command, console, print_json, set_threads
from umiad.cli.files import Axis, Follow, Frame, Nan, ShowNames, WindowOption, file_options, reading
from umiad.cli.models import Data, Device, Epochs, Equalise, Holdout, Json, Out, Seed, Size, Threads, Weights
from umiad.progress import RichReporter

if TYPE_CHECKING:
    from umiad.comparison_result import Comparison

SHOWN = {"det_auroc": "detection AUROC", "seg_auroc": "pixel AUROC", "seg_aupro": "AUPRO"}


@app.command("compare")
@command
def compare(
    data: Data,
    detectors: Annotated[
        str, typer.Option("--detectors", help="Names with commas between, see `umiad detectors`.")
    ],
    out: Out,
    preset: Annotated[str, typer.Option("--preset", help="default, paper or quick; for all.")] = "default",
    weights: Weights = "imagenet",
    seed: Seed = 0,
    size: Size = 256,
    backbone: Annotated[
        Literal["resnet18", "resnet34", "resnet50"],
        typer.Option("--backbone", help="The frozen network, for all that have one."),
    ] = "resnet18",
    epochs: Epochs = None,
    holdout: Holdout = 0.2,
    equalise: Equalise = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples for the intervals.")] = 1000,
    frame: Frame = None,
    window: WindowOption = "file",
    axis: Axis = "axial",
    nan: Nan = "error",
    follow: Follow = False,
    show_names: ShowNames = False,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> int:
    """Fit several detectors on the normal images of DATA and judge them on the same test images.

    Writes report.html, comparison.json, comparison.md and pictures/ into OUT, and each model into
    OUT/models/NAME. A model that lies there, fitted with the same settings on the same split, is loaded, not
    fitted again; after Ctrl-C repeat the command to go on. Exit code 1 when a detector failed to fit.
    """
    from umiad.config import check_size

    check_size(size)
    set_threads(threads)
    from umiad import comparison, comparison_files
    from umiad.data import load_data
    from umiad.interrupt import Interrupted

    options = comparison.CompareOptions(
        preset=preset,
        weights=weights,
        backbone=backbone,
        size=size,
        seed=seed,
        epochs=epochs,
        holdout=holdout,
        equalise=equalise,
        resamples=resamples,
        device=device,
    )
    names = [name for text in detectors.split(",") if (name := text.strip())]
    files = file_options(frame, reading(window, axis, nan), follow=follow, show_names=show_names)
    dataset = load_data(data, files=files)
    try:
        with RichReporter(console(err=True)) as reporter:
            found = comparison.compare(names, dataset, options=options, out=out, reporter=reporter)
            report = comparison_files.write_comparison(found, out)
    except (Interrupted, KeyboardInterrupt) as error:
        typer.echo(
            "umiad: stopped; finished models and the last saved state are kept, repeat the command to go on",
            err=True,
        )
        return getattr(error, "exit_code", 130)
    if json:
        print_json(found.to_json())
    else:
        _print_table(found)
        typer.echo(f"report: {report}")
    return 1 if found.failures else 0


def _print_table(found: Comparison) -> None:
    """One line per detector on standard output."""
    from rich.table import Table

    shown = {name: text for name, text in SHOWN.items() if name == "det_auroc" or found.has_masks}
    table = Table(box=None, pad_edge=False)
    for title in ("detector", *shown.values(), "common detection", "fit s", "x backbone", "model"):
        table.add_column(title, no_wrap=title != "model")
    results = {each.name: each for each in found.results}
    for name in found.names:
        if name not in results:
            table.add_row(name, *["-"] * (len(shown) + 3), f"failed: {found.failures[name]}")
            continue
        each = results[name]
        cells = [_cell(each.evaluation.metrics[metric]) for metric in shown]
        seconds = each.cost.fit_seconds
        took = "-" if seconds is None else f"{seconds:.1f}"
        common = _cell(each.common["det_auroc"])
        table.add_row(name, *cells, common, took, f"{each.cost.ratio:.2f}", each.cost.origin)
    console().print(table)


def _cell(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "-"
    ends = metric["ci95"]
    return f"{metric['value']:.3f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")
