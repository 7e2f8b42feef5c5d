"""The sections of a report: each study's runs as a table, figures, commands, and where they come from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten

from matplotlib.figure import Figure

from effv2.evidence.arms import tell_arms
from effv2.evidence.claims import SPLIT_SEED, Claims
from effv2.evidence.comparison import NONE, Rows, Told
from effv2.evidence.quantities import EPOCH_SECONDS, EVALUATE_RATE, LARGEST, percent, whole
from effv2.evidence.selection import complete
from effv2.evidence.statistics import wilson
from effv2.evidence.study import Study, studies_of
from effv2.tracking.read import RunRecord
from effv2.tracking.tags import (
    CODE_VERSION,
    COMMAND,
    DATA_DIGEST,
    ERROR,
    GIT_COMMIT,
    GIT_DIRTY,
    LOOKS,
    OUTCOME,
    PLANNED,
    names_in,
)

BEST_TRIALS = 5
MOST_NAMED, LONGEST_REASON = 6, 150  # of the runs that a study lacks; characters
SINGLE_RUNS = "Single runs"
# Where a report tells about them: what a tag is called, and how it is called there.
ENVIRONMENT = {
    GIT_COMMIT: "git commit",
    GIT_DIRTY: "uncommitted changes",
    CODE_VERSION: "code version",
    DATA_DIGEST: "data digest",
    "effv2.machine.processor": "processor",
    "effv2.machine.cores": "cores",
    "effv2.machine.threads": "threads",
    "effv2.machine.accelerator": "accelerator",
    "effv2.machine.memory_gib": "memory, GiB",
    "effv2.machine.system": "system",
    "effv2.machine.python": "Python",
    "effv2.machine.torch": "torch",
    "effv2.machine.torchvision": "torchvision",
    "effv2.machine.mlflow": "mlflow",
}


@dataclass(frozen=True)
class Section:
    """A study in a report. `table` has its titles first; figures are by the word that names their file.

    `missing` says in sentences what there should be and isn't.
    """

    title: str
    description: str
    run_id: str
    table: Rows
    figures: Mapping[str, Figure]
    notes: Sequence[str]
    missing: str
    commands: Sequence[str]
    environment: Rows


def sections_of(runs: Sequence[RunRecord], claims: Claims) -> list[Section]:
    """Return the sections of all studies; those of one name also say their split, or which run they are."""
    studies = studies_of(runs)
    made = [section(study, claims) for study in studies]
    titles = Counter(each.title for each in made)
    return [
        replace(each, title=f"{each.title} ({_apart(study)})") if titles[each.title] > 1 else each
        for each, study in zip(made, studies, strict=True)
    ]


def _apart(study: Study) -> str:
    splits = dict.fromkeys(run.params.get(SPLIT_SEED, "") for run in study.runs)
    run_id = study.parent.run_id[:8] if study.parent else ""
    return f"split {', '.join(splits)}, run {run_id}" if any(splits) else f"run {run_id}"


def section(study: Study, claims: Claims) -> Section:
    """Return a study's section."""
    tell: Callable[[Study, str, Claims], Told]
    tell = {"search": _tell_search, "evaluate-pretrained": _tell_networks}.get(study.kind, tell_arms)
    parent = study.parent
    title = SINGLE_RUNS if parent is None else parent.name
    known = [study.parent] if study.parent is not None else []
    told = tell(study, title, claims)
    return Section(
        title=title,
        description="" if parent is None else parent.params.get("study.description", ""),
        run_id="" if parent is None else parent.run_id,
        table=told.table,
        figures=told.figures,
        notes=told.notes,
        missing=_missing(study),
        commands=list(dict.fromkeys(c for run in known or study.runs if (c := run.tags.get(COMMAND, "")))),
        environment=list(_environment([*known, *study.runs])),
    )


def _missing(study: Study) -> str:
    """Say what a study lacks: runs that failed, and planned ones. One that diverged is an answer to a search."""
    parent = study.parent
    if parent is None:
        return ""
    there = {run.name for run in study.runs if run.status == "FINISHED"}
    reasons = {run.name: run.tags.get(ERROR, "no reason known") for run in study.runs if run.status == "FAILED"}
    diverged = {name for name, reason in reasons.items() if reason.startswith("Diverged:")}
    failed = [name for name in reasons if name not in there and (name not in diverged or study.kind != "search")]
    lacking = [name for name in names_in(parent.tags, PLANNED) if name not in there | reasons.keys()]
    said = []
    if any(run.status == "RUNNING" for run in study.runs):
        said.append("it is being worked on, or its process died")
    if failed:
        said.append(_some("failed", [f"{name} ({shorten(reasons[name], LONGEST_REASON)})" for name in failed]))
    if lacking:
        said.append(_some("planned but not finished", lacking))
    if not study.runs:
        said.append("it has no runs yet")
    goes_on = " The command below goes on with it." if parent.tags.get(COMMAND) else ""
    return f"{'; '.join(said)}.{goes_on if lacking or set(failed) - diverged else ''}" if said else ""


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
        yield "epochs took", f"{_duration(sum(took))}, finished runs: {len(took)}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"


def _tell_networks(study: Study, title: str, claims: Claims) -> Told:
    """Tell of published networks: accuracy on images they weren't fitted to, where those are known, and on all.

    A line a network and set of images.
    """
    rows: Rows = [("network", "top-1 of 1000 [95 % Wilson]", "among the classes present", "on", "images/s")]
    for run in complete(study.runs):
        seen = run.metrics.get("seen/images", 0)
        every = "test images" + (f", {seen:,.0f} of which it was trained on" if seen else "")
        for basis, which in (("unseen", "images that it was not trained on"), ("eval", every)):
            value, images = run.metrics.get(f"{basis}/top1_accuracy"), run.metrics.get(f"{basis}/images", 0.0)
            if value is None:
                continue
            count = int(images) if 0 < images < LARGEST else 0
            interval = wilson(round(value * count), count) if count and 0 <= value <= 1 else None
            shown = percent(value) + (f" [{percent(interval.low)} to {percent(interval.high)}]" if interval else "")
            present, rate = run.metrics.get(f"{basis}/top1_present"), run.metrics.get(EVALUATE_RATE)
            on = f"{count:,} {which}" if count else which
            rows.append((run.name, shown, _shown(present, percent), on, _shown(rate, whole)))
    return Told(rows if len(rows) > 1 else [])


def _shown(value: float | None, text: Callable[[float], str]) -> str:
    return NONE if value is None else text(value)


def _tell_search(study: Study, title: str, claims: Claims) -> Told:
    """Tell of the best trials of a search, and the test accuracy of the one that was chosen."""
    trials = sorted(study.runs, key=lambda run: -run.metrics.get("selected/val_accuracy", -math.inf))
    trials = [run for run in trials if "selected/val_accuracy" in run.metrics]
    outcomes = Counter(run.tags.get(OUTCOME, "unknown") for run in study.runs if run.status in ("FINISHED", "FAILED"))
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    if not trials:
        return Told(notes=[f"Trials: {ended}."] if ended else [])
    names = [
        name
        for name in trials[0].params
        if "." in name and len({run.params.get(name) for run in trials}) > 1 and name != "random.seed"
    ]
    titles = (f"best {min(BEST_TRIALS, len(trials))} of {len(trials)}", *(run.name for run in trials[:BEST_TRIALS]))
    lines = [
        ("validation accuracy", *(percent(run.metrics["selected/val_accuracy"]) for run in trials[:BEST_TRIALS])),
        (
            "test accuracy",
            *(_shown(run.metrics.get("selected/test_accuracy"), percent) for run in trials[:BEST_TRIALS]),
        ),
        *((name, *(_number(run.params.get(name, "")) for run in trials[:BEST_TRIALS])) for name in names),
    ]
    parent = study.parent
    if parent is not None and parent.status == "FINISHED" and parent.ended > parent.started:
        ended += f"; {_duration((parent.ended - parent.started) / 1000)} from its first start to its end"
    looks = len(parent.tags.get(LOOKS, "").split(",")) if parent is not None else 1
    seen = "the best one alone" if looks == 1 else f"{looks}, each the best one when the search had come that far"
    notes = [
        f"Trials: {ended}.",
        f"Trials are chosen on validation; the test set is looked at by {seen}, after it was chosen.",
    ]
    return Told([titles, *lines], notes=notes)


def _number(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
