"""The progress of a command: rich progress on a terminal, or a line per epoch and trial."""

from collections.abc import Mapping, Sequence

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from effv2.cli.options import in_options
from effv2.core.reporter import LineReporter, StudyProgress, accuracies
from effv2.core.secrets import masked

CELL_PADDING = 3  # characters: a space on both sides and a line


class ConsoleReporter(LineReporter):
    """Shows a study, the epochs of a run and the current work. A context manager that cleans up the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self._command = click.get_current_context().command
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=3600,  # seconds: runs are long, so the estimate uses all finished work
        )
        self._study, self._epochs, self._now = (
            self._progress.add_task(name, total=None, visible=False, note="") for name in ("study", "epochs", "")
        )
        self._counted = "", 0

    def __enter__(self) -> "ConsoleReporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line if there is no terminal for bars."""
        if not self.console.is_terminal:
            self.message(text)

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        text = in_options(text, self._command, settings=False)  # these name differences, not options
        self.console.print(masked(text), highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Show the current work. Each new count gets a new bar and estimate."""
        super().progress(what, done, total)
        if what != self._counted[0] or done < self._counted[1]:
            self._progress.reset(self._now)
        self._counted = what, done
        self._progress.update(self._now, description=escape(what), completed=done, total=total, visible=True)

    def study_progress(self, progress: StudyProgress) -> None:
        """Show the progress of the study, and each trial that has ended."""
        words = [f"{count} {what}" for what, count in progress.counts.items() if count]
        words += [f"best: {progress.best}"] if progress.best else []
        note = escape(", ".join(words))
        self._progress.update(self._study, total=progress.total, completed=progress.done, note=note, visible=True)
        self._progress.update(self._now, visible=False)
        super().study_progress(progress)

    def run_started(self, name: str, epochs: int) -> None:
        """Show a new run instead of the last one."""
        self._progress.reset(self._epochs, description=escape(f"{name}: epochs"), total=epochs, note="", visible=True)
        self._progress.update(self._now, visible=False)
        super().run_started(name, epochs)

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show a finished epoch with its accuracies."""
        self._progress.update(self._epochs, completed=epoch, note=accuracies(metrics))
        super().epoch(epoch, metrics)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, titles first. If the columns don't fit side by side, print several tables below each other."""
    console = Console()
    first, *columns = zip(*rows, strict=True) if rows else [()]
    while columns:
        shown = [first, columns.pop(0)]
        while columns and sum(max(map(len, each)) + CELL_PADDING for each in (*shown, columns[0])) < console.width:
            shown.append(columns.pop(0))
        titles, *lines = zip(*shown, strict=True)
        table = Table(titles[0], *(Column(title, justify="right") for title in titles[1:]))
        for line in lines:
            table.add_row(*line)
        console.print(table)
