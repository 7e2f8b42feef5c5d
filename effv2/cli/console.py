"""What is shown while a command works: rich progress on a terminal, a line an epoch and a trial elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from effv2.cli.options import in_options
from effv2.core.reporter import Reporter, StudyProgress

CELL_PADDING = 3  # characters: a space on both sides and a line


class ConsoleReporter(Reporter):
    """Shows a study, a run's epochs and what is done now; a context manager, so that the terminal is left tidy."""

    def __init__(self) -> None:
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
            speed_estimate_period=3600,  # seconds: a run is long, so what is left follows from all that was done
        )
        self._bars: dict[str, TaskID] = {}
        self._now, self._epochs = ("", 0), 0
        self._reported: set[str] = set()

    def __enter__(self) -> ConsoleReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, bar: str, description: str = "", **about: Any) -> None:
        """Show a bar, or what is new about it."""
        if bar not in self._bars:
            self._bars[bar] = self._progress.add_task(bar, total=None, note="")
        about |= {"description": escape(description)} if description else {}
        self._progress.update(self._bars[bar], **about)

    def _remove(self, *bars: str) -> None:
        for bar in bars:
            if bar in self._bars:
                self._progress.remove_task(self._bars.pop(bar))

    def _log(self, text: str) -> None:
        """Print a line where there is no terminal to show bars on."""
        if not self.console.is_terminal:
            self.message(text)

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        text = in_options(text, self._command, settings=False)  # these say what differs, not what to give
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def hint(self, text: str) -> None:
        """Print a line that only somebody who waits at a terminal has use for."""
        if self.console.is_terminal:
            self.message(text)

    def progress(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Show what is done now; whatever is counted anew gets a bar, and an estimate, of its own."""
        if what != self._now[0] or done < self._now[1]:
            self._remove("now")
        if total and not done:
            self._log(f"{what}: {total:,}")
        self._now = what, done
        self._show("now", what, completed=done, total=total)

    def study_progress(self, progress: StudyProgress) -> None:
        """Show how far the study is, and each trial that has ended."""
        words = [f"{progress.running} running"]
        words += [f"{progress.pruned} pruned"] if progress.pruned else []
        words += [f"{progress.failed} failed"] if progress.failed else []
        words += [f"best {progress.best[1]:.2%} ({progress.best[0]})"] if progress.best else []
        self._remove("now")
        self._show("study", total=progress.total, completed=progress.done, note=escape(", ".join(words)))
        for number, (trial, ending) in enumerate(progress.ended.items(), 1):
            if trial not in self._reported:
                self._log(f"[{number}/{progress.total}] {trial}: {ending}")
        self._reported |= set(progress.ended)

    def run_started(self, name: str, epochs: int) -> None:
        """Show a new run in place of the last one."""
        self._remove("epochs", "now")
        self._epochs = epochs
        self._show("epochs", f"{name}: epochs", total=epochs)
        self._log(f"training {name}, at most {epochs} epochs")

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show a finished epoch with its accuracies."""
        named = ((name, metrics.get(f"{name}/accuracy")) for name in ("train", "val", "test"))
        words = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in named if accuracy is not None)
        self._show("epochs", completed=epoch, note=words)
        self._log(f"epoch {epoch}/{self._epochs}: {words}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its titles first; as several, one below the other, where the columns don't fit side by side."""
    if not rows:
        return
    console = Console()
    widths = [max(map(len, column)) + CELL_PADDING for column in zip(*rows, strict=True)]
    columns = list(range(1, len(widths)))
    while columns:
        count = 1
        while count < len(columns) and widths[0] + sum(widths[i] for i in columns[: count + 1]) < console.width:
            count += 1
        shown, columns = [0, *columns[:count]], columns[count:]
        table = Table()
        for index in shown:
            table.add_column(rows[0][index], justify="right" if index else "left")
        for row in rows[1:]:
            table.add_row(*(row[index] for index in shown))
        console.print(table)
