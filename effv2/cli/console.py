"""What is shown while a command works: rich progress on a terminal, a line a run elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from effv2.core.reporter import Reporter, StudyProgress
from effv2.evidence.study import Rows

CELL_PADDING = 3  # characters: a space on both sides and a line


class ConsoleReporter(Reporter):
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
            speed_estimate_period=3600,  # seconds: a run is long, so what is left follows from all that was done
        )
        self._study: TaskID | None = None
        self._told: set[str] = set()
        self._decoding: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._epochs: TaskID | None = None
        self._steps: TaskID | None = None
        self._working: TaskID | None = None

    def __enter__(self) -> ConsoleReporter:
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
        self._progress.update(self._decoding, completed=done, total=total)
        if done == total:  # what is decoded next gets a bar, and an estimate, of its own
            self._progress.remove_task(self._decoding)
            self._decoding = None

    def study_opened(self, address: str) -> None:
        """Say where the study is to be seen."""
        self.message(address)
        self._study = self._progress.add_task("study", note="")

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def hint(self, text: str) -> None:
        """Print a line that only somebody who waits at a terminal has use for."""
        if self.console.is_terminal:
            self.message(text)

    def study_progress(self, progress: StudyProgress) -> None:
        """Show how far the study is; without a terminal, a line for each trial that has ended."""
        if self._study is None:
            return
        words = [f"{progress.running} running"]
        words += [f"{progress.pruned} pruned"] if progress.pruned else []
        words += [f"{progress.failed} failed"] if progress.failed else []
        words += [f"best {progress.best[1]:.2%} ({progress.best[0]})"] if progress.best else []
        self._progress.update(self._study, total=progress.total, completed=progress.done, note=escape(", ".join(words)))
        fresh = [slot for slot in progress.ended if slot not in self._told]
        self._told |= set(fresh)
        for slot in fresh if not self.console.is_terminal else ():
            place = list(progress.ended).index(slot) + 1
            self.message(f"[{place}/{progress.total}] {slot}: {progress.ended[slot]}")

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

    def evaluating(self, name: str, done: int, total: int) -> None:
        """Show evaluated images of a network; without a terminal, a line when it begins."""
        if done == 0:
            if self._evaluating is not None:
                self._progress.remove_task(self._evaluating)
            self._evaluating = self._progress.add_task(f"{escape(name)}: images", total=total, note="")
            if not self.console.is_terminal:
                self.message(f"evaluating {name} on {total:,} images")
        elif self._evaluating is not None:
            self._progress.update(self._evaluating, completed=done)

    def working(self, text: str) -> None:
        """Show what is being done, where it isn't known how much of it there is."""
        if self._working is None:
            self._working = self._progress.add_task(text, total=None, note="")
        self._progress.update(self._working, description=escape(text))

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show a finished epoch with its accuracies."""
        if self._epochs is None:
            return
        named = ((name, metrics.get(f"{name}/accuracy")) for name in ("train", "val", "test"))
        words = [f"{name} {accuracy:.1%}" for name, accuracy in named if accuracy is not None]
        self._progress.update(self._epochs, completed=epoch, note=", ".join(words))


def print_table(rows: Rows) -> None:
    """Print a table, its titles first; as several, one below the other, where the columns don't fit side by side."""
    if not rows:
        return
    console = Console()
    widths = [max(len(row[index]) for row in rows) + CELL_PADDING for index in range(len(rows[0]))]
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
