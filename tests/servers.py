"""Real MLflow servers for the tests, which are killed and started again."""

from __future__ import annotations

import os
import socket
import time
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
    """An MLflow server on a port of its own, its runs in the database `store`, its artifacts in `folder`.

    It is what `mlflow server --workers 1` runs: uvicorn, told by variables what to serve.
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
