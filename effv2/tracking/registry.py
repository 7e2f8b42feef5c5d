"""MLflow's registry: which version of a model is the champion, and how another one becomes it."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from effv2.core.errors import InputError
from effv2.core.processes import stop_if_told, uninterrupted
from effv2.tracking.store import MISSING, MlflowClient
from effv2.tracking.tags import LONGEST_TAG, PROMOTING
from effv2.tracking.writer import model_address

CHAMPION = "champion"  # the alias
TURN_SECONDS = 30.0  # that a version waits for one before it to be judged, which its process may have died over
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ServedModel:
    """A logged model: its address (models:/ID), the run that logged it, the size of its files."""

    address: str
    run_id: str
    megabytes: float


@dataclass(frozen=True)
class Version:
    """A version of a registered model; `source` is the address of a logged model, or where else its files are."""

    name: str
    number: int
    source: str
    run_id: str

    @property
    def words(self) -> str:
        """Name it."""
        return f"version {self.number} of {self.name}"


def find_model(address: str) -> ServedModel:
    """Return a model by the address of itself or its run; InputError where there is none, or not all of it."""
    kind, _, wanted = address.partition(":/")
    if kind not in ("runs", "models") or not re.fullmatch(r"[\w-]+", wanted):
        remedy = "give runs:/ID of the run that logged it, or models:/ID"
        raise InputError("model", address, "is no address of a logged model", remedy)
    try:
        found = address if kind == "models" else model_address(wanted)
        if not found:
            raise InputError("model", address, "that run has logged no model", "give one that has")
        model = MlflowClient().get_logged_model(found.removeprefix("models:/"))
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        raise InputError("model", address, "the tracking store has none of that id", "correct it") from error
    size = _bytes(model.model_id)
    if model.status != LoggedModelStatus.READY or not size:
        raise InputError("model", address, "its files are not all there", "give another one")
    if not model.source_run_id:
        raise InputError("model", address, "no run has logged it, so nothing says how good it is", "give another one")
    return ServedModel(found, model.source_run_id, size / 1e6)


def _bytes(model_id: str, folder: str | None = None) -> int:
    files = MlflowClient().list_logged_model_artifacts(model_id, folder)
    return sum(_bytes(model_id, file.path) if file.is_dir else file.file_size or 0 for file in files)


def find_champion(name: str) -> Version | None:
    """Return the version that holds the alias; None where none does."""
    client = MlflowClient()
    try:
        number = client.get_registered_model(name).aliases.get(CHAMPION)
        return _version(client.get_model_version(name, str(number))) if number else None
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return None


def _version(found: Any) -> Version:
    return Version(found.name, int(found.version), found.source or "", found.run_id or "")


def _versions(name: str) -> list[Any]:
    """Return all versions of a model, the oldest first."""
    return sorted(MlflowClient().search_model_versions(f"name = '{name}'"), key=lambda each: int(each.version))


@contextmanager
def registered(name: str, model: ServedModel) -> Iterator["Promotion"]:
    """Have a version of the model, once all before it are judged: the one that there is, or a new one.

    A new one that isn't made the champion inside is deleted at the end.
    """
    there = next((each for each in _versions(name) if each.source == model.address), None)
    made = None if there else _register(name, model)
    promotion = Promotion(_version(there or made))
    try:
        if made:
            _await_turn(made)
        yield promotion
    finally:
        if made and not promotion.done:
            MlflowClient().delete_model_version(name, str(made.version))


def _register(name: str, model: ServedModel) -> Any:
    try:
        MlflowClient().create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # By a client that doesn't repeat itself: each answer that was cut would leave a version.
    about = {"tags": {PROMOTING: "true"}, "model_id": model.address.removeprefix("models:/")}
    return mlflow.MlflowClient().create_model_version(name, model.address, model.run_id, **about)


def _await_turn(version: Any) -> None:
    """Wait for the versions that were registered just before, so that each is judged by what became of them."""
    deadline = time.monotonic() + TURN_SECONDS
    since = version.creation_timestamp - 1000 * TURN_SECONDS

    def is_before(other: Any) -> bool:
        recent = int(other.version) < int(version.version) and other.creation_timestamp >= since
        return recent and bool(other.tags.get(PROMOTING))

    while any(map(is_before, _versions(version.name))) and time.monotonic() < deadline:
        stop_if_told()
        time.sleep(POLL_SECONDS)


class Promotion:
    """A version on its way to the alias."""

    def __init__(self, version: Version) -> None:
        self.version, self.done = version, False

    def finish(self, description: str, tags: Mapping[str, str]) -> None:
        """Say why, and move the alias to it."""
        client, version = MlflowClient(), self.version
        number = str(version.number)
        with uninterrupted():
            client.update_model_version(version.name, number, description)
            for name, value in tags.items():
                client.set_model_version_tag(version.name, number, name, value[:LONGEST_TAG])
            client.set_registered_model_alias(version.name, CHAMPION, number)
            self.done = True
            client.delete_model_version_tag(version.name, number, PROMOTING)
