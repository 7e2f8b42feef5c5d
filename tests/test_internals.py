"""Private names of other packages that effv2 uses: they do what effv2 needs in the installed releases."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

from effv2.core import internals

PACKAGE = Path(internals.__file__).parents[1]
BUILT_IN = "__"


def test_no_other_module_uses_private_names_of_other_packages() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                names = [node.attr] if not _is_self(node.value) else []
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("effv2", "__")):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            else:
                continue
            private = [name for name in names if name.startswith("_") and not name.startswith(BUILT_IN)]
            found += [f"{path.name} {name}" for name in private if name not in own | {"_exit", "_fields"}]
    assert [each for each in found if not each.startswith("internals.py")] == []


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_tensors_are_moved_and_copied_all_at_once() -> None:
    tensors, others = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    internals.lerp_all(tensors, others, 0.25)
    assert [tensor.tolist() for tensor in tensors] == [[0.25] * 2, [0.25] * 3]
    internals.copy_all(tensors, others)
    assert all(map(torch.equal, tensors, others))


def test_the_compiler_is_set_up_by_settings_that_torch_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    config = torch._dynamo.config
    with config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        internals.set_up_compiler(7, tmp_path)
        assert config.recompile_limit == config.accumulated_recompile_limit == 7
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_torchvision_names_imagenettes_classes_and_publishes_accuracies() -> None:
    from torchvision.models import ResNet18_Weights

    url, md5, names = internals.imagenette()
    assert url.endswith("imagenette2-160.tgz") and len(md5) == 32
    assert len(names) == 10 and sorted(names) == list(names) and names["n03394916"] == "French horn"
    assert internals.imagenet_metrics(ResNet18_Weights.IMAGENET1K_V1)["acc@1"] == pytest.approx(69.758)


def test_optuna_names_trials_and_studies_and_misses_heartbeats(tmp_path: Path) -> None:
    import optuna
    from optuna.storages import RDBStorage, get_storage

    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        rdb = RDBStorage(f"sqlite:///{tmp_path}/optuna.db", heartbeat_interval=1, grace_period=1)
    storage = get_storage(rdb)
    try:
        numbers = [storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], name) for name in "ab"]
        assert sorted(map(internals.study_id, storage.get_all_studies())) == numbers == sorted(numbers)
        trial = storage.create_new_trial(numbers[0])
        assert internals.trial_id(storage.get_trial(trial)) == trial
        storage.record_heartbeat(trial)  # type: ignore[attr-defined]
        assert internals.stale_trial_ids(storage, numbers[0]) == []
        rdb.grace_period = -1  # simulates that time has passed
        assert internals.stale_trial_ids(storage, numbers[0]) == [trial]
    finally:
        rdb.remove_session()
        rdb.engine.dispose()


def test_mlflow_gives_the_latest_steps(store: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    for step in (1, 2, 3):
        client.log_metric(run_id, "loss", float("nan") if step == 3 else 1.0, step=step)
    client.log_metric(run_id, "best", 1.0)
    assert internals.latest_steps(client.get_run(run_id)) == {"loss": 3, "best": 0}


def test_torchvision_names_its_networks() -> None:
    from torchvision import models

    assert internals.classification_networks() == models.list_models(module=models)


def test_mlflow_names_its_experiment(sqlite_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    from mlflow.tracking import fluent

    # Undo what set_experiment changes.
    monkeypatch.setattr(fluent, "_active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    assert internals.default_experiment_id() == "0"
    other = mlflow.set_experiment("other").experiment_id
    assert internals.default_experiment_id() == other
