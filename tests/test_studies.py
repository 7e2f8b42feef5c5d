"""Study files: the published protocols, and how arms, options and seeds combine."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from torchvision.models import EfficientNet_B4_Weights, efficientnet_b4

from effv2.api.calls import SHORT_EPOCHS
from effv2.architecture import PUBLISHED_VARIANTS, build_model, count_gflops, parse_table
from effv2.config.layers import Layer, Written
from effv2.config.options import StudyOptions
from effv2.config.schema import TrainConfig
from effv2.config.studies import SWEEPS, Sources, Study, open_study, read_study
from effv2.core.errors import InputError
from effv2.core.reporter import LineReporter, Reporter
from effv2.data.dataset import load_once
from effv2.studies.earlier import differing
from effv2.studies.forecast import forecast
from effv2.studies.grid import Grid, make_grid
from effv2.studies.queue import NAME, Trials
from effv2.studies.seeds import ACCURACY, AutoSeeds
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import DATA_DIGEST, IDENTITY
from tests.conftest import ROOT

NO_OPTIONS: Layer = {}
PUBLISHED = [name for name in sorted(path.stem for path in SWEEPS.glob("*.yaml")) if open_study(name).protocol.stated]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_of_a_published_protocol_has_one_source(name: str) -> None:
    study, flat = open_study(name), TrainConfig().flat()
    sourced = [each for kind in Sources.model_fields for each in study.protocol.settings(kind)]
    assert len(sourced) == len(set(sourced))
    assert not [each for each in sourced if "." in each and each not in flat]  # others are sentences
    assert study.base.keys() <= set(sourced)
    assert {each for each in sourced if each in flat} >= {
        "model.dropout",
        "model.stochastic_depth",
        "evaluation.train_set",
    }


def test_hyper_parameter_check_crosses_each_change_with_plateau() -> None:
    for name in ("hparam-digits", "hparam-imagenette-32", "hparam-imagenette-128", "hparam-birds-32"):
        study = open_study(name)
        plain = study.select_checks("all", "none")
        assert study.select_checks("all", "plateau") == [f"{arm}_plateau" for arm in plain]
        assert study.select_checks("all", "both") == [*plain, *study.select_checks("all", "plateau")]
        for arm in plain:
            without, under = (study.arm(each, NO_OPTIONS).flat() for each in (arm, f"{arm}_plateau"))
            assert without["schedule.name"] == "none" and under == without | {"schedule.name": "plateau"}
    assert study.select_checks("dropout", "both") == ["default", "dropout", "default_plateau", "dropout_plateau"]
    assert study.select_checks("dropout", "none") == ["default", "dropout"]
    assert open_study("hparam-digits").arm("default", NO_OPTIONS).schedule.epochs == SHORT_EPOCHS  # as --help says
    assert open_study("search").config(NO_OPTIONS).schedule.epochs == SHORT_EPOCHS
    with pytest.raises(InputError, match=r"check droput: no such change in study [\w-]+; did you mean 'dropout'"):
        study.select_checks("droput", "both")


def test_a_study_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_study("ablate-mnist").name == "ablate-mnist"
    (tmp_path / "ablate-mnist").write_text("name: mine\nconfig: {}\n")
    assert open_study("ablate-mnist").name == open_study(str(tmp_path / "ablate-mnist")).name == "mine"
    with pytest.raises(InputError, match=r"study ablate-mnits: no file and no study .* the nearest is 'ablate-mnist'"):
        open_study("ablate-mnits")
    with pytest.raises(InputError, match=r"study sweeps/ablate-mnist.yaml: no file and no study of that name"):
        open_study("sweeps/ablate-mnist.yaml")


def test_an_installed_package_holds_the_studies(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT / "effv2", project / "effv2")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(project)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if name.startswith("effv2/sweeps/")}
    assert held == {path.stem for path in SWEEPS.glob("*.yaml")}


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


def test_fused_b4_begins_with_torchvisions_b4() -> None:
    study = read_study(SWEEPS / "ablate-fused-b4.yaml")
    tables = {name: study.arm(name, NO_OPTIONS).model.build_table() for name in study.arms}
    with torch.device("meta"):
        theirs, ours = (model.state_dict() for model in (efficientnet_b4(), build_model(tables["none"], 1000)))
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
    published = EfficientNet_B4_Weights.IMAGENET1K_V1.meta["_ops"]
    assert count_gflops(tables["none"], 1000, 380) == pytest.approx(published, abs=5e-4)
    fused = {name: "".join(stage.block for stage in table.stages) for name, table in tables.items()}
    assert list(fused.values()) == ["MMMMMMM", "FFFMMMM", "FFFFFMM", "FFFFFFF"]


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_file_opens_with_its_command(path: Path) -> None:
    study, first = read_study(path), path.read_text().splitlines()[0]
    entry = "hparam-check" if path.stem.startswith("hparam") else "ablate" if study.arms else "train"
    entry = "search" if path.stem.startswith("search") else entry
    assert first.startswith(f"# mlflow run . -e {entry} -P study={path.stem}")
    assert study.name == path.stem


def make(study: Study, chosen: list[str], seeds: tuple[int, ...] = ()) -> Grid:
    load = load_once(Reporter())
    return make_grid("ablate", study, chosen, NO_OPTIONS, StudyOptions(seeds=seeds), load=load, reporter=Reporter())


def test_one_variant_brings_its_baseline_and_all_brings_all() -> None:
    study = open_study("ablate")
    assert study.select("drop_one") == ["default", "drop_one"]
    assert study.select("default") == ["default"]
    assert study.select("half_layers, drop_one") == ["default", "half_layers", "drop_one"]
    with pytest.raises(
        InputError, match=r"variant half_layer: no variant, and no arm of study [\w-]+; did you mean 'half_layers'"
    ):
        study.select("drop_one,half_layer")
    assert study.with_variants("half_layers,drop_one") == study  # all share one queue
    three = study.with_variants("drop_one,efficientnet_v2_m")
    assert three.select("drop_one,efficientnet_v2_m") == ["default", "drop_one", "efficientnet_v2_m"]
    every = study.with_variants("all,efficientnet_v2_m")
    assert every.select("all,efficientnet_v2_m") == [*PUBLISHED_VARIANTS, "efficientnet_v2_m"]
    another = study.with_variants("efficientnet_v2_m")
    assert another.select("efficientnet_v2_m") == ["default", "efficientnet_v2_m"]
    assert another.arm("efficientnet_v2_m", NO_OPTIONS).model.variant == "efficientnet_v2_m"
    grid = make(study, study.select("all"), (3, 4))
    assert [*grid.trials] == [f"{name}, seed {seed}" for seed in (3, 4) for name in PUBLISHED_VARIANTS]


def test_a_single_number_is_one_seed_and_a_message_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    load, study, arms = load_once(Reporter()), open_study("ablate"), ["default"]
    for seeds in ("3", "0"):
        options = StudyOptions.model_validate({"seeds": seeds})
        grid = make_grid("ablate", study, arms, NO_OPTIONS, options, load=load, reporter=LineReporter())
        assert [*grid.trials] == [f"default, seed {seeds}"]
    assert [line for line in capsys.readouterr().err.splitlines() if "seed" in line] == [
        "The only seed is 3; for 3 seeds give `seeds` 0-2."
    ]


def test_options_change_what_arms_share(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: s\nconfig: {schedule: {epochs: 9}}\narms: {a: {}, b: {optimiser: {lr: 0.5}}}\n")
    options = {"schedule.epochs": Written("3"), "optimiser.lr": Written("0.1", "set optimiser.lr")}
    a, b = (read_study(path).arm(name, options) for name in "ab")
    assert (a.schedule.epochs, b.schedule.epochs) == (3, 3)
    assert (a.optimiser.lr, b.optimiser.lr) == (0.1, 0.5)
    assert a.data.dataset == "digits"


def test_a_file_without_seeds_keeps_the_configurations_own(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: s\nconfig: {random: {seed: 5}}\narms: {a: {}}\n")
    assert make(read_study(path), ["a"]).trials == {"a, seed 5": {"arm": "a", "seed": 5}}


def test_training_refuses_a_study_of_arms() -> None:
    with pytest.raises(InputError, match="use the command ablate"):
        read_study(SWEEPS / "ablate-digits.yaml").config(NO_OPTIONS)


def auto(
    reached: Callable[..., float],
    margin: float = 0.0,
    most: int = 8,
    names: tuple[str, ...] = ("base", "arm"),
    **more: Any,
) -> tuple[Any, Trials]:
    """Train half of the wanted runs at a time until none is wanted; `reached` gives the accuracy of an arm with a seed.

    With a split per seed, it gives the accuracy on that split.
    """
    arms, trials = dict.fromkeys(names, TrainConfig()), dict[str, FrozenTrial]()
    rule = AutoSeeds(arms, names, "base", margin=margin, most=most, **more)
    while True:
        wanted = rule.trials(rule.rounds(trials)[-1].counts)
        if not (left := [name for name in wanted if name not in trials]):
            return rule.rounds(trials)[-1], trials
        for name in left[: (len(left) + 1) // 2]:
            value = reached(*wanted[name].values())
            attributes = {NAME: name} | ({} if math.isnan(value) else {ACCURACY: value})
            state = TrialState.FAIL if math.isnan(value) else TrialState.COMPLETE
            hour = timedelta(hours=1)
            made = create_trial(state=state, value=None if math.isnan(value) else value, user_attrs=attributes)
            made.params, made.number = dict(wanted[name]), len(trials)
            made.datetime_start, made.datetime_complete = datetime(2026, 1, 1), datetime(2026, 1, 1) + hour
            trials[name] = made


def test_seeds_are_added_until_the_answer_is_known() -> None:
    noise = [0.01, -0.012, 0.003, -0.006, 0.011, -0.004, 0.008, -0.009]
    clear, _ = auto(lambda arm, seed: 0.5 + 0.1 * (arm == "arm") + noise[seed] / 10)
    assert clear.counts == {"base": 3, "arm": 3} and "decided" in clear.ending and "beats base" in clear.lines()[0]
    equal, _ = auto(lambda arm, seed: 0.5 + noise[seed if arm == "arm" else seed - 1])
    assert equal.counts == {"base": 8, "arm": 8} and "8 seeds" in equal.ending
    near, _ = auto(lambda arm, seed: 0.5 + noise[seed if arm == "arm" else seed - 1], margin=0.2)
    assert near.counts == {"base": 3, "arm": 3} and "no difference above" in near.lines()[0]
    dear, trials = auto(lambda arm, seed: 0.5 + noise[seed if arm == "arm" else seed - 1], budget=9.0)
    assert len(trials) == 8 and "budget" in dear.ending and dear.hours == 8
    broken, trials = auto(lambda arm, seed: math.nan if (arm, seed) == ("arm", 1) else 0.5 + noise[seed])
    assert broken.counts == {"base": 3, "arm": 3} and broken.ending


def test_no_seed_is_trained_that_could_not_count() -> None:
    noise = [0.01, -0.012, 0.003, -0.006, 0.011, -0.004, 0.008, -0.009]
    _, trials = auto(lambda arm, seed: 0.5 + noise[(seed + (arm == "arm")) % 8], most=6)
    for trial in trials.values():  # they become other seeds, from before the rule
        trial.user_attrs[NAME] = trial.user_attrs[NAME].replace("seed ", "seed 10")
        trial.params["seed"] += 100
    earlier = {trial.user_attrs[NAME]: trial for trial in trials.values()}
    rule = AutoSeeds(dict.fromkeys(("base", "arm"), TrainConfig()), ("base", "arm"), "base", most=6, before=(*earlier,))
    assert rule.rounds(earlier)[-1].counts == {"base": 0, "arm": 0} and rule.rounds(earlier)[-1].complete
    few = {name: trial for name, trial in earlier.items() if name[-1] in "01"}  # two of each arm
    assert replace(rule, before=(*few,)).rounds(few)[-1].counts == {"base": 3, "arm": 3}


def test_a_race_gives_seeds_to_what_may_be_the_best() -> None:
    means = {"base": 0.5, "low": 0.4, "high": 0.7, "near": 0.701}
    noise = [0.01, -0.012, 0.003, -0.006, 0.011, -0.004, 0.008, -0.009]
    won, _ = auto(lambda arm, seed: means[arm] + noise[seed] / 10, names=("base", "low", "high"), race=True)
    assert won.counts == dict.fromkeys(("base", "low", "high"), 3) and won.lines()[0] == "high is the best of 3."
    tied, _ = auto(lambda arm, seed: means[arm] + noise[seed] / 10, names=tuple(means), race=True)
    assert tied.counts == {"base": 3, "low": 3, "high": 8, "near": 8}
    assert tied.lines()[0] == "near leads; may be better: high."


def test_auto_seeds_of_several_splits_have_one_each_and_pair_by_split() -> None:
    noise = [0.01, -0.012, 0.003, -0.006, 0.011, -0.004, 0.008, -0.009]
    of_split = [0.2, -0.3, 0.1, 0.3, -0.1, 0.25, -0.2, 0.0]  # both arms share it

    def value(arm: str, seed: int, split: int) -> float:
        assert seed == split
        return 0.5 + of_split[split] + (arm == "arm") * (0.1 + noise[seed] / 10)

    clear, trials = auto(value, own_splits=True)
    assert clear.counts == {"base": 3, "arm": 3} and "arm, split 2, seed 2" in trials
    assert "beats base by 10.00 points" in clear.lines()[0] and clear.lines()[0].endswith("3 splits")
    near, _ = auto(lambda arm, seed, split: value(arm, seed, split) - 0.1 * (arm == "arm"), own_splits=True)
    assert near.counts == {"base": 8, "arm": 8} and "undecided" in near.lines()[0]
    # On splits that share images, the same accuracies are weaker evidence.
    low = [auto(value, own_splits=True, overlap=each, most=3)[0].answers["arm"].interval.low for each in (0.0, 0.25)]
    assert low[1] < low[0]


def test_an_arm_that_opens_again_gets_more() -> None:
    reached = {"base": [0.5, 0.51, 0.49, 0.75], "a": [0.6, 0.61, 0.59], "b": [0.5, 0.53, 0.47]}

    def value(arm: str, seed: int) -> float:
        return reached[arm][seed] if seed < len(reached[arm]) else 0.5 + seed / 1000

    _, trials = auto(value, names=("base", "a", "b"))
    rounds = AutoSeeds(dict.fromkeys(reached, TrainConfig()), tuple(reached), "base", most=8).rounds(trials)
    assert rounds[1].counts == {"base": 4, "a": 3, "b": 4}
    assert rounds[2].counts["a"] == 4 and rounds[2].counts["base"] == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("arms: {on: {}, off: {}}\nbaseline: off", (["on", "off"], "off", ())),
        ("arms: {yes: {}, no: {}}", (["yes", "no"], "yes", ())),
        (
            "arms: {1: {}, 0.5: {}, 2020-01-01: {}, null: {}, true: {}}",
            (["1", "0.5", "2020-01-01", "null", "true"], "1", ()),
        ),
        ("arms: {a: {}}\nseeds: 0", (["a"], "a", (0,))),
        ("arms: {a: {}}\nseeds: 012", (["a"], "a", (12,))),
        ("arms: {a: {}}\nseeds: [3, 1]", (["a"], "a", (3, 1))),
        ("arms: {a: {}}\nseeds: 0-2", (["a"], "a", (0, 1, 2))),
        ("arms: {a: {}}\nseeds: 7, 2-3", (["a"], "a", (7, 2, 3))),
        ("seeds: 2-0", "line 2: seeds 2-0: must be at most 10,000 whole numbers of at least 0, such as 0,1,2 or 0-2"),
        (
            "seeds: 0-4000000000",
            "line 2: seeds 0-4000000000: must be at most 10,000 whole numbers",
        ),
        ("seeds: 0-2,1", "line 2: seeds 0-2,1: the same seed appears twice; remove one"),
        ("arms: {a: {augment: {flip: on}}}\ndescription: no", (["a"], "a", ())),
        ("x: &x {on: 1}", "line 2: x: unknown key 'x'"),
        ("arms: {a: {}, b: {}}\nbaseline: no", "line 3: baseline no: is not an arm; choose from: a, b"),
        (
            "arms: {a: {}, b: {}}\nbaseline: false",
            "line 3: baseline False: must be a string; write it in q",
        ),
        ("arms: {a: {model: {on: 1}}}", "line 2: arms.a.model.on: unknown key 'on'"),
        ("on: 1", "line 2: on: unknown key 'on'"),
        ("seeds: true", "line 2: seeds True: must be at most 10,000 whole numbers"),
        ("arms: {a: {data: {per_class: 1:30}}}", "line 2: arms.a.data.per_class 1:30: must be a whole number"),
    ],
)
def test_keys_and_values_are_what_they_look_like(text: str, expected: Any, tmp_path: Path) -> None:
    """YAML 1.1 reads on and no as booleans, 012 as ten, 1:30 as ninety."""
    path = tmp_path / "study.yaml"
    path.write_text(f"name: yes\n{text}\n")
    if isinstance(expected, str):
        with pytest.raises(InputError, match=re.escape(expected)):
            read_study(path)
        return
    study = read_study(path)
    assert study.name == "yes" and ([*study.arms], study.baseline, study.seeds) == expected
    for arm in study.arms:
        assert study.arm(arm, {}).augment.flip == ("flip" in text)


def test_a_forecast_counts_runs_that_are_older_than_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make(open_study("ablate"), ["default"], (5, 6))
    params = {
        name: str(value) for name, value in grid.arms["default"].flat().items() if name != "optimiser.layer_decay"
    }
    metrics = {"time/total_train_seconds": 3600.0, "selected/test_accuracy": 0.5}
    images, code = grid.definition["data"]["default"], grid.definition["code"]
    planned = (grid.configuration({"arm": "default", "seed": 6}).hash(), images, code)
    identities = [("another", images, code), (planned[0], images, "older code"), planned]
    tags = [dict(zip(IDENTITY, each, strict=True)) for each in identities]
    runs = [RunRecord("", "", "FINISHED", params, metrics, each) for each in tags]
    slow = {"time/total_train_seconds": 72_000.0}
    runs.append(RunRecord("", "", "FINISHED", params, slow, tags[-1] | {DATA_DIGEST: "other images"}))
    monkeypatch.setattr("effv2.studies.forecast.read_experiment", lambda *_: runs)
    lines, _ = forecast(grid, StudyOptions(), load_once(Reporter()), "0", Reporter(), begun=None)
    assert lines[0].startswith("2 runs, about 2.0 hours of training in total, estimated from finished runs.")
    assert "Finished already: 1 run of these, which saves 1.0 hours." in lines
    rules = {"study.max_seeds": "3", "study.looks": "once"}
    one_look = replace(grid, stamps=rules)
    lines, once = forecast(one_look, StudyOptions(), load_once(Reporter()), "0", Reporter(), begun=None)
    _, later = forecast(one_look, StudyOptions(fresh=True), load_once(Reporter()), "0", Reporter(), begun=None)
    assert "widens the intervals to those of every look up to 30 seeds" in lines[-1]
    assert float(once[1][2].split()[0]) > 1.5 * float(later[1][2].split()[0])
    for started, table in ((0, later), (1, once)):  # the study began before, or after, the runs that it has (0)
        study = RunRecord("study", "", "RUNNING", rules, {}, {}, started=started)
        found = forecast(grid, StudyOptions(), load_once(Reporter()), "0", Reporter(), begun=study)
        assert found[1] == table and not any("Finished already" in line for line in found[0])


def test_options_override_the_rules_of_a_study_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text((SWEEPS / "ablate.yaml").read_text() + "max_seeds: 5\nmargin: 0.02\n")
    study = open_study(str(tmp_path / "own.yaml"))
    how: dict[str, Any] = {"load": load_once(Reporter()), "reporter": Reporter()}
    for given, most, margin in (({}, 5, 0.02), ({"max_seeds": 9, "margin": 0.1}, 9, 0.1)):
        options = StudyOptions.model_validate({"seeds": "auto", **given})
        grid = make_grid("ablate", study, ["default", "drop_one"], NO_OPTIONS, options, **how)
        assert (grid.stamps["study.max_seeds"], grid.stamps["study.margin"]) == (most, margin)
    with pytest.raises(InputError, match="max_seeds 9: the study began with 5"):
        grid.resumed({"study.max_seeds": "5", "study.margin": "0.1"}, lambda _: [])


def test_a_difference_of_settings_is_named_without_its_consequences() -> None:
    before = {"arms": {"a": {}, "b": {"model.dropout": 0.5}}, "data": {"a": "1", "b": "1"}, "code": "c"}
    images = {"evaluation.batch_norm_images": 600}
    now = {"arms": {"a": images, "b": before["arms"]["b"] | images}, "data": {"a": "2", "b": "2"}, "code": "c"}  # type: ignore[index]
    assert differing(before, now) == ["evaluation.batch_norm_images was 0, is 600"]
    assert differing(before, {**before, "data": {"a": "2", "b": "1"}}) == ["data: a was 1, is 2"]


def test_a_list_of_seeds_says_how_its_test_could_be_less_strict() -> None:
    assert "give `max_seeds` 3" in make(open_study("ablate"), ["default"], (0, 1, 2)).about[-1]
    assert len(make(open_study("ablate"), ["default"], (0, 1)).about) == 1


def test_splits_hold_the_seeds() -> None:
    study = open_study("ablate").model_copy(update={"splits": 2, "seeds": (0,)})
    grid = make(study, ["default"])
    assert [*grid.trials] == ["default, split 0, seed 0", "default, split 1, seed 0"]
    assert [grid.configuration(each).data.split_seed for each in grid.trials.values()] == [0, 1]
    planned = {"study.max_seeds": 1, "study.looks": "once", "study.splits": 2}
    assert grid.stamps == planned and grid.definition["splits"] == 2
    more = make(study.model_copy(update={"seeds": (0, 1)}), ["default"])
    with pytest.raises(InputError, match="2: the study began for one look, at 1 seed"):
        more.resumed({name: str(value) for name, value in planned.items()}, lambda _: [])
    own = make(study.model_copy(update={"seeds": ()}), ["default"])  # the seed of each arm's configuration
    assert own.trials == grid.trials
    how: dict[str, Any] = {"load": load_once(Reporter()), "reporter": Reporter()}

    def automatic(splits: int, **options: Any) -> Grid:
        of_splits, given = study.model_copy(update={"splits": splits}), StudyOptions(seeds="auto", **options)
        return make_grid("ablate", of_splits, ["default", "drop_one"], NO_OPTIONS, given, **how)

    for splits, options in ((2, {}), (4, {"max_seeds": 5})):
        with pytest.raises(InputError, match=f"has {splits} splits, and each of these seeds needs one"):
            automatic(splits, **options)
    auto_grid = automatic(4)
    assert [*auto_grid.wanted({})][2:4] == ["default, split 1, seed 1", "drop_one, split 1, seed 1"]
    assert len(auto_grid.wanted({})) == 6 and auto_grid.stamps["study.max_seeds"] == 4
    assert auto_grid.auto is not None and auto_grid.auto.overlap == pytest.approx(0.25)  # from digits' test fraction
    with pytest.raises(InputError, match="the study began for one look, at 2 seeds"):
        auto_grid.resumed({"study.max_seeds": "2", "study.looks": "once"}, lambda _: [])  # it had a list of seeds
    assert auto_grid.resumed({"study.max_seeds": "4"}, lambda _: []).auto.most == 4  # type: ignore[union-attr]
