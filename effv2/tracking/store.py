"""The tracking store of MLflow's own settings: opened, checked before any training, its errors explained."""

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
from mlflow.entities import Experiment, Run, RunTag
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
from effv2.core.secrets import masked, masked_values
from effv2.tracking.addresses import STORES, TRACKING_URI, check_database, read_where_typed, shown_uri, tracking_uri
from effv2.tracking.plain_files import folder_of_files, write_whole_files
from effv2.tracking.tags import PID

PROBE_SECONDS = 4  # seconds for a server's sign of life; MLflow's own limits are minutes
WAIT_SECONDS = 2.0  # seconds between two checks of an unreachable store
MOST_SETBACKS = 5  # repetitions of a piece of work after failures of the store
TrackingError = MlflowException
TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError)  # the store is unreachable, or refuses
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
CUT = "Connection broken|IncompleteRead|Failed to download artifacts"  # signs of a cut answer; the last hides why
DEFAULT, OWN_EXPERIMENT = "0", "effv2"  # the id of MLflow's default experiment, and the name of effv2's
MISSING = "RESOURCE_DOES_NOT_EXIST"  # no run, model or experiment has that id
# Errors on opening a database whose creation was interrupted, and which has no version of its tables.
HALF_BUILT = r"(?s)^(?!.*found version (?!None)\w).*(already exists|out-of-date|no such (table|column)|duplicate col)"
LASTING = (MISSING, "PERMISSION_DENIED", "UNAUTHENTICATED")
MIGRATIONS = Path(mlflow.__file__).with_name("store") / "db_migrations" / "versions"  # named by schema version
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
# Patterns of an error's code and text, each with the problem of the store and the remedy. The first match counts.
EXPLANATIONS = (
    ("ALLOW_FILE_STORE", "MLflow wants MLFLOW_ALLOW_FILE_STORE=true for plain files", f"set it, or use {STORES}"),
    ("unsupported URI|Can't load plugin|Invalid database engine", "no such kind of store", f"use {STORES}"),
    (
        r"unable to open database|not a database|readonly database|malformed|^ \[Errno (1|2|13|17|20|21|28|30)\]",
        "its file can't be used ({reason})",
        "correct its path, or give yourself access",
    ),
    ("^OLDER_SCHEMA", "its tables are those of an older MLflow", "keep a copy, then run: mlflow db upgrade {uri}"),
    ("^NEWER_SCHEMA", "its tables are those of a newer MLflow", "install that MLflow here, or use another database"),
    ("No module named", "needs the Python package {package}", "install it with: pip install {package}"),
    (
        "^UNAUTHENTICATED",
        "the server requires a known user",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    ("DENIED.*Invalid Host", "the server refuses this name", "start it with --allowed-hosts, or use another address"),
    ("^PERMISSION_DENIED", "the user may not do this ({reason})", "ask the administrator of the server"),
    ("WRONG_VERSION_NUMBER|record layer failure", "the server doesn't use TLS", "use an http:// address"),
    (
        "SSLError",
        "the server's certificate can't be verified",
        "set MLFLOW_TRACKING_SERVER_CERT_PATH to that of the authority that signed it, or correct the address",
    ),
    ("", "the tracking store doesn't answer ({reason})", "start the server or correct the address"),
)


class MlflowClient(mlflow.MlflowClient):
    """MLflow's client, which repeats calls whose answer was cut. Callers delete what a repeated creation made twice."""

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute. A method repeats its calls."""
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
    """The tracking store was unreachable for longer than a run waits for it."""


def open_store(experiment: str | None, create: bool = True, message: Message = lambda text: None) -> str:
    """Return the id of the experiment to log to; InputError if the store doesn't answer.

    Without `create`, an experiment of that name must exist. An empty name means that of `mlflow run`, or of
    MLFLOW_EXPERIMENT_NAME or _ID. Otherwise it means `Default` if that has runs of effv2, else `effv2`. A database is
    created and migrated only here. With None, this checks the store, creates nothing, and returns an empty text.
    """
    configure()
    file = _database_file()
    if (run_id := os.environ.get("MLFLOW_RUN_ID")) and not is_begun():
        raise _no_run(run_id)
    if experiment is None and not is_begun():
        remedy = f"train something first, as with `effv2 ablate`, or name the store of your runs: {STORES}"
        raise InputError(TRACKING_URI, shown_uri(), "there is no such file yet", remedy)
    try:
        if file:  # in whose name MLflow would quote spaces
            file.parent.mkdir(parents=True, exist_ok=True)
        here = file or folder_of_files()
        # Processes that start simultaneously must not create or migrate a store together: that fails.
        with FileLock(f"{here}.lock") if here and os.access(here.parent, os.W_OK) else nullcontext():
            if file:
                _create_database(file)
            check_database()
            _probe()
            if experiment is None:
                return ""
            found = _experiment(experiment, create, message)
    except (MlflowException, SQLAlchemyError, CommandError, OSError, ImportError, ValueError) as error:
        if file and re.search(HALF_BUILT, str(error)) and _is_empty(file):
            problem = "its creation was interrupted, and it is empty"
            raise InputError("MLFLOW_TRACKING_URI", shown_uri(), problem, f"remove the file {file}") from error
        raise _explained(error, experiment or "") from error
    if found.lifecycle_stage != "active":
        raise InputError("experiment", found.name, "that experiment was deleted", "restore it or choose another one")
    _check_artifacts(found)
    return str(found.experiment_id)


def _database_file() -> Path | None:
    """Return the path of the tracking store's database, if it is a file; InputError as check_address."""
    uri = tracking_uri()
    if not re.match("sqlite[:+]", uri):
        return None
    database = make_url(uri).database or ":memory:"
    if database == ":memory:":
        raise InputError(TRACKING_URI, uri, "names no file, so no run would be kept", f"use {STORES}")
    if os.path.isdir(database):  # noqa: PTH112 (never raises)
        raise InputError(TRACKING_URI, uri, "is a folder", f"name a file in it, as sqlite:///{database}/mlflow.db")
    return None if database.startswith("file:") else Path(database)


def _create_database(file: Path) -> None:
    """Create a missing database, first in another place: a killed creation leaves none in the right place."""
    file = file.resolve()  # the target of a link

    def is_there() -> bool:
        return file.exists() and file.stat().st_size > 0

    if is_there():
        return
    building = file.with_name(f"{file.name}.new")
    for left in (building, building.with_name(f"{building.name}-journal")):
        left.unlink(missing_ok=True)
    url = make_url(mlflow.get_tracking_uri()).set(database=str(building))
    MlflowClient(url.render_as_string()).search_experiments(max_results=1)
    if not is_there():  # no server has created it meanwhile
        building.replace(file)


def _is_empty(file: Path) -> bool:
    """Say whether a file is a database of MLflow's without any logged data, perhaps without some of its tables."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        tables = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        held = tables.intersection(("runs", "registered_models", "trace_info", "studies"))  # the last ones are Optuna's
        full = (opened.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in held)  # noqa: S608
        return "experiments" in tables and not any(full)
    return False


def is_begun() -> bool:
    """Say whether there is a store. The file of a database may not exist yet."""
    configure()
    file = _database_file()
    return not file or file.is_file()


def _check_artifacts(experiment: Experiment) -> None:
    """Refuse a folder for artifacts that can't be written. Other places fail when the first artifact is logged."""
    location = experiment.artifact_location
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]+:", location):  # those of the server have one slash: mlflow-artifacts:/1
        return
    folder = Path(local_file_uri_to_path(location)).absolute()  # type: ignore[no-untyped-call]
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 (never raises)
    if not os.access(there, os.W_OK):
        problem = f"the folder of its artifacts, {there}, can't be written"
        raise InputError("experiment", experiment.name, problem, "make it writable, or choose another experiment")


def configure() -> None:
    """Hide MLflow's own lines, which would disturb our progress, and shorten its retries: ours report waiting."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints stack traces
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")  # half a second: effv2 itself waits for servers
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if os.environ.get("MLFLOW_RUN_ID"):
        read_where_typed()
    if folder := folder_of_files():
        write_whole_files(folder)


def _probe() -> None:
    """Check quickly whether the store answers; one of TRACKING_ERRORS if it doesn't."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
        http_request(creds, "/health", "GET", timeout=PROBE_SECONDS, max_retries=3)  # type: ignore[no-untyped-call]
    MlflowClient().search_experiments(max_results=1)  # a server without its database still reports that it is healthy


def answers() -> bool:
    """Say whether the tracking store answers now."""
    with suppress(*TRACKING_ERRORS):
        _probe()
        return True
    return False


def outage_passed(error: Exception, setbacks: Counter[str], work: str, seconds: float, message: Message) -> bool:
    """Wait until the tracking store answers, and return whether its failure was temporary.

    `setbacks` limits this for one piece of work. StoreAway if the store is unreachable for too many seconds.
    """
    lasting = is_refusal(error) or (getattr(error, "error_code", "") in LASTING and not re.search(CUT, str(error)))
    if isinstance(error, MlflowException) and not lasting and setbacks[work] < MOST_SETBACKS:
        setbacks[work] += 1
        message(f"The tracking store failed ({reason(error)}); the work resumes when it answers.")
        time.sleep(WAIT_SECONDS * setbacks[work])
    elif answers():
        return False
    deadline = time.monotonic() + seconds
    while not answers():
        stop_if_told()
        if time.monotonic() > deadline:
            problem = f"The tracking store {shown_uri()} has not answered for {seconds} seconds; start it."
            raise StoreAway(problem) from error
        time.sleep(WAIT_SECONDS)
    return True


@contextmanager
def tracking_faults() -> Iterator[None]:
    """Turn errors of the tracking store inside into one sentence."""
    try:
        yield
    except TrackingError as error:
        raise RunError(f"The tracking store failed ({reason(error)}); fix it.", resumes=True) from error


def is_refusal(error: Exception) -> bool:
    """Say whether the store understood and refused, so that repeating won't help. A deleted run counts, too."""
    if isinstance(error, MlflowException) and error.error_code in REFUSALS:
        return True
    status = getattr(getattr(error, "response", None), "status_code", "")  # for an artifact
    return bool(re.search(r"error code (400|413|422)", f"error code {status} {error}"))


def reason(error: BaseException) -> str:
    """Return why the store failed, in a few words."""
    if found := re.search(r"too many (\d+) error responses|HTTPError: (\d+)", str(error)):
        return f"it answers with HTTP status {found[1] or found[2]}"
    if re.search("Max retries exceeded|Connection broken", str(error)):
        return "no connection"
    if found := re.search(r"\(\w+\.\w+Error\) ([^\[\n]+)", str(error)):  # for a database, between SQL and addresses
        return found[1].strip()
    return masked(" ".join(str(error).split()))[:200].rstrip(".") or type(error).__name__


def _adopted(message: Message) -> Run | None:
    """Return the RUNNING run that `mlflow run` opened for this command. Any other run is ignored."""
    if not (run_id := os.environ.get("MLFLOW_RUN_ID")):
        return None
    try:
        run = MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise (_no_run(run_id) if error.error_code == MISSING else error) from error
    if run.info.status == "RUNNING" and not any(name.startswith("effv2.") for name in run.data.tags):
        tags = [RunTag(*each) for each in masked_values(run.data.tags).items()]
        MlflowClient().log_batch(run_id, tags=tags)  # the project's address may have secrets
        return run
    del os.environ["MLFLOW_RUN_ID"]
    message(f"MLFLOW_RUN_ID names the run {run_id}, which was not opened for this command, so it is ignored.")
    return None


def _no_run(run_id: str) -> InputError:
    remedy = "unset it, or set MLFLOW_TRACKING_URI to the right store, a file by its absolute path"
    return InputError("MLFLOW_RUN_ID", run_id, f"the tracking store {shown_uri()} has no such run", remedy)


def _experiment(name: str, create: bool, message: Message) -> Experiment:
    client = MlflowClient()
    if adopted := _adopted(message):
        given = client.get_experiment(adopted.info.experiment_id)
        if name and given.name != name:
            problem = "`mlflow run` already opened a run in another experiment"
            raise InputError("experiment", name, problem, "give the name to `mlflow run`, with --experiment-name")
        return given
    if not name:
        chosen = default_experiment_id()
        named = chosen != DEFAULT or any(map(os.environ.get, ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")))
        ours = client.get_experiment_by_name(OWN_EXPERIMENT)
        if named or client.search_runs([DEFAULT], f"tags.`{PID}` != ''", max_results=1) or not (ours or create):
            return client.get_experiment(chosen)  # Default for earlier runs of effv2, and for reports on others' runs
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
        return found  # another process was faster


def _explained(error: Exception, experiment: str) -> InputError:
    code, why = str(getattr(error, "error_code", "")), reason(error)
    if isinstance(error, ValueError):
        name = found[0] if (found := re.search(r"MLFLOW_\w+", str(error))) else "MLflow's variables"
        return InputError(name, os.environ.get(name, ""), why, "correct or unset it")
    if code == MISSING or (code == "INVALID_PARAMETER_VALUE" and (experiment or "MLFLOW_EXPERIMENT_ID" in why)):
        return InputError("experiment", experiment[:80], f"refused ({why})", "correct the option or MLflow's variables")
    text = f"{code} {error}"
    if schema := re.search(r"found version (?!None)(\w+)|revision identified by '(\w+)'", text):
        text = f"{'OLDER' if [*MIGRATIONS.glob(f'{schema[1] or schema[2]}_*')] else 'NEWER'}_SCHEMA"
    package = getattr(error, "name", "")
    known = {"reason": why, "uri": shown_uri(), "package": DRIVERS.get(package, package)}
    words = next(words for pattern, *words in EXPLANATIONS if re.search(pattern, text, re.DOTALL))
    return InputError(TRACKING_URI, shown_uri(), *(each.format(**known) for each in words))
