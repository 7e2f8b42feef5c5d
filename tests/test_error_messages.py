"""One sentence for wrong input to commands, with exit code 2 before a run is created, and for exhausted resources."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effv2.cli.main import ablate, hparam_check, search, train
from effv2.core.errors import RunError, what_ran_out
from tests.conftest import ROOT, all_runs, invoke, make_image_tree


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
        "train --dataset mnist",
        "train --weights /nowhere.pt",
        "ablate --weights nonsense/x",
        "ablate --study {}",
        "report --claims /nowhere.yaml",
        "ablate --storage nonsense",
        "search --storage postgresql://me:p@ss@host/db",
        "hparam-check --storage journal://study.log",
        "evaluate-pretrained --storage sqlite:////proc/nowhere/optuna.db",
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
    "--checkpoint-minutes nan": "--checkpoint-minutes nan: must be a finite number",
    "--dataset folder": "--data-dir: the data set 'folder' needs a folder",
    "--dataset birds": "kaggle.com",
    "--dataset folder --data-dir /nowhere": "--data-dir /nowhere: no such folder",
    "--dataset imagenette --data-dir .": "give a folder that holds imagenette2-160, or --download to download it",
    "--dataset mnist --data-dir .": "MNIST can't be read",
    "--image-size 7": "--image-size 7: must be at least 8",
    "--image-size big": "--image-size big: must be a whole number",
    "--seed 0-2": "--seed 0-2: must be a whole number of at least 0; only a study takes several",
    "--epochs 0": "--epochs 0",
    "--batch-size 1": "--batch-size 1",
    "--lr nan": "--lr nan",
    "--lr -1": "--lr -1",
    "--dropout 1.5": "--dropout 1.5",
    "--per-class 9999": "--per-class 9999: the class",
    "--scheduler step": "--scheduler step",
    "--precision fp8": "--precision fp8",
    "--seed -3": "--seed -3",
    f"--precision fp32 --experiment {'x' * 600}": "--experiment xxx",
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
    "--workers 0": "--workers 0: must be at least 1",
    "--fresh maybe": "--fresh maybe",
    "--storage mysql://u:secret@h/d": f"--storage mysql://u:***@h/d: {STORAGE}",
    "--storage sqlite://": STORAGE,
    "--storage nonsense": "--storage nonsense: not an address",
    "--storage postgresql://u:secret@h:port/db": "--storage postgresql://u:***@h:port/db: its port is not a number",
    "--storage sqlite:////proc/nowhere/optuna.db": "optuna.db: can't be used (no such folder); create it",
    "--storage postgresql://me:secret@127.0.0.1:9/db": "--storage postgresql://me:***@127.0.0.1:9/db: can't be",
    "--variant drop_two": "--variant drop_two: no variant, and no arm of study ablate; did you mean 'drop_one'?",
    "--seeds 1,x": "such as 0,1,2 or 0-2; the option --seeds also takes auto or race.",
    "--seeds 1,1": "--seeds 1,1",
}
HPARAM_ERRORS = {
    "--set schedule.name=cosine": "the check compares the schedules none and plateau; use --scheduler",
    "--check drop_out": "--check drop_out: no such change in study hparam-digits; did you mean 'dropout'?",
    "--scheduler cosine": "--scheduler cosine: no arm of the study hparam-digits has it; use both",
}
SEARCH_ERRORS = {"--trials 0": "--trials 0: must be at least 1"}


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


STUDY_ERRORS = {
    "arms: {a: {model: {variant: drop_one, table: F 1 3 1 8 8 1}}}": r"line 2: arms.a.model.table: .*needs a name of",
    "description: a": r"has no arms to compare; use the command train",
    "seeds: [0, 0]\narms: {a: {}}": r"line 2: seeds.*the same seed appears twice",
    "arms: {'a[/x]': {}}": r"line 2: arms.*letters, digits",
    "arms: {a: &a {model: *a}}": r"contains itself",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\n"
    "e: &e [*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]": r"more than 50,000 values",
    "config: " + "[" * 60 + "]" * 60: r"or 50 levels",
    "config: {random: {seed: 0x" + "f" * 6000 + "}}": r"line 2: config.random.seed 0xf+…: must be a whole number",
    "arms: !!int ''": r"line 2: arms: must be a dictionary",
    "name: " + "x" * 1_000_001: r"can't be read \(it is larger than 1 MB\)",
    "config: {schedule: {epochs: 2, warmup_epochs: 2}}": r"line 2: config.schedule.warmup_epochs 2: the warm-up",
    "config: {model: {outputs: 5}}\narms: {a: {}}": r"model.outputs 5: the data has 10 classes",
    "config: {data: {image_sise: 32}}": r"line 2: config.data.image_sise: unknown key.*'image_size'",
    "config: {dta: {}}": r"line 2: config.dta: unknown key 'dta'; did you mean 'data'",
    "config: {optimiser.lr: 0.5}": r"line 2: config.optimiser.lr: not a group of settings; write the group",
    "config: {model: {dropout: 0.3, table: F 1 3 1 24 24 2}}": r"line 2: config.model.table: .*needs a name of its own",
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
    "search: {space: {model.dropout: {low: 0, high: 2}}}": r"line 2: search.space.model.dropout.high 2.0: must be",
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


def test_wrong_names_are_found_by_the_nearest(empty_store: str) -> None:
    result = invoke(train, "--lrr", "3")
    assert result.exit_code == 2 and "Did you mean '--lr'?" in result.stderr and not all_runs()


def full_disk_of_torch() -> None:
    try:
        raise OSError(28, "No space left on device", "/data/weights.pt")
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904


def no_memory_on_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory_on_the_host() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(
    ("runs_out", "sentence"),
    [
        (no_memory_on_the_device, "memory is full; lower optimiser.batch_size or data.image_size"),
        (no_memory_on_the_host, "memory is full; lower optimiser.batch_size or data.image_size"),
        (full_disk_of_torch, "disk is full at /data/weights.pt; free space"),
    ],
)
def test_an_exhausted_resource_is_one_sentence(runs_out: Callable[[], None], sentence: str) -> None:
    with pytest.raises(RunError, match=sentence), what_ran_out():
        runs_out()


def test_other_faults_are_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), what_ran_out():
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="shape"), what_ran_out():
        raise RuntimeError("shape")
