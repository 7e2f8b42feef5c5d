"""What came out of studies, whatever they study: made once, from tracked runs alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from textwrap import shorten

from effv2.evidence.arms import arms_results
from effv2.evidence.claims import Claims
from effv2.evidence.networks import networks_results
from effv2.evidence.protocols import SEED_SETTING, SPLIT_SEED, RightAnswers, counted
from effv2.evidence.quantities import EPOCH_SECONDS, VALIDATION, duration, number, percent
from effv2.evidence.study import NO_STUDY, NONE, Rows, StudyResults, TrackedStudy, studies_of
from effv2.tracking import tags
from effv2.tracking.read import SELECTED_TEST, SELECTED_VALIDATION, RunRecord

BEST_TRIALS = 5
MOST_NAMED, LONGEST_REASON = 6, 150  # of the runs that a study lacks; characters
# How tags are called where a report tells of the code, the data and the machine.
ENVIRONMENT = {
    tags.GIT_COMMIT: "git commit",
    tags.GIT_DIRTY: "uncommitted changes",
    tags.CODE_VERSION: "code version",
    tags.DATA_DIGEST: "data digest",
    **{f"{tags.MACHINE}{name}": name for name in ("processor", "cores", "threads", "accelerator")},
    f"{tags.MACHINE}memory_gib": "memory, GiB",
    f"{tags.MACHINE}system": "system",
    f"{tags.MACHINE}python": "Python",
    **{f"{tags.MACHINE}{name}": name for name in ("torch", "torchvision", "mlflow")},
}


def results_of(runs: Sequence[RunRecord], claims: Claims, right: RightAnswers) -> list[StudyResults]:
    """Return what came out of all studies; those of one name also say their split, or which run they are."""
    studies = studies_of(runs)
    titles = Counter(study.parent.name for study in studies)
    made = [study_results(study, claims, right) for study in studies]
    for place, (study, results) in enumerate(zip(studies, made, strict=True)):
        if titles[results.title] > 1:
            splits = dict.fromkeys(run.params.get(SPLIT_SEED, "") for run in study.runs)
            split = f"split {', '.join(splits)}, " if any(splits) else ""
            made[place] = replace(results, title=f"{results.title} ({split}run {results.run_id[:8]})")
    return made


def study_results(study: TrackedStudy, claims: Claims, right: RightAnswers) -> StudyResults:
    """Return what came out of a study; `right` reads which images a run of a fixed network got right."""
    if study.kind == "search":
        own = search_results(study)
    elif study.kind == "evaluate-pretrained":
        own = networks_results(study, right)
    else:
        own = arms_results(study, claims)
    parent, known = study.parent, [] if study.parent is NO_STUDY else [study.parent]
    return replace(
        own,
        title=parent.name,
        description=parent.params.get("study.description", ""),
        run_id=parent.run_id,
        missing=_missing(study),
        commands=list(dict.fromkeys(c for run in known or study.runs if (c := run.tags.get(tags.COMMAND, "")))),
        environment=list(_environment([*known, *study.runs])),
    )


def _missing(study: TrackedStudy) -> str:
    """Say what a study lacks: runs that failed, and planned ones. One that diverged is an answer to a search."""
    there = {run.name for run in study.runs if run.status == "FINISHED"}
    failed = {run.name: run.tags.get(tags.ERROR, "no reason known") for run in study.runs if run.status == "FAILED"}
    lacking = [name for name in tags.names_in(study.parent.tags, tags.PLANNED) if name not in there | failed.keys()]
    diverged = {name for name, error in failed.items() if error.startswith("Diverged:")}
    hidden = there | (diverged if study.kind == "search" else set())
    errors = [f"{name} ({shorten(error, LONGEST_REASON)})" for name, error in failed.items() if name not in hidden]
    found = ["it is being worked on, or its process died"] if any(run.status == "RUNNING" for run in study.runs) else []
    for words, names in {"failed": errors, "planned but not finished": lacking}.items():
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            found.append(f"{counted(len(names), 'run')} {words}: {', '.join(names[:MOST_NAMED])}{more}")
    if not study.runs:
        found.append("it has no runs yet")
    resumes = study.parent.tags.get(tags.COMMAND) and (lacking or failed.keys() - there - diverged)
    return f"{'; '.join(found)}.{' The command below resumes it.' if resumes else ''}" if found else ""


def _environment(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    for tag, words in ENVIRONMENT.items():
        if values := dict.fromkeys(run.tags[tag] for run in runs if tag in run.tags):
            yield words, ", ".join(values)
    sets = dict.fromkeys(
        f"{images.name}, {images.images:,} images of {len(images.classes)} classes, digest {images.digest}: {context}"
        for run in runs
        for context, images in sorted(run.images.items())
    )
    if sets:
        yield "data", "; ".join(sets)
    if took := [sum(curve.values()) for run in runs if (curve := run.history.get(EPOCH_SECONDS))]:
        yield "epochs took", f"{duration(sum(took))}, finished runs: {len(took)}"


def search_results(study: TrackedStudy) -> StudyResults:
    """Return what came out of a search: its best trials, and the test accuracy of the one that was chosen."""
    runs = study.in_order()
    ranked = [run for run in runs if SELECTED_VALIDATION in run.metrics]
    ranked.sort(key=lambda run: -run.metrics[SELECTED_VALIDATION])
    named = [name for name in (ranked[0].params if ranked else ()) if "." in name and name != SEED_SETTING]
    searched = [name for name in named if len({run.params.get(name) for run in ranked}) > 1]
    rows = [
        (
            run.name,
            run.tags.get(tags.OUTCOME, run.status.lower()),
            run.metrics.get(SELECTED_VALIDATION),
            max(run.history.get(VALIDATION, ()), default=0),
            *map(run.params.get, searched),
            run.run_id,
        )
        for run in runs
    ]
    shown = ranked[:BEST_TRIALS]
    table: Rows = [(f"best {len(shown)} of {len(ranked)}", *(run.name for run in shown))]
    for words, metric in (("validation accuracy", SELECTED_VALIDATION), ("test accuracy", SELECTED_TEST)):
        table.append((words, *(percent(run.metrics[metric]) if metric in run.metrics else NONE for run in shown)))
    for name in searched:
        texts = [run.params.get(name, "") for run in shown]
        table.append((name, *(text if math.isnan(number(text)) else f"{number(text):.4g}" for text in texts)))
    sentence, metrics = "No trial was chosen yet.", {}
    for best in (run for run in ranked if run.run_id == study.parent.tags.get(tags.BEST_RUN)):
        metrics = {name: best.metrics[name] for name in (SELECTED_VALIDATION, SELECTED_TEST) if name in best.metrics}
        tested = f", {percent(metrics[SELECTED_TEST])} on the test set" if SELECTED_TEST in metrics else ""
        sentence = f"Best: **{best.name}**, {percent(metrics[SELECTED_VALIDATION])} on validation{tested}."
    return StudyResults(
        sentence=sentence,
        table=table if ranked else [],
        notes=_notes_on_trials(study, bool(ranked)),
        metrics=metrics,
        files={"trials.csv": [("trial", "state", "validation accuracy", "epochs", *searched, "run_id"), *rows]},
    )


def _notes_on_trials(study: TrackedStudy, any_ranked: bool) -> list[str]:
    """Say how the trials ended, and how often the test set was looked at."""
    parent, ended = study.parent, [run for run in study.runs if run.status in ("FINISHED", "FAILED")]
    outcomes = Counter(run.tags.get(tags.OUTCOME, "unknown") for run in ended)
    words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    if not any_ranked:
        return [f"Trials: {words}."] if words else []
    if parent.status == "FINISHED" and parent.ended > parent.started:
        words += f"; {duration((parent.ended - parent.started) / 1000)} from its first start to its end"
    looks = len(parent.tags.get(tags.LOOKS, "").split(","))
    seen = "the best one alone" if looks == 1 else f"{looks}, each the best one when the search had come that far"
    how = f"Trials are chosen on validation; the test set is looked at by {seen}, after it was chosen."
    return [f"Trials: {words}.", how]
