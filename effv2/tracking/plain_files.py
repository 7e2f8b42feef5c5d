"""MLflow's store of plain files, changed in one point: it replaces or creates a file only when it is fully written.

MLflow empties a file before it writes it. A process that is killed in between would leave an empty metric or
`meta.yaml`, and MLflow could then read no run of that experiment.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE
from mlflow.utils import file_utils, yaml_utils
from mlflow.utils.uri import is_local_uri

from effv2.tracking.addresses import tracking_uri


def folder_of_files() -> Path | None:
    """Return the folder of a tracking store of plain files, if MLflow takes one."""
    uri = tracking_uri()
    plain = MLFLOW_ALLOW_FILE_STORE.get() and is_local_uri(uri)  # type: ignore[no-untyped-call]
    return Path(file_utils.local_file_uri_to_path(uri)).absolute() if plain else None  # type: ignore[no-untyped-call]


def write_whole_files(folder: Path) -> None:
    """Write whole files from now on in this process. Unfinished ones are in `folder`, the store's."""
    from mlflow.store.tracking import file_store

    def whole(path: Path, write: Callable[[str], Any]) -> None:
        part = folder / f".{uuid.uuid4().hex}.yaml"  # no folder, so no experiment
        try:
            write(str(part))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def write_to(path: str, text: str) -> None:
        whole(Path(path), lambda part: file_utils.write_to(part, text))  # type: ignore[no-untyped-call]

    def append_to(path: str, text: str) -> None:
        if os.path.exists(path):  # noqa: PTH110 (never raises)
            file_utils.append_to(path, text)  # type: ignore[no-untyped-call]
        else:
            write_to(path, text)

    def write_yaml(root: str, file_name: str, data: Any, **_: object) -> None:
        path = Path(root, file_name)
        whole(path, lambda part: yaml_utils.write_yaml(folder, Path(part).name, data))  # type: ignore[no-untyped-call]

    ours = {"write_to": write_to, "append_to": append_to, "write_yaml": write_yaml, "overwrite_yaml": write_yaml}
    for name, function in ours.items():
        setattr(file_store, name, function)
