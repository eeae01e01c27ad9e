"""The command that compares settings where only normal images exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from umiad.cli.app import app, command, console, print_json, set_threads
from umiad.cli.files import Axis, Follow, Frame, Nan, ShowNames, WindowOption, file_options, reading
from umiad.cli.models import Data, Device, Epochs, Equalise, Json, Out, Seed, Size, Threads, Weights
from umiad.progress import RichReporter

if TYPE_CHECKING:
    from umiad.tuning_candidates import Candidate
    from umiad.tuning_result import Tuning

SHOWN = {
    "rank_score": "rank_score",
    "det_auroc": "detection AUROC",
    "seg_auroc": "pixel AUROC",
    "seg_aupro": "AUPRO",
}
WITH_INTERVAL = ("rank_score", "det_auroc")


@app.command("tune")
@command
def tune(
    data: Data,
    out: Out,
    candidates: Annotated[
        Path | None,
        typer.Option(
            "--candidates", help="TOML file of [[candidate]] tables: name, detector, preset, settings."
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            help="Without a file: whose presets (default: egmf, whose preset paper trains for long).",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Without a file: what --set goes on top of (default: default)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Without a file: one more candidate with this setting; repeatable."),
    ] = None,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Parts that are held out in turn.")] = 3,
    per_image: Annotated[
        int, typer.Option("--per-image", min=1, help="Synthetic anomalies in each normal image.")
    ] = 4,
    weights: Weights = "imagenet",
    size: Size = 256,
    seed: Seed = 0,
    equalise: Equalise = None,
    epochs: Epochs = None,
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
    """Compare settings of detectors where only normal images exist, on synthetic anomalies.

    Only the NORMAL images of the training part are used, those that `umiad fit --holdout 0` with the same seed
    would fit; abnormal and test images are listed and fingerprinted for the split, and not used. The normal images
    are cut into folds (near-duplicates and patients kept together); each candidate is fitted without a fold
    and must tell the held-out normals from synthetic anomalies planted in them. These are no lesions: the numbers
    are a proxy for choosing settings, not an estimate of accuracy.

    Writes report.html, tuning.json, tuning.md, best.toml and pictures/ into OUT, and each candidate's result into
    OUT/candidates as soon as it is complete: after Ctrl-C repeat the command to go on. Exit code 1 when a candidate
    failed to fit.
    """
    from umiad.config import check_size

    check_size(size)
    set_threads(threads)
    from umiad import tuning, tuning_files
    from umiad.interrupt import Interrupted

    chosen = _candidates(candidates, detector, preset, settings)
    options = tuning.TuneOptions(
        folds=folds,
        per_image=per_image,
        weights=weights,
        size=size,
        seed=seed,
        equalise=equalise,
        epochs=epochs,
        device=device,
    )
    files = file_options(frame, reading(window, axis, nan), follow=follow, show_names=show_names)
    try:
        with RichReporter(console(err=True)) as reporter:
            found = tuning.tune(data, chosen, options=options, files=files, out=out, reporter=reporter)
            report = tuning_files.write_tuning(found, out)
    except (Interrupted, KeyboardInterrupt) as error:
        typer.echo("umiad: stopped; finished candidates are kept, repeat the command to go on", err=True)
        return getattr(error, "exit_code", 130)
    if json:
        print_json(found.to_json())
    else:
        _print_table(found)
        typer.echo("on synthetic anomalies: a proxy for choosing settings, not an estimate of accuracy")
        if found.best is not None:
            typer.echo(f"best: {found.command(found.best)}")
        typer.echo(f"report: {report}")
    return 1 if found.failures else 0


def _candidates(
    file: Path | None, detector: str | None, preset: str | None, settings: list[str] | None
) -> list[Candidate]:
    """From the file, or from presets and settings; ConfigError where both are given."""
    from umiad.cli.settings import parse_settings
    from umiad.errors import ConfigError
    from umiad.tuning_candidates import preset_candidates, read_candidates

    if file is None:
        variants = [parse_settings([text]) for text in settings or []]
        return preset_candidates(detector or "egmf", preset=preset or "default", variants=variants)
    if detector or preset or settings:
        raise ConfigError(
            "--candidates names detectors, presets and settings: leave out --detector, --preset, --set"
        )
    return read_candidates(file)


def _print_table(found: Tuning) -> None:
    """One line per candidate on standard output, the best first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("candidate", *SHOWN.values(), "gap", "fit s", "result"):
        table.add_column(title, no_wrap=title != "result")
    for each in found.results:
        cells = [_cell(each.value(m), each.interval(m) if m in WITH_INTERVAL else None) for m in SHOWN]
        gap = "-" if each.gap is None else f"{each.gap:.3f}"
        origin = "loaded" if each.loaded else "computed"
        table.add_row(each.name, *cells, gap, f"{each.fit_seconds:.1f}", origin)
    for name, reason in found.failures.items():
        table.add_row(name, *["-"] * (len(SHOWN) + 2), f"failed: {reason}")
    console().print(table)


def _cell(value: float | None, ends: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")
