"""The tracking store that MLflow's own settings name: opened, checked before anything is trained, explained."""

import logging
import os
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import mlflow
from alembic.util import CommandError
from filelock import FileLock
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.rest_utils import http_request
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from effv2.core.errors import InputError, RunError, StoreAway
from effv2.core.internals import default_experiment_id
from effv2.core.processes import stop_if_told
from effv2.core.reporter import Message
from effv2.core.secrets import masked
from effv2.tracking.addresses import STORES, TRACKING_URI, check_database, read_where_typed, shown_uri, tracking_uri
from effv2.tracking.tags import PID

PROBE_SECONDS = 4  # that a server has to answer whether it is there; MLflow's own limits are minutes
WAIT_SECONDS = 2.0  # between two looks at a store that is away
MOST_SETBACKS = 5  # so often a piece of work is begun again because the store failed, and answered again
TrackingError = MlflowException
TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)  # a store that is away, or refuses
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
CUT = "Connection broken|IncompleteRead"  # what an answer that broke off looks like
DEFAULT, OWN_EXPERIMENT = "0", "effv2"  # the id of MLflow's experiment, the name of that for our runs
MISSING = "RESOURCE_DOES_NOT_EXIST"  # there is no run, model or experiment of that id
# What opening a database says whose creation was cut short, and which names no version of its tables.
HALF_BUILT = (
    r"(?s)^(?!.*found version (?!None)\w).*(already exists|out-of-date|no such (table|column)|duplicate column)"
)
LASTING = (MISSING, "PERMISSION_DENIED", "UNAUTHENTICATED")
MIGRATIONS = Path(mlflow.__file__).with_name("store") / "db_migrations" / "versions"  # named by the schema's version
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
# What the code and the text of an error look like, and what is wrong with the store, with the remedy: the first found.
EXPLANATIONS = (
    ("ALLOW_FILE_STORE", "MLflow wants MLFLOW_ALLOW_FILE_STORE=true for plain files", f"set it, or use {STORES}"),
    ("unsupported URI|Can't load plugin", "no such kind of store", f"use {STORES}"),
    ("^OLDER_SCHEMA", "its tables are those of an older MLflow", "keep a copy, then run: mlflow db upgrade {uri}"),
    ("^NEWER_SCHEMA", "its tables are those of a newer MLflow", "install that MLflow here, or use another database"),
    ("No module named", "needs the Python package {package}", "install it with: pip install {package}"),
    (
        "^UNAUTHENTICATED",
        "the server doesn't know the user, or wants one",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    ("DENIED.*Invalid Host", "the server refuses this name", "start it with --allowed-hosts, or use another address"),
    ("^PERMISSION_DENIED", "the user may not do this ({reason})", "ask whoever keeps the server"),
    ("WRONG_VERSION_NUMBER|record layer failure", "the server speaks no TLS", "use an http:// address"),
    (
        "SSLError",
        "the server's certificate can't be verified",
        "set MLFLOW_TRACKING_SERVER_CERT_PATH to that of the authority which signed it, or correct the address",
    ),
    ("", "the tracking store doesn't answer ({reason})", "start the server or correct the address"),
)


class MlflowClient(mlflow.MlflowClient):
    """MLflow's client, which repeats calls whose answer was cut; `create_run` and `create_logged_model` alone mind."""

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute; a method that repeats itself."""
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def repeated(*args: Any, **kwargs: Any) -> Any:
            for _ in range(MOST_SETBACKS):
                try:
                    return found(*args, **kwargs)
                except TRACKING_ERRORS as error:
                    if not re.search(CUT, str(error)):
                        raise
            return found(*args, **kwargs)

        return repeated


class TrackingAway(StoreAway):
    """The tracking store was away for longer than a run waits for it."""


def open_store(experiment: str | None, create: bool = True, message: Message = lambda text: None) -> str:
    """Answer with the id of the experiment to log to; InputError if the store doesn't answer.

    Without `create`, an experiment of that name must be there. An empty name means that of `mlflow run`, of
    MLFLOW_EXPERIMENT_NAME or _ID, else `effv2`, or `Default` where that has runs of ours. A database is created and
    migrated nowhere else. None looks whether there is a store, creates nothing, and answers with nothing.
    """
    configure()
    file = _database_file()
    if (run_id := os.environ.get("MLFLOW_RUN_ID")) and not is_begun():
        raise _no_run(run_id)
    if experiment is None and not is_begun():
        raise InputError(TRACKING_URI, shown_uri(), "there is no such file", f"name the store of your runs: {STORES}")
    try:
        # Processes that start at once must not migrate a new database together, which fails.
        with FileLock(f"{file}.lock") if file and os.access(file.parent, os.W_OK) else nullcontext():
            if file:
                _create_database(file)
            check_database()
            _probe()
            if experiment is None:
                return ""
            found = _experiment(experiment, create, message)
    except (MlflowException, SQLAlchemyError, CommandError, OSError, ImportError) as error:
        if file and re.search(HALF_BUILT, str(error)) and _is_empty(file):
            problem = "its creation was cut short, and nothing is in it"
            raise InputError("MLFLOW_TRACKING_URI", shown_uri(), problem, f"remove the file {file}") from error
        raise _explained(error, experiment or "") from error
    if found.lifecycle_stage != "active":
        raise InputError("experiment", found.name, "that experiment was deleted", "restore it or choose another one")
    _check_artifacts(found)
    return str(found.experiment_id)


def _database_file() -> Path | None:
    """Return the path of the tracking store's database, if it is a file; InputError as check_address."""
    uri = tracking_uri()
    database = make_url(uri).database if uri.startswith("sqlite:") else None
    return Path(database) if database and database != ":memory:" and not database.startswith("file:") else None


def _create_database(file: Path) -> None:
    """Create a database that is missing, beside its place first: a creation that is killed leaves none there."""
    file = file.resolve()  # of a link, where that leads

    def is_there() -> bool:
        return file.exists() and file.stat().st_size > 0

    if is_there():
        return
    building = file.with_name(f"{file.name}.new")
    for left in (building, building.with_name(f"{building.name}-journal")):
        left.unlink(missing_ok=True)
    url = make_url(mlflow.get_tracking_uri()).set(database=str(building))
    MlflowClient(url.render_as_string()).search_experiments(max_results=1)
    if not is_there():  # no server has made it meanwhile
        building.replace(file)


def _is_empty(file: Path) -> bool:
    """Say whether a file is a database of MLflow's in which nothing was logged, perhaps not all of its tables."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        tables = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        held = tables.intersection(("runs", "registered_models", "trace_info", "studies"))  # the last are Optuna's
        full = (opened.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in held)  # noqa: S608
        return "experiments" in tables and not any(full)
    return False


def is_begun() -> bool:
    """Say whether there is a store; a database that is a file may not have been created yet."""
    configure()
    file = _database_file()
    return not file or file.is_file()


def _check_artifacts(experiment: Experiment) -> None:
    """Refuse a folder for artifacts that can't be written; other places show it when a run's first one is logged."""
    location = experiment.artifact_location
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]+:", location):  # the server's own have one slash: mlflow-artifacts:/1
        return
    folder = Path(local_file_uri_to_path(location)).absolute()  # type: ignore[no-untyped-call]
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 (never raises)
    if not os.access(there, os.W_OK):
        problem = f"the folder {there} can't be written, where its artifacts go"
        raise InputError("experiment", experiment.name, problem, "make it writable, or choose another experiment")


def configure() -> None:
    """Keep MLflow's own lines from running through our progress, and its retries short: ours say that they wait."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints the stack of what we explain
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")  # half a second: waiting for a server is ours
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if os.environ.get("MLFLOW_RUN_ID"):
        read_where_typed()


def _probe() -> None:
    """Ask the store for a sign of life, with little patience; one of TRACKING_ERRORS without it."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
        http_request(creds, "/health", "GET", timeout=PROBE_SECONDS, max_retries=3)  # type: ignore[no-untyped-call]
    MlflowClient().search_experiments(max_results=1)  # a server whose database is away says that it is well


def answers() -> bool:
    """Say whether the tracking store answers now."""
    with suppress(*TRACKING_ERRORS):
        _probe()
        return True
    return False


def outage_passed(error: Exception, setbacks: Counter[str], work: str, seconds: float, message: Message) -> bool:
    """Say, after waiting for it to answer, whether the tracking store failed as it may for a while.

    Not too often for the same piece of work, which `setbacks` count. StoreAway where it is away for too many seconds.
    """
    lasting = is_refusal(error) or getattr(error, "error_code", "") in LASTING
    if isinstance(error, MlflowException) and not lasting and setbacks[work] < MOST_SETBACKS:
        setbacks[work] += 1
        message(f"The tracking store failed ({reason(error)}); the work is resumed when it answers.")
        time.sleep(WAIT_SECONDS * setbacks[work])
    elif answers():
        return False
    deadline = time.monotonic() + seconds
    while not answers():
        stop_if_told()
        if time.monotonic() > deadline:
            problem = f"The tracking store {shown_uri()} has been away for {seconds} seconds; start it."
            raise StoreAway(problem) from error
        time.sleep(WAIT_SECONDS)
    return True


@contextmanager
def tracking_faults() -> Iterator[None]:
    """Turn what the tracking store raises inside into one sentence."""
    try:
        yield
    except TrackingError as error:
        raise RunError(f"The tracking store failed ({reason(error)}); fix it.", resumes=True) from error


def is_refusal(error: Exception) -> bool:
    """Say whether the store understood and refused, so that trying again won't help; a run that was deleted too."""
    if isinstance(error, MlflowException) and error.error_code in REFUSALS:
        return True
    status = getattr(getattr(error, "response", None), "status_code", "")  # of an artifact
    return bool(re.search(r"error code (400|413|422)", f"error code {status} {error}"))


def reason(error: BaseException) -> str:
    """Return why the store failed, in a few words."""
    if found := re.search(r"too many (\d+) error responses|HTTPError: (\d+)", str(error)):
        return f"it answers with HTTP status {found[1] or found[2]}"
    if "Max retries exceeded" in str(error):
        return "no connection"
    if found := re.search(r"\(\w+\.\w+Error\) ([^\[\n]+)", str(error)):  # of a database, between SQL and addresses
        return found[1].strip()
    return masked(" ".join(str(error).split()))[:200].rstrip(".") or type(error).__name__


def _adopted(message: Message) -> Run | None:
    """Return the RUNNING run that `mlflow run` opened for this command; any other is left alone and forgotten."""
    if not (run_id := os.environ.get("MLFLOW_RUN_ID")):
        return None
    try:
        run = MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise (_no_run(run_id) if error.error_code == MISSING else error) from error
    if run.info.status == "RUNNING" and not any(name.startswith("effv2.") for name in run.data.tags):
        return run
    del os.environ["MLFLOW_RUN_ID"]
    message(f"MLFLOW_RUN_ID names the run {run_id}, which was not opened for this command: it is left alone.")
    return None


def _no_run(run_id: str) -> InputError:
    remedy = "unset it, or give MLFLOW_TRACKING_URI the right store, a file by its absolute path"
    return InputError("MLFLOW_RUN_ID", run_id, f"the tracking store {shown_uri()} has no such run", remedy)


def _experiment(name: str, create: bool, message: Message) -> Experiment:
    client = MlflowClient()
    if adopted := _adopted(message):
        given = client.get_experiment(adopted.info.experiment_id)
        if name and given.name != name:
            problem = "`mlflow run` already opened a run in another experiment"
            raise InputError("experiment", name, problem, "give the name to `mlflow run` itself, as --experiment-name")
        return given
    if not name:
        chosen = default_experiment_id()
        named = chosen != DEFAULT or any(map(os.environ.get, ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")))
        if named or client.search_runs([DEFAULT], f"tags.`{PID}` != ''", max_results=1):  # ours of before
            return client.get_experiment(chosen)
        name = OWN_EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is None and not create:
        names = [each.name for each in client.search_experiments()]
        raise InputError("experiment", name, "no such experiment", choices=names)
    try:
        return found or client.get_experiment(client.create_experiment(name))
    except MlflowException:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found  # another process was quicker


def _explained(error: Exception, experiment: str) -> InputError:
    code, why = str(getattr(error, "error_code", "")), reason(error)
    if code == MISSING or (code == "INVALID_PARAMETER_VALUE" and (experiment or "MLFLOW_EXPERIMENT_ID" in why)):
        return InputError("experiment", experiment[:80], f"refused ({why})", "correct the option or MLflow's variables")
    text = f"{code} {error}"
    if schema := re.search(r"found version (?!None)(\w+)|revision identified by '(\w+)'", text):
        text = f"{'OLDER' if [*MIGRATIONS.glob(f'{schema[1] or schema[2]}_*')] else 'NEWER'}_SCHEMA"
    package = getattr(error, "name", "")
    known = {"reason": why, "uri": shown_uri(), "package": DRIVERS.get(package, package)}
    words = next(words for pattern, *words in EXPLANATIONS if re.search(pattern, text, re.DOTALL))
    return InputError(TRACKING_URI, shown_uri(), *(each.format(**known) for each in words))
