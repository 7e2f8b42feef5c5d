"""The results of studies, made once, only from tracked runs: of searches and networks here, of arms in `study`."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from effv2.core.errors import joined
from effv2.core.figures import accuracy_against_cost
from effv2.core.words import duration, number, percent, whole
from effv2.evidence.answers import NONE
from effv2.evidence.claims import Claims
from effv2.evidence.protocols import SEED_SETTING, RightAnswers
from effv2.evidence.quantities import EPOCH_SECONDS, EVALUATE_RATE, SHOWN, VALIDATION, quantity
from effv2.evidence.statistics import LEVEL, holm, mcnemar, p_text, right_on_shared, wilson
from effv2.evidence.study import Rows, StudyResults, arms_results, line_of, near_chance, shared_settings
from effv2.tracking import tags
from effv2.tracking.read import SELECTED_TEST, SELECTED_VALIDATION, RunRecord
from effv2.tracking.studies import NO_STUDY, TrackedStudy, complete, studies_of

CsvRows = list[tuple[Any, ...]]
BEST_TRIALS = 5
COMMON = {  # settings that a description of trainings names
    "data.dataset": "{}",
    "data.per_class": "{} images per class",
    "data.image_size": "{0}x{0} pixels",
    "execution.precision": "{}",
    "schedule.epochs": "trained up to epoch {}",
}
PAIRS_WITH_P = 6  # with more pairs, only pairs.csv has the p-values
ENOUGH_TO_RANK = 100
OF_ANY_IMAGES = ("top1_accuracy", "top1_present", "top5_accuracy", "loss", "ece")
IMAGES = {  # of a ranking, by origin
    "unseen": "images of ImageNet's validation set, on which published weights were not trained",
    "seen": "images of ImageNet's training set",
    "unknown": "images whose names don't show whether they are ImageNet's",
}
CAUTIONS = {  # on the use of such images
    "seen": " Published weights were trained on these images, so this says little about other images.",
    "unknown": " Whether the weights were trained on these images is not known.",
}
Ranked = Mapping[str, np.ndarray]  # the images that each network got right, the best first: label to bool (N)
SETS = {"unseen": "images that it was not trained on", "unknown": "images that it may not have been trained on"}


def results_of(runs: Sequence[RunRecord], claims: Claims, right: RightAnswers) -> list[StudyResults]:
    """Return the results of all studies. The titles of studies of equal name also show when they began."""
    studies = studies_of(runs)
    names = Counter(study.parent.name for study in studies)
    return [study_results(study, claims, right, names[study.parent.name] > 1) for study in studies]


def study_results(study: TrackedStudy, claims: Claims, right: RightAnswers, of_several: bool = False) -> StudyResults:
    """Return the results of a study. `right` reads which images are right in a run of a fixed network."""
    if study.kind == "search":
        own = search_results(study)
    elif study.kind == "evaluate-pretrained":
        own = networks_results(study, right)
    else:
        own = arms_results(study, claims)
    parent, known = study.parent, [] if study.parent is NO_STUDY else [study.parent]
    about = parent.params.get("study.description", ""), own.description, _in_short(study.runs)
    began = datetime.fromtimestamp(parent.started / 1000, timezone.utc)
    return replace(
        own,
        title=f"{parent.name} (begun {began:%Y-%m-%d %H:%M} UTC)" if of_several else parent.name,
        description=" ".join(filter(None, about)),
        run_id=parent.run_id,
        missing=study.missing(),
        commands=list(dict.fromkeys(c for run in known or study.runs if (c := run.tags.get(tags.COMMAND, "")))),
        environment=list(_environment([*known, *study.runs])),
    )


def _in_short(runs: Sequence[RunRecord]) -> str:
    """Name the images, the precision and the length of trainings, as far as all have the same."""
    common = shared_settings(runs)
    words = [text.format(common[name]) for name, text in COMMON.items() if common.get(name, "0") not in ("", "0")]
    return f"Data: {', '.join(words)}." if words else ""


def _environment(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """Yield the code, the machine and the data of runs, and the total time of their epochs."""
    of_code = (tags.GIT_COMMIT, tags.GIT_DIRTY, tags.CODE_VERSION, tags.DATA_DIGEST)
    there = sorted({tag for run in runs for tag in run.tags if tag.startswith((*of_code, tags.MACHINE))})
    for tag in there:
        words = tag.removeprefix("effv2.").removeprefix("machine.").replace("_", " ")
        yield words, ", ".join(dict.fromkeys(run.tags[tag] for run in runs if tag in run.tags))
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
    """Return the results of a search: its best trials, and the test accuracy of the chosen one."""
    runs = study.in_order()
    tried = [run for run in runs if SELECTED_VALIDATION in run.metrics]
    ranked = sorted(tried, key=lambda run: -run.metrics[SELECTED_VALIDATION])
    named = [name for name in (ranked[0].params if ranked else ()) if "." in name and name != SEED_SETTING]
    searched = [name for name in named if len({run.params.get(name) for run in ranked}) > 1]
    shown = {run.name: [run] for run in ranked[:BEST_TRIALS]}
    table: Rows = [(f"best {len(shown)} of {len(ranked)}", *shown)]
    table += [*line_of(shown, SELECTED_VALIDATION), *line_of(shown, SELECTED_TEST)]
    for name in searched:
        texts = [run.params.get(name, "") for (run,) in shown.values()]
        table.append((name, *(text if math.isnan(number(text)) else f"{number(text):.4g}" for text in texts)))
    sentence, metrics = "No trial was chosen yet.", {}
    for best in (run for run in ranked if run.run_id == study.parent.tags.get(tags.BEST_RUN)):
        metrics = {name: best.metrics[name] for name in (SELECTED_VALIDATION, SELECTED_TEST) if name in best.metrics}
        tested = f", {percent(metrics[SELECTED_TEST])} on the test set" if SELECTED_TEST in metrics else ""
        sentence = f"Best: {best.name}, {percent(metrics[SELECTED_VALIDATION])} on validation{tested}."
    void = near_chance({run.name: [run] for run in ranked[:1]}, quantity(SELECTED_VALIDATION))
    trials: list[tuple[Any, ...]] = [("trial", "state", "validation accuracy", "epochs", *searched, "run_id")]
    for run in runs:
        state, accuracy = run.tags.get(tags.OUTCOME) or run.status.lower(), run.metrics.get(SELECTED_VALIDATION)
        epochs = max(run.history.get(VALIDATION, ()), default=0)
        trials.append((run.name, state, accuracy, epochs, *map(run.params.get, searched), run.run_id))
    return StudyResults(
        answers=[*void, sentence],
        short=" ".join([*void, sentence]),
        table=table if ranked else [],
        notes=_notes_on_trials(study, bool(ranked)),
        metrics=metrics,
        files={"trials.csv": trials},
    )


def _notes_on_trials(study: TrackedStudy, any_ranked: bool) -> list[str]:
    """Describe how the trials ended, and how often the test set was evaluated."""
    parent, ended = study.parent, [run for run in study.runs if run.status in ("FINISHED", "FAILED")]
    outcomes = Counter(run.tags.get(tags.OUTCOME, "unknown") for run in ended)
    words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    if not any_ranked:
        return [f"Trials: {words}."] if words else []
    if parent.status == "FINISHED" and parent.ended > parent.started:
        words += f"; {duration((parent.ended - parent.started) / 1000)} from its first start to its end"
    looks = len([*filter(None, parent.tags.get(tags.LOOKS, "").split(","))]) or int(tags.BEST_RUN in parent.tags)
    seen = ("none yet", "only the best one")[looks] if looks < 2 else f"{looks}, each the best one at its time"
    how = f"Trials are chosen on validation. Evaluated on the test set, after the choice: {seen}."
    return [f"Trials: {words}.", how]


def networks_results(study: TrackedStudy, right: RightAnswers) -> StudyResults:
    """Return the results of an evaluation of networks. `right` reads which images are right in a run."""
    runs = {run.name: run for run in complete(study.in_order())}
    ranked, images, origin = _rank(runs, right)
    tests = [(one, other, *mcnemar(ranked[one], ranked[other])) for one, other in combinations(ranked, 2)]
    pairs = pd.DataFrame(tests, columns=["better", "worse", "only_better_right", "only_worse_right", "p"])
    pairs["p_holm"] = [p for p, _ in holm(pairs["p"].tolist())]
    pairs["told_apart"] = pairs["p_holm"] < LEVEL
    rows, heads = [tuple(pairs), *pairs.itertuples(index=False)], _heads(runs.values())
    sentence = _sentence(runs, ranked, origin, pairs, heads)
    ordered = {label: runs[label] for label in dict.fromkeys([*ranked, *runs])}
    title = f"top-1 of {heads}, {len(next(iter(ranked.values()), ())):,} {origin} images"
    table, figures = _ranking(runs, ranked, title)
    named = [(label, name, run.metrics[name]) for label, run in runs.items() for name in run.metrics]
    return StudyResults(
        answers=[sentence],
        short=sentence,
        table=_table(ordered.values(), heads),
        details=_details(ordered, images),
        metrics={f"{label}/{name}": value for label, name, value in named if name.endswith(OF_ANY_IMAGES)},
        files={"ranking.csv": table, "pairs.csv": rows} if ranked else {},
        figures=figures,
    )


def _ranking(runs: Mapping[str, RunRecord], ranked: Ranked, title: str) -> tuple[CsvRows, dict[str, Figure]]:
    """Return a table of the networks that were ranked, and the figure of their accuracies and costs, by its name."""
    metrics = sorted({name for run in runs.values() for name in run.metrics})
    table: CsvRows = [("network", "run_id", "right", "images", "low", "high", *metrics)]
    shares, costs = {}, {}
    for label, answers in ranked.items():
        run, count, interval = runs[label], int(answers.sum()), wilson(int(answers.sum()), len(answers))
        table.append((label, run.run_id, count, len(answers), *interval, *map(run.metrics.get, metrics)))
        shares[label] = (count / len(answers), *interval)
        costs[label] = run.metrics.get("model/gflops"), 1000 / run.metrics.get(EVALUATE_RATE, math.inf)
    return table, {"accuracy against cost": accuracy_against_cost(shares, costs, title)} if len(ranked) > 1 else {}


def _rank(runs: Mapping[str, RunRecord], right: RightAnswers) -> tuple[Ranked, str, str]:
    """Rank networks by the predictions of their runs, all for the same images; return also these, and their origin."""
    answers = {label: found for label, run in runs.items() if (found := right(run))}
    if not answers:
        return {}, "eval", "unknown"
    correct = right_on_shared(answers.values())
    params = runs[next(iter(answers))].params
    images, origin = params.get("evaluation.ranked_on", "eval"), params.get("evaluation.ranked_origin", "unknown")
    return dict(sorted(zip(answers, correct, strict=True), key=lambda item: -int(item[1].sum()))), images, origin


def _heads(runs: Iterable[RunRecord]) -> str:
    """Describe the number of outputs of networks."""
    return joined(sorted({run.params.get("evaluation.outputs", "1000") for run in runs}, key=int), "or")


def _sentence(runs: Iterable[str], ranked: Ranked, origin: str, pairs: pd.DataFrame, heads: str) -> str:
    """Describe which networks are better, and which pairs are undecided."""
    lost = [label for label in runs if label not in ranked]
    missing = f" Not ranked, because predictions are missing: {joined(lost)}." if lost else ""
    if not ranked:
        return f"No network was ranked.{missing}"
    size, caution = len(next(iter(ranked.values()))), CAUTIONS.get(origin, "")
    better, open_ = dict[str, list[str]](), dict[str, list[str]]()
    for pair in pairs.itertuples():
        p = f" ({p_text(pair.p_holm)})" if len(pairs) <= PAIRS_WITH_P else ""
        (better if pair.told_apart else open_).setdefault(pair.better, []).append(f"{pair.worse}{p}")
    words = [f"{one} is better than {joined(others)}" for one, others in better.items()]
    either = "; ".join(f"{one} or {joined(others, 'or')}" for one, others in open_.items())
    words += [f"undecided which is better: {either}"] if either else []
    how = f" (exact McNemar tests, Holm-corrected for {len(pairs)}, {LEVEL:.0%} level)" if len(pairs) else ""
    what = "; ".join(words) or "only one network, nothing to compare"
    few = f" So few images rarely decide. Evaluate more than {ENOUGH_TO_RANK}." if size < ENOUGH_TO_RANK else ""
    return f"Top-1 over {heads} classes on {size:,} {IMAGES[origin]}{how}: {what}.{few}{caution}{missing}"


def _table(runs: Iterable[RunRecord], heads: str) -> Rows:
    """Return one row per network and set of images: those that it wasn't trained on, if known, and all."""
    rows: Rows = [("network", f"top-1 of {heads} [95 % Wilson]", "among the classes present", "on", "images/s")]
    for run in runs:
        seen, rate = run.metrics.get("seen/images", 0), run.metrics.get(EVALUATE_RATE)
        every = "test images" + (f", {seen:,.0f} of which it was trained on" if seen else "")
        for images, which in (SETS | {"eval": every}).items():
            value, present, count = (run.metrics.get(f"{images}/{name}") for name in (*OF_ANY_IMAGES[:2], "images"))
            if value is None or count is None:
                continue
            shown = f"{percent(value)} [{wilson(round(value * count), int(count)).text(percent)}]"
            cells = (shown, NONE if present is None else percent(present), f"{count:,.0f} {which}")
            rows.append((run.name, *cells, NONE if rate is None else whole(rate)))
    return rows if len(rows) > 1 else []


def _details(runs: Mapping[str, RunRecord], images: str) -> Rows:
    """Return the other figures of networks and their weights: one row each, one column per network."""
    if not runs:
        return []
    groups = {label: [run] for label, run in runs.items()}
    names = [*(f"{images}/{name}" for name in OF_ANY_IMAGES[2:]), *SHOWN]
    params = {"weights.name": "weights", "weights.sha256": "their SHA-256", "weights.verified": "published, verified"}
    weights = [(words, *(run.params.get(name, NONE) for run in runs.values())) for name, words in params.items()]
    figures = [line for name in names for line in line_of(groups, name)]
    return [("network", *runs), *figures, *weights, ("run", *(run.run_id for run in runs.values()))]
