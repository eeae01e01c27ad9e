"""Progress for people: bars, one line per epoch, notes; on standard error, so that output can be piped."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from umiad.training import Row


class Reporter(Protocol):
    """Who is told how far a long job is."""

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` steps of the stage `name` are finished."""
        ...

    def epoch(self, row: Row) -> None:
        """An epoch has ended; `row` is its line of the training log."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...


class Silent:
    """The null reporter."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Ignore."""

    def epoch(self, row: Row) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


class RichReporter:
    """A `Reporter` that draws with rich. Use it as a context manager."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """Draw or move the bar of a stage; a finished stage leaves one line."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(name))
            self.console.print(f"{name}: {total} done", highlight=False)

    def epoch(self, row: Row) -> None:
        """One line per epoch: loss, likelihood of training and held-out normals, time left."""
        number, epochs = int(row["epoch"] or 0), int(row["epochs"] or 0)
        facts = [f"epoch {number}/{epochs}"]
        if (loss := row.get("loss")) is not None:
            facts.append(f"loss {loss:.4f} nats/dim")
        labels = {"nats_per_dim": "train", "holdout_nats_per_dim": "held-out normals"}
        facts += [
            f"-log p {text} {value:.4f}"
            for key, text in labels.items()
            if (value := row.get(key)) is not None
        ]
        facts.append(f"{row['seconds']:.1f} s, left {_clock(float(row['seconds_left'] or 0))}")
        self.console.print("  ".join(facts), highlight=False)
        self.stage("training", number, epochs)

    def note(self, text: str) -> None:
        """Print a note."""
        from rich.markup import escape

        self.console.print(f"[yellow]note:[/] {escape(text)}", highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
