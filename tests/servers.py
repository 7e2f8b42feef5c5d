"""Real servers for the tests, which kill and restart them, and a proxy that fails now and then."""

from __future__ import annotations

import http.client
import http.server
import os
import random
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

from mlflow.server.constants import (
    ARTIFACT_ROOT_ENV_VAR,
    ARTIFACTS_DESTINATION_ENV_VAR,
    BACKEND_STORE_URI_ENV_VAR,
    REGISTRY_STORE_URI_ENV_VAR,
    SERVE_ARTIFACTS_ENV_VAR,
)

from tests.forks import Forked, forks

APP = "mlflow.server.fastapi_app"


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """An MLflow server on a free port, with its runs in the database `store` and its artifacts in `folder`.

    Like `mlflow server --workers 1`, it runs uvicorn, configured by environment variables.
    """

    def __init__(self, store: str, folder: Path) -> None:
        self.port, self.log = free_port(), folder / "server.log"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.words = ["-m", "uvicorn", "--host", "127.0.0.1", "--port", str(self.port), f"{APP}:app"]
        self.environment = os.environ | {
            BACKEND_STORE_URI_ENV_VAR: store,
            REGISTRY_STORE_URI_ENV_VAR: store,
            ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
            ARTIFACTS_DESTINATION_ENV_VAR: str(folder / "artifacts"),
            SERVE_ARTIFACTS_ENV_VAR: "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def start(self) -> None:
        with self.log.open("a+") as log:
            self.process: Forked = forks("uvicorn", APP).start(self.words, log, log.fileno(), self.environment)
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            with suppress(OSError), closing(socket.create_connection(("127.0.0.1", self.port), timeout=1)):
                return
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Failing(http.server.ThreadingHTTPServer):
    """A proxy that fails in a share of the requests, with each kind of network fault in turn."""

    FAULTS = ("drop", "delay", "lost", "502", "500", "503", "429", "cut")
    daemon_threads = True

    def __init__(self, port: int, share: float) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.port, self.share, self.chance, self.lock = port, share, random.Random(0), threading.Lock()  # noqa: S311
        self.failed: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def fault(self) -> str:
        with self.lock:
            fails = self.chance.random() < self.share
            fault = self.FAULTS[self.failed.total() % len(self.FAULTS)] if fails else ""
            self.failed[fault] += fails
            return fault

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""


class Passing(http.server.BaseHTTPRequestHandler):
    """One request to a Failing server."""

    protocol_version = "HTTP/1.1"
    server: Failing

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault()
        self.close_connection = bool(fault)
        if fault == "drop":
            return
        if fault == "delay":
            time.sleep(0.5)
        if fault in ("500", "503", "429"):
            self.answer(int(fault), [], b"")
            return
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.port)) as connection:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content, headers = answer.read(), answer.getheaders()
        if fault == "502":
            self.answer(502, [], b"")
        elif fault != "lost":
            self.answer(answer.status, headers, content, len(content) // 2 if fault == "cut" else len(content))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int = 0) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        self.wfile.write(content[:sent])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Cluster:
    """A PostgreSQL server on a free port."""

    def __init__(self, programs: Path, folder: Path, user: str | None, port: int) -> None:
        self.programs, self.folder, self.user, self.port = programs, folder, user, port

    def run(self, program: str, *words: str) -> None:
        # Write to a file: a server that inherits a pipe would keep it open.
        with Path(tempfile.gettempdir(), f"{self.folder.name}.log").open("ab") as log:
            command = [str(self.programs / program), *words]
            subprocess.run(command, check=True, stdout=log, stderr=log, user=self.user, cwd=self.folder, timeout=60)

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, "start")

    def crash(self) -> None:
        """Kill every process of the server at once and restart it, as after a power failure."""
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")
        time.sleep(1)
        self.start()

    def database(self, name: str) -> str:
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "effv2", name)
        return f"postgresql://effv2@127.0.0.1:{self.port}/{name}"
