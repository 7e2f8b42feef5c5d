"""Processes that start at once: a server forks them after it has imported the slow packages.

    python -m tests.forks SOCKET MODULE...

imports the modules and forks a process for each command from the socket. It starts no thread and computes nothing. Each
process has its own session, folder, environment and output, and can be killed. All die with the client.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# The modules that commands of effv2 import.
COMMANDS = (
    "effv2.api.console",
    "effv2.cli.main",
    "effv2.run.run",
    "effv2.studies.engine",
    "mlflow.pyfunc",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch.export",
)
FORK_SAFE_THREAD = "jemalloc_bg_thd"  # of jemalloc, from pyarrow, which stops it before a fork
LOOK_SECONDS = 0.02  # between two checks for ended processes
LONGEST_MESSAGE = 2**17
LONGEST_REST = 200  # seconds until a process must have ended; then it prints its stacks and is killed
LONGEST_LIFE = 270  # the same for its whole life: a test ends after 300 seconds


class Forks:
    """The client: it starts the server."""

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno()), *modules]
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # otherwise its import starts threads
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._ended: dict[int, int] = {}

    def start(self, words: list[str], said: IO[str], output: int, environment: Mapping[str, str]) -> Forked:
        """Run Python with these words in this folder. It writes to the file `output`, which `said` reads."""
        command = {"words": words, "folder": str(Path.cwd()), "environment": dict(environment)}
        socket.send_fds(self._socket, [json.dumps(command).encode()], [output])
        while "started" not in (answer := self._receive()):
            pass
        return Forked(self, answer["started"], said)

    def ended(self, number: int, timeout: float | None) -> int | None:
        """Wait up to `timeout` seconds; return the exit code as subprocess does, or None if the process lives."""
        while number not in self._ended and select.select([self._socket], [], [], timeout)[0]:
            self._receive()
        return self._ended.get(number)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)

    def _receive(self) -> dict[str, int]:
        content = self._socket.recv(LONGEST_MESSAGE)
        assert content, "the fork server has ended: see its output"
        answer: dict[str, int] = json.loads(content)
        if "ended" in answer:
            self._ended[answer["ended"]] = answer["code"]
        return answer


@cache
def forks(*modules: str) -> Forks:
    """Return this process's server with these modules."""
    made = Forks(*modules)
    STARTED.append(made)
    return made


STARTED: list[Forks] = []


@dataclass
class Forked:
    """A forked process. `said` reads its standard output and standard error."""

    of: Forks
    pid: int
    said: IO[str]
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        if self.returncode is None:
            self.returncode = self.of.ended(self.pid, timeout)
        return self.returncode

    def until(self, pattern: str) -> str:
        """Return its output up to the first line that matches the pattern."""
        lines = []
        for line in self.said:
            lines.append(line)
            if re.search(pattern, line):
                return "".join(lines)
        raise AssertionError(f"no line matches {pattern}: {''.join(lines)}")

    def rest(self) -> str:
        """Return the rest of its output, once it and its children have ended."""
        stuck: list[int] = []

        def show_where() -> None:
            stuck.append(self.pid)
            self.show_where()

        watch = threading.Timer(LONGEST_REST, show_where)
        watch.start()
        text = self.said.read()
        watch.cancel()
        self.wait()
        assert not stuck, f"it did not end within {LONGEST_REST} seconds: {text}"
        return text

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def show_where(self) -> None:
        """Let it write the stacks of its threads, and kill it. May be called in a thread, because it reads nothing."""
        for number in (signal.SIGUSR1, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
            time.sleep(1)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(channel: socket.socket) -> dict[str, Any]:
    """Fork a process for each command. This function returns only in those processes, with the command."""
    running: set[int] = set()
    while True:
        if select.select([channel], [], [], LOOK_SECONDS if running else None)[0]:
            content, files, _, _ = socket.recv_fds(channel, LONGEST_MESSAGE, 1)
            if not content:  # the client is gone
                break
            number = os.fork()
            if number == 0:
                channel.close()
                os.setsid()
                for output in (1, 2):
                    os.dup2(files[0], output)
                os.close(files[0])
                command: dict[str, Any] = json.loads(content)
                return command
            os.close(files[0])
            running.add(number)
            channel.send(json.dumps({"started": number}).encode())
        for number in list(running):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                running.remove(number)
                code = os.waitstatus_to_exitcode(status)
                with suppress(OSError):
                    channel.send(json.dumps({"ended": number, "code": code}).encode())
    for number in running:
        os.kill(number, signal.SIGKILL)
    sys.exit()


def run(command: dict[str, Any]) -> None:
    """Do in this process what `python WORDS` does. SIGUSR1 prints the stacks of its threads."""
    faulthandler.register(signal.SIGUSR1)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    first, *others = command["words"]
    if first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = [first, *others[1:]]
        exec(others[0], {"__name__": "__main__"})  # noqa: S102
    else:
        sys.argv = [first, *others]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    gc.disable()  # keep the imports out of garbage collection
    for name in sys.argv[2:]:
        importlib.import_module(name)
    threads = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    others = {(task / "comm").read_text().strip() for task in threads} - {FORK_SAFE_THREAD}
    assert not others, f"a process with these threads can't be forked: {others}"
    gc.freeze()  # forked processes share it, and their garbage collectors skip it
    gc.enable()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
