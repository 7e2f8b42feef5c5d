"""What is shown while a command works: rich progress on a terminal, a line a run elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from effv2.evidence.comparison import Comparison
from effv2.training.loop import EpochResult


class ConsoleDisplay:
    """Shows decoding, epochs and steps; a context manager, so that the terminal is left in order."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._decoding: TaskID | None = None
        self._epochs: TaskID | None = None
        self._steps: TaskID | None = None

    def __enter__(self) -> ConsoleDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def decoding(self, done: int, total: int) -> None:
        """Show decoded images."""
        if self._decoding is None:
            self._decoding = self._progress.add_task("decoding images", note="")
        self._progress.update(self._decoding, completed=done, total=total, visible=done < total)

    def run_started(self, name: str, epochs: int) -> None:
        """Show a new run in place of the last one."""
        for task in (self._epochs, self._steps):
            if task is not None:
                self._progress.remove_task(task)
        self._epochs = self._progress.add_task(f"{escape(name)}: epochs", total=epochs, note="")
        self._steps = self._progress.add_task("  steps", note="")
        if not self.console.is_terminal:
            self.console.print(f"training {name}, at most {epochs} epochs", highlight=False, markup=False)

    def step(self, step: int, steps: int) -> None:
        """Show a step of the epoch."""
        if self._steps is not None:
            self._progress.update(self._steps, completed=step, total=steps)

    def epoch(self, result: EpochResult) -> None:
        """Show a finished epoch with its accuracies."""
        if self._epochs is None:
            return
        metrics = result.metrics
        words = [f"train {metrics['train/accuracy']:.1%}", f"test {metrics['test/accuracy']:.1%}"]
        if "val/accuracy" in metrics:
            words.insert(1, f"val {metrics['val/accuracy']:.1%}")
        self._progress.update(self._epochs, completed=result.epoch, note=", ".join(words))


def print_comparison(comparison: Comparison) -> None:
    """Print a study's table: figures down, arms across, which fits a terminal."""
    titles, *figures = comparison.lines()
    table = Table()
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left")
    for cells in figures:
        table.add_row(*cells)
    Console().print(table)
