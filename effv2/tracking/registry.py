"""MLflow's registry: the champion among the versions of a model, and its replacement."""

import re
import time
from collections.abc import Callable, Mapping
from functools import partial

import mlflow
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from effv2.core.errors import InputError
from effv2.core.processes import uninterrupted
from effv2.tracking.read import if_there
from effv2.tracking.store import REFUSALS, MlflowClient
from effv2.tracking.tags import PROMOTING, PROMOTION

CHAMPION = "champion"  # the alias
TURN_SECONDS = 30.0  # seconds that a version waits for the judgement of an earlier one, whose process may have died


def find_champion(name: str) -> ModelVersion | None:
    """Return the version that has the alias; None if no version has it. InputError for a name that can't be served."""
    if not re.fullmatch(r"\w[\w .-]*", name):
        problem = "may only have letters, digits, spaces and _ . -"
        raise InputError("name", name, problem, "give a name such as birds")
    return if_there(partial(MlflowClient().get_model_version_by_alias, name), CHAMPION, REFUSALS)


def promote_version(name: str, model: LoggedModel, judge: Callable[[], tuple[str, Mapping[str, str]] | None]) -> None:
    """Register a model, unless it is registered, and move the alias to it if `judge` returns a description and tags.

    `judge` is called after the judgement of all earlier versions. A new version marks the turn. It is deleted if the
    model has another version, or isn't promoted. What a kill has left of it is then deleted, too.
    """
    client, judged = MlflowClient(), None
    turn = version = _register(name, model)
    try:
        _await_turn(turn)
        before = (each for each in _versions(name) if int(each.version) < int(turn.version))
        version = next((each for each in before if each.source == model.model_uri), turn)
        number = str(version.version)
        if judged := judge():
            ours = {tag for tag in version.tags if tag.startswith((PROMOTING, PROMOTION))}
            with uninterrupted():
                client.update_model_version(name, number, judged[0])
                for tag, value in judged[1].items():
                    client.set_model_version_tag(name, number, tag, value)
                client.set_registered_model_alias(name, CHAMPION, number)
                for tag in ours - judged[1].keys():
                    client.delete_model_version_tag(name, number, tag)
    finally:
        left = not judged and PROMOTING in version.tags and not version.description
        for each in {turn.version: turn, version.version: version}.values():
            if left or each is not version:
                client.delete_model_version(name, str(each.version))


def _versions(name: str) -> list[ModelVersion]:
    return list(MlflowClient().search_model_versions(f"name = '{name}'", order_by=["version_number ASC"]))


def _register(name: str, model: LoggedModel) -> ModelVersion:
    try:
        MlflowClient().create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client, about = mlflow.MlflowClient(), {PROMOTING: "true"}  # without repeats: each creates a version
    return client.create_model_version(name, model.model_uri, model.source_run_id, about, model_id=model.model_id)


def _await_turn(version: ModelVersion) -> None:
    """Wait for the judgement of the versions that were registered shortly before."""
    since, deadline = version.creation_timestamp - 1000 * TURN_SECONDS, time.monotonic() + TURN_SECONDS
    while time.monotonic() < deadline and any(
        PROMOTING in each.tags and int(each.version) < int(version.version) and each.creation_timestamp > since
        for each in _versions(version.name)
    ):
        time.sleep(0.2)
