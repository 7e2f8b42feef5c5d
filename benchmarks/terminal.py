"""Draw what a terminal of 80 columns shows of README's small example: docs/pictures/progress.svg and answer.svg.

    python benchmarks/terminal.py [EPOCHS]

It runs the example under a pseudo-terminal, in a temporary folder, with two epochs unless another number is given.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
CODES = re.compile(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-ln-z])")  # all but those of colours, which stay in the text


def screen(output: str) -> list[str]:
    """Return the lines that the terminal shows after this output, in which a cleared line is written anew."""
    lines, row = [""], 0
    for piece in CODES.split(output):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not CODES.fullmatch(piece):
            lines[row] += piece
    return [line for line in lines if line.strip()]


def draw(name: str, command: str, lines: list[str]) -> None:
    """Write a picture of the command and what it shows."""
    console = Console(record=True, width=80, file=StringIO(), color_system="truecolor", force_terminal=True)
    console.print(Text.from_ansi("\n".join([f"$ {command}", *lines])))
    console.save_svg(str(PICTURES / name), title="effv2")


def main(epochs: str = "2") -> None:
    """Run the example and draw it at work and at its end."""
    command = f"effv2 ablate --variant drop_one --epochs {epochs}"
    ours, theirs = pty.openpty()
    output, script = "", shutil.which("effv2") or "effv2"
    with tempfile.TemporaryDirectory() as folder:
        about = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
        words = [script, *command.split()[1:]]
        with subprocess.Popen(words, stdout=theirs, stderr=theirs, cwd=folder, env=about):  # noqa: S603
            os.close(theirs)
            while piece := read(ours):
                output += piece
    PICTURES.mkdir(exist_ok=True)
    frames = output.split("\r\x1b[2K")
    working = [at for at, frame in enumerate(frames) if "images/s" in frame]
    draw("progress.svg", command, screen("\r\x1b[2K".join(frames[: working[len(working) * 3 // 4] + 1])))
    draw("answer.svg", command, screen(output))


def read(ours: int) -> str:
    """Return what was written, nothing once the command has ended."""
    try:
        return os.read(ours, 1 << 16).decode(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
