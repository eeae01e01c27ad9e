"""The command-line application: its help text, its commands, and how errors become exit codes."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from umiad import __version__
from umiad.errors import UmiadError

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")

HELP = """Find, score and outline what is abnormal in medical images, learning from normal images only.

A first session:

\b
  umiad check-data DATA                     what is in the folder, what is wrong with it
  umiad fit DATA --out MODEL                learn from the normal images
  umiad evaluate MODEL DATA --out REPORT    metrics with intervals on the test part
  umiad score MODEL FILES... --out RESULTS  scores, maps and pictures of new images
  umiad compare DATA --detectors padim,egmf --out REPORT
                                            several detectors on the same split, in one report
  umiad tune DATA --out RESULT              compare settings where only normal images exist
  umiad export MODEL --to onnx --out EXPORTED
                                            score on a machine without torch

DATA is a folder such as normal/ + abnormal/ (+ masks/), or the MVTec layout, or a .csv manifest
(path,label,mask,patient,split). Higher scores are more anomalous; they are no probabilities.
Research use only: umiad marks unusual regions, it makes no diagnosis.

Exit codes: 0 ok, 1 failed, 2 usage, 3 input, 4 disk, 5 model file, 130/143 stopped by a signal.
"""

app = typer.Typer(
    name="umiad",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"umiad {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def command(function: Callable[P, int | None]) -> Callable[P, None]:
    """Turn the errors of a command into one line on standard error and the documented exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = function(*args, **kwargs)
        except UmiadError as error:
            typer.echo(f"umiad: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("umiad: stopped", err=True)
            raise typer.Exit(130) from error
        except BrokenPipeError as error:
            sys.stderr.close()
            raise typer.Exit(1) from error
        if code:
            raise typer.Exit(code)

    return run


def console(*, err: bool = False) -> Console:
    """A rich console; where the output is no terminal: no colours, and wide enough for tables."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(stderr=err, soft_wrap=True, width=None if stream.isatty() else 120)


def print_json(value: object) -> None:
    """Machine-readable output on standard output."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage while large libraries are imported: there is none, and looking takes a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def set_threads(threads: int | None) -> None:
    """Limit torch to `threads` threads, if given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


from umiad.cli import compare, export, models, results, tools, tune  # noqa: E402 - the commands register themselves with `app`

__all__ = ["app", "compare", "export", "models", "results", "tools", "tune"]
