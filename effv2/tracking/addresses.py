"""Addresses of stores: checked before they are opened, interpreted as intended, shown without secrets."""

import os
import re
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from effv2.core.errors import InputError
from effv2.core.secrets import masked

TRACKING_URI = "MLFLOW_TRACKING_URI"
STORES = "sqlite:///mlflow.db, http://HOST:PORT or postgresql://USER@HOST/DATABASE"
DATABASES = re.compile(r"(sqlite|postgresql|mysql|mssql)[:+]")
OF_MLFLOW, OF_OPTUNA = {"experiments", "metrics"}, {"studies", "trials"}  # tables of each
PATIENCE = {"pysqlite": {"timeout": 60}, "psycopg": {"connect_timeout": 10}}  # seconds, by driver


def tracking_uri() -> str:
    """Return the tracking URI; InputError as check_address."""
    uri = mlflow.get_tracking_uri()
    check_address(TRACKING_URI, uri)
    return uri


def shown_uri() -> str:
    """Return the tracking URI without secrets."""
    return masked(mlflow.get_tracking_uri())


def ui_address() -> str:
    """Return the address of the server's pages; empty if the tracking store is not a server."""
    uri = shown_uri()
    return uri.rstrip("/") if uri.startswith("http") else ""


def read_where_typed() -> None:
    """Make a relative path in the tracking URI absolute: the user meant the folder where they typed `mlflow run`.

    `mlflow run` starts the command in the project's folder. So it is the nearest parent process in another folder.
    """
    uri = os.environ.get(TRACKING_URI, "")
    relative = re.fullmatch(r"(sqlite:///|file:|)((?![/:~'\"\s]|\w[\w+]*:)[^?]+)(\?.*)?", uri)
    if relative is None:
        return
    with suppress(psutil.Error):
        folders = (Path(above.cwd()) for above in psutil.Process().parents())
        path = next((folder for folder in folders if folder != Path.cwd()), Path()) / relative[2]
        if path.is_absolute() and path.exists():
            os.environ[TRACKING_URI] = f"{relative[1]}{path}{relative[3] or ''}"


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
        host = make_url(uri).host or "" if DATABASES.match(uri) else ""
    except ValueError as error:
        raise InputError(what, uri, "its port is not a number", "correct it") from error
    except SQLAlchemyError as error:
        remedy = "use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        raise InputError(what, uri, "is not the address of a database", remedy) from error
    if "@" in host or re.match(r"[\w+]+://[^/]*\s.*@", uri):
        shown, remedy = "%20".join(uri.split()), "write @ as %40, a space as %20"
        raise InputError(what, shown, "its user or password holds an @ or a space", remedy)


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
