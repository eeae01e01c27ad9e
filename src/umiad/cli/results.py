"""What came of scoring, shown to people; and the command merge, which makes one result of shards."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from umiad.cli.app import app, command, print_json
from umiad.cli.models import Json, threshold_text

if TYPE_CHECKING:
    from umiad.batch import ShardSummary
    from umiad.scorebook import Summary


@app.command("merge")
@command
def merge(
    out: Annotated[Path, typer.Argument(help="The --out of the shards.", metavar="OUT")], json: Json = False
) -> int:
    """Make one result of all shards in OUT: what a single `umiad score` would have written.

    All shards must be there, whole, and of the same files, model and options; else nothing is written, and the error
    names the shard and the command. The exit code is 3 where files were skipped. OUT/shards may be deleted afterwards.
    """
    from umiad.merging import merge_shards

    return show(merge_shards(out), out, json=json)


def show(result: Summary | ShardSummary, out: Path, *, json: bool) -> int:
    """Print a result; returns the exit code: 3 where files were skipped."""
    from umiad import scorebook

    if json:
        print_json(result.to_json())
    elif isinstance(result, scorebook.Summary):
        _print_summary(result)
    else:
        _print_shard(result, out)
    return 3 if result.skipped else 0


def _print_summary(summary: Summary) -> None:
    facts = summary.model
    typer.echo(f"{len(summary.findings)} images scored, {len(summary.skipped)} skipped")
    if facts["image_threshold"] is None:
        typer.echo(f"no threshold: {facts['threshold_rule']}")
    else:
        typer.echo(f"{summary.above} above the threshold {threshold_text(facts)}")
    for volume in summary.volumes:
        typer.echo(
            f"{volume['file']}: {volume['scored']} of {volume['frames']} slices or frames scored, "
            f"the highest is number {volume['highest_frame']}"
        )
    _print_skipped(summary)
    if summary.peak_memory is not None:
        own, child = summary.peak_memory
        beside = "" if child is None else f", and {child} MB in the largest decoding process"
        typer.echo(f"peak memory: {own} MB{beside}")
    typer.echo(f"report: {summary.folder / 'report.html'}")


def _print_shard(result: ShardSummary, out: Path) -> None:
    typer.echo(
        f"shard {result.shard}: {result.files} files done, {result.images} images scored, "
        f"{len(result.skipped)} files skipped"
    )
    _print_skipped(result)
    typer.echo(f"when all {result.shard.of} are done: {shlex.join(['umiad', 'merge', str(out)])}")


def _print_skipped(result: Summary | ShardSummary) -> None:
    for _, reason in result.skipped:
        typer.echo(f"skipped {reason}", err=True)
    if result.aliased:
        text = "DICOM files are named by the first digits of their SHA-256"
        typer.echo(f"{result.aliased} {text}; --show-names shows paths, which may name patients")
