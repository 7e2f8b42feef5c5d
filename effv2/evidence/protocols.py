"""Which runs a claim is about: the settings of a protocol's arms, or of those of a study."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from effv2.config.layers import Layer, dotted
from effv2.config.schema import Group
from effv2.config.studies import Published, Settings, Study, open_study
from effv2.core.errors import InputError, nearest
from effv2.evidence.quantities import TEST, TRAIN, quantity
from effv2.tracking.accuracies import BEST_TEST, LAST_TEST
from effv2.tracking.read import RunRecord

PUBLISHED = Path(__file__).with_name("published")
ONLY_ARM = "default"  # of a study that has no arms
SEED_SETTING, SPLIT_SEED = "random.seed", "data.split_seed"
# What may differ between runs that are compared: what pairs them, where the images lie and, but for times, how they
# are computed.
COMPUTED = {"execution.device", "execution.compile", "execution.channels_last", "evaluation.batch_size"}
FREE = {SEED_SETTING, SPLIT_SEED, "data.dir", "data.download", *COMPUTED}


class Protocol(Group):
    """Which runs a claim is about: those that have the settings of `runs` and of an arm.

    A setting that some arm names has TrainConfig's default, or that of `runs`, in an arm that doesn't name it. Instead
    of settings an arm may name a study that has one arm alone, or `study/arm`.
    """

    runs: Settings = Field(default_factory=dict)
    arms: dict[str, Settings | str] = Field(min_length=1)
    over: Literal["seeds", "images"] = "seeds"  # what varies: training, or the test images of a fixed network
    command: str = ""
    others: Literal["same", "default"] = "same"  # settings that nobody names: alike in all runs, or TrainConfig's
    needs: str = ""  # what must be there first
    assumed: str = ""  # what the source doesn't state, said with every claim
    nearest: str = ""  # a protocol with the same arms that comes close, shown where this one has no runs
    published: Published = Published()
    study: str = ""  # of which it is the protocol, and under whose name the published curves stand

    def own(self, arm: str) -> Settings:
        """Return the settings that an arm names, once those of studies are resolved."""
        named = self.arms[arm]
        return named if isinstance(named, dict) else {}

    def settings(self, arm: str) -> Settings:
        """Return all settings of an arm; of those that other arms alone name, the ones in `runs`."""
        return self.runs | self.own(arm)

    def varied(self) -> set[str]:
        """Return the settings in which arms differ."""
        return {name for arm in self.arms for name in self.own(arm)}

    def studies(self) -> dict[str, str]:
        """Return the studies that arms name, by arm."""
        return {arm: named for arm, named in self.arms.items() if isinstance(named, str)}

    def with_study(self, arm: str, folder: Path) -> Protocol:
        """Return it with the settings of the study that an arm names, and with what that assumes if nothing is yet."""
        name, _, of_study = self.studies()[arm].partition("/")
        study = open_study(name, folder)
        arms = self.arms | {arm: _settings_of(study, of_study)}
        return self.model_copy(update={"arms": arms, "assumed": self.assumed or study.assumptions()})


def protocol_title(study: str, free: Sequence[str]) -> str:
    """Return the name of a study's protocol."""
    return f"{study}, free: {', '.join(free)}" if study and free else study


def study_protocols(name: str, free: Sequence[str], folder: Path) -> dict[str, Protocol]:
    """Return the protocol of a study, without the settings that are left `free`, and that of its nearest runs."""
    study = open_study(name, folder)
    arms = {arm: _settings_of(study, arm) for arm in study.arms or [ONLY_ARM]}
    first, published = next(iter(arms.values())), study.published
    if unknown := next((key for key in free if key not in first | published.runs), ""):
        raise InputError("free", unknown, "no setting of the study", nearest(unknown, list(first)))
    kept = set.intersection(*map(set, arms.values())) - set(free)  # what is `auto` in an arm is free too
    shared = {key for key in kept if all(arm[key] == first[key] for arm in arms.values())}
    runs = {key: value for key, value in first.items() if key in shared}
    runs |= {key: value for key, value in published.runs.items() if key not in free}
    seeds = " -P seed=0; then seeds 1 and 2" if " -e train " in study.command else " -P seeds=0,1,2"
    near_runs = {key: value for key, value in published.nearest.items() if key not in free}
    title = protocol_title(name, free)
    near = f"{title}, nearest" if near_runs else ""
    protocol = Protocol(
        runs=runs,
        arms={arm: {key: each[key] for key in each if key in kept - shared} for arm, each in arms.items()},
        command=study.command and study.command + seeds,
        needs=published.needs,
        assumed=study.assumptions(),
        nearest=near,
        published=published,
        study=name,
    )
    differing = ", ".join(f"{key} {value}" for key, value in near_runs.items())
    nearest_protocol = Protocol(runs=runs | near_runs, arms=protocol.arms, assumed=f"{near}: {differing}.")
    return {title: protocol} | ({near: nearest_protocol} if near else {})


def _settings_of(study: Study, arm: str) -> Settings:
    """Return what decides the runs of a study's arm: each setting that has one value and isn't free by its nature."""
    if not study.arms and arm in ("", ONLY_ARM):
        config = study.config(Layer({}, dotted))
    elif arm in study.arms:
        config = study.arm(arm, Layer({}, dotted))
    else:
        wrong = f"has no arm {arm!r}" if arm else "has several arms, so name one, as study/arm"
        raise InputError("study", study.name, wrong, nearest(arm, list(study.arms) or [ONLY_ARM]))
    return {key: value for key, value in config.flat().items() if key not in FREE and value != "auto"}


@cache
def published_runs() -> Mapping[str, Mapping[str, RunRecord]]:
    """Return the post's training runs, as far as it published their curves, by study and arm; one run an arm."""
    found: dict[str, dict[str, RunRecord]] = {}
    with (PUBLISHED / "curves.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            run = RunRecord("", row["arm"], "FINISHED", {}, {}, {}, {TRAIN: {}, TEST: {}})
            run = found.setdefault(row["study"], {}).setdefault(row["arm"], run)
            for name, column in ((TRAIN, "train_accuracy_percent"), (TEST, "test_accuracy_percent")):
                run.history[name][int(row["epoch"])] = round(float(row[column]) / 100, 6)
            test = run.history[TEST]
            run.metrics.update({BEST_TEST: max(test.values()), LAST_TEST: test[max(test)]})
    return found


def published_value(protocol: Protocol, metric: str, arm: str) -> float | None:
    """Return the published figure of an arm: as it was printed, else from the published curve; None without one."""
    printed = protocol.published.figures.get(metric, {})
    run = published_runs().get(protocol.study, {}).get(arm)
    return printed.get(arm, None if run is None else quantity(metric).value(run))
