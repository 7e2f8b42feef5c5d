"""Initial weights: found, verified, compared with the network. Layers that are frozen or learn more slowly."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from effv2.api.console import ConsoleReporter
from effv2.architecture import build_model
from effv2.cli.main import ablate, search, train
from effv2.config.schema import TrainConfig
from effv2.core.errors import InputError
from effv2.core.provenance import sha256_of_file
from effv2.core.reporter import Reporter
from effv2.data.batches import NORMALISATIONS
from effv2.data.dataset import load_dataset, load_once
from effv2.data.images import Square
from effv2.execution.device import make_execution
from effv2.run.initial import FoundWeights, initialise
from effv2.run.run import prepare
from effv2.serving.export import as_base64, write_served
from effv2.tracking.writer import TrackedRun
from effv2.training.loop import Training
from effv2.training.optimisers import make_optimiser
from tests.conftest import OTHER_TINY_TABLE, TINY_STUDY, TINY_TABLE, tiny_config

State = dict[str, torch.Tensor]


def network_of(config: TrainConfig, outputs: int = 10, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = build_model(config.model.build_table(), outputs)
    return network


def saved(path: Path, outputs: int = 10, **model: Any) -> Path:
    torch.save(network_of(tiny_config(model=model), outputs).state_dict(), path)
    return path


def prepared(path: object, said: list[str] | None = None, **groups: Any) -> TrainConfig:
    config = tiny_config(**{**groups, "model": {"weights": str(path), **groups.get("model", {})}})
    messages: list[str] = [] if said is None else said
    return prepare([config], load_once(Reporter()), messages.append)[0]


def started(config: TrainConfig) -> Training:
    dataset = load_dataset(config.data)
    return Training(config, dataset, initialise=initialise(config, dataset.classes))


def copied(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: State, other: State) -> set[str]:
    return {name for name, value in one.items() if name in other and torch.equal(value, other[name])}


def test_published_weights_give_the_outputs_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, with the normalisation of the weights."""
    torch.manual_seed(0)
    theirs = models.efficientnet_v2_s(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "new.pth")
    head = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "new.pth").rename(file := tmp_path / "checkpoints" / f"efficientnet_v2_s-{head}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published: Any = models.EfficientNet_V2_S_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(published, "url", f"http://127.0.0.1:1/{file.name}")
    model = {"variant": "default", "table": "", "outputs": 1000}
    config = prepared("published", model=model)
    assert config.data.normalise == "imagenet" and config.model.weights_sha256.startswith(head)
    assert prepared("IMAGENET1K_V1", model=model, data={"normalise": "none"}).data.normalise == "none"
    network = network_of(config, 1000).eval()
    initialise(config, ())(network)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(images), theirs(images))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="is not the published file"):
        prepared("DEFAULT", model=model)  # the results of the other names are cached


@pytest.mark.parametrize("kind", ["pth", "wrapped", "safetensors"])
def test_weights_of_a_file_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    state, said = copied(network_of(tiny_config())), list[str]()
    path = tmp_path / f"one.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            state if kind == "pth" else {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path
        )
    config = prepared(path, said)
    assert len(same(state, copied(started(config).state.model))) == len(state)
    assert "100.00% of the parameters" in said[0] and "new head" not in said[0]
    shutil.copy(path, again := tmp_path / f"two.{kind}")
    assert prepared(again).hash() == config.hash() != tiny_config().hash()
    torch.save(network_of(tiny_config(), seed=2).state_dict(), tmp_path / "other.pth")
    assert prepared(tmp_path / "other.pth").hash() != config.hash()


def test_a_head_of_other_classes_is_initialised_from_the_seed(tmp_path: Path) -> None:
    said = list[str]()
    config = prepared(saved(tmp_path / "w.pth", 1000), said)
    ours, seeded = copied(started(config).state.model), copied(started(tiny_config()).state.model)
    assert {name for name in same(ours, seeded) if "classifier" in name} == {"classifier.1.weight", "classifier.1.bias"}
    assert ", a new head" in said[0]


def test_networks_that_share_stages_take_what_fits_if_asked(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth")
    table = f"{tiny_config().model.table} / M 2 3 1 16 16 1"
    said = list[str]()
    with pytest.raises(InputError, match=r"they belong to another network: features\.\S+ is .* model.weights_partial"):
        prepared(path, model={"table": table, "variant": "longer"})
    config = prepared(path, said, model={"table": table, "variant": "longer", "weights_partial": True})
    assert 0 < float(said[0].partition("): ")[2].partition("%")[0]) < 100
    assert "features.0.0.weight" in same(torch.load(path, weights_only=True), copied(started(config).state.model))


@pytest.mark.parametrize(
    ("weights", "model", "problem"),
    [
        ("/nowhere/w.pth", {}, "no such file, and only default, .* have published weights"),
        ("IMAGENET1K_V9", {"variant": "default", "table": ""}, "did you mean|no published weights"),
        ("runs:/none", {}, "there is no tracking store|no model there"),
        ("text.pth", {}, "can't be loaded"),
        ("other.pth", {}, "they belong to another network"),
        ("two.pth", {}, "it holds several networks: model., net.; keep the parameters of one"),
        ("w.pth", {"weights_sha256": "0123456789"}, "their SHA-256 begins with"),
    ],
)
def test_wrong_weights_are_refused_before_anything_begins(
    tmp_path: Path, sqlite_store: str, weights: str, model: dict[str, Any], problem: str
) -> None:
    saved(tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("text")
    torch.save({"layer": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"net.layer": torch.zeros(2), "model.layer": torch.zeros(2)}, tmp_path / "two.pth")
    place = weights if weights.startswith(("/", "runs", "IMAGE")) else tmp_path / weights
    with pytest.raises(InputError, match=f"^model.weights .*({problem})"):
        prepared(place, model=model)


def test_frozen_layers_do_not_move_by_a_bit(tmp_path: Path) -> None:
    """Steps, weight decay, norms and averaging don't change them. After the frozen epochs, they learn."""
    optimiser = {"weight_decay": 0.5, "ema_decay": 0.9, "frozen_epochs": 1}
    evaluation = {"batch_norm_images": 50}
    training = started(
        prepared(saved(tmp_path / "w.pth"), optimiser=optimiser, evaluation=evaluation, schedule={"epochs": 2})
    )
    nets = training.state.model, training.state.averaged.module  # type: ignore[union-attr]
    before = [copied(net) for net in nets]
    epochs = iter(training)
    next(epochs)
    for net, first in zip(nets, before, strict=True):
        moved = first.keys() - same(first, copied(net))
        assert moved and all(name.startswith("classifier.") for name in moved)
    next(epochs)
    moved = before[0].keys() - same(before[0], copied(nets[0]))
    assert {"features.0.0.weight", "features.0.1.running_mean"} <= moved


def test_a_resumed_fine_tuning_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """It is interrupted while the body is frozen, and later."""
    groups: dict[str, Any] = {"optimiser": {"frozen_epochs": 1, "head_lr_factor": 5}, "schedule": {"epochs": 3}}
    config = prepared(saved(tmp_path / "w.pth", 1000), **groups)
    whole = started(config)
    states = []
    for _ in whole:
        states.append(copy.deepcopy(whole.state.state_dict()))
    for state in states[:2]:
        again = started(config)
        again.state.load_state_dict(copy.deepcopy(state))
        list(again)
        assert len(same(copied(whole.state.model), copied(again.state.model))) == len(copied(whole.state.model))


def test_a_frozen_body_learns_as_in_plain_torch(tmp_path: Path) -> None:
    """On the fast paths, the head gets the same gradients as with torch's layers."""
    config = prepared(saved(tmp_path / "w.pth"), optimiser={"frozen_epochs": -1, "clip_norm": 0.0})
    execution, dataset = make_execution(config.execution), load_dataset(config.data)
    heads = []
    for quick in (True, False):
        how = replace(execution, fast_paths=quick), initialise(config, dataset.classes)
        training = Training(config, dataset, *how)
        next(iter(training))
        heads.append(training.state.model.get_parameter("classifier.1.weight"))
    fast, plain = heads
    assert torch.allclose(fast, plain, atol=1e-5)


def test_batch_norm_stays_while_the_rest_learns(tmp_path: Path) -> None:
    training = started(prepared(saved(tmp_path / "w.pth"), optimiser={"freeze_batch_norm": True}))
    before = copied(training.state.model)
    next(iter(training))
    kept = same(before, copied(training.state.model))
    assert {"features.0.1.running_mean", "features.0.1.running_var", "features.0.1.weight"} <= kept
    assert "features.0.0.weight" not in kept


def test_layers_learn_at_their_own_rates() -> None:
    config = tiny_config(optimiser={"lr": 0.01, "head_lr_factor": 10, "layer_decay": 0.5})
    network = network_of(config)
    optimiser = make_optimiser(config.optimiser, network)
    rates = {id(each): group["lr"] for group in optimiser.param_groups for each in group["params"]}
    found = {name.rpartition(".")[0]: rates[id(each)] for name, each in network.named_parameters()}
    parts = len(list(network.get_submodule("features").children()))
    assert found["classifier.1"] == 0.1 == optimiser.param_groups[0]["lr"]
    assert found[f"features.{parts - 1}.0"] == 0.005 and found["features.0.0"] == 0.01 * 0.5**parts
    assert len(make_optimiser(tiny_config().optimiser, network).param_groups) == 2


def call(*words: str) -> Result:
    settings = (
        "model.outputs=13",
        "model.variant=tiny",
        f"model.table={tiny_config().model.table}",
        "data.image_size=16",
    )
    named = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(train, [*named, "--per-class", "8", "--epochs", "1", *words], catch_exceptions=False)


def test_a_search_of_other_networks_is_refused(tmp_path: Path, sqlite_store: str) -> None:
    path = saved(tmp_path / "w.pth")
    table = "--set", f"model.table={tiny_config().model.table}", "--set", "model.variant=tiny"
    result = CliRunner().invoke(search, ["--weights", str(path), *table])
    assert (
        result.exit_code == 2
        and "--weights-partial" in result.output
        and "a search of --depth-multiplier" in result.output
    )


def test_training_starts_from_a_logged_run_and_from_what_a_name_means_now(sqlite_store: str) -> None:
    client = MlflowClient()
    assert call("--set", "data.normalise=imagenet").exit_code == 0
    (first,) = client.search_runs(["0"])
    (model,) = client.search_logged_models(["0"])
    client.create_registered_model("digits")
    client.create_model_version("digits", model.model_uri, first.info.run_id, model_id=model.model_id)
    client.set_registered_model_alias("digits", "best", "1")
    for seed, address in enumerate((f"runs:/{first.info.run_id}", "models:/digits@best", "models:/digits/1"), 1):
        result = call("--weights", address, "--seed", str(seed))
        assert result.exit_code == 0, result.output
        assert f"Starts from {address} (" in result.output and model.model_uri in result.output
        found, *_ = client.search_runs(["0"])
        assert found.data.params["model.weights"] == model.model_uri
        assert found.data.params["data.normalise"] == "imagenet"
        assert found.data.params["model.weights_sha256"]
        assert "100.00% of the parameters" in found.data.tags["effv2.weights"]
    table = {"variant": "tiny", "table": tiny_config().model.table, "weights": model.model_uri}
    for data, size in (({"per_class": 8}, 16), ({"per_class": 8, "image_size": 12}, 12)):
        free = TrainConfig.model_validate({"data": data, "model": table})
        (wanted,) = prepare([free], load_once(Reporter()), lambda text: None)
        assert (wanted.data.image_size, wanted.data.normalise) == (size, "imagenet")


def test_the_output_for_everything_else_is_no_class(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 11))
    files = write_served(tmp_path, network, NORMALISATIONS["none"], Square(8), classes=[*"0123456789"], outputs=11)
    settings = json.loads(files["settings"].read_text())
    assert settings["names"] == [*"0123456789", "other"]
    older = {"image_size": 8, "names": settings["names"]}
    for outputs, stored in ((11, settings), (13, settings), (13, older)):
        found = FoundWeights({"classifier.1.bias": torch.zeros(outputs)}, "0", settings=stored)
        assert found.classes == tuple("0123456789")


def test_a_logged_model_of_another_kind_is_refused(sqlite_store: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    files = write_served(tmp_path, network, NORMALISATIONS["none"], Square(8), classes=[*"0123456789"], outputs=10)
    run = TrackedRun(MlflowClient().create_run("0").info.run_id, "0")
    run.log_model(files, as_base64(Image.new("RGB", (8, 8))))
    with pytest.raises(InputError, match=r"model\.weights .*: they belong to another network: features"):
        prepared(f"runs:/{run.run_id}")


def test_missing_weights_matter_only_to_a_training_that_begins_with_them(
    tmp_path: Path, sqlite_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run, or one with a checkpoint, doesn't need them if their full hash is given."""
    path = saved(tmp_path / "a,b=c.pth", 1000)
    plain = "--set", f"optimiser.momentum=0.8,model.weights={path}"
    words = *plain, "--set", f"model.weights_sha256={sha256_of_file(path).upper()}", "--epochs", "2"
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(ConsoleReporter, "epoch", interrupt)
        assert call(*words).exit_code == 130
    path.unlink()
    resumed = call(*words)
    assert resumed.exit_code == 0 and "resuming the run" in resumed.output, resumed.output
    assert "Finished before" in call(*words).output
    (run,) = MlflowClient().search_runs(["0"])
    assert "a new head" in run.data.tags["effv2.weights"] and run.data.params["model.weights"] == str(path)
    for refused in (call(*words, "--seed", "1"), call(*plain)):
        assert refused.exit_code == 2 and f" {path}: no such file" in refused.output
        assert "model.weights_sha256" in refused.output
    assert len(MlflowClient().search_runs(["0"])) == 1


def test_a_new_study_without_its_weights_is_refused_before_its_run(tmp_path: Path, sqlite_store: str) -> None:
    """It is refused even with a known hash. A study that began with the weights is resumed and found finished."""
    path, study = saved(tmp_path / "w.pth"), tmp_path / "tiny.yaml"
    study.write_text(TINY_STUDY.replace("other, table: " + OTHER_TINY_TABLE, "other, table: " + TINY_TABLE))
    known = f"model.weights_sha256={sha256_of_file(path)}"

    def again(weights: str) -> Result:
        words = ["--study", str(study), "--epochs", "1", "--set", f"model.weights={weights}", "--set", known]
        return CliRunner().invoke(ablate, [*words, "--log-model", "none"], catch_exceptions=False)

    refused = again(f"{path}h")
    assert refused.exit_code == 2 and f"{path}h: no such file" in refused.output, refused.output
    assert not MlflowClient().search_runs(["0"])
    assert again(str(path)).exit_code == 0
    path.unlink()
    assert again(str(path)).exit_code == 0 and len(MlflowClient().search_runs(["0"])) == 3


def test_a_run_shows_its_data_once_and_what_it_evaluated(sqlite_store: str) -> None:
    words = "--set", "evaluation.every=2", "--epochs", "3"
    shown = "Data: 10 classes; train 80, validation "
    first = call(*words)
    assert first.exit_code == 0 and first.output.count(shown) == 1, first.output
    assert " images. Training images per class: 8.\n" in first.output
    assert shown not in call(*words).output
    (run,) = MlflowClient().search_runs(["0"])
    epochs = [each.step for each in MlflowClient().get_metric_history(run.info.run_id, "test/accuracy")]
    assert epochs == [2, 3] and run.data.metrics["best/epoch"] in epochs
    assert run.data.metrics["final/test_accuracy"] == run.data.metrics["test/accuracy"]
    assert len(MlflowClient().get_metric_history(run.info.run_id, "train/loss")) == 3
