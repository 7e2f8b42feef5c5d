"""The tracking store that MLflow's own settings name, checked before anything is trained."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.tracking.fluent import _get_experiment_id
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from effv2.core.errors import InputError, nearest
from effv2.core.provenance import without_password

# MLflow's own limits let a dead server block for minutes; a check may be impatient.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
OF_THE_USER = frozenset(name for name in IMPATIENT if name in os.environ)

WAIT_SECONDS = 2.0
# What the code and the text of an error look like, and what to say of the store: the first that is found.
EXPLANATIONS = (
    (
        "MLFLOW_ALLOW_FILE_STORE",
        "MLflow keeps runs in plain files only where MLFLOW_ALLOW_FILE_STORE=true is set; set it, or use "
        "sqlite:///mlflow.db.",
    ),
    ("unsupported URI", "no such kind of store; use sqlite:///FILE, http://HOST:PORT or a database."),
    (
        "^UNAUTHENTICATED",
        "the server doesn't know the user, or wants one; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN.",
    ),
    (
        "^PERMISSION_DENIED.*Invalid Host",
        "the server doesn't answer under this name; start it with --allowed-hosts, or use an address that it allows.",
    ),
    ("^PERMISSION_DENIED", "the user may not do this ({reason}); ask whoever keeps the server."),
    ("WRONG_VERSION_NUMBER|record layer failure", "the server speaks no TLS; use an http:// address."),
    (
        "SSLError",
        "the server's certificate can't be verified; set MLFLOW_TRACKING_SERVER_CERT_PATH to that of the authority "
        "which signed it, or correct the address.",
    ),
    ("", "the tracking store doesn't answer ({reason}); start the server or correct the address."),
)
TrackingError = MlflowException
TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)  # a store that is away, or refuses


def open_store(experiment: str, create: bool = True) -> str:
    """Answer with the id of the experiment to log to; InputError if the store doesn't answer.

    Without `create`, an experiment of that name must be there. An empty name leaves the choice to MLflow: that of
    `mlflow run`, of MLFLOW_EXPERIMENT_NAME or _ID, or `Default`. A database is created, and migrated, here and nowhere
    later.
    """
    with _opening(experiment):
        found = _experiment(MlflowClient(), experiment, create)
    if found.lifecycle_stage != "active":
        raise InputError(f"--experiment {found.name}: that experiment was deleted; restore it or choose another one.")
    _check_artifacts(found)
    return str(found.experiment_id)


def check_store() -> None:
    """Do nothing where the store answers; InputError where it doesn't."""
    with _opening(""):
        MlflowClient().search_experiments(max_results=1)


@contextmanager
def _opening(experiment: str) -> Iterator[None]:
    """Open the store inside, for an experiment or for none in particular, and explain what goes wrong."""
    _quieten()
    try:
        with impatient(), _creation_lock():
            yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise InputError(_explain(error, experiment)) from error


def _check_artifacts(experiment: Experiment) -> None:
    """Refuse a folder for artifacts that can't be written; other places show it when a run's first one is logged."""
    location = experiment.artifact_location
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]+:", location):  # the server's own have one slash: mlflow-artifacts:/1
        return
    folder = Path(local_file_uri_to_path(location)).absolute()  # type: ignore[no-untyped-call]
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 (never raises)
    if not os.access(there, os.W_OK):
        raise InputError(
            f"--experiment {experiment.name}: the folder {there} can't be written, where its artifacts go; give it "
            "other permissions, or choose another experiment."
        )


def tracking_uri() -> str:
    """Return the tracking URI, password and all, to hand on to a worker of ours."""
    return mlflow.get_tracking_uri()


def use_store(uri: str) -> None:
    """Log to the store that the process which started this one logs to."""
    _quieten()
    mlflow.set_tracking_uri(uri)


def _creation_lock() -> AbstractContextManager[object]:
    """Keep processes that start at once from migrating a new sqlite database together, which fails."""
    address = make_url(uri) if (uri := mlflow.get_tracking_uri()).startswith("sqlite:") else None
    file = Path(address.database) if address is not None and address.database else None
    return FileLock(f"{file}.lock") if file is not None and os.access(file.parent, os.W_OK) else nullcontext()


def answers() -> bool:
    """Say whether the tracking store answers now."""
    try:
        with impatient():
            MlflowClient().search_experiments(max_results=1)
    except TRACKING_ERRORS:
        return False
    return True


def wait_until_it_answers(seconds: float) -> bool:
    """Wait for the tracking store for so long at most; say whether it answers."""
    deadline = time.monotonic() + seconds
    while not answers():
        if time.monotonic() > deadline:
            return False
        time.sleep(WAIT_SECONDS)
    return True


def _quieten() -> None:
    """Keep MLflow's own lines from running through our reporter."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints the stack of what we tell
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # What a run writes is tried again by its outbox, which tells of an outage: minutes of silence before help nobody.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def shown_uri() -> str:
    """Return the tracking URI without a password in it."""
    return without_password(mlflow.get_tracking_uri())


def store_name() -> str:
    """Name the tracking store, the same from every working folder, without a password in it."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:") and (file := make_url(uri).database):
        return f"sqlite:///{Path(file).resolve()}"
    if "://" not in uri or uri.startswith("file:"):
        return Path(local_file_uri_to_path(uri)).resolve().as_uri()  # type: ignore[no-untyped-call]
    return without_password(uri)


def reason(error: BaseException) -> str:
    """Return why the store failed, in a few words."""
    if found := re.search(r"too many (\d+) error responses|HTTPError: (\d+)", str(error)):
        return f"it answers with HTTP status {found[1] or found[2]}"
    if "Max retries exceeded" in str(error):
        return "no connection"
    if found := re.search(r"\(\w+\.\w+Error\) ([^\[\n]+)", str(error)):  # of a database, between SQL and addresses
        return found[1].strip()
    return without_password(" ".join(str(error).split()))[:200].rstrip(".") or type(error).__name__


class _Impatience:
    """How many are impatient now, in any thread, and what held before the first of them was."""

    lock = threading.Lock()
    count = 0
    before: Mapping[str, str | None] = {}


@contextmanager
def impatient() -> Iterator[None]:
    """Wait seconds, not minutes, for a server that is gone; the user's own settings stand."""
    with _Impatience.lock:
        if _Impatience.count == 0:
            _Impatience.before = {name: os.environ.get(name) for name in IMPATIENT if name not in OF_THE_USER}
            os.environ.update({name: IMPATIENT[name] for name in _Impatience.before})
        _Impatience.count += 1
    try:
        yield
    finally:
        with _Impatience.lock:
            _Impatience.count -= 1
            for name, value in _Impatience.before.items() if _Impatience.count == 0 else ():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _experiment(client: MlflowClient, name: str, create: bool) -> Experiment:
    adopted = os.environ.get("MLFLOW_RUN_ID")
    if adopted:
        given = client.get_experiment(client.get_run(adopted).info.experiment_id)
        if name and given.name != name:
            raise InputError(
                f"--experiment {name}: `mlflow run` already opened a run in another experiment; give the name to "
                "`mlflow run` itself, as --experiment-name."
            )
        return given
    if not name:
        client.search_experiments(max_results=1)  # creates and migrates a database
        return client.get_experiment(_get_experiment_id() or "0")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found
    if not create:
        names = [each.name for each in client.search_experiments()]
        raise InputError(f"--experiment {name}: no such experiment; {nearest(name, names)}.")
    try:
        return client.get_experiment(client.create_experiment(name))
    except MlflowException:  # another process was quicker
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found


def _explain(error: Exception, experiment: str) -> str:
    uri, code = shown_uri(), str(getattr(error, "error_code", ""))
    if code == "RESOURCE_DOES_NOT_EXIST" or (code == "INVALID_PARAMETER_VALUE" and experiment):
        return f"--experiment {experiment[:80]}: refused ({reason(error)}); correct the option or MLflow's variables."
    text = f"{code} {error}"
    sentence = next(sentence for pattern, sentence in EXPLANATIONS if re.search(pattern, text, re.DOTALL))
    return f"MLFLOW_TRACKING_URI {uri}: {sentence.format(reason=reason(error))}"
