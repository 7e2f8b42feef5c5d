"""The study engine: its workers, its coordinator and its databases are really killed."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from effv2.cli.main import ablate
from effv2.core.errors import StoreAway
from effv2.core.processes import is_gone
from effv2.studies.queue import NAME, OWNER
from effv2.studies.storage import Database, Storage, open_storage
from tests.conftest import OTHER_TINY_TABLE, ROOT, TINY_TABLE, running
from tests.forks import Forked
from tests.queues import make_queue, trials
from tests.servers import Cluster, Server, free_port

EPOCHS, SEEDS = 8, [0, 1, 2, 3, 4]
RUNS = 2 * len(SEEDS)  # more than the engine enqueues at a time
SMALL = f"""
name: small
config:
  data: {{image_size: 8, per_class: 40}}
  schedule: {{epochs: {EPOCHS}}}
  execution: {{device: cpu, precision: fp32}}
arms:
  default: {{model: {{variant: tiny, table: {TINY_TABLE}}}}}
  other: {{model: {{variant: other, table: {OTHER_TINY_TABLE}}}}}
seeds: {SEEDS}
retries: 3
"""
Table = list[tuple[str, ...]]
many_processes = pytest.mark.timeout(900)


def accuracies(folder: Path) -> Table:
    """Return the rows of the parent's table as (arm, seed, accuracies...), without times."""
    (parent,) = (run for run in runs() if "mlflow.parentRunId" not in run.data.tags)
    path = MlflowClient().download_artifacts(parent.info.run_id, "comparison.csv", str(folder))
    with Path(path).open(encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [(row["variant"], row["seed"], *(row[name] for name in row if "accuracy," in name)) for row in rows]


def runs() -> list[Run]:
    return list(MlflowClient().search_runs(["0"], max_results=1000))


def children(status: str) -> list[Run]:
    return [run for run in runs() if "mlflow.parentRunId" in run.data.tags and run.info.status == status]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def undisturbed(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Table]:
    """Return a function that gives the table of the undisturbed study on a number of threads."""
    known: dict[int, Table] = {}

    def table(threads: int) -> Table:
        if threads not in known:
            folder = tmp_path_factory.mktemp("peace")
            shutil.copy(template_database, folder / "mlflow.db")
            (folder / "small.yaml").write_text(SMALL)
            before = torch.get_num_threads()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
                torch.set_num_threads(threads)
                words = ["--study", "small.yaml", "--log-model", "none"]
                assert CliRunner().invoke(ablate, words, catch_exceptions=False).exit_code == 0
                torch.set_num_threads(before)
                known[threads] = accuracies(folder)
        return known[threads]

    return table


Start = Callable[[Path, str, int], Forked]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function (study, storage, workers) that starts an ablation."""
    with ExitStack() as stack:

        def start_one(study: Path, storage: str, workers: int) -> Forked:
            words: list[str | Path] = [
                "--study",
                study,
                "--storage",
                storage,
                "--workers",
                str(workers),
                "--log-model",
                "none",
            ]
            return stack.enter_context(running(ROOT / "entry_points" / "ablate.py", *words))

        yield start_one


def wait_for(condition: Callable[[], Any], process: Forked) -> Any:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with suppress(Exception):  # missing tables, or a database that was just killed
            found = condition()
            if found:
                return found
        if process.poll() is not None:
            pytest.fail(f"the process ended too early: {process.rest()}")
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"timed out after 240 seconds: {process.rest()}")


def in_mid_epoch(storage: Storage, finished: int) -> int:
    """Return the pid of a living worker after its first epoch, once `finished` trials have ended; else 0."""
    found = trials(storage)
    if sum(trial.state.is_finished() for trial in found) < finished:
        return 0
    running = (trial for trial in found if trial.state == TrialState.RUNNING)
    begun = (trial.user_attrs[OWNER] for trial in running if 0 < len(trial.intermediate_values) < EPOCHS)
    # The trial of a killed worker remains running until another worker looks for work.
    return next((int(owner.split("/")[2]) for owner in begun if not is_gone(owner)), 0)


def end(process: Forked) -> str:
    said = process.rest()
    assert process.returncode == 0, said
    return said


def check_small(storage: Storage, expected: Table, folder: Path) -> None:
    found = trials(storage)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * RUNS
    assert len({trial.user_attrs[NAME] for trial in found}) == RUNS
    assert len(children("FINISHED")) == RUNS
    assert len({(run.data.tags["effv2.arm"], run.data.tags["effv2.seed"]) for run in children("FINISHED")}) == RUNS
    assert not [run for run in runs() if run.info.status == "RUNNING"]
    assert accuracies(folder) == expected


@many_processes
def test_a_killed_worker_and_a_killed_coordinator_cost_nothing(
    sqlite_store: str, study: Path, tmp_path: Path, undisturbed: Callable[[int], Table], start: Start
) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    first = start(study, url, 2)
    wait_for((tmp_path / "optuna.db").exists, first)
    storage = open_storage(url)
    os.kill(wait_for(lambda: in_mid_epoch(storage, 1), first), signal.SIGKILL)
    os.kill(wait_for(lambda: in_mid_epoch(storage, 2), first), signal.SIGTERM)
    wait_for(lambda: in_mid_epoch(storage, 4), first)
    first.kill()
    said = first.rest()  # waits for the end of its workers: they share the pipe and end by themselves
    assert children("KILLED") and not [run for run in runs() if run.info.status == "RUNNING"], said
    assert f"[{RUNS}/{RUNS}]" in end(start(study, url, 2))
    check_small(storage, undisturbed(max(1, torch.get_num_threads() // 2)), tmp_path)
    storage.close()


@many_processes
def test_auto_seeds_end_the_same_whatever_is_killed(sqlite_store: str, study: Path, tmp_path: Path) -> None:
    words = ["--study", str(study), "--seeds", "auto", "--log-model", "none", "--epochs", "5", "--per-class", "12"]
    assert CliRunner().invoke(ablate, [*words, "--plan", "true"], catch_exceptions=False).exit_code == 0
    assert not runs() and not (tmp_path / "optuna.db").exists(), "a plan creates nothing"
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    command = [*words, "--max-seeds", "4", "--storage", storage]
    with running(ROOT / "entry_points" / "ablate.py", *command, "--workers", "2") as first:
        wait_for((tmp_path / "optuna.db").exists, first)
        opened = open_storage(storage)
        os.kill(wait_for(lambda: in_mid_epoch(opened, 1), first), signal.SIGKILL)
        wait_for(lambda: in_mid_epoch(opened, 3), first)
        first.kill()
        first.rest()
    resumed = CliRunner().invoke(ablate, command, catch_exceptions=False)
    assert resumed.exit_code == 0 and "the end" in resumed.output
    found = trials(opened)
    assert {trial.state for trial in found} == {TrialState.COMPLETE}
    names = {trial.user_attrs[NAME] for trial in found}
    counts = {arm: sum(name.startswith(f"{arm}, ") for name in names) for arm in ("default", "other")}
    assert len(names) == len(found) and counts["default"] == counts["other"] in (3, 4)
    (parent,) = (run for run in runs() if "mlflow.parentRunId" not in run.data.tags)
    assert parent.data.params["study.max_seeds"] == "4" and "default" in parent.data.tags["effv2.answer"]
    refused = CliRunner().invoke(ablate, [*words, "--max-seeds", "5", "--storage", storage])
    assert refused.exit_code == 2 and "began with 4" in refused.output
    opened.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a PostgreSQL server as a user that may run one."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: no server to test with")
    folder = Path(tempfile.mkdtemp(prefix="effv2-postgresql-"))
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    cluster = Cluster(Path(found).resolve().parent, folder, user, free_port())
    cluster.run("initdb", "--no-sync", "--auth=trust", "--username=effv2", "-D", str(folder / "data"))
    cluster.start()
    yield cluster
    cluster.run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def server(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Start an MLflow server on a PostgreSQL database and point MLflow at it."""
    server = Server(cluster.database("mlflow").replace("postgresql:", "postgresql+psycopg:"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.start()
    yield server
    server.stop()


@many_processes
def test_four_workers_on_postgresql_survive_whatever_is_killed(
    server: Server, cluster: Cluster, study: Path, tmp_path: Path, undisturbed: Callable[[int], Table], start: Start
) -> None:
    """The test kills a worker, the MLflow server and the database, one after the other."""
    url = cluster.database("optuna")
    process = start(study, url, 4)
    storage = open_storage(url)
    os.kill(wait_for(lambda: in_mid_epoch(storage, 1), process), signal.SIGKILL)
    wait_for(lambda: in_mid_epoch(storage, 2), process)
    server.stop()
    process.until("is away|store failed")
    server.start()
    wait_for(lambda: in_mid_epoch(storage, 4), process)
    cluster.crash()
    end(process)
    check_small(storage, undisturbed(max(1, torch.get_num_threads() // 4)), tmp_path)
    storage.close()


def test_a_connection_that_is_cut_within_a_query_is_waited_for(cluster: Cluster) -> None:
    storage = open_storage(cluster.database("cut"))
    assert isinstance(storage, Database)
    queue = make_queue(storage)
    assert queue.lease() is not None
    cut: list[int] = []

    def cut_once(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "FROM trials" in statement and not cut:
            cut.append(connection.connection.dbapi_connection.info.backend_pid)
            with storage._locks.begin() as other:
                other.execute(sqlalchemy.text(f"SELECT pg_terminate_backend({cut[0]})"))

    sqlalchemy.event.listen(storage._rdb.engine, "before_cursor_execute", cut_once)
    assert queue.trials()["0"].state == TrialState.RUNNING
    assert cut
    storage.close()


def test_a_database_that_cannot_be_reached_is_waited_for_then_named() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreAway, match="The storage has not answered for"):
        open_storage("postgresql+psycopg://nobody@127.0.0.1:1/nothing", wait=0.5)
