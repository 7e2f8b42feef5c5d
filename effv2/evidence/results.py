"""What came out of studies, whatever they study: made once, from tracked runs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from textwrap import shorten

from effv2.evidence.arms import arms_results
from effv2.evidence.claims import Claims
from effv2.evidence.networks import networks_results
from effv2.evidence.protocols import SPLIT_SEED
from effv2.evidence.quantities import EPOCH_SECONDS, duration
from effv2.evidence.selection import RightAnswers
from effv2.evidence.study import StudyResults, TrackedStudy, studies_of
from effv2.evidence.trials import trials_results
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import (
    CODE_VERSION,
    COMMAND,
    DATA_DIGEST,
    ERROR,
    GIT_COMMIT,
    GIT_DIRTY,
    MACHINE,
    PLANNED,
    names_in,
)

MOST_NAMED, LONGEST_REASON = 6, 150  # of the runs that a study lacks; characters
# How tags are called where a report tells of the code, the data and the machine.
ENVIRONMENT = {GIT_COMMIT: "git commit", GIT_DIRTY: "uncommitted changes", CODE_VERSION: "code version"}
ENVIRONMENT |= {DATA_DIGEST: "data digest"}
ENVIRONMENT |= {f"{MACHINE}{name}": name for name in ("processor", "cores", "threads", "accelerator")}
ENVIRONMENT |= {f"{MACHINE}memory_gib": "memory, GiB", f"{MACHINE}system": "system", f"{MACHINE}python": "Python"}
ENVIRONMENT |= {f"{MACHINE}{name}": name for name in ("torch", "torchvision", "mlflow")}


def results_of(runs: Sequence[RunRecord], claims: Claims, right: RightAnswers) -> list[StudyResults]:
    """Return what came out of all studies; those of one name also say their split, or which run they are."""
    studies = studies_of(runs)
    made = [study_results(study, claims, right) for study in studies]
    titles = Counter(each.title for each in made)
    return [
        replace(each, title=f"{each.title} ({_apart(study)})") if titles[each.title] > 1 else each
        for each, study in zip(made, studies, strict=True)
    ]


def _apart(study: TrackedStudy) -> str:
    splits = dict.fromkeys(run.params.get(SPLIT_SEED, "") for run in study.runs)
    run_id = study.parent.run_id[:8] if study.parent else ""
    return f"split {', '.join(splits)}, run {run_id}" if any(splits) else f"run {run_id}"


def study_results(study: TrackedStudy, claims: Claims, right: RightAnswers) -> StudyResults:
    """Return what came out of a study; `right` reads which images a run of a fixed network got right."""
    if study.kind == "search":
        own = trials_results(study)
    elif study.kind == "evaluate-pretrained":
        own = networks_results(study, right)
    else:
        own = arms_results(study, claims)
    parent, known = study.parent, [study.parent] if study.parent is not None else []
    return replace(
        own,
        title=study.title,
        description="" if parent is None else parent.params.get("study.description", ""),
        run_id="" if parent is None else parent.run_id,
        missing=_missing(study),
        commands=list(dict.fromkeys(c for run in known or study.runs if (c := run.tags.get(COMMAND, "")))),
        environment=list(_environment([*known, *study.runs])),
    )


def _missing(study: TrackedStudy) -> str:
    """Say what a study lacks: runs that failed, and planned ones. One that diverged is an answer to a search."""
    parent = study.parent
    if parent is None:
        return ""
    there = {run.name for run in study.runs if run.status == "FINISHED"}
    reasons = {run.name: run.tags.get(ERROR, "no reason known") for run in study.runs if run.status == "FAILED"}
    diverged = {name for name, reason in reasons.items() if reason.startswith("Diverged:")}
    failed = [name for name in reasons if name not in there and (name not in diverged or study.kind != "search")]
    lacking = [name for name in names_in(parent.tags, PLANNED) if name not in there | reasons.keys()]
    found = []
    if any(run.status == "RUNNING" for run in study.runs):
        found.append("it is being worked on, or its process died")
    if failed:
        found.append(_some("failed", [f"{name} ({shorten(reasons[name], LONGEST_REASON)})" for name in failed]))
    if lacking:
        found.append(_some("planned but not finished", lacking))
    if not study.runs:
        found.append("it has no runs yet")
    resumes = parent.tags.get(COMMAND) and (lacking or set(failed) - diverged)
    return f"{'; '.join(found)}.{' The command below goes on with it.' if resumes else ''}" if found else ""


def _some(words: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{len(names)} {'run' if len(names) == 1 else 'runs'} {words}: {', '.join(names[:MOST_NAMED])}{more}"


def _environment(runs: Iterable[RunRecord]) -> Iterator[tuple[str, str]]:
    known = list(runs)
    for tag, words in ENVIRONMENT.items():
        values = list(dict.fromkeys(run.tags[tag] for run in known if tag in run.tags))
        if values:
            yield words, ", ".join(values)
    sets = dict.fromkeys(
        f"{images.name}, {images.images:,} images of {len(images.classes)} classes, digest {images.digest}: {context}"
        for run in known
        for context, images in sorted(run.images.items())
    )
    if sets:
        yield "data", "; ".join(sets)
    took = [sum(curve.values()) for run in known if (curve := run.history.get(EPOCH_SECONDS))]
    if took:
        yield "epochs took", f"{duration(sum(took))}, finished runs: {len(took)}"
