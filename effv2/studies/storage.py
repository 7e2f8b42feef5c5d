"""Optuna's storage: opening it, creating its tables, locking it across processes, and waiting when it is away."""

import hashlib
import os
import random
import re
import sqlite3
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.trial import TrialState
from sqlalchemy import exc
from sqlalchemy.engine import URL

from effv2.core.errors import InputError, StoreAway
from effv2.core.internals import stale_trial_ids, trial_id
from effv2.core.processes import stop_if_told
from effv2.core.secrets import masked
from effv2.studies.journal import LockFile, Log, LogAway, check_log, clock, faults
from effv2.tracking.addresses import is_tracking_database, storage_address
from effv2.tracking.store import reason

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # seconds without a heartbeat after which a remote worker is suspected to be gone
# Seconds of further silence after which it counts as gone: after an outage of the storage, every heartbeat is old for a
# moment.
SECOND_LOOK_SECONDS = 2 * HEARTBEAT_SECONDS
TAKEOVER_SECONDS = GRACE_SECONDS + SECOND_LOOK_SECONDS + HEARTBEAT_SECONDS  # until its trial is taken, at most
OUTAGE_SECONDS = 600  # seconds that a database may be away
LEAVING_SECONDS = 5  # the same while the process ends
# Seconds, and milliseconds for tcp_user_timeout. Otherwise a client would wait for hours for a peer whose machine died,
# and the server would keep the lock of such a client.
POSTGRESQL_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
    "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
}
CUT_TRANSACTION = ("25P02", "25P03")  # Optuna used the transaction again; it was idle for too long
DATABASE_ERRORS = (StorageInternalError, exc.DBAPIError, LogAway)
R = TypeVar("R")


class Storage(ABC):
    """An open storage, and the lock that serialises changes to a study and disappears with its process.

    `patience` is the number of seconds that the storage may be away before StoreAway. `wait` is that number during the
    opening. `file` is the file of the storage, if it has one.
    """

    optuna: BaseStorage

    def __init__(self, shown: str, file: Path | None, wait: float) -> None:
        self.shown, self.file, self.patience = shown, file, wait or OUTAGE_SECONDS
        self._opened_file: int | None = None

    @abstractmethod
    def lock(self, name: str, long: bool = False) -> AbstractContextManager[None]:
        """Hold the lock of that name, perhaps for `long`. It is not reentrant.

        In a file, all names share one lock, and all long ones another. A long lock is awaited without limit. StoreAway
        if another process holds the other one for longer than `patience`.
        """

    @abstractmethod
    def beat(self, trial: int, ended: bool = False) -> None:
        """Record a heartbeat of the work on a trial, or that the work has `ended`."""

    @abstractmethod
    def stale(self, study: int) -> list[int]:
        """Return the running trials without a heartbeat for GRACE_SECONDS."""

    def close(self) -> None:  # noqa: B027 (a log has none)
        """Close the connections of this thread."""

    def retry(self, operation: Callable[[], R]) -> R:
        """Repeat an operation while the database is away; StoreAway if that takes longer than `patience`.

        The operation must be repeatable, because the answer to the last attempt may have been lost.
        """
        pause, away_since = 0.05, float("inf")
        while True:
            stop_if_told()
            began = time.monotonic()
            try:
                return operation()
            except DATABASE_ERRORS as error:
                if not _is_away(error):
                    if self._is_lost(error):
                        why = reason(error.__cause__ or error)
                        problem = f"The storage's file {self.file} was removed, replaced or damaged ({why})."
                        raise StoreAway(problem) from error
                    raise
                now = time.monotonic()
                # After a long attempt: the database was there for most of that time.
                away_since = min(away_since, began) if now - began < GRACE_SECONDS else now
                if now - away_since > self.patience:
                    why = f"for {now - away_since:.0f} seconds ({reason(error.__cause__ or error)})"
                    remedy = f"check that {self.file} can be read and written" if self.file else "start the database"
                    raise StoreAway(f"The storage has not answered {why}; {remedy}.") from error
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
            pause = min(2 * pause, 5.0)

    def _is_lost(self, error: Exception) -> bool:
        """Say whether the file of a storage is no longer the one that was opened, or can't be read."""
        if isinstance(error, LogAway):
            return error.lost
        damaged = re.search("malformed|not a database|disk I/O error", str(error.__cause__ or error))
        return self.file is not None and (damaged is not None or self._opened_file not in (None, self._file_number()))

    def _file_number(self) -> int | None:
        """Return the inode of the storage's file; None without a file."""
        return self.file.stat().st_ino if self.file and self.file.exists() else None


class Database(Storage):
    """A storage in sqlite or PostgreSQL."""

    def __init__(self, url: URL, wait: float) -> None:
        file = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
        super().__init__(masked(url.render_as_string(hide_password=False)), file, wait)
        self.url = url.render_as_string(hide_password=False)
        ours = {name: value for name, value in POSTGRESQL_ARGUMENTS.items() if name not in url.query}
        arguments = {"timeout": 60} if file else ours
        engine: dict[str, Any] = {"connect_args": arguments, "pool_pre_ping": True}
        self._locks = sqlalchemy.create_engine(url, **engine)
        self._rdb = self.retry(lambda: self._opened(engine)) if wait else self._opened(engine)
        self.optuna = get_storage(self._rdb)
        self._opened_file = self._file_number()

    def _opened(self, engine: dict[str, Any]) -> RDBStorage:
        with self.lock("tables"), warnings.catch_warnings():  # two processes that create them at once would fail
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return RDBStorage(self.url, engine, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)

    @contextmanager
    def lock(self, name: str, long: bool = False) -> Iterator[None]:  # noqa: D102
        if self.file:
            path = f"{self.file}.publish.lock" if long else f"{self.file}.lock"
            try:
                with FileLock(path, timeout=-1 if long else self.patience):
                    yield
            except Timeout as error:
                raise StoreAway(f"Another process holds the lock {error.lock_file}; end that process.") from error
            return
        key = int.from_bytes(hashlib.sha256(f"effv2 {name}".encode()).digest()[:8], "big", signed=True)
        with self._locks.begin() as connection:
            if not long:
                connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout = {round(1000 * self.patience)}"))
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield

    def beat(self, trial: int, ended: bool = False) -> None:  # noqa: D102
        if not ended:
            self._rdb.record_heartbeat(trial)

    def stale(self, study: int) -> list[int]:  # noqa: D102
        return stale_trial_ids(self._rdb, study)

    def close(self) -> None:  # noqa: D102
        self._rdb.remove_session()
        self._rdb.engine.dispose()
        self._locks.dispose()


class Journal(Storage):
    """A storage in a shared folder: a log, its locks, and a file for each running trial."""

    def __init__(self, file: Path, wait: float) -> None:
        super().__init__(f"journal://{file}", file, wait)
        self._signs = Path(f"{file}.alive")
        names = ("lock", "publish.lock", "append.lock")
        locks = [LockFile(Path(f"{file}.{name}"), GRACE_SECONDS, SECOND_LOOK_SECONDS) for name in names]
        self._lock, self._long, _ = locks
        self.optuna = JournalStorage(Log(file, locks, lambda: self.patience))
        self._signs.mkdir(exist_ok=True)

    def lock(self, name: str, long: bool = False) -> AbstractContextManager[None]:  # noqa: D102
        return self._long.held(float("inf")) if long else self._lock.held(self.patience)

    def beat(self, trial: int, ended: bool = False) -> None:  # noqa: D102
        sign = self._signs / str(trial)
        with faults():
            sign.unlink(missing_ok=True) if ended else sign.touch()

    def stale(self, study: int) -> list[int]:  # noqa: D102
        running = self.optuna.get_all_trials(study, deepcopy=False, states=(TrialState.RUNNING,))
        with faults():
            since = clock(self._signs) - GRACE_SECONDS if running else 0.0
            return [each for each in map(trial_id, running) if self._touched(each) < since]

    def _touched(self, trial: int) -> float:
        with suppress(FileNotFoundError), (self._signs / str(trial)).open("rb") as file:  # NFS then asks its server
            return os.fstat(file.fileno()).st_mtime
        return 0.0


def open_storage(url: str, wait: float = 0) -> Storage:
    """Open a storage and create its tables if they are missing; InputError if it can't be used.

    `url` is sqlite:///FILE for one machine. For several machines it is postgresql://USER@HOST/DATABASE, or
    journal:///FOLDER/FILE in a shared folder. A storage that was open before may be away: `wait` is in seconds.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parsed = check_storage(url) if not wait else storage_address(url)
    try:
        return Journal(parsed, wait) if isinstance(parsed, Path) else Database(parsed, wait)
    except (exc.SQLAlchemyError, StorageInternalError, LogAway, OSError, RuntimeError) as error:
        raise cannot_use(masked(url), error) from error


def check_storage(url: str) -> URL | Path:
    """Return the address of a storage, or the file of a log.

    InputError for anything else, for a database of MLflow's, and for a file that can't be a log.
    """
    parsed = storage_address(url)
    try:
        if isinstance(parsed, URL) and is_tracking_database(parsed):
            problem = "is a database of MLflow's, to which Optuna would add its tables"
            raise InputError("storage", url, problem, "give another one, such as sqlite:///optuna.db")
        if isinstance(parsed, Path):
            check_log(parsed)
    except ImportError as error:
        remedy = "write postgresql:// without a driver, and install it with: pip install 'effv2[postgresql]'"
        raise InputError("storage", url, f"needs the package {error.name}", remedy) from error
    except (exc.SQLAlchemyError, OSError, LogAway) as error:
        raise cannot_use(masked(url), error) from error
    return parsed


def cannot_use(shown: str, error: Exception) -> InputError:
    """Return the error for a database that fails before any work."""
    problem = f"can't be used ({reason(error.__cause__ or error)})"  # from the error that Optuna or SQLAlchemy wrapped
    of_file = shown.startswith(("journal:", "sqlite"))
    remedy = "give another file" if of_file else "start the database or correct the address"
    return InputError("storage", shown, problem, remedy)


def _is_away(error: Exception) -> bool:
    """Say whether an error means that the database is unreachable or busy, and not that it refuses."""
    if isinstance(error, LogAway):
        return not error.lost
    # Optuna wraps errors of SQLAlchemy, which wraps those of the driver.
    cause = error.__cause__ or error if isinstance(error, StorageInternalError) else error
    original = getattr(cause, "orig", None)
    if isinstance(original, sqlite3.Error):
        return "locked" in str(original) or "busy" in str(original)
    state = getattr(original, "sqlstate", None)
    if state:  # connection, resources, shutdown, a lock that isn't free, a conflict
        return state[:2] in ("08", "53", "55", "57", "40") or state in CUT_TRANSACTION
    if isinstance(cause, exc.PendingRollbackError):  # Optuna used the broken transaction again
        return cause.code == "8s2b"
    invalidated = bool(getattr(cause, "connection_invalidated", False))
    return invalidated or isinstance(cause, (exc.OperationalError, exc.InterfaceError))
