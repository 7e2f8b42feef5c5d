"""Addresses of stores: checked before they are opened, interpreted as intended, shown without secrets."""

import os
import re
from pathlib import Path

from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from effv2.core.errors import InputError
from effv2.core.processes import folders_above
from effv2.core.secrets import masked

TRACKING_URI = "MLFLOW_TRACKING_URI"
STORES = "sqlite:///mlflow.db, http://HOST:PORT or postgresql://USER@HOST/DATABASE"
FORMS = "sqlite:///FILE, postgresql://USER@HOST/DATABASE or journal:///FOLDER/FILE"
DATABASES = re.compile(r"(sqlite|postgresql|mysql|mssql)[:+]")
OF_MLFLOW, OF_OPTUNA = {"experiments", "metrics"}, {"studies", "trials"}  # tables of each
PATIENCE = {"pysqlite": {"timeout": 60}, "psycopg": {"connect_timeout": 10}}  # seconds, by driver


def tracking_uri() -> str:
    """Return the tracking URI; InputError as check_address."""
    import mlflow  # late, because commands refuse a wrong storage before they import it

    uri = mlflow.get_tracking_uri()
    check_address(TRACKING_URI, uri)
    return uri


def shown_uri() -> str:
    """Return the tracking URI without secrets."""
    import mlflow

    return masked(mlflow.get_tracking_uri())


def ui_address() -> str:
    """Return the address of the server's pages, without a user; empty if the tracking store is not a server."""
    uri = re.sub("^(https?://)[^/]*@", r"\1", shown_uri())
    return uri.rstrip("/") if uri.startswith("http") else ""


def read_where_typed() -> None:
    """Make a relative path in the tracking URI absolute: the user meant the folder where they typed `mlflow run`.

    `mlflow run` starts the command in the project's folder. It created its run in the user's, so that file exists.
    """
    uri = os.environ.get(TRACKING_URI, "")
    if relative := re.fullmatch(r"(sqlite:///|file:|)((?![/:~'\"\s]|\w[\w+]*:)[^?]+)(\?.*)?", uri):
        paths = (folder / relative[2] for folder in folders_above())
        if there := next(filter(os.path.exists, paths), None):
            os.environ[TRACKING_URI] = f"{relative[1]}{there}{relative[3] or ''}"


def check_address(what: str, uri: str) -> None:
    """Refuse the address of a store, given as `what`, that MLflow or SQLAlchemy would not read as intended."""
    bare = uri.strip("\"' \t\r\n")
    home = re.sub(r"(^|:|/)(~\w*)", lambda found: found[1] + os.path.expanduser(found[2]), bare, count=1)
    if bare != uri:
        remedy = f"write it without them, as {bare}" if bare else "unset it"
        raise InputError(what, uri, "has quotes or spaces around it", remedy)
    if (variable := re.search(r"\$(\w+|\{\w+\})", uri)) and re.match(r"(sqlite|file|journal)\b.*:|[^:]*$", uri):
        raise InputError(what, uri, f"the {variable[0]} in it is not replaced", "write the value of that variable")
    if home != bare and re.match(r"(sqlite:///|file:/*)?~", bare):
        raise InputError(what, uri, "the ~ in it is not replaced by the home folder", f"write {home}")
    if re.match(r"(\w[\w.-]*|\[[\da-fA-F:]+\]):\d+(/|$)", uri):
        raise InputError(what, uri, "has no scheme", f"write http://{uri}")
    try:
        url = make_url(uri) if DATABASES.match(uri) else None
    except ValueError as error:
        raise InputError(what, uri, "its port is not a number", "correct it") from error
    except SQLAlchemyError as error:
        remedy = "use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        raise InputError(what, uri, "is not the address of a database", remedy) from error
    split = url is not None and url.host and "@" in f"{url.host}{url.database}"  # inside the password
    if split or re.match(r"[\w+]+://[^/]*\s.*@", uri):
        remedy = "write @ as %40, / as %2F, a space as %20"
        raise InputError(what, f"{uri.partition('//')[0]}//…", "its user or password holds an @ or a space", remedy)


def storage_address(url: str) -> URL | Path:
    """Return the address of Optuna's storage, or the file of a log; InputError for anything else."""
    check_address("storage", url)
    if url.startswith("journal:///") and (file := Path(url.removeprefix("journal://"))).name:
        if not file.absolute().parent.is_dir():
            raise InputError("storage", url, "can't be used (no such folder)", "create it or correct the path")
        return file.absolute()
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):  # the latter for a port that isn't a number
        raise InputError("storage", url, "not an address", f"use {FORMS}") from None
    shown, backend = masked(url), parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql") or parsed.database in (None, "", ":memory:"):
        raise InputError("storage", shown, "no such kind of storage", f"use {FORMS}")
    if backend == "sqlite" and not Path(str(parsed.database)).absolute().parent.is_dir():
        raise InputError("storage", shown, "can't be used (no such folder)", "create it or correct the path")
    if backend == "sqlite" and Path(str(parsed.database)).is_dir():
        raise InputError("storage", shown, "is a folder", "name a file in it, as sqlite:///FOLDER/optuna.db")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def tables_of(url: URL) -> set[str]:
    """Return the names of the tables in a database; none if its file is missing."""
    if url.get_backend_name() == "sqlite" and not os.path.isfile(url.database or ""):  # noqa: PTH113 (never raises)
        return set()
    engine = create_engine(url, connect_args=PATIENCE.get(url.get_driver_name(), {}))
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def check_database() -> None:
    """Refuse a database of Optuna's, because MLflow would add its tables to it."""
    uri = tracking_uri()
    if DATABASES.match(uri) and tables_of(make_url(uri)) >= OF_OPTUNA:
        raise InputError(TRACKING_URI, uri, "holds Optuna's studies, not runs", f"use {STORES}")


def is_tracking_database(url: URL) -> bool:
    """Say whether a database is the one of the tracking URI, or holds the tables of any tracking store."""

    def place(of: URL) -> tuple[object, ...]:
        database, options = os.path.realpath(of.database or ""), of.query.get("options")
        return of.get_backend_name(), of.host, of.port or 5432, database, options

    uri = tracking_uri()
    mine = DATABASES.match(uri) is not None and place(make_url(uri)) == place(url)
    return mine or tables_of(url) >= OF_MLFLOW
