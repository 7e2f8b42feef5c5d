"""Faults of the tracking store: one sentence that names the remedy."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Experiment
from sqlalchemy.exc import OperationalError

from effv2.cli.main import ablate
from effv2.core.errors import InputError
from effv2.studies.storage import Database, open_storage
from effv2.tracking import store
from effv2.tracking.read import read_runs
from effv2.tracking.run import open_experiment, open_run
from effv2.tracking.store import open_store
from tests.conftest import running

CUT_SHORT = """
import os, signal
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "after_cursor_execute")
def die(connection, cursor, statement, *_):
    if "CREATE TABLE label_schemas" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

"""
BY_US = "from effv2.tracking.store import open_store; open_store('')"
BY_MLFLOW = "from mlflow import MlflowClient; MlflowClient().search_experiments()"


@pytest.mark.parametrize("creates", [BY_US, BY_MLFLOW])
def test_a_database_whose_creation_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, creates: str) -> None:
    """effv2 creates its own database again. One of another program is refused as interrupted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    with running("-c", CUT_SHORT + creates) as process:
        said = process.rest()
    assert process.returncode == -signal.SIGKILL, said
    if creates == BY_MLFLOW:
        with pytest.raises(InputError, match=r"new.db: its creation was interrupted.*; remove the file .*new.db"):
            open_store("")
    else:
        assert open_store("") == "0"
    assert {path.name for path in tmp_path.glob("new.db*")} <= {"new.db", "new.db.lock"}


def test_a_database_is_created_in_a_new_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my runs/+/new.db")
    assert open_store("") == "0" and (tmp_path / "my runs/+/new.db").is_file()
    (tmp_path / "text").write_text("no database " * 200)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///text")
    with pytest.raises(InputError, match=r"its file can't be used \(file is not a database\); correct its path"):
        open_store("")


SLOW_CREATION = """
import time
from mlflow.store.tracking.file_store import FileStore
from effv2.tracking.store import open_store
create = FileStore._create_default_experiment
FileStore._create_default_experiment = lambda store: (time.sleep(3), create(store))
open_store("")
"""


def test_two_processes_create_a_store_of_files_together(file_store: str) -> None:
    with running("-c", SLOW_CREATION) as one, running("-c", SLOW_CREATION) as other:
        assert one.rest() + other.rest() == ""


def test_a_kill_leaves_a_store_of_files_readable(file_store: str) -> None:
    """MLflow itself would leave empty files, and then read no run of the experiment."""
    open_store("")
    logs = """
import itertools, sys
from mlflow import MlflowClient
from effv2.tracking.store import configure
configure()
client, run = MlflowClient(), sys.argv[1]
client.log_param(run, "first", "1")
for number in itertools.count():
    client.log_metric(run, f"metric/{number}", 1.0)
    client.set_tag(run, "number", str(number))
    client.update_run(run, name=f"run {number}")
"""
    client = MlflowClient()
    for _ in range(5):
        run_id = client.create_run("0").info.run_id
        with running("-c", logs, run_id) as process:
            while not read_runs([run_id])[0].metrics:  # reads while the process writes
                assert process.poll() is None, process.rest()
            read_runs([run_id] * 5)
        process.wait()
        assert read_runs([run_id])[0].tags.get("number", "0").isdecimal()  # it may have died before the first tag
    assert len(client.search_runs(["0"])) == 5


def test_a_variable_of_mlflow_that_can_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "maybe")
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_INSECURE_TLS maybe: .*; correct or unset it"):
        open_store("")


def test_a_database_is_created_where_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.db").symlink_to("disk/real.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///link.db")
    assert open_store("") == "0" and (tmp_path / "link.db").is_symlink() and (tmp_path / "disk/real.db").is_file()


def test_a_database_that_a_server_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MlflowClient", lambda uri: type(uri, (), {"search_experiments": made_by_a_server}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")

    def made_by_a_server(**_: object) -> None:
        (tmp_path / "new.db").write_text("a server's")
        (tmp_path / "new.db.new").write_text("ours")

    store._create_database(tmp_path / "new.db")
    assert (tmp_path / "new.db").read_text() == "a server's"


@pytest.mark.parametrize("location", ["mlflow-artifacts:/1", "dbfs:/runs/1", "s3://bucket/1"])
def test_artifacts_that_a_server_keeps_need_no_folder_here(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    store._check_artifacts(Experiment("1", "kept elsewhere", location, "active"))
    with pytest.raises(InputError, match=r"the folder of its artifacts, .*, can't be written"):
        store._check_artifacts(Experiment("1", "kept here", "file:///runs/1", "active"))


@pytest.mark.parametrize(
    ("statements", "remedy"),
    [
        (["update alembic_version set version_num = 'cfd24bdc0731'"], "older MLflow.*mlflow db upgrade sqlite:///"),
        (["update alembic_version set version_num = 'abcdef012345'"], "newer MLflow; install that MLflow here"),
        (
            ["update alembic_version set version_num = 'abcdef012345'", "drop table trace_tags"],
            "newer MLflow; install that MLflow here",
        ),
    ],
)
def test_tables_of_another_mlflow(sqlite_store: str, statements: list[str], remedy: str) -> None:
    with closing(sqlite3.connect("mlflow.db")) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    with pytest.raises(InputError, match=remedy):
        open_store("")


def test_variables_that_name_experiments_must_agree(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    other = client.create_experiment("other")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", other)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    with pytest.raises(InputError, match=f"experiment: refused .*`{other}` does not match .* MLflow's variables"):
        open_store("")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert open_store("") == other
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    with pytest.raises(InputError, match=r"experiment: refused .*MLFLOW_EXPERIMENT_ID .*`77` does not exist"):
        open_store("")
    assert len(client.search_experiments()) == 2


def test_mlflow_and_optuna_do_not_share_a_database(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "new.db")
    for tracking, storage in (("mlflow.db", "mlflow.db"), ("other.db", "mlflow.db"), ("new.db", "link.db")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / tracking}")
        result = CliRunner().invoke(ablate, ["--storage", f"sqlite:///{storage}", "--experiment", "new"])
        assert result.exit_code == 2 and "is a database of MLflow's" in result.stderr, result.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.db", "mlflow.db"]
    with closing(open_storage("sqlite:///optuna.db")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///optuna.db")
        with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI sqlite:///optuna\.db: holds Optuna's studies"):
            open_store("")
    with closing(sqlite3.connect("optuna.db")) as database:
        assert not database.execute("select * from sqlite_master where name = 'experiments'").fetchall()


def test_a_fault_while_a_storage_is_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker waits for its database, but not with such a fault."""

    def opened(*_: object) -> None:
        raise OperationalError("SELECT", {}, sqlite3.OperationalError("no such column: x"))

    monkeypatch.setattr(Database, "_opened", opened)
    with pytest.raises(InputError, match=r"storage sqlite:///.*optuna.db: can't be used \(no such column: x\)"):
        open_storage(f"sqlite:///{tmp_path}/optuna.db", wait=1)


@pytest.mark.parametrize("kind", ["finished", "ours", "opened for it", "of nobody"])
def test_a_run_is_adopted_only_where_it_was_opened_for_the_command(
    sqlite_store: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = MlflowClient().create_run("0", tags={"effv2.study": "x"} if kind == "ours" else {}).info.run_id
    if kind == "finished":
        MlflowClient().set_terminated(run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32 if kind == "of nobody" else run_id)
    said: list[str] = []
    if kind == "of nobody":
        with pytest.raises(InputError, match=r"MLFLOW_RUN_ID 0+: the tracking store .* has no such run; unset it"):
            open_experiment("", said.append)
        return
    before = MlflowClient().get_run(run_id).info.status
    experiment = open_experiment("", said.append)
    with open_run("run", experiment, {"effv2.study": "y"}, message=said.append) as run:
        run.log_params({"a.b": "c"})
    there = MlflowClient().get_run(run_id)
    if kind == "opened for it":
        assert run.run_id == run_id and not said
    else:
        assert f"the run {run_id}, which was not opened for this command, so it is ignored" in said[0]
        assert run.run_id != run_id and there.info.status == before and not there.data.params


def test_relative_paths_start_where_mlflow_run_was_typed(
    sqlite_store: str, template_database: Path, tmp_path: Path
) -> None:
    """`mlflow run` starts the command in the project's folder and passes on the address unchanged."""
    (tmp_path / "project").mkdir()
    given = {"MLFLOW_RUN_ID": MlflowClient().create_run("0").info.run_id, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    program = (
        "import os; from effv2.tracking.store import open_store; open_store(''); print(os.environ['MLFLOW_RUN_ID'])"
    )
    command = [sys.executable, "-c", program]
    how: dict[str, Any] = {"cwd": tmp_path / "project", "env": os.environ | given, "capture_output": True, "text": True}
    assert subprocess.run(command, **how).stdout.strip() == given["MLFLOW_RUN_ID"]
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    *_, last = subprocess.run(command, **how).stderr.strip().splitlines()
    assert f"MLFLOW_RUN_ID {given['MLFLOW_RUN_ID']}: the tracking store sqlite:///mlflow.db has no such run" in last
    assert not [*(tmp_path / "project").iterdir()]
    # Typed in the project's folder; the folder of the terminal has the store of another command.
    (tmp_path / "moved.db").rename(tmp_path / "project" / "mlflow.db")
    shutil.copy(template_database, tmp_path)
    typed = [sys.executable, "-c", f"import subprocess; subprocess.run({command})"]
    assert subprocess.run(typed, **how).stdout.strip() == given["MLFLOW_RUN_ID"]


@pytest.mark.parametrize(("value", "logged"), [("true", True), ("false", False), ("perhaps", False)])
def test_system_metrics_are_logged_if_requested(
    sqlite_store: str, value: str, logged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", value)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    said: list[str] = []
    with open_run("run", open_store(""), {}, message=said.append) as run:
        deadline = time.monotonic() + 20
        while logged and time.monotonic() < deadline and not MlflowClient().get_run(run.run_id).data.metrics:
            time.sleep(0.05)
    there = MlflowClient().get_run(run.run_id)
    assert there.info.status == "FINISHED" and ("system/cpu_utilization_percentage" in there.data.metrics) == logged
    assert [each[:30] for each in said] == (["System metrics can't be logged"] if value == "perhaps" else [])


def test_runs_land_in_an_experiment_of_their_own(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If `Default` holds runs of an earlier effv2, commands resume and report them there."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    client = MlflowClient()
    client.create_run("0")  # a run of another program: effv2 can report on it
    assert open_store("", create=False) == "0"
    own = open_store("")
    assert client.get_experiment(own).name == "effv2" and open_store("", create=False) == own
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    assert open_store("") == "0"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    client.create_run("0", tags={"effv2.pid": "1"})
    assert open_store("") == "0" and open_store("effv2") == own
