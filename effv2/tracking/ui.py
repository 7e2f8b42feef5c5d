"""MLflow's UI on the current store, opened at the comparison."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from urllib.request import urlopen

from mlflow.entities import ViewType

from effv2.core.errors import InputError, RunError
from effv2.tracking.addresses import TRACKING_URI, shown_uri, tracking_uri, ui_address
from effv2.tracking.read import artifact_names
from effv2.tracking.store import MlflowClient, open_store, tracking_faults
from effv2.tracking.tags import PARENT
from effv2.tracking.writer import page_of

START_SECONDS = 120.0
PAGE = "report.html"  # of a study


def comparison(experiment: str) -> str:
    """Return the page of the newest finished run or of its study, else study, else run; InputError without a store."""
    own, client = open_store(experiment or None, create=False), MlflowClient()  # the UI would create a database
    with tracking_faults():
        ids = [own] if own else [each.experiment_id for each in client.search_experiments(ViewType.ACTIVE_ONLY)]
        for condition in ("attributes.status = 'FINISHED'", "params.`study.kind` != ''", ""):
            for run in client.search_runs(ids, condition, order_by=["attributes.start_time DESC"], max_results=1):
                run_id = run.data.tags.get(PARENT, run.info.run_id)
                return page_of(run.info.experiment_id, run_id, PAGE if PAGE in artifact_names(run_id, "") else "")
    where = ("experiment", experiment) if experiment else (TRACKING_URI, shown_uri())
    raise InputError(*where, "holds no runs yet", "name the store of your runs, or make some with `effv2 ablate`")


def open_ui(experiment: str, port: int, say: Callable[[str], None], browse: bool) -> None:
    """Print the address of the comparison and, with `browse`, open it. Without a server, serve it until Ctrl-C."""
    page = comparison(experiment)

    def show(server: str) -> None:
        say(f"{server}/{page}")
        if browse:
            webbrowser.open(f"{server}/{page}")

    if server := ui_address():
        show(server)
        return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InputError("port", port, "is in use", "name another one")
    # The command line, which other users of the machine can read, doesn't hold the store's address.
    environment = {"MLFLOW_BACKEND_STORE_URI": tracking_uri(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    words = [sys.executable, "-m", "mlflow", "ui", "-p", str(port), "-w", "1"]
    with tempfile.TemporaryFile() as log, suppress(KeyboardInterrupt):
        process = subprocess.Popen(  # noqa: S603 (in a session of its own it hears no Ctrl-C)
            words, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
        )
        try:
            if started := _answers(f"http://127.0.0.1:{port}/health", process):
                show(f"http://127.0.0.1:{port}")
                say("This serves the store until you press Ctrl-C.")
                process.wait()
            log.seek(0)
            *_, last = log.read().decode(errors="replace").splitlines() or [""]
            raise RunError(f"MLflow's UI {'has ended' if started else 'has not started'}: {last}")
        finally:
            process.terminate()
            process.wait()


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urlopen(address):  # noqa: S310
            return True
        time.sleep(0.2)
    return False
