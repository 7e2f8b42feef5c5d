"""What a terminal shows: progress while a command or a call works, a line an epoch and a trial elsewhere; tables."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from effv2.core.reporter import LineReporter, StudyProgress, accuracies
from effv2.core.secrets import masked

TICKS = 100  # of an epoch, at which the progress of the run and the study follows
CELL_PADDING = 3  # characters: a space on both sides and a line


class Left(ProgressColumn):
    """How much is done of how much, and how long the rest takes, as far as that is known."""

    def render(self, task: Task) -> Text:
        """Return the cell of a task."""
        seconds = task.time_remaining
        left = f" {timedelta(seconds=round(seconds))} left" if seconds else ""
        return Text("" if task.total is None else f"{int(task.completed):,}/{int(task.total):,}{left}")


class ConsoleReporter(LineReporter):
    """Shows a study, a run's epochs and what is done now; a context manager, so that the terminal is left tidy.

    `in_words` replaces names in messages, for example by a command's options. Without `lines`, only messages are
    printed where there is neither a terminal nor a notebook.
    """

    def __init__(self, in_words: Callable[[str], str] = str, lines: bool = True) -> None:
        self.console, self._in_words = Console(stderr=True), in_words
        notebook = self.console.is_jupyter
        bars = self.console.is_terminal or (notebook and find_spec("ipywidgets") is not None)
        super().__init__((lines or notebook) and not bars)  # bars show what lines would
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=26)),
            BarColumn(self.console.width // 8),
            Left(),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.console,
            disable=not bars,
            expand=True,
            speed_estimate_period=3600,  # seconds: a run is long, so what is left follows from all that was done
        )
        self._study, self._epochs, self._now = (
            self._progress.add_task(name, total=None, visible=False, note="") for name in ("study", "epochs", "")
        )
        self._counted = "", 0

    def __enter__(self) -> "ConsoleReporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._now, visible=False)
        self._progress.stop()

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        self.console.print(masked(self._in_words(text)), highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Show what is done now; each new count gets its own bar and estimate."""
        super().progress(what, done, total)
        if what != self._counted[0] or done < self._counted[1]:
            self._progress.reset(self._now, note="")
        self._counted = what, done
        self._progress.tasks[self._now].total = total  # which an update to None leaves as it is
        self._progress.update(self._now, description=escape(what), completed=done, visible=True)

    def study_progress(self, progress: StudyProgress) -> None:
        """Show how far the study is, and each trial that has ended."""
        words = [f"best: {progress.best}"] if progress.best else []
        words += [f"{count} {what}" for what, count in progress.counts.items() if count]
        note = escape(", ".join(words))
        self._progress.update(self._study, total=progress.total, completed=progress.done, note=note, visible=True)
        self._progress.update(self._now, visible=False)
        super().study_progress(progress)

    def run_started(self, name: str, epochs: int) -> None:
        """Show a new run in place of the last one."""
        self._progress.reset(self._epochs, description=escape(name), total=epochs, note="", visible=True)
        self._progress.update(self._now, visible=False)
        super().run_started(name, epochs)

    def step(self, epoch: int, step: int, steps: int, images_per_second: float) -> None:
        """Show how far the epoch is; the run and the study follow, so that what is left is known early."""
        self.progress(f"training epoch {epoch}", step, steps)
        self._progress.update(self._now, note=f"{images_per_second:,.1f} images/s")
        if step * TICKS % steps < TICKS:
            epochs, there = epoch - 1 + step / steps, self._progress.tasks[self._study].completed
            self._progress.update(self._epochs, completed=epochs)
            self._progress.update(self._study, completed=max(there, len(self._ended) + epochs / self._most))
        if step == steps and not self.lines:
            self.progress("evaluating")

    def epoch(self, epoch: int, metrics: Mapping[str, float], best: float) -> None:
        """Show a finished epoch with its accuracies."""
        watched = "val" if "val/accuracy" in metrics else "test"
        note = f", best {watched} {best:.1%}" if best >= 0 else ""
        self._progress.update(self._epochs, completed=epoch, note=accuracies(metrics) + note)
        super().epoch(epoch, metrics, best)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its titles first; as several, one below the other, where the columns don't fit side by side."""
    console = Console()
    first, *columns = zip(*rows, strict=True) if rows else [()]
    while columns:
        shown = [first, columns.pop(0)]
        while columns and sum(max(map(len, each)) + CELL_PADDING for each in (*shown, columns[0])) < console.width:
            shown.append(columns.pop(0))
        titles, *lines = zip(*shown, strict=True)
        table = Table(escape(titles[0]), *(Column(escape(title), justify="right") for title in titles[1:]))
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
