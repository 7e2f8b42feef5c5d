"""Earlier studies in a storage: those that a command with the same definition resumes."""

from collections.abc import Mapping
from typing import Any

from effv2.config.schema import TrainConfig
from effv2.core import provenance
from effv2.core.internals import study_id
from effv2.core.words import differences
from effv2.studies.plan import Plan
from effv2.studies.storage import Storage

DEFINITION, PARENT = "definition", "parent_run"  # user attributes of Optuna's study


def earlier(plan: Plan, storage: Storage, experiment_id: str) -> tuple[list[Any], ...]:
    """Return all studies, those of the plan's name that have begun, and of these its own, each list newest first."""
    studies = sorted(storage.optuna.get_all_studies(), key=study_id, reverse=True)
    kind = f"{plan.kind} {plan.name} "
    begun = [study for study in studies if study.study_name.startswith(kind) and PARENT in study.user_attrs]
    names = {each.study_name: named(plan.as_in(each.user_attrs[DEFINITION]), experiment_id) for each in begun}
    return studies, begun, [each for each in begun if each.study_name.rpartition("#")[0] == names[each.study_name]]


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two definitions in words. If settings differ, the images that follow are not named."""
    defaults = TrainConfig().flat()  # which identities may leave out
    arms = [{arm: defaults | own for arm, own in each.get("arms", {}).items()} for each in (before, now)]
    found = differences(*arms)
    known = {"arms", "data"} if found else {"arms"}
    return [*found, *differences(*({name: each[name] for name in each.keys() - known} for each in (before, now)))]


def named(plan: Plan, experiment_id: str) -> str:
    """Return the name of a plan's study in the storage, before its number."""
    definition = {**plan.definition, "experiment": experiment_id}
    return f"{plan.kind} {plan.name} {provenance.sha256_of_values(definition)[:12]}"
