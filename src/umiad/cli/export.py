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
What was measured is printed, and stays in the export. Name images like those that will be scored: phantoms
show that the software works, no more.

Needs the extra: pip install 'umiad[onnx]'; for --to openvino 'umiad[onnx,openvino]'. Where it runs, onnxruntime
and onnx, or openvino alone.
"""


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
        measured = export_model(
            loaded,
            out,
            to=to,
            check=check or (),
            source_manifest_sha256=file_sha256(model / MANIFEST),
            reporter=reporter,
        )
    if json:
        print_json({"out": str(out), "runtime": to, "parity": measured.canonical()})
        return
    typer.echo(f"saved {out} for {to}: {loaded.info['detector']}, {loaded.info['size']} px")
    typer.echo(f"parity on {measured.words()}")
