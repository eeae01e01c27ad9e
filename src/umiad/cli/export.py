"""The command that turns a saved model into one for ONNX Runtime or OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from umiad.cli.app import app, command, console, print_json, set_threads
from umiad.cli.models import Json, Model, Threads
from umiad.progress import RichReporter

HELP = """Write MODEL for a machine without torch, with proof that it scores the same.

\b
  umiad export MODEL --to onnx --out EXPORTED --check IMAGES
  umiad score EXPORTED FILES... --out RESULTS

The export holds the network as one graph, and the preprocessing, thresholds and p-values of the model.
`umiad score` takes it like a saved model and writes the same files; torch is not imported. Nothing else can be
done with it: to fit, calibrate or evaluate, keep MODEL.

Before anything is written both score the images under --check (64 at most), one by one and three at a time. Maps
may differ by 1e-4 of their range, image scores by 1e-4, decisions not at all; above that nothing is written.
What was measured is printed, and stays in the export. With --int8 convolutions are brought to 8 bits afterwards; that
changes maps and scores for good, so it is measured too, and refused where order or decisions are not as good as kept:
look at it, and at --accuracy on labelled data, before using it. Name images like those that will be scored: phantoms
show that the software works, no more.

Needs the extra: pip install 'umiad[onnx]'; for --to openvino 'umiad[onnx,openvino]'. Where it runs, onnxruntime
and onnx, or openvino alone.
"""

MEASURED = ("parity", "loss", "accuracy")
"""Of an export's configuration: what the command shows as JSON."""


@app.command("export", help=HELP)
@command
def export(
    model: Model,
    to: Annotated[Literal["onnx", "openvino"], typer.Option("--to", help="Which runtime it is for.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the exported model (a directory).")],
    check: Annotated[
        list[Path] | None,
        typer.Option(
            "--check",
            metavar="PATH",
            help="Images or folders on which both are compared; repeatable. Without: generated phantoms.",
        ),
    ] = None,
    int8: Annotated[
        list[Path] | None,
        typer.Option(
            "--int8",
            metavar="NORMALS",
            help="Bring convolutions to 8 bits, with ranges from these normal images (--to onnx); repeatable.",
        ),
    ] = None,
    accuracy: Annotated[
        Path | None,
        typer.Option("--accuracy", metavar="DATA", help="Labelled data: judge both on its test part."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write a saved model for ONNX Runtime or OpenVINO, compared with the original."""
    set_threads(threads)
    from umiad import api
    from umiad.duplicates import file_sha256
    from umiad.export import export_model
    from umiad.manifest import MANIFEST

    loaded = api.load(model)
    with RichReporter(console(err=True)) as reporter:
        if not check:
            reporter.note("no --check: compared on generated phantoms, which are no medical images")
        config = export_model(
            loaded,
            out,
            to=to,
            check=check or (),
            int8=int8 or (),
            accuracy=accuracy,
            source_manifest_sha256=file_sha256(model / MANIFEST),
            reporter=reporter,
        )
    if json:
        written = config.canonical()
        print_json({"out": str(out), "runtime": to, **{key: written[key] for key in MEASURED}})
        return
    typer.echo(f"saved {out} for {to}: {loaded.info['detector']}, {loaded.info['size']} px")
    typer.echo(f"parity on {config.parity.words()}")
    if config.loss is not None:
        typer.echo(config.loss.words())
    for name, (before, after) in config.accuracy.items():
        if before is not None and after is not None:
            typer.echo(f"{name}: {100 * before:.2f} of the model, {100 * after:.2f} of this export")
