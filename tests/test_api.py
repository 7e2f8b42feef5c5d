"""The Python API: its functions do what the commands do, and return objects."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

import effv2
from effv2.cli.main import train
from effv2.core.errors import InputError
from effv2.core.reporter import LineReporter
from effv2.data.images import Square
from effv2.tracking.writer import model_address
from tests import stubs
from tests.conftest import TINY_STUDY, TINY_TABLE, all_runs, invoke

TINY: dict[str, Any] = {
    "image_size": 8,
    "epochs": 1,
    "device": "cpu",
    "precision": "fp32",
    "set": {"model.variant": "tiny", "model.table": TINY_TABLE},
}


def test_importing_takes_no_time_and_knows_its_names() -> None:
    script = "import effv2, sys; print(*sys.modules); effv2.InputError; print(*dir(effv2))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported, names = map(str.split, done.stdout.splitlines())
    assert not {"click", "pydantic", "torch", "mlflow"} & {*imported} and {"ablate", "RunError"} <= {*names}
    with pytest.raises(AttributeError, match="no attribute 'abalte'"):
        getattr(effv2, "abalte")  # noqa: B009


def test_its_types_and_its_help_follow_from_the_options() -> None:
    assert stubs.is_current(), "run: python -m tests.stubs"
    for call in stubs.CALLS:
        parameters = inspect.signature(call).parameters
        assert [*parameters][:-1] == [*call.taken.fields] and all(
            f"{name}: " in str(call.__doc__) for name in call.taken.fields
        )
    assert inspect.signature(effv2.train).parameters["image_size"].default == 32


def test_a_study_comes_back_with_verdicts_runs_figures_and_models(
    sqlite_store: str, tiny_study: Path, tmp_path: Path
) -> None:
    found = effv2.ablate(study=tiny_study, variant="other", seeds=range(3), log_model="best")
    assert found.answers[0] in repr(found) and found.answers[0].startswith("other against default: ")
    (verdict,) = found.verdicts.to_dict("records")
    assert (verdict["arm"], verdict["against"], verdict["seeds"]) == ("other", "default", 3)
    assert verdict["low"] < verdict["difference"] < verdict["high"] and not found.failed
    runs = found.runs.set_index("run_id")
    assert len(runs) == 6 and set(runs["arm"]) == {"default", "other"} and set(runs["seed"]) == {"0", "1", "2"}
    means = runs.groupby("arm")["selected/test_accuracy"].mean()
    assert means["other"] - means["default"] == pytest.approx(verdict["difference"])
    assert isinstance(found.figure(), Figure) and found.figure("train accuracy") is found.figures["train accuracy"]
    with pytest.raises(effv2.InputError, match="did you mean 'train accuracy'"):
        found.figure("train acuracy")

    parent, *_ = all_runs()
    assert parent.data.tags["effv2.command"].startswith(
        f"effv2 ablate --variant other --study {tiny_study} --seeds 0,1,2"
    )
    again = effv2.ablate(study=str(tiny_study), variant="other", seeds="0,1,2")
    assert again.run_id == found.run_id and again.verdicts.equals(found.verdicts)
    report = effv2.report(export=tmp_path / "report")
    assert report.file is not None and report.file.is_file() and len(report.runs) == 6
    assert list(report.verdicts.columns) == ["claim", "verdict", "why"] and "tiny: other against" in repr(report)


def test_a_model_answers_as_its_training_measured(sqlite_store: str, tmp_path: Path) -> None:
    ended = effv2.train(**TINY)
    model = ended.model()
    (run,) = all_runs()
    image = next(path for path in [tmp_path / "seven.png"])
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 17, 23, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(image)
    one, other = model([image, *pixels[1:]]), model([Image.fromarray(each) for each in pixels])
    assert torch.equal(one, other) and one.shape == (5, 10)
    import mlflow

    served = mlflow.pyfunc.load_model(model_address(run.info.run_id))
    answers = served.predict([image, *[Image.fromarray(each) for each in pixels[1:]]])
    assert [label for label, _ in model.predict(pixels)] == [each["label"] for each in answers]
    assert [p for _, p in model.predict(pixels)] == pytest.approx([each["probability"] for each in answers], abs=1e-5)
    assert model.predict(image) == model.predict(str(image)) == model.predict(pixels[0]) == model.predict([image])
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        model.predict("gone.png")
    with pytest.raises(MlflowException, match="it is not base64 or a Path"):
        served.predict(["gone.png"])
    assert isinstance(model.preparation, Square) and model.classes == tuple("0123456789")
    one.sum().backward()  # it can be trained further
    assert ended.metrics["best/test_accuracy"] == ended.runs["best/test_accuracy"][0] and not len(ended.verdicts)
    assert effv2.train(**TINY).was_finished and len(all_runs()) == 1
    # A command with the same settings gives the same run.
    words = [
        word
        for name in ("image-size", "epochs", "device", "precision")
        for word in (f"--{name}", TINY[name.replace("-", "_")])
    ]
    words += [word for name, value in TINY["set"].items() for word in ("--set", f"{name}={value}")]
    assert "Finished before" in invoke(train, *map(str, words)).output


@pytest.mark.parametrize(
    ("options", "what", "said"),
    [
        ({"lr": -1}, "lr", "lr -1: input should be greater than 0"),
        ({"dataset": "folder", "data_dir": Path("/nowhere")}, "data_dir", "data_dir /nowhere: no such folder"),
        ({"set": ["optimiser.nam=sgd"]}, "set optimiser.nam", "no such setting"),
        ({"log_model": "bset"}, "log_model", "did you mean 'best'"),
        ({"study": "ablate-minst"}, "study", "nearest is 'ablate-mnist'"),
    ],
)
def test_wrong_input_is_an_error_with_its_parts(
    empty_store: str, options: dict[str, Any], what: str, said: str
) -> None:
    with pytest.raises(effv2.InputError, match=said) as error:
        effv2.train(**options)
    assert error.value.what == what and error.value.problem
    assert not MlflowClient().search_runs(["0"])
    with pytest.raises(TypeError, match=r"no option 'epoch'; the nearest is 'epochs'"):
        effv2.train(epoch=3)  # type: ignore[call-arg]


def test_a_call_prints_little_unless_verbose(sqlite_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for reporter, epochs in ((None, 0), (LineReporter(), 1)):
        effv2.train(**TINY, fresh=True, reporter=reporter)
        said = capsys.readouterr().err
        assert "Data: 10 classes" in said and said.count("epoch 1/1: train") == epochs


def test_a_script_with_several_workers_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import effv2\n"
        "print('once')\n"
        "study = effv2.ablate(study='tiny.yaml', workers=2, log_model='none')\n"
        "print(sorted(study.runs['status']))\n"
    )
    (tmp_path / "tiny.yaml").write_text(TINY_STUDY)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("once") == 1 and "['FINISHED', 'FINISHED']" in done.stdout, done.stdout + done.stderr


def test_a_setting_of_another_kind_is_named() -> None:
    with pytest.raises(InputError, match="set"):
        effv2.train(set=5)  # type: ignore[arg-type]
