"""The commands as users run them: what they log, how they end, what they answer to wrong input."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.projects._project_spec import load_project

from effv2.api.console import ConsoleReporter
from effv2.architecture import parse_table
from effv2.cli.main import ablate, evaluate_pretrained, hparam_check, report, search, train
from effv2.cli.options import in_options
from effv2.config.schema import TrainConfig
from effv2.core import processes
from effv2.core.errors import Terminated
from effv2.core.processes import ending_signals, is_alive, this_process, uninterrupted
from effv2.core.reporter import Reporter, StudyProgress
from effv2.data.dataset import load_once
from effv2.run.run import RunSpec, prepare
from effv2.studies.storage import open_storage
from effv2.tracking.sender import Sender
from tests.conftest import ROOT, TINY_TABLE, make_image_tree, running

EPOCH_METRICS = {
    "train/loss", "train/accuracy", "test/loss", "test/accuracy", "val/loss", "val/accuracy", "learning_rate",
    "time/epoch_seconds", "time/train_seconds", "time/evaluate_seconds",
    "throughput/train_images_per_second", "throughput/evaluate_images_per_second",
}  # fmt: skip
FINAL_METRICS = {
    "best/test_accuracy", "best/epoch", "selected/test_accuracy", "selected/epoch", "final/test_accuracy",
    "selected/test_ece", "model/parameters", "model/gflops",
}  # fmt: skip

TINY_MODEL = f"  model: {{variant: tiny, table: {TINY_TABLE}}}\n"  # the last line of a study's `config`
COMMANDS = {
    "train": train,
    "ablate": ablate,
    "hparam-check": hparam_check,
    "search": search,
    "evaluate-pretrained": evaluate_pretrained,
    "report": report,
}

TINY_TRAINING = f"""
name: tiny
config:
  data: {{{{image_size: 8}}}}
  model: {{{{variant: tiny, table: {TINY_TABLE}}}}}
  optimiser: {{{{lr: {{lr}}}}}}
  schedule: {{{{epochs: {{epochs}}}}}}
  execution: {{{{device: cpu, precision: fp32}}}}
"""


def all_runs() -> list[Run]:
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["start_time ASC"]))


def invoke(command: Any, *words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


def test_ablation_holds_everything(store: str, tiny_study: Path, tmp_path: Path) -> None:
    seeds = [0, 1] if store.startswith("sqlite:") else [0]
    words = ["--seeds", ",".join(map(str, seeds)), "--experiment", "tiny"]
    result = invoke(ablate, "--study", tiny_study, "--variant", "other", *words)
    assert result.exit_code == 0, result.output
    parent, *children = all_runs()
    client = MlflowClient()
    assert [run.data.tags["mlflow.runName"] for run in children] == [
        f"{arm}, seed {seed}" for seed in seeds for arm in ("default", "other")
    ]
    for run in (parent, *children):
        assert run.info.status == "FINISHED"
        assert client.get_experiment(run.info.experiment_id).name == "tiny"
    for run in children:
        tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert {f"effv2.{name}" for name in ("config_hash", "data_digest", "code_version", "pid")} <= tags.keys()
        assert tags["effv2.study"] == "tiny" and tags["effv2.seed"] == params["random.seed"]
        assert params["model.variant"] == tags["effv2.variant"] and params["data.image_size"] == "8"
        assert all("." in name for name in params)
        assert metrics.keys() >= EPOCH_METRICS | FINAL_METRICS
        for name in EPOCH_METRICS:
            assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [1, 2]
        assert run.inputs and run.outputs
        inputs = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
        assert inputs.keys() == {"train", "validation", "test"}
        assert json.loads(inputs["train"].profile or "")["classes"]["3"] == 12
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert artifacts >= {"study.yaml", "predictions.csv", "per_class.csv", "confusion_matrix.csv", "curves.png"}
        assert artifacts >= {"wrong.jpg", "reliability.png"}
        assert len(run.outputs.model_outputs) == 1
    assert len({run.data.tags["effv2.config_hash"] for run in children}) == 2 * len(seeds)
    assert "| test accuracy, best epoch |" in parent.data.tags["mlflow.note.content"]
    mean = statistics.fmean(run.data.metrics["final/test_accuracy"] for run in children[::2])
    assert parent.data.metrics["default/final/test_accuracy"] == pytest.approx(mean)
    table = Path(client.download_artifacts(parent.info.run_id, "comparison.csv", str(tmp_path))).read_text()
    best = {run.info.run_id: run.data.metrics["best/test_accuracy"] for run in children}
    for line in table.splitlines()[1:]:
        _, _, run_id, value, *_ = line.split(",")
        assert float(value) == best[run_id]
    images = Path(client.download_artifacts(parent.info.run_id, "images.csv", str(tmp_path))).read_text()
    assert {"differing.jpg", "report.html"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    page = Path(client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))).read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "Test images on which the arms differ most" in page
    shares = [[float(share) for share in line.split(",")[1:]] for line in images.splitlines()[1:]]
    apart = [abs(one - other) for one, other in shares]  # those on which the arms differ most come first
    assert apart[0] > 0 and apart == sorted(apart, reverse=True)
    assert statistics.fmean(one for one, _ in shares) == pytest.approx(
        statistics.fmean(run.data.metrics["selected/test_accuracy"] for run in children[::2]), abs=1e-3
    )


def test_the_same_command_again_repeats_nothing_but_fresh_does(sqlite_store: str, tiny_study: Path) -> None:
    words = ["--study", str(tiny_study), "--variant", "default", "--log-model", "none"]
    for _ in range(2):
        assert invoke(ablate, *words).exit_code == 0
    assert len(all_runs()) == 2
    assert invoke(ablate, *words, "--fresh").exit_code == 0
    first, second = (run for run in all_runs() if "effv2.seed" in run.data.tags)
    timed = ("time/", "throughput/", "inference/")
    kept = [
        {name: value for name, value in run.data.metrics.items() if not name.startswith(timed)}
        for run in (first, second)
    ]
    assert kept[0] == kept[1] and len(kept[0]) > 10


def test_only_the_best_model_is_kept_when_asked(sqlite_store: str, tiny_study: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--log-model", "best").exit_code == 0
    _, *children = all_runs()
    with_model = [run for run in children if run.outputs and run.outputs.model_outputs]
    assert len(with_model) == 1
    assert all(run.info.status == "FINISHED" for run in children)


@pytest.mark.parametrize("fault", ["diverges", "interrupted"])
def test_runs_that_end_badly_say_so(
    sqlite_store: str, tiny_study: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "diverges":
        optimiser = "optimiser: {name: sgd, momentum: 0.99, lr: 100, clip_norm: 0}"
        text = tiny_study.read_text().replace("config:", f"config:\n  {optimiser}")
        tiny_study.write_text(text.replace("epochs: 2", "epochs: 50"))
        code, status, words = 1, "FAILED", "no longer a finite number"
    else:
        from effv2.training import loop

        monkeypatch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        code, status, words = 130, "KILLED", "the same command without --fresh resumes them"
    result = invoke(ablate, "--study", tiny_study, "--fresh")
    assert result.exit_code == code and words in result.output
    assert {run.info.status for run in all_runs()} == {status}


def test_sigterm_leaves_no_run_running(sqlite_store: str, tiny_study: Path) -> None:
    tiny_study.write_text(tiny_study.read_text().replace("epochs: 2", "epochs: 100000"))
    with running(ROOT / "entry_points" / "ablate.py", "--study", tiny_study) as process:
        while not any("train/loss" in run.data.metrics for run in all_runs()):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        errors = process.rest()
    assert process.returncode == 143 and "KILLED" in errors and "Traceback" not in errors
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


class Swallows:
    """Its destructor is ended by SIGTERM, which Python drops."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("looks", ["a step", "a wait for the store", "a call of the queue", "progress"])
def test_a_signal_that_python_swallowed_ends_what_follows(sqlite_store: str, tmp_path: Path, looks: str) -> None:
    run = MlflowClient().create_run("0")
    storage = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}")

    def look() -> None:
        if looks == "a step":
            with uninterrupted():
                pass
        elif looks == "a wait for the store":
            with closing(Sender(run.info.run_id, print, resumed=False)) as sender:
                sender.put(lambda: time.sleep(0.5))
                sender.flush(60)
        elif looks == "a call of the queue":
            storage.retry(lambda: None)
        else:
            with ConsoleReporter() as reporter:
                reporter.step(1, 1, 2, 3.0)

    with ending_signals():
        Swallows()
        with pytest.raises(Terminated):
            look()
        try:
            raise Terminated
        except Terminated:
            look()  # on the way out nothing is cut short
    look()


def test_a_study_is_shown_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock = iter(range(10, 1000, 10))
    reporter = ConsoleReporter()
    monkeypatch.setattr(reporter._progress, "get_time", lambda: float(next(clock)))

    def shown() -> list[str]:
        with reporter.console.capture() as printed:
            reporter.console.print(reporter._progress)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", printed.get()).splitlines()
        assert all(len(line) <= 80 for line in lines)
        return [" ".join(line.split()) for line in lines]

    reporter.progress("loading PyTorch")
    assert shown() == ["loading PyTorch " + 10 * "━"]
    reporter.study_progress(
        StudyProgress(6, 1, {"running": 1}, "m, seed 0, validation accuracy 90.00 %", {"a": "accuracy 90.00 %"})
    )
    reporter.run_started("efficientnet_v2_m_of_a_long_name, seed 1", 20)
    metrics = {"train/accuracy": 0.9, "val/accuracy": 0.8, "throughput/train_images_per_second": 1234.5}
    reporter.epoch(4, metrics, 0.85)
    for step in (1, 2, 3):
        reporter.step(5, step, 12, 1234.5)
    study, run, now = shown()
    assert re.match(r"study ━\S+ 1/6 \d.* left best: m, seed 0, va.*…$", study)
    assert re.match(r"efficientnet_v2_m_of_a_lo… ━\S+ 4/20 \d:\d\d:\d\d left best 85.0%, tr.*$", run)
    assert re.match(r"training epoch 5 ━\S+ 3/12 \d.* left 1,23[45] images/s$", now)
    reporter.step(5, 12, 12, 1234.5)
    assert shown()[-1] == "evaluating " + 10 * "━"


def test_wrong_options_are_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("name: x\narms: {a: {}, b: {data: {dataset: folder, dir: /nowhere}}}\n")
    cases = [
        "train --dataset folder --data-dir /nowhere",
        "train --variant nonsense",
        "ablate --data-dir /nowhere --dataset mnist",
        "search --data-dir /nowhere --dataset birds",
        "evaluate-pretrained --models resnet50,resnet5O",
        "evaluate-pretrained --data-dir /nowhere",
        "train --weights /nowhere.pt",
        "ablate --weights nonsense/x",
        "ablate --study {}",
    ]
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom effv2.cli.main import main\n"
        "for words in sys.argv[1:]:\n    done = CliRunner().invoke(main, words.split())\n"
        "    print(done.exit_code, 'torch' in sys.modules or 'mlflow' in sys.modules, done.stderr.strip())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *(each.format(study) for each in cases)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == ["2 False Error"] * len(cases), done.stdout
    assert "the nearest is 'resnet50'" in done.stdout and done.stdout.count("/nowhere: no such folder; give") == 5


@pytest.mark.parametrize(("seconds", "code"), [(0.0, 0), (0.8, -signal.SIGTERM)])
def test_a_second_signal_ends_at_once_what_hears_none(seconds: float, code: int) -> None:
    """But for one that comes with the first."""
    script = (
        "import os, signal, time\nfrom contextlib import suppress\nfrom effv2.core.processes import ending_signals\n"
        "with ending_signals():\n    for pause in (0, SECONDS):\n        time.sleep(pause)\n"
        "        with suppress(BaseException):\n            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    with running("-c", script.replace("SECONDS", str(seconds))) as process:
        process.rest()
    assert process.returncode == code


def test_a_signal_waits_for_the_end_of_the_outermost_block() -> None:
    done = False
    with ending_signals(), pytest.raises(Terminated), uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
        done = True
    assert done


def test_second_signal_does_not_cut_the_marking_short(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C under `mlflow run` is followed by a SIGTERM."""
    from mlflow.tracking.client import MlflowClient as Client

    from effv2.training import loop

    ended, signals = Client.set_terminated, iter([signal.SIGTERM])

    def signalled_again(*args: Any, **kwargs: Any) -> None:
        for number in signals:
            os.kill(os.getpid(), number)
        ended(*args, **kwargs)

    monkeypatch.setattr(processes, "TOGETHER_SECONDS", 60)  # however slow this machine is
    monkeypatch.setattr(Client, "set_terminated", signalled_again)
    monkeypatch.setattr(loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert invoke(ablate, "--study", tiny_study).exit_code == 130
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


@pytest.mark.parametrize("damage", ["removed", "overwritten"])
def test_a_queue_that_is_gone_in_mid_study_is_named(
    sqlite_store: str, tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    from effv2.training import loop
    from effv2.training.evaluation import evaluate

    def lost(*args: Any) -> Any:
        (tmp_path / "optuna.db").unlink()
        if damage == "overwritten":
            (tmp_path / "optuna.db").write_bytes(b"something else" * 100)
        return evaluate(*args)

    words = (ablate, "--study", tiny_study, "--log-model", "none")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lost)
        result = invoke(*words)
    assert result.exit_code == 1 and "optuna.db was removed, replaced or damaged" in result.stderr, result.stderr
    assert {run.info.status for run in all_runs()} == {"FAILED"}
    if damage == "removed":
        assert invoke(*words).exit_code == 0


@pytest.mark.parametrize("pid", ["x", "-1", "1e3", "9" * 30, ""])
def test_a_process_tag_that_somebody_wrote_stops_no_command(pid: str) -> None:
    *where, _, started, unique = this_process().split("/")
    assert is_alive("/".join([*where, pid, started, unique])) is None


def test_ignored_hangup_stays_ignored(sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    from effv2.training import loop
    from effv2.training.evaluation import evaluate

    evaluated = evaluate

    def hang_up(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return evaluated(*args)

    monkeypatch.setattr(loop, "evaluate", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_failing_arm_does_not_cost_the_others(sqlite_store: str, tiny_study: Path) -> None:
    text = tiny_study.read_text().replace(
        "default: {model", "default: {optimiser: {name: sgd, lr: 100, momentum: 0.99, clip_norm: 0}, model"
    )
    tiny_study.write_text(text.replace("epochs: 2", "epochs: 30"))
    result = invoke(ablate, "--study", tiny_study, "--log-model", "none")
    assert result.exit_code == 1 and "1 of 2 runs failed. default, seed 0" in result.output
    parent, *children = all_runs()
    assert [run.info.status for run in (parent, *children)] == ["FAILED", "FAILED", "FINISHED"]
    assert "comparison.csv" in {file.path for file in MlflowClient().list_artifacts(parent.info.run_id)}


def test_a_study_that_fails_while_it_begins_is_not_left_running(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effv2.studies.engine._note_planned", Mock(side_effect=RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        invoke(ablate, "--study", tiny_study)
    assert [run.info.status for run in all_runs()] == ["FAILED"]


def test_a_store_that_fails_for_a_moment_costs_no_run(
    sqlite_store: str, tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effv2.tracking import store

    tiny_study.write_text(f"{tiny_study.read_text()}retries: 0\n")
    failures = iter([MlflowException("database is locked")])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        for failure in failures:
            raise failure
        return open_run(*args, **kwargs)

    open_run = RunSpec.open_run
    monkeypatch.setattr(RunSpec, "open_run", interrupted)
    monkeypatch.setattr(store, "WAIT_SECONDS", 0.1)
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none").exit_code == 0


def test_a_run_brings_the_study_file_that_repeats_it(sqlite_store: str, tiny_study: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["--log-model", "none", "--study"]
    assert invoke(ablate, *words, tiny_study, "--variant", "default", "--seeds", "7").exit_code == 0
    (_, first) = all_runs()
    again = MlflowClient().download_artifacts(first.info.run_id, "study.yaml", str(tmp_path))
    assert invoke(train, *words, again).exit_code == 0
    second = all_runs()[-1]
    for name in ("effv2.config_hash", "effv2.data_digest", "effv2.seed"):
        assert second.data.tags[name] == first.data.tags[name]
    assert second.data.metrics["test/loss"] == first.data.metrics["test/loss"]


@pytest.mark.parametrize("entry", ["train", "ablate"])
def test_mlflow_run_adopts_its_run(
    sqlite_store: str, tiny_study: Path, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "one.yaml"
    study.write_text(tiny_study.read_text().partition("arms:")[0] + TINY_MODEL)
    file = study if entry == "train" else tiny_study
    words = {"study": str(file), "epochs": "1", "image-size": "9", "lr": "1e-3"}
    alone = entry == "train"  # with its model, which a study's runs log likewise
    words |= {} if alone else {"storage": f"sqlite:///{tmp_path / 'optuna.db'}", "log-model": "none"}
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry, "--env-manager", "local"]
    for name, value in words.items():
        command += ["-P", f"{name.replace('-', '_')}={value}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    # The same command again, with a run opened for it as `mlflow run` does.
    monkeypatch.setenv("MLFLOW_RUN_ID", MlflowClient().create_run("0").info.run_id)
    assert (
        invoke(COMMANDS[entry], *(word for name, value in words.items() for word in (f"--{name}", value))).exit_code
        == 0
    )
    adopted, *children, again = all_runs()
    assert again.data.tags["effv2.continues"] == adopted.info.run_id
    assert adopted.data.tags["mlflow.project.entryPoint"] == entry
    assert len(children) == (0 if alone else 2) and bool(adopted.outputs and adopted.outputs.model_outputs) == alone
    assert adopted.data.tags["effv2.study"] == "tiny"
    for run in (adopted, *children):
        assert run.info.status == "FINISHED"
    for run in children or [adopted]:
        assert run.data.params["schedule.epochs"] == "1" and run.data.params["optimiser.lr"] == "0.001"


def test_mlflow_run_fails_on_wrong_input_before_training(sqlite_store: str) -> None:
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "train", "--env-manager", "local"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "-P", "variant=drop_two"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode != 0
    assert "--variant drop_two: no such variant; did you mean 'drop_one'?" in done.stderr + done.stdout
    assert [run.info.status for run in all_runs()] == ["FAILED"]


def test_a_password_that_mlflow_run_has_logged_is_not_passed_over(
    sqlite_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", opened := MlflowClient().create_run("0").info.run_id)
    result = invoke(ablate, "--storage", "postgresql://me:secret@127.0.0.1:9/db")
    assert result.exit_code == 2 and "secret" not in result.output and result.stderr.count("\n") == 1
    for said in ("--storage postgresql://me:***@", f"runs delete --run-id {opened}`", "PGPASSWORD"):
        assert said in result.stderr
    for words in (["--data-dir", "https://me:secret@h/x"], ["--storag", "postgresql://me:secret@h/db"]):
        result = invoke(train, *words)
        assert result.exit_code == 2 and "secret" not in result.output and f"--run-id {opened}`" in result.stderr
    assert "can't be used" in invoke(ablate, "--storage", "postgresql://me@127.0.0.1:9/db").stderr


TRAIN_ERRORS = {
    "--variant drop_two": "--variant drop_two: no such variant; did you mean 'drop_one'?",
    "--dataset imagenet": "--dataset imagenet: no such data set; did you mean 'imagenette'?",
    "--scheduler cosin": "--scheduler cosin: no such schedule; did you mean 'cosine'?",
    "--set lr=1": "--set lr 1: no such setting; give --lr.",
    "--set optimiser.nam=sgd": "--set optimiser.nam sgd: no such setting; the nearest is 'optimiser.name'",
    "--set optimiser.name=rmsprob": "--set optimiser.name rmsprob: no such optimiser; choose from: ",
    "--set optimiser.lr=1 --lr 2": "--set optimiser.lr 1: --lr is given as well; remove one",
    "--set model.dropout=0,model.dropout=1": "--set model.dropout 1: is given twice",
    "--set sgd": "--set sgd: has no value; write SETTING=VALUE",
    "--checkpoint-minutes nan": "--checkpoint-minutes nan: input should be a finite number",
    "--dataset folder": "--data-dir: the data set 'folder' needs a folder",
    "--dataset birds": "kaggle.com",
    "--dataset folder --data-dir /nowhere": "--data-dir /nowhere: no such folder",
    "--dataset imagenette --data-dir .": "give a folder that holds imagenette2-160, or --download to download it",
    "--dataset mnist --data-dir .": "MNIST can't be read",
    "--image-size 7": "--image-size 7: input should be greater than or equal to 8",
    "--image-size big": "--image-size big: input should be a valid integer",
    "--epochs 0": "--epochs 0",
    "--batch-size 1": "--batch-size 1",
    "--lr nan": "--lr nan",
    "--lr -1": "--lr -1",
    "--dropout 1.5": "--dropout 1.5",
    "--per-class 9999": "--per-class 9999: the class",
    "--scheduler step": "--scheduler step",
    "--precision fp8": "--precision fp8",
    "--seed -3": "--seed -3",
    f"--experiment {'x' * 600}": "--experiment xxx",
    "--data-dir /tmp": "--data-dir /tmp: digits come with scikit-learn",
    "--log-model bset": "--log-model bset: no such choice; did you mean 'best'? Choose from: best, all, none",
    "--study nowhere.yaml": "--study nowhere.yaml: no file and no study of that name",
    "--study ablate-mnist.yaml": "no file and no study of that name; the nearest is 'ablate-mnist'",
    f"--study {ROOT}/effv2/sweeps/ablate-minst.yaml": f"nearest is '{ROOT}/effv2/sweeps/ablate-mnist.yaml'",
    "--study ~nobody_of_that_name/x.yaml": "--study ~nobody_of_that_name/x.yaml: no file and no study of that name",
    "--study ~/nowhere.yaml": "--study ~/nowhere.yaml: no file and no study of that name",
}
FORMS = "sqlite:///FILE, postgresql://USER@HOST/DATABASE or journal:///FOLDER/FILE"
STORAGE = f"no such kind of storage; use {FORMS}"
ABLATE_ERRORS = {
    "--workers 0": "--workers 0: input should be greater than or equal to 1",
    "--fresh maybe": "--fresh maybe",
    "--storage mysql://u:secret@h/d": f"--storage mysql://u:***@h/d: {STORAGE}",
    "--storage sqlite://": STORAGE,
    "--storage nonsense": "--storage nonsense: not an address",
    "--storage postgresql://u:secret@h:port/db": "--storage postgresql://u:***@h:port/db: its port is not a number",
    "--storage sqlite:////proc/nowhere/optuna.db": "optuna.db: can't be used (no such folder); create it",
    "--storage postgresql://me:secret@127.0.0.1:9/db": "--storage postgresql://me:***@127.0.0.1:9/db: can't be",
    "--variant drop_two": "--variant drop_two: no such variant; did you mean 'drop_one'?",
    "--seeds 1,x": "--seeds 1,x",
    "--seeds 1,1": "--seeds 1,1",
}
HPARAM_ERRORS = {
    "--check drop_out": "--check drop_out: no such arm; did you mean 'dropout'?",
    "--scheduler cosine": "--scheduler cosine: no arm of the study hparam-digits has it; use both",
}
SEARCH_ERRORS = {"--trials 0": "--trials 0: input should be greater than or equal to 1"}


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        (command, words, text)
        for command, errors in (
            (train, TRAIN_ERRORS),
            (ablate, ABLATE_ERRORS),
            (hparam_check, HPARAM_ERRORS),
            (search, SEARCH_ERRORS),
        )
        for words, text in errors.items()
    ],
)
def test_wrong_input_is_one_sentence(empty_store: str, command: Any, words: str, expected: str) -> None:
    result = invoke(command, *words.split())
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ") and expected in line and line.endswith(".") and "secret" not in line
    assert not all_runs()


def test_what_auto_chose_is_logged_with_its_reason(
    sqlite_store: str, tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effv2.execution.resolve._cpu_has_bf16", lambda: True)
    study = tmp_path / "auto.yaml"
    study.write_text(tiny_study.read_text().replace("fp32", "auto").partition("arms:")[0] + TINY_MODEL)
    words = ["--study", str(study), "--log-model", "none"]
    assert invoke(train, *words).exit_code == 0
    (run,) = all_runs()
    assert run.data.params["execution.precision"] in ("fp32", "bf16")
    assert re.fullmatch(r"a step in bf16 is [\d.]+ times as fast as in fp32", run.data.tags["effv2.calibration"])


def test_faults_in_data_are_found_before_a_run_is_created(sqlite_store: str, tmp_path: Path) -> None:
    root = make_image_tree(tmp_path / "set")
    (root / "class 0" / "0.jpg").write_bytes(b"")
    (root / "class 2" / "lost.jpg").symlink_to(tmp_path / "nowhere")
    result = invoke(train, "--dataset", "folder", "--data-dir", str(root), "--image-size", "8")
    assert (
        result.exit_code == 2
        and re.search(r"2 images.*class 0/0.jpg.*class 2/lost.jpg", result.stderr)
        and not all_runs()
    )


@pytest.mark.parametrize(
    ("groups", "images", "expected"),
    [
        pytest.param({}, 60, (100, 1024), id="few images"),
        pytest.param({"optimiser": {"batch_size": 2}}, 60, (48, 0), id="some"),
        pytest.param({"schedule": {"epochs": 6}}, 60, (6, 1024), id="given epochs"),
        pytest.param({"evaluation": {"batch_norm_images": 0}}, 60, (100, 0), id="given images"),
        pytest.param({"data": {"sampling": "published", "validation_fraction": 0}}, 60, (6, 0), id="published"),
        pytest.param({"data": {"dataset": "digits", "dir": ""}}, 0, (6, 0), id="digits"),
    ],
)
def test_few_images_get_more_epochs_and_estimates_of_batch_norm(
    tmp_path: Path, groups: dict[str, Any], images: int, expected: tuple[int, int]
) -> None:
    """Three classes of 20 images leave 42 to train on, after the test and the validation images."""
    root, said = make_image_tree(tmp_path / "set", images=images // 3), list[str]()
    data = {"dataset": "folder", "dir": str(root), "image_size": 8} | groups.get("data", {})
    config = TrainConfig.model_validate(groups | {"data": data, "execution": {"precision": "fp32"}})
    configs = [config, config.with_seed(1)]
    found = prepare(configs, load_once(Reporter()), said.append)
    assert {(each.schedule.epochs, each.evaluation.batch_norm_images) for each in found} == {expected}
    assert bool(said) == (expected != (6, 0)) and all(f"Epochs: {expected[0]}, of " in each for each in said)


def test_a_training_near_chance_level_says_so(sqlite_store: str, tmp_path: Path) -> None:
    for epochs, said in ((2, True), (3, False)):
        study = tmp_path / f"{epochs}.yaml"
        study.write_text(TINY_TRAINING.format(epochs=epochs, lr=1e-6 if said else 0.02))
        result = invoke(train, "--study", study, "--log-model", "none")
        assert result.exit_code == 0 and ("The network is near chance level: " in result.stderr) == said, result.output


STUDY_ERRORS = {
    "arms: {a: {model: {variant: drop_one, table: F 1 3 1 8 8 1}}}": r"line 2: .*needs a name of its own",
    "description: a": r"has no arms to compare; use the command train",
    "seeds: [0, 0]\narms: {a: {}}": r"line 2: seeds.*the same seed appears twice",
    "arms: {'a[/x]': {}}": r"line 2: arms.*letters, digits",
    "arms: {a: &a {model: *a}}": r"contains itself",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\n"
    "e: &e [*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]": r"more than 50,000 values",
    "config: " + "[" * 60 + "]" * 60: r"or 50 levels",
    "config: {random: {seed: 0x" + "f" * 6000 + "}}": r"line 2: config.random.seed 0xf+…: input should be a valid int",
    "arms: !!int ''": r"line 2: arms: input should be a valid dictionary",
    "name: " + "x" * 1_000_001: r"can't be read \(it is larger than 1 MB\)",
    "config: {schedule: {epochs: 2, warmup_epochs: 2}}": r"line 2: config.schedule.warmup_epochs 2: the warm-up",
    "config: {model: {outputs: 5}}\narms: {a: {}}": r"model.outputs 5: the data has 10 classes",
    "config: {data: {image_sise: 32}}": r"line 2: config.data.image_sise: unknown key.*'image_size'",
    "config: {dta: {}}": r"line 2: config.dta: unknown key 'dta'; did you mean 'data'",
    "config: {optimiser.lr: 0.5}": r"line 2: config.optimiser.lr: not a group of settings; write the group",
    "config: {model: {dropout: 0.3, table: F 1 3 1 24 24 2}}": r"model.variant default: .* needs a name of its own",
    "seeds: [1, '01']": "the same seed appears twice",
    "config: {data: {}, model: {}}\narms: {a: {model: {dropout: 0.1}, optimizer: {}}}": r"line 3: arms.a.optimizer: un",
    "config:\n  optimiser:\n    lr: fast": r"line 4: config.optimiser.lr fast",
    "arms:\n  a: {model: {variant: drop_two}}": r"line 3: arms.a.model.variant drop_two: .* did you mean 'drop_one'",
    "arms: {a: {model: {table: M 1 3 1 24 20 1}}}": r"line 2: arms.a.model.table .*: the row .* multiples of 8",
    "arms: {a: {model: {table: F 1 3 1 24 24}}}": r"line 2: arms.a.model.table .*: the row .* is not a stage",
    "sedes: [1]": r"line 2: sedes: unknown key.*'seeds'",
    "seeds: [-1]": r"seeds.*-1",
    "config: {data: [1}": r"line 2: not valid YAML",
    "config: {}\nconfig: {}": r"line 3: the key 'config' appears twice \(first in line 2\)",
    "config: 3": r"line 2: config",
    "arms: {a: {}}\nbaseline: b": r"line 3: baseline b: is not an arm",
    "search: {sampler: tpe}": r"line 2: search.sampler: unknown key.*hoose from: trials, space, prune",
    "search: {space: {model.dropout: {step: 1}}}": r"unknown key 'step'; choose from: low, high, log|low",
    "search: {space: {}}": r"line 2: search.space",
    "search: {}\narms: {a: {}}": r"line 2: search: a file has arms or a search, not both",
    "search: {space: {model.droput: {low: 0, high: 1}}}": r"line 2: search.space.model.droput: can't be searched; did",
    "search: {space: {model.dropout: {low: 0, high: 2}}}": r"line 2: search.space.model.dropout.high 2.0: input should",
    "search: {space: {model.dropout: {low: 1, high: 0}}}": r"line 2: search.space.model.dropout.*low must be below",
    "search: {space: {optimiser.lr: {low: 0, high: 1, log: true}}}": r"line 2: .*a log scale needs a low above 0",
}


@pytest.mark.parametrize(("text", "pattern"), STUDY_ERRORS.items())
def test_wrong_study_files_name_the_line(empty_store: str, tmp_path: Path, text: str, pattern: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"name: wrong\n{text}\n")
    result = invoke(ablate, "--study", str(path))
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert re.search(pattern, line), line
    assert not all_runs()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://127.0.0.1:9", "MLFLOW_TRACKING_URI http://127.0.0.1:9: the tracking store doesn't answer"),
        ("file:runs", "MLFLOW_ALLOW_FILE_STORE=true"),
        ("sqlite:////proc/nowhere/mlflow.db", "its file can't be used"),
        ("nonsense://x", "MLFLOW_TRACKING_URI nonsense://x: no such kind of store"),
        ("http://me:secret@127.0.0.1:9", "http://***@127.0.0.1:9"),
        ("postgresql://u:secret@h:x/d", "MLFLOW_TRACKING_URI postgresql://u:***@h:x/d: its port is not a number"),
        ("sqlite:mlflow.db", "MLFLOW_TRACKING_URI sqlite:mlflow.db: is not the address of a database; use sqlite:///"),
    ],
)
def test_tracking_store_that_does_not_answer(
    tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    result = invoke(ablate, "--study", tiny_study)
    assert result.exit_code == 2 and expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "secret" not in result.stderr
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "words",
    [["entry_points/train.py"], ["entry_points/evaluate_pretrained.py"], ["-m", "effv2"], ["-m", "effv2", "ablate"]],
)
def test_help_is_complete_and_imports_nothing_slow(words: list[str]) -> None:
    """So that it is there at once, which a clock would only show on a machine that does nothing else."""
    command = [sys.executable, "-X", "importtime", *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "Usage:" in done.stdout and {"click", "effv2"} <= imported
    assert not imported & {"matplotlib", "mlflow", "numpy", "optuna", "PIL", "scipy", "sklearn", "sqlalchemy", "torch"}


@pytest.mark.parametrize("name", COMMANDS)
def test_parameters_of_mlflow_run_are_the_options_of_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow passes on every parameter under its own name, an empty one too."""
    entry_point = load_project(str(ROOT)).get_entry_point(name)  # type: ignore[no-untyped-call]
    options = [str(option.name) for option in COMMANDS[name].params]
    words = shlex.split(entry_point.compute_command(dict.fromkeys(options, ""), None))
    assert words[:2] == ["python", f"entry_points/{name.replace('-', '_')}.py"] and (ROOT / words[1]).is_file()
    with COMMANDS[name].make_context(name, words[2:]) as context:
        assert context.params.keys() == set(options) and not any(context.params.values())


def test_wrong_names_are_found_by_the_nearest(empty_store: str) -> None:
    result = invoke(train, "--lrr", "3")
    assert result.exit_code == 2 and "Did you mean '--lr'?" in result.stderr and not all_runs()


def test_set_reaches_every_setting_and_the_command_that_resumes_is_logged(
    sqlite_store: str, tiny_study: Path, tmp_path: Path
) -> None:
    study = tmp_path / "one.yaml"
    study.write_text(tiny_study.read_text().partition("arms:")[0] + TINY_MODEL)
    words: list[str | Path] = ["--study", study, "--lr", "0.01", "--log-model", "none", "--fresh", "--set", ""]
    words += ["--set", "optimiser.name=sgd, optimiser.momentum=0.5", "--set", f"model.table={TINY_TABLE}"]
    result = invoke(train, *words)
    assert result.exit_code == 0 and re.search(r"^epoch 2/2: train [\d.]+%", result.stderr, re.MULTILINE)
    (run,) = all_runs()
    params = run.data.params
    assert (params["optimiser.name"], params["optimiser.momentum"], params["optimiser.lr"]) == ("sgd", "0.5", "0.01")
    assert parse_table(params["model.table"]) == parse_table(TINY_TABLE)
    command = shlex.split(run.data.tags["effv2.command"])
    assert command[:4] == ["effv2", "train", "--study", str(study)]
    assert command.count("--set") == 2 and "--fresh" not in command


def test_texts_name_the_options_of_their_command() -> None:
    text = "lower optimiser.batch_size or config.data.dir in a/data.dir.png, see `fresh` and `ablate`; model.dropout."
    assert in_options(text, ablate) == (
        "lower --batch-size or config.data.dir in a/data.dir.png, see --fresh and `ablate`; model.dropout."
    )
    assert in_options("lower execution.batch_size, data.dir", evaluate_pretrained) == "lower --batch-size, --data-dir"
    assert in_options("`fresh`: optimiser.lr was 1", train, settings=False) == "--fresh: optimiser.lr was 1"
