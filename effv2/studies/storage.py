"""Optuna's storage: opened, its tables created, locked across processes, and waited for where it goes away."""

from __future__ import annotations

import hashlib
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, get_storage
from optuna.storages._heartbeat import BaseHeartbeat
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from effv2.errors import InputError, RunError

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat for so long, a worker that can't be seen from here counts as gone
OUTAGE_SECONDS = 600  # so long a database may be away
TRANSIENT = (StorageInternalError, DBAPIError)

P = ParamSpec("P")
R = TypeVar("R")


class HeartbeatStorage(optuna.storages.BaseStorage, BaseHeartbeat):
    """What is used of Optuna's cached RDBStorage: a storage with heartbeats."""


@dataclass(frozen=True)
class Storage:
    """An open storage and the lock that serialises changes to a study; the lock dies with its process."""

    url: str
    shown: str
    optuna: HeartbeatStorage
    lock: Callable[[str], AbstractContextManager[object]]


def open_storage(url: str) -> Storage:
    """Open a storage, creating its tables where they are missing; InputError if it can't be used.

    `url` is sqlite:///FILE, for one machine, or postgresql://USER@HOST/DATABASE, for many.
    """
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        raise InputError(
            f"--storage {url}: not an address; use sqlite:///FILE or postgresql://USER@HOST/DATABASE."
        ) from None
    shown = parsed.render_as_string(hide_password=True)
    try:
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            return _open(parsed, lambda name: _file_lock(Path(str(parsed.database))), {"timeout": 60})
        if parsed.get_backend_name() == "postgresql":
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            engine = sqlalchemy.create_engine(parsed, pool_pre_ping=True, connect_args={"connect_timeout": 10})
            return _open(parsed, partial(_advisory_lock, engine), {"connect_timeout": 10})
    except ModuleNotFoundError as error:
        raise InputError(
            f"--storage {shown}: needs the package {error.name}; install it with: pip install 'effv2[postgresql]'."
        ) from None
    except (SQLAlchemyError, StorageInternalError, OSError, RuntimeError, NoSuchModuleError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
        raise InputError(
            f"--storage {shown}: can't be used ({reason}); start the database or correct the address."
        ) from error
    raise InputError(
        f"--storage {shown}: no such kind of storage; use sqlite:///FILE or postgresql://USER@HOST/DATABASE."
    )


def _open(url: URL, lock: Callable[[str], AbstractContextManager[object]], arguments: dict[str, int]) -> Storage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = url.render_as_string(hide_password=False)
    engine = {"connect_args": arguments, "pool_pre_ping": True}
    with lock("tables"), warnings.catch_warnings():  # two processes that create them at once would fail
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        rdb = RDBStorage(text, engine, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)
    return Storage(text, url.render_as_string(hide_password=True), get_storage(rdb), lock)  # type: ignore[arg-type]


def _file_lock(database: Path) -> FileLock:
    return FileLock(f"{database}.lock")


@contextmanager
def _advisory_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    key = int.from_bytes(hashlib.sha256(f"effv2 {name}".encode()).digest()[:8], "big", signed=True)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


class StorageAway(RunError):
    """The database has been away for longer than we wait."""


def patient(operation: Callable[P, R]) -> Callable[P, R]:
    """Repeat an operation on the storage while the database is away; RunError after ten minutes.

    The operation must be one that may be repeated, since the answer to the last attempt may just have been lost.
    """

    @wraps(operation)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        deadline, pause = time.monotonic() + OUTAGE_SECONDS, 0.05
        while True:
            try:
                return operation(*args, **kwargs)
            except TRANSIENT as error:
                if time.monotonic() > deadline:
                    reason = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
                    raise StorageAway(
                        f"The storage has been away for {OUTAGE_SECONDS // 60} minutes ({reason}); start the database "
                        "and give the same command again, which goes on from here."
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
            pause = min(2 * pause, 5.0)

    return repeated
