"""What is shown while a command or a call works: rich progress on a terminal, a line an epoch and a trial elsewhere."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from effv2.core.reporter import LineReporter, StudyProgress, accuracies
from effv2.core.secrets import masked

SHORT_BAR, BAR, WIDE = 10, 30, 100  # characters; the last is the width of a terminal that has room for long bars
LONGEST_NAME = 26  # characters
TICK_SECONDS = 1.0  # between two steps that the progress of the run and the study follows
STUDY, NOW = 0, 2  # places of tasks
WHOLE_RUN = 3600.0  # seconds: a run is long, so what is left follows from all that was done


class Left(ProgressColumn):
    """How much is done of how much, and how long the rest takes where that is known."""

    max_refresh = 0.5  # seconds

    def render(self, task: Task) -> Text:
        """Return the cell of a task, empty where nothing is counted."""
        if task.total is None:
            return Text()
        seconds = task.time_remaining
        left = f" {timedelta(seconds=round(seconds))} left" if seconds else ""
        return Text(f"{int(task.completed):,}/{int(task.total):,}{left}", style="progress.download")


class ConsoleReporter(LineReporter):
    """Shows a study, a run's epochs and what is done now; a context manager, so that the terminal is left tidy.

    `in_words` names in a message what its reader knows under another name. Without `lines` only messages are printed
    where there is neither a terminal nor a notebook.
    """

    def __init__(self, in_words: Callable[[str], str] = str, lines: bool = True) -> None:
        super().__init__()
        self.console, self._in_words = Console(stderr=True), in_words
        notebook = self.console.is_jupyter
        bars = self.console.is_terminal or (notebook and find_spec("ipywidgets") is not None)
        self._lines = (lines or notebook) and not bars
        one_line = {"no_wrap": True, "overflow": "ellipsis"}
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(**one_line, max_width=LONGEST_NAME)),
            BarColumn(BAR if self.console.width >= WIDE else SHORT_BAR),
            Left(),
            TextColumn("{task.fields[note]}", table_column=Column(**one_line, ratio=1)),
            console=self.console,
            disable=not bars,
            expand=True,
            speed_estimate_period=WHOLE_RUN,
        )
        self._study, self._epochs, self._now = (
            self._progress.add_task(name, total=None, visible=False, note="") for name in ("study", "epochs", "")
        )
        self._counted, self._ticked = ("", 0), 0.0

    def __enter__(self) -> "ConsoleReporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._now, visible=False)
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line where there are no bars to show it."""
        if self._lines:
            self.message(text)

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        self.console.print(masked(self._in_words(text)), highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int = 0, total: int | None = None, note: str = "") -> None:
        """Show what is done now; whatever is counted anew gets a bar, and an estimate, of its own."""
        super().progress(what, done, total, note)
        if what != self._counted[0] or done < self._counted[1]:
            self._progress.reset(self._now)
        self._counted = what, done
        self._progress.tasks[NOW].total = total  # which an update to None leaves as it is
        about = {"description": escape(what), "note": escape(note), "visible": True}
        self._progress.update(self._now, completed=done, **about)

    def study_progress(self, progress: StudyProgress) -> None:
        """Show how far the study is, and each trial that has ended."""
        words = [f"best {progress.best[1]:.2%} ({progress.best[0]})"] if progress.best else []
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
        super().step(epoch, step, steps, images_per_second)
        self.progress(f"training epoch {epoch}", step, steps, f"{images_per_second:,.0f} images/s")
        if (now := time.monotonic()) - self._ticked > TICK_SECONDS:
            self._ticked, epochs = now, epoch - 1 + step / steps
            self._progress.update(self._epochs, completed=epochs)
            done = max(self._progress.tasks[STUDY].completed, len(self._ended) + epochs / self._most)
            self._progress.update(self._study, completed=done)

    def epoch(self, epoch: int, metrics: Mapping[str, float], best: float) -> None:
        """Show a finished epoch with its accuracies."""
        note = f"best {best:.1%}, " if best >= 0 else ""
        self._progress.update(self._epochs, completed=epoch, note=note + accuracies(metrics))
        super().epoch(epoch, metrics, best)
