"""Addresses of stores: wrong ones are refused, and no secret of one is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from effv2.core.errors import InputError, RunError
from effv2.core.secrets import masked
from effv2.tracking.addresses import shown_uri, ui_address
from effv2.tracking.read import read_run
from effv2.tracking.run import open_run
from effv2.tracking.store import open_store

HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("127.0.0.1:5000", "has no scheme; write http://127.0.0.1:5000"),
        ("my-server:5000/mlflow", "has no scheme; write http://my-server:5000/mlflow"),
        ("'http://h:5000'", "quotes or spaces around it; write it without them, as http://h:5000"),
        ('"sqlite:///new.db"', "quotes or spaces around it; write it without them, as sqlite:///new.db"),
        ("sqlite:///new.db\n", "quotes or spaces around it"),
        ("sqlite:///~/new.db", f"write sqlite:///{HOME}/new.db"),
        ("sqlite:///$HOME/new.db", "the $HOME in it is not replaced; write the value of that variable"),
        ("${HOME}/new", "the ${HOME} in it is not replaced"),
        ("sqlite://", "names no file, so no run would be kept; use sqlite:///mlflow.db"),
        ("sqlite:///.", "is a folder; name a file in it, as sqlite:///./mlflow.db"),
        ("sqlite3:///new.db", "no such kind of store"),
        ("  ", "spaces around it; unset it"),
        ("file:~/new", f"write file:{HOME}/new"),
        ("postgresql://u:a@b@h/d", "write @ as %40"),
        ("postgresql://u:a@b/1@h/d", "postgresql://…: its user or password holds an @"),
        ("postgresql://u:a b@h/d", "write @ as %40, / as %2F, a space as %20"),
        ("postgresql://u:a@h:port/d", "port is not a number"),
        ("sqlite:new.db", "is not the address of a database; use sqlite:///FILE"),
        ("mysql+nodriver://u@h/d", "no such kind of store"),
        ("mysql+pymysql://u@h/d", "needs the Python package pymysql; install it with: pip install pymysql"),
        ("mysql+mysqldb://u@h/d", "install it with: pip install mysqlclient"),
    ],
)
def test_wrong_kinds_of_addresses_are_refused(
    address: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(InputError, match=re.escape(remedy)) as raised:
        open_store("")
    assert str(raised.value).startswith("MLFLOW_TRACKING_URI ") and not [*tmp_path.iterdir()]


S = "s3cr3t"
SECRET_ADDRESSES = f"""
postgresql://user:{S}@host/db postgresql://user:{S}@{S}@host/db postgresql+psycopg://user:a/{S}?#{S}@host:5432/db
postgresql://host/db?user=u&password={S}&a=b postgresql://host/db?password={S}@{S} redis://:{S}@host:6379/0
postgresql://u:x@h/db?sslpassword={S}&sslmode=require mysql+pymysql://u:{S}@h/db?charset=utf8 s3://AKIA:{S}@bucket/x
http://u:{S}@h:5000 HTTP://{S}@h:5000/p https://{S}:x-oauth-basic@github.com/o/r.git git+https://{S}@host/o/r@main
https://h/x?token={S} https://h/x?a=b&access_token={S}#x https://h/#id_token={S} https://h/x?api_key={S}&b=c
https://h/x?X-Amz-Signature={S}&X-Amz-Credential={S} https://a.blob/x?sv=1&sig={S} http://u:p/{S}?#{S}@h
mssql+pyodbc:///?odbc_connect=Driver%3Dx%3BPWD%3D{S} user:{S}@host/db postgresql:/u:{S}@h/db --storage=http://u:{S}@h
(OperationalError:postgresql://u:{S}@h/db) AccountName=x;AccountKey={S}==;E=1
""".split()
CLEAN = (
    "sqlite:///mlflow.db http://127.0.0.1:5000/a postgresql://user@host/db git@github.com:o/r.git ssh://git@host/o/r "
    "https://github.com/o/r/tree@main resnet50=/a/x.pth models:/m-1 models:/a@b "
    "#/runs?a=b&viewStateShareKey=c lr=0.1 /a/b@c"
)


def test_links_to_a_server_name_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@127.0.0.1:5000/a@b/")
    assert ui_address() == "http://127.0.0.1:5000/a@b"


@pytest.mark.parametrize(
    "address", [*SECRET_ADDRESSES, f"header 'Bearer {S}\\n'", f"host=h password={S} user=u", f"password='a {S}' user=u"]
)
def test_no_secret_of_an_address_is_shown(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    shown = [
        shown_uri(),
        str(InputError("storage", address, f"no {address}", f"not {address}")),
        str(RunError(address)),
    ]
    assert all("***" in each and S not in each for each in shown), shown
    assert masked(f"{CLEAN} {address} {CLEAN}") == f"{CLEAN} {masked(address)} {CLEAN}"


def test_what_a_command_shows_and_records_holds_no_secret(sqlite_store: str, tmp_path: Path) -> None:
    """The test reads its output, its command line as other users see it, its tags and its parameters."""
    program = (
        "import sys; from pathlib import Path; from effv2.cli.main import main\n"
        "try: main()\nfinally: print(Path('/proc/self/cmdline').read_bytes())"
    )
    address = f"postgresql://u:{S}@127.0.0.1:9/db"
    for more in ([], [address]):
        words = ["ablate", "--storage", f"{address}?password={S}", *more]
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and S not in done.stdout + done.stderr and "u:***@127.0.0.1" in done.stdout, done
    given = MlflowClient().create_run("0", tags={"mlflow.source.name": f"https://{S}@host/o/r"})  # as `mlflow run` does
    MlflowClient().log_param(given.info.run_id, "storage", address)
    os.environ["MLFLOW_RUN_ID"] = given.info.run_id  # effv2 removes it when it adopts the run
    experiment = open_store("")
    with (
        pytest.raises(ZeroDivisionError),
        open_run("run", experiment, {"effv2.command": f"--storage {address}"}, message=print),
    ):
        raise ZeroDivisionError(f"no connection to {address}")
    run = MlflowClient().get_run(given.info.run_id)
    assert S not in str(run.data.tags) and "u:***@127.0.0.1" in run.data.tags["effv2.error"]
    assert S not in str(read_run(given.info.run_id))
