"""Identity: a finished run is found after edits that change no number, and after no other edits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import Field, create_model

from effv2 import architecture
from effv2.cli.main import main
from effv2.config import schema
from effv2.config.schema import TrainConfig
from effv2.core.provenance import VERSIONS
from effv2.data.dataset import load_dataset, stratified_split
from tests.conftest import tiny_config
from tests.recorded import (
    DECIDING,
    EXEMPT,
    RECORDED,
    ROOT,
    changed,
    code,
    defaults,
    definitions,
    differing,
    numbers,
    refusals,
)

HOW = (
    "If results are equal, confirm it with `python -m tests.recorded`, which compares them; "
    "if they differ, raise the number in effv2.core.provenance.VERSIONS first."
)
BATCHES = ROOT / "effv2" / "data" / "batches.py"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RECORDED.read_text())
    return content


def test_code_that_decides_results_is_as_recorded(recorded: dict[str, Any]) -> None:
    assert recorded["versions"] == VERSIONS, f"Record what the new versions compute: {HOW}"
    assert not changed(recorded["code"], code()), HOW
    assert defaults() == recorded["defaults"], f"Settings added later are left out at their default. {HOW}"


def test_every_module_of_the_deciding_rooms_is_recorded_or_exempt() -> None:
    listed = {file for files in DECIDING.values() for file in files}
    package = ROOT / "effv2"
    rooms = (package / room for room in ("data", "training", "execution"))
    found = {path.relative_to(package).as_posix() for room in rooms for path in room.glob("[!_]*.*")}
    assert found == {file for file in listed if file.startswith(("data/", "training/", "execution/"))} | EXEMPT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"numbers": {"augmented": "other"}}, "augmented differs", id="another number"),
        pytest.param(
            {"numbers": {"augmented": "x"}, "versions": {"training": 2}}, "augmented differs", id="another version"
        ),
        pytest.param({"numbers": {"augmented": "other"}, "versions": {"batches": 2}}, "", id="its version"),
        pytest.param({"versions": {"batches": 0}}, "versions only rise", id="a lower version"),
        pytest.param({"defaults": {"stopping.best_since": "min_epochs"}}, "must keep theirs", id="a default"),
        pytest.param({"code": {"batches": {"data/batches.py random_flip": "other"}}}, "", id="equal numbers"),
        pytest.param(
            {
                "code": {"training": {"training/loop.py Training": "x"}},
                "numbers": {"sgd, onecycle, zero start": [1.0] * 7},
                "versions": {"batches": 2},
            },
            "training changed",
            id="code whose numbers another version hides",
        ),
    ],
)  # fmt: skip
def test_changed_results_are_recorded_only_with_a_new_version(
    recorded: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    now = {key: {**value, **change.get(key, {})} for key, value in recorded.items()}
    now["code"] = {v: {**recorded["code"][v], **change.get("code", {}).get(v, {})} for v in recorded["code"]}
    assert bool(said) == bool(refusals(recorded, now)) and said in " ".join(refusals(recorded, now))


def test_results_are_as_recorded(recorded: dict[str, Any]) -> None:
    assert not differing(recorded["numbers"], numbers()), HOW


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('"""Mirror each', '"""Turn each', id="a docstring"),
        pytest.param("    mirrored = to_device", "    # A coin for each.\n    mirrored = to_device", id="a comment"),
        pytest.param("mirrored", "turned", id="a local name"),
        pytest.param("def random_flip(images: Tensor) -> Tensor:", "def random_flip(images):", id="annotations"),
        pytest.param(
            "\n\ndef random_flip", "\n\ndef invert(x):\n    return 255 - x\n\n\ndef random_flip", id="a function"
        ),
    ],
)
def test_edits_that_change_no_number_need_no_version(old: str, new: str) -> None:
    source = BATCHES.read_text()
    assert old in source
    assert not changed({"batches": definitions(source)}, {"batches": definitions(source.replace(old, new))})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("torch.rand(len(images)) < 0.5", "torch.rand(len(images)) < 0.6", id="a number"),
        pytest.param("ERASED_AREA = (0.02, 0.33)", "ERASED_AREA = (0.02, 0.4)", id="a constant"),
        pytest.param("images.flip(3), images", "images, images.flip(3)", id="an order"),
        pytest.param("def random_flip", "def random_mirror", id="a definition that is gone"),
        pytest.param(
            "def random_erasing", "def random_flip(x):\n    return x\n\n\ndef random_erasing", id="a redefinition"
        ),
        pytest.param("# Share of", "torch.set_num_threads(1)\n# Share of", id="a statement"),
        pytest.param("from effv2.data.dataset import Split", "from effv2.data.other import Split", id="an import"),
        pytest.param("(images: Tensor, probability", "(probability: float, images", id="the order of parameters"),
    ],
)
def test_edits_of_arithmetic_are_refused(old: str, new: str) -> None:
    source = BATCHES.read_text()
    assert old in source
    assert changed({"batches": definitions(source)}, {"batches": definitions(source.replace(old, new))})


@pytest.mark.parametrize("spoilt", ["", "variables", "settings", "owner"])
def test_the_commit_and_the_changes_are_those_of_this_checkout(tmp_path: Path, spoilt: str) -> None:
    """Git's variables, its settings and the owner of the folder don't matter."""
    core = tmp_path / "effv2" / "core"
    core.mkdir(parents=True)
    for path in (core / "__init__.py", core.parent / "__init__.py"):
        path.touch()
    shutil.copy(ROOT / "effv2" / "core" / "provenance.py", core)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTHONPATH"))}
    plain |= {"HOME": str(tmp_path / "nobody"), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*command: str, folder: Path = tmp_path) -> str:
        return subprocess.run(command, cwd=folder, env=plain, text=True, capture_output=True, check=True).stdout

    def git(*words: str, folder: Path = tmp_path) -> str:
        return run("git", "-c", "user.name=a", "-c", "user.email=a@b", *words, folder=folder).strip()

    other = tmp_path / "other"
    other.mkdir()
    for folder in (other, tmp_path):
        git("init", "-q", folder=folder)
        git("commit", "-q", "--allow-empty", "-m", str(folder), folder=folder)
    git("add", "effv2")
    git("commit", "-q", "-m", "all")
    with (core / "provenance.py").open("a") as file:
        file.write("# A change.\n")
    commit = git("rev-parse", "HEAD")
    if spoilt == "variables":
        plain |= {"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other), "GIT_EXTERNAL_DIFF": "true"}
    elif spoilt == "settings":
        (tmp_path / ".git/info/attributes").write_text("*.py diff=py\n")
        for setting in ("color.ui always", "diff.external true", "diff.noprefix true", "status.showUntrackedFiles no"):
            git("config", *setting.split())
        git("config", "diff.py.textconv", "cat /dev/null")
    elif spoilt == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root may give a folder to somebody else")
        for path in (tmp_path, tmp_path / ".git"):
            os.chown(path, 12345, 12345)
    program = "from effv2.core.provenance import git_state; print(*git_state(), sep='')"
    found = run(sys.executable, "-c", program)
    assert found.startswith(f"{commit} M effv2/core/provenance.py\n?? other/\n"), found
    assert "\n+++ b/effv2/core/provenance.py\n" in found and "\n+# A change.\n" in found


AGAIN = """
import sys
from click.testing import CliRunner
from effv2.cli.main import main
for words in sys.argv[1:]:
    print(CliRunner().invoke(main, words.split(), catch_exceptions=False).output)
"""


def test_finished_runs_are_found_after_comments_in_every_file(
    sqlite_store: str, tmp_path: Path, tiny_study: Path
) -> None:
    ablate = f"ablate --study {tiny_study} --variant other --log-model none"
    assert "already finished" not in CliRunner().invoke(main, ablate.split(), catch_exceptions=False).output
    single = tmp_path / "single.yaml"
    study = yaml.safe_load(tiny_study.read_text())
    model = study["arms"]["other"]["model"]
    single.write_text(yaml.safe_dump({"name": "single", "config": {**study["config"], "model": model}}))

    package = Path(shutil.copytree(ROOT / "effv2", tmp_path / "copy" / "effv2"))
    for path in package.rglob("*.py"):
        path.write_text(path.read_text() + "\n# A comment.\n")
    command = [sys.executable, "-c", AGAIN, ablate, f"train --study {single} --log-model none"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert "All 2 runs were already finished" in done.stdout and "Finished before" in done.stdout, done


def test_an_added_entry_of_a_table_is_no_change_but_a_different_one_is() -> None:
    table = "KINDS = {'a': 1, 'b': 2}\n@KINDS.register('c')\ndef _c(x):\n    return x\n"
    more = table.replace("'b': 2", "'b': 2, 'd': 4") + "@KINDS.register('e')\n@twice\ndef _e(x):\n    return -x\n"
    assert not changed({"": definitions(table)}, {"": definitions(more)})
    for old, new in (("'b': 2", "'b': 3"), ("'b': 2", ""), ("register('c')", "register('d')"), ("x\n", "-x\n")):
        assert changed({"": definitions(table)}, {"": definitions(table.replace(old, new))})


def test_changed_table_of_a_variant_is_another_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TrainConfig().hash()
    stages = architecture.VARIANTS["default"].stages
    longer = architecture.Table((*stages[:-1], replace(stages[-1], layers=16)))
    monkeypatch.setitem(architecture.VARIANTS, "added", longer)
    assert TrainConfig().hash() == before
    monkeypatch.setitem(architecture.VARIANTS, "default", longer)
    assert TrainConfig().hash() != before


def test_added_field_is_left_out_of_the_identity_at_its_default() -> None:
    grown = create_model("OptimiserConfig", __base__=schema.OptimiserConfig, beta=(float, Field(0.9)))
    model = create_model("TrainConfig", __base__=TrainConfig, optimiser=(grown, grown()))
    assert model().hash() == TrainConfig().hash()
    assert model.model_validate({"optimiser": {"beta": 0.5}}).hash() != TrainConfig().hash()


def test_fields_that_every_identity_holds_are_as_they_were() -> None:
    """A new hash of the defaults voids all finished runs with defaults. It may change only with a default."""
    assert TrainConfig().hash() == "e94ea176d41059fa"
    assert set(TrainConfig().flat()) >= schema.FIRST_FIELDS


def test_another_split_is_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_config().data
    before = load_dataset(data).digest()

    def other(*arguments: Any, **named: Any) -> object:
        kept, held = stratified_split(*arguments, **named)
        return kept[1:], held

    monkeypatch.setattr("effv2.data.dataset.stratified_split", other)
    assert load_dataset(data).digest() != before
