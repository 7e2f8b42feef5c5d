"""Tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

CELL_PADDING = 3  # characters: a space on both sides and a line


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its titles first; as several, one below the other, where the columns don't fit side by side."""
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
