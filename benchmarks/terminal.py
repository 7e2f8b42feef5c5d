"""Draw README's small example in a terminal of 80 columns: docs/terminal-progress.svg and terminal-answer.svg.

python benchmarks/terminal.py [EPOCHS] runs it in a temporary folder, with two epochs unless another number is given.
"""

import os
import pty
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parents[1] / "docs"
CODES = re.compile(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-ln-z])")  # all except colours, which stay in the text
CLEARED = "\r\x1b[2K"  # begins a new drawing


def screen(output: str) -> list[str]:
    """Return the lines that the terminal shows after this output. A cleared line is overwritten."""
    lines, row = [""], 0
    for piece in CODES.split(output):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[1A":
            row -= 1
        elif not CODES.fullmatch(piece):
            lines[row] += piece
        elif piece == "\x1b[2K":
            lines[row] = ""
    return [line for line in lines if line.strip()]


def main(epochs: str = "2") -> None:
    """Run the example; draw its progress and its end."""
    words = ["effv2", "ablate", "--variant", "drop_one", "--epochs", epochs]
    ours, theirs = pty.openpty()
    about, output = os.environ | {"COLUMNS": "80", "TERM": "xterm-256color"}, b""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(words, stdout=theirs, stderr=theirs, cwd=folder, env=about),  # noqa: S603
        suppress(OSError),  # once the command has ended
    ):
        os.close(theirs)
        while piece := os.read(ours, 1 << 16):
            output += piece
    frames = output.decode().split(CLEARED)
    working = [at for at, frame in enumerate(frames) if "images/s" in frame]
    for name, until in (("progress", working[len(working) * 3 // 4] + 1), ("answer", len(frames))):
        console = Console(record=True, width=80, file=StringIO(), color_system="truecolor", force_terminal=True)
        console.print(Text.from_ansi("\n".join([f"$ {' '.join(words)}", *screen(CLEARED.join(frames[:until]))])))
        console.save_svg(str(DOCS / f"terminal-{name}.svg"), title="effv2")


if __name__ == "__main__":
    main(*sys.argv[1:])
