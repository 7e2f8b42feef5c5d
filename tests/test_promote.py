"""Promotion: only a model that is better on the same images becomes the champion. Refused models leave no trace."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from effv2.cli import main
from effv2.core.errors import InputError, RunError
from effv2.core.paths import write_csv
from effv2.core.words import percent
from effv2.evidence import promotion
from effv2.evidence.promotion import Decision, promote
from effv2.tracking import registry
from effv2.tracking.tags import OUTCOME, PROMOTING, PROMOTION
from effv2.tracking.writer import TrackedRun
from tests.conftest import TINY_TABLE

IMAGES, NUMBERS = 200, itertools.count()
Log = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def log(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    """Return a function that logs a model with a number of right answers. It returns two addresses, the run's last."""
    folder = tmp_path_factory.mktemp("promoted")
    shutil.copy(template_database, folder / "mlflow.db")

    def log_run(
        right: int,
        tags: Mapping[str, str] = {},
        ids: str = "image",
        true: str = "dog",
        digest: str = "",
        ending: str = "",
        names: int = IMAGES,
    ) -> tuple[str, str]:
        client, place = MlflowClient(), folder / str(next(NUMBERS))
        place.mkdir()
        run_id = client.create_run("0", tags={OUTCOME: "complete", **tags}).info.run_id
        for name, value in {"inference/single_image_seconds": 0.012, "model/parameters": 5000}.items():
            client.log_metric(run_id, name, value)
        rows = [(f"{ids} {k % names}", true, true if k < right else "cat", "0.5") for k in range(IMAGES)]
        write_csv(place / f"predictions.csv{ending}", [("id", "true", "predicted", "probability"), *rows])
        client.log_artifact(run_id, str(place / f"predictions.csv{ending}"))
        TrackedRun(run_id, "0").log_dataset("dogs", "test", digest, "", {"images": IMAGES, "classes": ["cat", "dog"]})
        model = client.create_logged_model("0", "model", run_id)
        (place / "program").write_bytes(bytes(2_000_000))
        client.log_model_artifact(model.model_id, str(place / "program"))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        client.set_terminated(run_id)
        return f"models:/{model.model_id}", f"runs:/{run_id}"

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield log_run


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Return a name for registered models that no other test uses."""
    return f"model {next(NUMBERS)}"


def try_out(name: str, address: str, dry_run: bool = False, **limits: float) -> Decision:
    return promote(address, name, dry_run=dry_run, **limits)


def held(name: str) -> dict[int, tuple[str, Mapping[str, str]]]:
    """Return source and tags of each version."""
    found = MlflowClient().search_model_versions(f"name = '{name}'")
    return {int(each.version): (str(each.source), each.tags) for each in found}


def champion(name: str) -> int | None:
    found = registry.find_champion(name)
    return int(found.version) if found else None


def call(*words: str) -> Result:
    return CliRunner().invoke(main.promote, words)


def test_only_a_better_model_moves_the_alias(log: Log, name: str) -> None:
    first, run = log(150)
    assert try_out(name, run).verdict == "promoted" and champion(name) == 1  # no champion yet
    for right, alone, theirs in ((140, 0, 10), (150, 0, 0), (155, 5, 0)):  # worse, equal, better by chance
        refused = try_out(name, log(right)[0])
        assert refused.verdict == "refused" and f"right, {alone} against {theirs} where only" in refused.reason
    assert list(held(name)) == [1] and champion(name) == 1
    better, _ = log(156)  # six images are right only here: p = 2 / 2^6
    assert "(exact McNemar, p = 0.031)" in try_out(name, better).reason and champion(name) == 2
    version = MlflowClient().get_model_version_by_alias(name, "champion")
    assert version.description and "78.00 % against 75.00 % of 200 test images right" in version.description
    assert "| right alone | 6 | 0 |" in version.description
    figures = {key.removeprefix(PROMOTION): value for key, value in held(name)[2][1].items()}
    mine = {"accuracy": "78.00 %", "right_alone": "6", "McNemar": "p = 0.031", "images": "200", "milliseconds": "12"}
    mine |= {"megabytes": "2", "parameters": "5,000"}
    its = mine | {"accuracy": "75.00 %", "right_alone": "0"}
    assert figures == mine | {f"champion_{key}": value for key, value in its.items()}
    assert held(name)[1][0] == first and held(name)[2][0] == better


def test_the_command_says_what_it_did_and_what_it_would_do(log: Log, name: str) -> None:
    first, run = log(100)
    dry = call(run, "--name", name, "--dry-run")
    assert dry.exit_code == 0 and "nothing was changed" in dry.stdout and not held(name)
    done = call(run, "--name", name)
    assert done.exit_code == 0 and f"mlflow models serve --model-uri models:/{name}@champion" in done.stdout
    again = call(first, "--name", name)
    assert again.exit_code == 0 and f"is already the champion, as version 1 of {name}" in again.stdout
    for extra in ((), ("--dry-run",)):
        refused = call(log(90)[0], "--name", name, *extra)
        assert refused.exit_code == 1 and "45.00 % against 50.00 % of 200 test images right" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1 and list(held(name)) == [1]
    assert (call(first).exit_code, call(first, "--name", "a/b").exit_code) == (2, 2)


def test_limits_hold_for_the_first_model_too(log: Log, name: str) -> None:
    address, _ = log(100)
    slow = try_out(name, address, max_milliseconds=11.9)
    assert slow.verdict == "refused" and "it takes 12 milliseconds, but 11.9 are allowed" in slow.reason
    large = try_out(name, address, max_megabytes=1.9)
    assert large.verdict == "refused" and "it takes 2 megabytes, but 1.9 are allowed" in large.reason and not held(name)
    assert try_out(name, address, max_milliseconds=12, max_megabytes=2).verdict == "promoted"


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"ids": "picture"}, "only one of the two has 400, such as image 0"),
        ({"true": "wolf"}, "200 test images have other labels than the champion's: image 0 is wolf, was dog"),
        ({"digest": "2"}, "have the names of the champion's, but other pixels"),
    ],
    ids=["ids", "labels", "pixels"],
)
def test_other_test_images_are_no_evidence(log: Log, name: str, other: dict[str, str], problem: str) -> None:
    try_out(name, log(100, digest="1")[0])
    refused = try_out(name, log(200, **({"digest": "1"} | other))[0])
    assert refused.verdict == "refused" and problem in refused.reason and list(held(name)) == [1]


def test_concurrent_promotions_are_judged_one_after_the_other(
    log: Log, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are registered while nobody is the champion yet."""
    models = {log(right)[0]: right for right in (100, 150, 125, 175)}
    barrier, register = Barrier(len(models)), registry._register

    def registered_together(*args: Any) -> Any:
        made = register(*args)
        barrier.wait(60)
        return made

    monkeypatch.setattr(registry, "_register", registered_together)
    with ThreadPoolExecutor(len(models)) as pool:
        decisions = list(pool.map(lambda model: try_out(name, model), models))
    versions = sorted(held(name).items())
    kept = [models[source] for _, (source, _) in versions]
    assert kept == sorted(kept) and kept[-1] == 175 and champion(name) == versions[-1][0]
    assert sum(each.verdict == "promoted" for each in decisions) == len(kept)
    assert not any(PROMOTING in tags for _, (_, tags) in versions)


def test_a_model_has_one_version_even_after_a_kill(log: Log, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TURN_SECONDS", 0.1)
    address, run = log(100)
    left = registry._register(name, registry.find_model(run)[0])  # a kill leaves this version
    assert try_out(name, address).verdict == "promoted"
    assert champion(name) == int(left.version) and list(held(name)) == [1] and PROMOTING not in held(name)[1][1]
    worse, run = log(90)
    registry._register(name, registry.find_model(run)[0])
    monkeypatch.setattr(promotion, "_against_champion", better_at_first(promotion._against_champion))
    assert try_out(name, worse).verdict == "refused" and list(held(name)) == [1]


def better_at_first(judge: Callable[..., Decision]) -> Callable[..., Decision]:
    """Return a judge that promotes at first, as if the champion had come in the meantime."""
    looks = iter([Decision("promoted", "", [])])
    return lambda *args: next(looks, None) or judge(*args)


def test_an_existing_version_is_judged_in_its_turn(log: Log, name: str) -> None:
    client, (address, run), (better, _) = MlflowClient(), log(100), log(150)
    client.create_registered_model(name)
    client.create_model_version(name, address, run.removeprefix("runs:/"))
    other = registry._register(name, registry.find_model(better)[0])  # it is being judged
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(try_out, name, address)
        time.sleep(1)
        assert not waiting.done()
        client.set_registered_model_alias(name, "champion", str(other.version))
        client.delete_model_version_tag(name, str(other.version), PROMOTING)
        assert waiting.result(20).verdict == "refused"
    assert champion(name) == 2 and {number: each[0] for number, each in held(name).items()} == {1: address, 2: better}


def test_figures_of_an_earlier_promotion_are_removed(log: Log, name: str) -> None:
    try_out(name, log(100)[0])
    again, _ = log(150)
    assert try_out(name, again).verdict == "promoted" and f"{PROMOTION}champion_accuracy" in held(name)[2][1]
    MlflowClient().delete_registered_model_alias(name, "champion")
    assert try_out(name, again).verdict == "promoted" and champion(name) == 2 and sorted(held(name)) == [1, 2]
    assert [tag for tag in held(name)[2][1] if "champion" in tag] == [] and f"{PROMOTION}accuracy" in held(name)[2][1]


def test_a_champion_that_is_gone_or_cannot_be_judged(log: Log, name: str) -> None:
    client = MlflowClient()
    _, run = log(100)
    try_out(name, run)
    client.delete_run(run.removeprefix("runs:/"))
    with pytest.raises(
        RunError, match=r"version 1 of .* can't be judged, because it has no run, or its run was deleted; correct that"
    ):
        try_out(name, log(200)[0])
    client.delete_model_version(name, "1")
    assert try_out(name, log(50)[0]).verdict == "promoted"  # no version is the champion
    by_hand = client.create_model_version(name, str(Path.cwd()))
    client.set_registered_model_alias(name, "champion", str(by_hand.version))
    with pytest.raises(RunError, match="can't be judged, because it has no run"):
        try_out(name, log(200)[0])
    assert champion(name) == int(by_hand.version) and len(held(name)) == 2


def test_what_cannot_be_judged_is_refused_before_anything_is_registered(log: Log, name: str) -> None:
    client = MlflowClient()
    pruned, _ = log(100, tags={OUTCOME: "pruned"})
    foreign, _ = log(100, tags={OUTCOME: ""})
    deleted, run = log(100)
    client.delete_logged_model(deleted.removeprefix("models:/"))
    unfinished = client.create_logged_model("0", "model", run.removeprefix("runs:/"))
    without, _ = log(100, ending=".old")
    twice, _ = log(100, names=IMAGES - 1)
    for address, problem in {
        pruned: "was pruned, is incomplete",
        foreign: "is incomplete, or is not a run of effv2",
        deleted: "has no model of that id",
        run: "no model was logged there, or it is incomplete",
        f"models:/{unfinished.model_id}": "or it is incomplete",
        without: "has no predictions of test images",
        twice: "or several for one image",
        "runs:/nothing": "has no model of that id",
        f"models:/{name}/1": "is not the address of a logged model",
    }.items():
        with pytest.raises(InputError, match=problem):
            try_out(name, address)
    assert not held(name)


def test_a_dry_run_creates_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(InputError, match="there is no such file"):
        try_out("a", "runs:/1", dry_run=True)
    assert not list(tmp_path.iterdir())


def test_a_trained_model_is_served_by_its_alias(sqlite_store: str, tmp_path: Path) -> None:
    import mlflow.pyfunc

    words = ["--set", f"model.table={TINY_TABLE}", "--variant", "tiny", "--per-class", "12", "--image-size", "8"]
    words += ["--epochs", "1", "--device", "cpu", "--precision", "fp32"]
    assert CliRunner().invoke(main.train, words, catch_exceptions=False).exit_code == 0
    (run,) = MlflowClient().search_runs(["0"])
    assert call(f"runs:/{run.info.run_id}", "--name", "digits").exit_code == 0
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    (answer,) = model.predict([np.zeros((8, 8), np.uint8)])
    assert answer["label"] in [str(digit) for digit in range(10)]
    accuracy = held("digits")[1][1][f"{PROMOTION}accuracy"]
    assert accuracy == percent(run.data.metrics["selected/test_accuracy"])
