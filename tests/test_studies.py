"""Study files: the published protocols to the letter, and how arms, options and seeds combine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from effv2.architecture import PUBLISHED_VARIANTS, parse_table
from effv2.config import TrainConfig
from effv2.documents import dotted
from effv2.errors import InputError
from effv2.studies.files import Study, built_in_ablation, built_in_hparam_check, read_study
from effv2.studies.grid import Grid, make_grid
from effv2.studies.plan import LoadedData
from effv2.studies.settings import Layer, option_layer

SWEEPS = Path(__file__).parents[1] / "sweeps"
NO_OPTIONS = Layer({}, dotted)
# Everything that the published notebooks did not do, and what all of them did.
PUBLISHED: dict[str, Any] = {
    "data.sampling": "published", "data.validation_fraction": 0.0, "data.test_fraction": 0.2, "data.split_seed": 42,
    "data.normalise": "none",
    "augment.crop": 0, "augment.flip": False, "augment.trivial_augment": False, "augment.erasing": 0.0,
    "augment.mixup": 0.0, "augment.cutmix": 0.0,
    "model.dropout": 0.2, "model.stochastic_depth": 0.2, "model.table": "",
    "model.depth_multiplier": 1.0, "model.width_multiplier": 1.0, "model.zero_init_residual": False,
    "optimiser.name": "adam", "optimiser.lr": 1e-4, "optimiser.weight_decay": 0.0, "optimiser.clip_norm": 0.0,
    "optimiser.label_smoothing": 0.0, "optimiser.ema_decay": 0.0,
    "schedule.name": "none", "schedule.warmup_epochs": 0,
    "evaluation.train_set": True, "execution.precision": "fp32",
}  # fmt: skip
ABLATIONS = {
    "imagenette": {"size": 32, "per_class": 0, "batch": 128, "epochs": 100},
    "mnist": {"size": 28, "per_class": 0, "batch": 32, "epochs": 5},
    "birds": {"size": 32, "per_class": 100, "batch": 128, "epochs": 50},
    "digits": {"size": 28, "per_class": 0, "batch": 32, "epochs": 20},
}


def check(config: TrainConfig, expected: dict[str, Any]) -> None:
    flat = config.flat()
    assert {name: flat[name] for name in expected} == expected


@pytest.mark.parametrize(("dataset", "protocol"), ABLATIONS.items())
def test_published_ablations(dataset: str, protocol: dict[str, int]) -> None:
    study = read_study(SWEEPS / f"ablate-{dataset}.yaml")
    arms = study.select("all", "variant")
    assert arms == list(PUBLISHED_VARIANTS) and study.baseline == "default"
    for arm in arms:
        own = {
            "data.dataset": dataset, "data.image_size": protocol["size"], "data.per_class": protocol["per_class"],
            "optimiser.batch_size": protocol["batch"], "schedule.epochs": protocol["epochs"],
            "model.outputs": 1000, "model.variant": arm, "stopping.patience": 0,
        }  # fmt: skip
        check(study.arm(arm, NO_OPTIONS), PUBLISHED | own)


@pytest.mark.parametrize("dataset", ["imagenette", "birds"])
@pytest.mark.parametrize("size", [32, 128])
def test_published_training_from_scratch(dataset: str, size: int) -> None:
    own = {
        "data.dataset": dataset, "data.image_size": size, "data.per_class": 100, "optimiser.batch_size": 128,
        "schedule.epochs": 350, "stopping.min_epochs": 150, "stopping.patience": 50, "model.outputs": 0,
        "model.variant": "default",
    }  # fmt: skip
    check(read_study(SWEEPS / f"train-{dataset}-{size}.yaml").config(NO_OPTIONS), PUBLISHED | own)


@pytest.mark.parametrize("dataset", ["imagenette", "birds"])
@pytest.mark.parametrize("size", [32, 128])
def test_published_hyper_parameter_check(dataset: str, size: int) -> None:
    study = read_study(SWEEPS / f"hparam-{dataset}-{size}.yaml").crossed(["none", "plateau"])
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "depth": {"model.depth_multiplier": 0.1},
        "half_layers": {"model.variant": "half_layers"},
        "dropout": {"model.dropout": 0.6},
        "stochastic_depth": {"model.stochastic_depth": 0.5},
    }
    shared = {
        "data.dataset": dataset, "data.image_size": size, "data.per_class": 100, "optimiser.batch_size": 128,
        "schedule.epochs": 350, "stopping.min_epochs": 150, "stopping.patience": 50, "model.outputs": 0,
        "model.variant": "default", "schedule.plateau_factor": 0.1, "schedule.plateau_patience": 10,
    }  # fmt: skip
    assert list(study.arms) == [*changes, *(f"{name}_plateau" for name in changes)] and study.baseline == "default"
    for name, change in changes.items():
        check(study.arm(name, NO_OPTIONS), PUBLISHED | shared | change)
        check(study.arm(f"{name}_plateau", NO_OPTIONS), PUBLISHED | shared | change | {"schedule.name": "plateau"})


def test_built_in_check_changes_the_same_things_as_the_published_one() -> None:
    built_in, published = built_in_hparam_check(), read_study(SWEEPS / "hparam-imagenette-32.yaml")
    assert {name: layer.values for name, layer in built_in.arms.items()} == {
        name: layer.values for name, layer in published.arms.items()
    }
    assert built_in.arm("default", NO_OPTIONS).schedule.epochs == 3


def test_component_ablation_changes_one_component_at_a_time() -> None:
    study = read_study(SWEEPS / "ablate-components.yaml")
    arms = {name: study.arm(name, NO_OPTIONS) for name in study.arms}
    default = PUBLISHED_VARIANTS["default"]
    columns = ("kernel", "expand_ratio", "squeeze_excitation")
    for name, column in (("kernel_5", "kernel"), ("expansion_6", "expand_ratio"), ("expansion_half", "expand_ratio"),
                         ("no_squeeze_excitation", "squeeze_excitation")):  # fmt: skip
        table = parse_table(arms[name].model.table)
        for ours, theirs in zip(table.stages, default.stages, strict=True):
            for other in {*columns, "block", "stride", "in_channels", "out_channels", "layers"} - {column}:
                assert getattr(ours, other) == getattr(theirs, other)
        assert table != default
    assert parse_table(arms["v1_last_stage"].model.table).stages[:-1] == default.stages
    assert len(parse_table(arms["drop_stage_5"].model.table).stages) == 5
    assert all(config.data.validation_fraction > 0 for config in arms.values())


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_file_opens_with_its_command(path: Path) -> None:
    study, first = read_study(path), path.read_text().splitlines()[0]
    entry = {"hparam": "hparam-check", "recipe": "ablate"}.get(path.stem.split("-")[0], path.stem.split("-")[0])
    assert first.startswith(f"# mlflow run . -e {entry} -P study=sweeps/{path.name}")
    assert study.name == path.stem


def make(study: Study, chosen: list[str], seeds: tuple[int, ...] = ()) -> Grid:
    return make_grid(
        "ablate", study, chosen, NO_OPTIONS, seeds=seeds, load=LoadedData(lambda done, total: None), remark=print
    )


def test_one_variant_brings_its_baseline_and_all_brings_all() -> None:
    study = built_in_ablation()
    assert study.select("drop_one", "variant") == ["default", "drop_one"]
    assert study.select("default", "variant") == ["default"]
    grid = make(study, study.select("all", "variant"), (3, 4))
    assert [*grid.wanted] == [(name, seed) for seed in (3, 4) for name in PUBLISHED_VARIANTS]


def test_options_change_what_arms_share_and_empty_ones_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: s\nconfig: {schedule: {epochs: 9}}\narms: {a: {}, b: {optimiser: {lr: 0.5}}}\n")
    options = option_layer({"epochs": "3", "lr": "0.1", "dataset": ""}, {"epochs": "schedule.epochs",
                           "lr": "optimiser.lr", "dataset": "data.dataset"})  # fmt: skip
    a, b = (read_study(path).arm(name, options) for name in "ab")
    assert (a.schedule.epochs, b.schedule.epochs) == (3, 3)
    assert (a.optimiser.lr, b.optimiser.lr) == (0.1, 0.5)
    assert a.data.dataset == "digits"


def test_a_file_without_seeds_keeps_the_configurations_own(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: s\nconfig: {random: {seed: 5}}\narms: {a: {}}\n")
    assert make(read_study(path), ["a"]).wanted == [("a", 5)]


def test_training_refuses_a_study_of_arms() -> None:
    with pytest.raises(InputError, match="use `ablate`"):
        read_study(SWEEPS / "ablate-digits.yaml").config(NO_OPTIONS)
