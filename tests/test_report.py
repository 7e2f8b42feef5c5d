"""Reports: at the end of a study, of an experiment, and of exports."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from effv2.cli.main import ablate, report, train
from effv2.core.errors import InputError
from effv2.evidence.claims import read_claims
from effv2.evidence.exports import Evidence, export, exported
from effv2.tracking.exports import Manifest, answers_of, read_export, write_export
from effv2.tracking.read import Images, RunRecord, read_experiment
from effv2.tracking.tags import ANSWER, REUSED, reused, reused_in
from tests.conftest import all_runs, invoke

CLAIM = """
claims:
  M1:
    words: The other network is better than the tiny one.
    protocol:
      runs: {data.dataset: digits, data.image_size: 8}
      arms:
        default: {model.variant: tiny}
        other: {model.variant: OTHER}
      command: effv2 ablate --study tiny.yaml --seeds 0,1,2
    checks:
      - {kind: difference, metric: selected/test_accuracy, arm: other, against: default}
"""
# A run without a study: a small network of the variant `default`.
OF_THE_DEFAULT = ["--depth-multiplier", "0.1", "--width-multiplier", "0.1", "--precision", "fp32"]
OF_THE_DEFAULT += ["--image-size", "8", "--per-class", "12", "--epochs", "1", "--log-model", "none"]


class Page(HTMLParser):
    """The links of a page, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows_of(markdown: str) -> dict[str, list[str]]:
    """Return the cells of the verdict table by claim id."""
    lines = [line.split(" | ") for line in markdown.splitlines() if re.match(r"\| [A-Z]\d+ \|", line)]
    return {cells[0].strip("| "): cells for cells in lines}


def artifact(run_id: str, name: str, folder: Path) -> str:
    return Path(MlflowClient().download_artifacts(run_id, name, str(folder))).read_text(encoding="utf-8")


def test_a_study_ends_with_a_report_and_views(sqlite_store: str, tiny_study: Path, tmp_path: Path) -> None:
    words = ["--study", str(tiny_study), "--log-model", "none", "--experiment", "tiny"]
    assert invoke(ablate, *words, "--seeds", "0,1").exit_code == 0
    parent = all_runs()[0]
    html = artifact(parent.info.run_id, "report.html", tmp_path)
    markdown = artifact(parent.info.run_id, "report.md", tmp_path)
    assert not Page(html).open and len(html) < 3_000_000
    assert not [
        each for each in Page(html).addresses if not each.startswith(("#", "data:"))
    ]  # it loads nothing from other sites
    first = html[html.index("<section") : html.index("<table")]
    assert "other against default: 2 seeds, but a verdict needs 3." in first and "With `seeds` auto" in first
    assert "<svg" in first  # the forest plot
    assert "laims</h2>" not in html and "no claim" not in html and "Not complete" not in html
    assert f"effv2 ablate --study {tiny_study} --seeds 0,1 --log-model none" in html
    drawn = {file.path for file in MlflowClient().list_artifacts(parent.info.run_id, "figures")}
    assert set(re.findall(r"\(figures/([\w.-]+)\)", markdown)) == {path.removeprefix("figures/") for path in drawn}
    assert len(drawn) == 5 and html.count("<svg") == 5
    # In MLflow's UI, the experiment and the run begin with where to look. The views are saved.
    experiment = MlflowClient().get_experiment(parent.info.experiment_id)
    saved = {name for name in experiment.tags if name.startswith("mlflow.sharedViewState.")}
    assert saved == {f"mlflow.sharedViewState.effv2-{name}" for name in ("answers", "table", "curves")}
    assert all(
        "viewStateShareKey=effv2-curves" in tags["mlflow.note.content"] for tags in (experiment.tags, parent.data.tags)
    )
    above = parent.data.tags["mlflow.note.content"].partition("| variant")[0].splitlines()  # a warning may come first
    assert any(line.startswith("- other against default: 2 seeds") for line in above[:3])
    assert parent.data.tags[ANSWER].endswith("other against default: 2 seeds, but a verdict needs 3.")
    state = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.effv2-table"])["state"])
    assert state["orderByKey"] == "metrics.`best/test_accuracy`" and not state["orderByAsc"]
    # A third seed joins. Runs that another study has finished are reused in the report of this one.
    MlflowClient().set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "The user's own words.")
    second_study = "name: second\nbaseline: other\nshow: [seconds/to_test_accuracy_0.01]"
    tiny_study.write_text(tiny_study.read_text().replace("name: tiny", second_study))
    assert invoke(ablate, *words, "--seeds", "0,1,2").exit_code == 0
    second = next(run for run in all_runs() if run.data.params.get("study.name") == "second")
    assert sorted(reused_in(second.data.tags).values()) == [
        "default, seed 0", "default, seed 1", "other, seed 0", "other, seed 1",
    ]  # fmt: skip
    deleted_since = json.dumps([reused("0" * 32, "other, seed 0")])
    MlflowClient().set_tag(second.info.run_id, REUSED, deleted_since)
    assert len(read_experiment(experiment.experiment_id, (), second.info.run_id)) == 3
    markdown = artifact(second.info.run_id, "report.md", tmp_path)
    assert "## Single runs" not in markdown  # the study lists the reused runs
    assert "| default | 3 |" in markdown and "| variant | default | other |" in markdown
    assert "| training to 1 % test accuracy, s |" in markdown
    assert "| minus other [interval] |" in markdown and "- default against other: undecided" in markdown
    tags = MlflowClient().get_experiment(parent.info.experiment_id).tags
    assert tags["mlflow.note.content"] == "The user's own words."


def test_arms_may_be_compared_only_on_validation(sqlite_store: str, tiny_study: Path, tmp_path: Path) -> None:
    tiny_study.write_text(tiny_study.read_text().replace("config:", "config:\n  evaluation: {test_set: false}"))
    assert invoke(ablate, "--study", tiny_study, "--log-model", "none", "--seeds", "0,1,2").exit_code == 0
    parent, *children = all_runs()
    assert not any("test" in name for run in (parent, *children) for name in run.data.metrics)
    markdown = artifact(parent.info.run_id, "report.md", tmp_path)
    assert "| variant | runs | validation accuracy, selected epoch | minus default [interval] |" in markdown
    assert "The test set was not evaluated" in markdown and "validation-accuracy.svg" in markdown
    assert "| none |" not in parent.data.tags["mlflow.note.content"]
    tiny_study.write_text(tiny_study.read_text().replace("default: {", "default: {evaluation: {test_set: true}, "))
    refused = invoke(ablate, "--study", tiny_study)
    assert refused.exit_code == 2 and "evaluation.test_set: true in some arms" in refused.output


def test_an_experiment_is_reported_exported_and_rebuilt(sqlite_store: str, tiny_study: Path, tmp_path: Path) -> None:
    assert invoke(ablate, "--study", tiny_study, "--seeds", "0,1,2", "--log-model", "none").exit_code == 0
    assert invoke(train, *OF_THE_DEFAULT).exit_code == 0
    claims, out, again = tmp_path / "claims.yaml", tmp_path / "out", tmp_path / "again"
    claims.write_text(CLAIM.replace("OTHER", "ohter"))
    assert invoke(report, "--claims", claims, "--export", out).exit_code == 0
    why = rows_of((out / "report.md").read_text())["M1"][3]
    assert "no run is like other: in the nearest ones model.variant is tiny or other or default, not ohter" in why
    claims.write_text(CLAIM.replace("OTHER", "other"))
    result = invoke(report, "--claims", claims, "--export", out)
    assert result.exit_code == 0 and "claims: " in result.output, result.output
    assert re.match(r"tiny: (All networks are near chance .*)?other ", result.output) and "\nM1 " in result.output
    markdown = (out / "report.md").read_text()
    verdicts = rows_of(markdown)
    assert next(iter(verdicts)) == "M1" and "not tested" not in verdicts["M1"][2]
    assert markdown.index("## tiny") < markdown.index("## Your claims")  # the user's own studies come first
    (line,) = (line for line in markdown.splitlines() if line.startswith("Published claims without runs here"))
    assert all(f"{id_}" in line or id_ in verdicts for id_ in read_claims().claims) and "A1" in line
    assert "## Single runs" in markdown
    # The page is on the run of the report, which the next report reuses. The study's run keeps its own report.
    made = [run for run in all_runs() if "effv2.report" in run.data.tags]
    parent = next(run for run in all_runs() if run.data.params.get("study.kind") == "ablate")
    assert artifact(made[0].info.run_id, "report.html", tmp_path) == (out / "report.html").read_text()
    assert "<title>tiny: effv2" in artifact(parent.info.run_id, "report.html", tmp_path)
    assert len(made) == 1 and made[0].info.status == "FINISHED"
    # The export holds and hashes every number. The report follows only from them.
    hashes = json.loads((out / "data" / "manifest.json").read_text())["sha256"]
    assert (out / "data" / "manifest.json").stat().st_mode == (out / "report.md").stat().st_mode
    files = {path.relative_to(out / "data").as_posix() for path in (out / "data").rglob("*.csv")}
    files.add("claims.yaml")
    (shared,) = (name for name in files if "predictions" in name)  # of all runs, since their images are the same
    assert set(hashes) == files and len((out / "data" / shared).read_text().splitlines()[0].split(",")) == 2 + 2 * 7
    assert all(hashlib.sha256((out / "data" / name).read_bytes()).hexdigest() == hashes[name] for name in files)
    with (out / "data" / "metrics.csv").open(newline="") as file:
        known = {(row["run_id"], row["name"]): float(row["value"]) for row in csv.DictReader(file)}
    assert known == {(run.info.run_id, name): value for run in all_runs() for name, value in run.data.metrics.items()}
    assert "\nOur verdict: " in (out / "report.md").read_text()  # on a claim without a source
    moved = shutil.copytree(out, tmp_path / "elsewhere")
    assert invoke(report, "--from-export", moved, "--export", again).exit_code == 0
    for name in ("report.html", "report.md", "data/manifest.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    assert len(all_runs()) == 9
    # An export isn't written over itself, by any path.
    assert invoke(report, "--from-export", moved, "--export", moved / ".." / moved.name).exit_code == 2
    # Changed files are noticed.
    (moved / "data" / "metrics.csv").write_text("run_id,name,value\n")
    result = invoke(report, "--from-export", moved, "--export", tmp_path / "not")
    assert result.exit_code == 2 and "metrics.csv is missing or was changed" in result.output


def test_exports_of_several_experiments_are_joined(sqlite_store: str, tmp_path: Path) -> None:
    early, late, other, joined = (tmp_path / name for name in ("early", "late", "other", "joined"))
    claims = tmp_path / "claims.yaml"
    claims.write_text(CLAIM)
    assert invoke(train, *OF_THE_DEFAULT, "--experiment", "one").exit_code == 0
    assert invoke(report, "--experiment", "one", "--claims", claims, "--export", early).exit_code == 0
    (run,) = (run for run in all_runs() if "effv2.report" not in run.data.tags)
    MlflowClient().log_metric(run.info.run_id, "test/loss", 0.5, step=2)  # the run has grown
    assert invoke(report, "--experiment", "one", "--claims", claims, "--export", late).exit_code == 0
    assert invoke(train, *OF_THE_DEFAULT, "--experiment", "other").exit_code == 0
    claims.write_text(CLAIM.replace("M1", "M2"))
    assert invoke(report, "--experiment", "other", "--claims", claims, "--export", other).exit_code == 0
    sources = ["--from-export", f"{other}, {early},{late},"]
    result = invoke(report, *sources, "--export", joined)
    assert result.exit_code == 2 and "claims.yaml differ" in result.output
    assert not joined.exists()
    assert invoke(report, *sources, "--export", late).exit_code == 2  # nor over any of its sources
    result = invoke(report, *sources, "--export", joined, "--claims", claims)
    assert result.exit_code == 0, result.output

    def held(folder: Path) -> dict[str, object]:
        read = exported([folder / "data"])
        return {run.run_id: (run, read.predictions(run)) for run in read.runs}

    assert held(joined) == held(late) | held(other)
    assert held(early).keys() == held(late).keys() and held(early) != held(late)  # the last export counts
    order = [(folder / "data" / "runs.csv").read_text().splitlines()[1:] for folder in (late, other, joined)]
    assert order[2] == order[0] + order[1]  # oldest first
    assert json.loads((joined / "data" / "manifest.json").read_text())["experiment"] == "other, one"
    assert exported([joined / "data", other / "data"]).experiment == "other, one"  # each name once


NAMED = RunRecord(
    "r1",
    '=HYPERLINK("x")',
    "FINISHED",
    {"@a": "-1", "b": "-1+1", "c": "'=1", "d": "'plain", "e": "\tx"},
    {"train/loss": -0.5},
    {"effv2.arm": "+x"},
    {"train/loss": {1: -0.5}},
    {"train": Images("=x", "d", 2, ("=a", "b"))},
    1,
    2,
)


def export_one(folder: Path) -> Path:
    answers = [("=1.png", "=a", "=a", "0.5"), ("'2.png", "b", "=a", "0.5")]
    predictions = {"predictions.csv": answers, "unseen/predictions.csv": answers}
    export(Evidence("mine", "", [NAMED], lambda _: predictions), folder / "data", {})
    return folder / "data"


def test_no_name_is_a_formula_in_a_csv_and_all_are_read_back(tmp_path: Path) -> None:
    folder = export_one(tmp_path)
    for path in folder.rglob("*.csv"):
        with path.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t") and not re.fullmatch(r"-[\d.]+", cell)], path
    read = exported([folder])
    assert list(read.runs) == [NAMED]
    assert read.right(NAMED) == {"=1.png": True, "'2.png": False}
    assert read.predictions(NAMED)["predictions.csv"] == read.predictions(NAMED)["unseen/predictions.csv"]


def test_an_export_names_no_place_of_files(tmp_path: Path) -> None:
    place = {f"data.{name}": "/home/ann/x" for name in ("dir", "train_dir", "test_dir", "labels")}
    params = {**place, "weights.file": "/home/ann/x", "model.weights": "/home/ann/x.pt"}
    run = RunRecord("r1", "one", "FINISHED", params, {}, {"effv2.queue": "ann"})
    write_export(tmp_path, Manifest(experiment="e", ui=""), [run], {}, {})
    assert not [path for path in tmp_path.iterdir() if "ann" in path.read_text()]
    assert [run.params for run in read_export(tmp_path).runs] == [{"model.weights": "x.pt"}]


def test_predictions_with_other_columns_are_read_and_damaged_ones_are_not() -> None:
    assert answers_of("note,predicted,id,true\nx,a,1.png,b\n") == [("1.png", "b", "a", "")]
    for text in (
        "",
        "id,true,predicted\n",
        "id,true,predicted\n1.png,a\n",
        f"id,true,predicted\n{'x' * 20_000_000},a,a\n",
    ):
        assert answers_of(text) is None


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("runs.csv", "r1,name,FINISHED,yesterday,2"),
        ("runs.csv", "r1,name"),
        ("params.csv", "r1,a"),
        ("tags.csv", ""),
        ("metrics.csv", "r1,loss,high"),
        ("epochs.csv", "r1,1e999,0.5"),
        ("images.csv", "r1,train,digits,x,2,null"),
        ("images.csv", "r1,train,digits,x,2," + "[" * 10_000),
    ],
)
def test_an_export_with_values_of_wrong_kinds_is_refused(tmp_path: Path, table: str, line: str) -> None:
    folder = export_one(tmp_path)
    content = (folder / table).read_text().splitlines()[0] + f"\n{line}\n"
    (folder / table).write_text(content)
    about = json.loads((folder / "manifest.json").read_text())
    about["sha256"][table] = hashlib.sha256(content.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"^from_export .*: one of its tables is invalid .*; export again"):
        exported([folder])


def test_empty_and_half_finished_studies_say_what_is_missing(sqlite_store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(report, "--export", out).exit_code == 0
    markdown = (out / "report.md").read_text()
    assert "effv2 ablate --variant drop_one" in markdown
    assert not rows_of(markdown) and "effv2 ablate --variant drop_one" in (out / "report.html").read_text()
    client = MlflowClient()
    name = r"half $x$ | <i>é数\1"  # nothing in this foreign name counts as mathematics, markup or a pattern
    run_id = client.create_run("0", run_name=name).info.run_id
    tags = {
        "effv2.planned": '["default, seed 0", "other, seed 0"]',
        "effv2.command": "effv2 ablate --study <b>half.yaml",
    }
    client.log_batch(run_id, params=[Param("study.kind", "ablate")], tags=[RunTag(*each) for each in tags.items()])
    child = client.create_run("0", run_name="default, seed 0", tags={"mlflow.parentRunId": run_id}).info.run_id
    values = {
        "best/test_accuracy": 0.5,
        "test/accuracy": 0.5,
        "time/total_train_seconds": 1.0,
        "time/train_seconds": 1.0,
    }
    client.log_batch(child, [Metric(key, value, 0, 1) for key, value in values.items()], [Param("model.variant", name)])
    client.set_terminated(child)
    assert invoke(report, "--export", out).exit_code == 0
    markdown, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert (
        "1 run planned but not finished: other, seed 0. The command below resumes it." in markdown
        and "effv2 ablate --study" in markdown
    )
    assert "<b>half" not in html and "<i>" not in html + markdown and not Page(html).open and html.count("<svg") == 3
    # In the same folder again: the files of the earlier report are gone, and other files stay.
    mine = [out / "data" / "mine.txt", out / "figures" / "01-overview.svg"]
    for path in mine:
        path.write_text("mine")
    client.delete_run(child)
    assert invoke(report, "--export", out).exit_code == 0
    assert list((out / "figures").iterdir()) == mine[1:] and {path.read_text() for path in mine} == {"mine"}


def test_a_report_creates_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    refused = invoke(report)
    assert refused.exit_code == 2 and "no such file yet; train something first" in refused.stderr
    assert not list(tmp_path.iterdir())
    assert invoke(report, "--export", "out").exit_code == 0
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert "Published claims without runs here: T1, " in (tmp_path / "out" / "report.md").read_text()
    assert invoke(report, "--from-export", "out", "--export", "again").exit_code == 0


def test_the_run_that_mlflow_opened_gets_the_report(
    sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = MlflowClient().create_run("0", run_name="funny-fox-123").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    assert invoke(report).exit_code == 0
    (run,) = all_runs()
    assert (run.info.run_name, run.info.status) == ("report", "FINISHED")
    assert "Published claims without runs here: T1, " in artifact(opened, "report.md", tmp_path)
    assert run.data.tags["mlflow.note.content"].startswith("0 runs.\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--claims", "nowhere.yaml"], "--claims nowhere.yaml: can't be read"),
        (["--claims", "/dev/zero"], "--claims /dev/zero: can't be read (it is not a regular file)"),
        (["--claims", "pipe"], "--claims pipe: can't be read (it is not a regular file)"),
        (["--from-export", "x"], "name one with --export"),
        (["--from-export", " ,"], "names no folder"),
        (["--from-export", "x", "--export", "y"], "has no manifest.json"),
        (["--from-export", "nested", "--export", "y"], "has no manifest.json"),
        (["--export", "file"], "can't be written"),
        (["--experiment", "Defualt"], "no such experiment; did you mean 'Default'?"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_created(
    sqlite_store: str, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo("pipe")
    Path("nested").mkdir()
    Path("nested/manifest.json").write_text("[" * 10_000)
    result = invoke(report, *words)
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1
    assert not all_runs() and not Path("y").exists()
