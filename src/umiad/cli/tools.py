"""Commands around the installation: detectors, weights, doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umiad.cli.app import app, command, console, print_json, set_threads
from umiad.cli.models import Json, Seed, Size, Threads
from umiad.progress import RichReporter

weights_app = typer.Typer(
    help="Pretrained backbone weights: where they lie, how to bring them to a machine without network.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(weights_app, name="weights")


@app.command("detectors")
@command
def detectors(
    names: Annotated[
        list[str] | None, typer.Argument(help="Count the parameters of these; without names: list all.")
    ] = None,
    size: Size = 256,
    json: Json = False,
) -> None:
    """List the detectors and their presets; of named ones also parameters per part (total, trainable; used in scoring).

    Each that is named is built and fitted briefly to see what scoring uses: some seconds.
    """
    from umiad.parameters import listing, parameter_table

    rows = parameter_table(size=size, names=names) if names else listing()
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']}: {row['summary']}")
        typer.echo(f"  {row['reference']}; fidelity: {row['fidelity']}")
        if not names:
            typer.echo(f"  presets: {', '.join(row['presets'])}")
            continue
        typer.echo(f"  presets: {', '.join(row['presets'])}; preset {row['preset']!r} at {size} px:")
        for part, counts in row["parts"].items():
            typer.echo(
                f"    {part:24} {counts['total']:>12,} parameters, {counts['trainable']:>12,} trainable"
            )
        typer.echo(
            f"    {'all':24} {row['total']:>12,} parameters, {row['trainable']:>12,} trainable, "
            f"{row['used']:,} used in scoring"
        )
    if not names:
        typer.echo("parameters of one: umiad detectors NAME")


@weights_app.command("list")
@command
def weights_list(json: Json = False) -> None:
    """List the weights in the cache."""
    from umiad import weights

    entries = weights.listing()
    if json:
        print_json(
            [{"label": e.label, "path": str(e.path), "bytes": e.bytes, "sha256": e.sha256} for e in entries]
        )
        return
    for entry in entries:
        typer.echo(f"{entry.label:24} {entry.bytes:>12,} bytes  {entry.path}")
    if not entries:
        typer.echo(
            "no weights in the cache; `umiad weights fetch` downloads, `umiad weights add FILE` copies"
        )


@weights_app.command("add")
@command
def weights_add(
    file: Annotated[Path, typer.Argument(help="A .safetensors file, or torchvision's .pth.")],
) -> None:
    """Copy a weights file into the cache after checking it (for machines without network)."""
    from umiad import weights

    entry = weights.add(file)
    typer.echo(f"added {entry.label}: use it with --weights {entry.label}")


@weights_app.command("fetch")
@command
def weights_fetch() -> None:
    """Download torchvision's ImageNet ResNet18 into the cache; the SHA-256 is pinned."""
    from umiad import weights

    entry = weights.fetch()
    typer.echo(f"fetched {entry.label}: {entry.path}")


@app.command("doctor")
@command
def doctor(json: Json = False) -> int:
    """Check the installation: versions, devices, weights, space, and what is known to break."""
    from umiad.doctor import diagnose, render, to_json

    checks = diagnose()
    if json:
        print_json(to_json(checks))
    else:
        render(checks, console())
    return 1 if any(check.status == "error" for check in checks) else 0


@app.command("demo")
@command
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = Path("demo-out"),
    weights: Annotated[
        str, typer.Option("--weights", help="auto: the cache if it has some, else random.")
    ] = "auto",
    size: Size = 256,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Run the main job on generated phantom images: check, fit, evaluate, score; then look at the report."""
    set_threads(threads)
    from umiad.demo import run_demo

    with RichReporter(console(err=True)) as reporter:
        result = run_demo(out, weights=weights, size=size, seed=seed, reporter=reporter)
    for line in result.lines():
        typer.echo(line)
