"""Earlier studies in a storage: those that a command with the same definition resumes."""

from typing import Any

from effv2.core import provenance
from effv2.core.internals import study_id
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


def named(plan: Plan, experiment_id: str) -> str:
    """Return the name of a plan's study in the storage, before its number."""
    definition = {**plan.definition, "experiment": experiment_id}
    return f"{plan.kind} {plan.name} {provenance.sha256_of_values(definition)[:12]}"
