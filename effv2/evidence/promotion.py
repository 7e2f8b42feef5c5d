"""Whether a model takes the place of the champion, the one in service: only where it is better on evidence."""

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from effv2.config.options import PromotionOptions
from effv2.core.errors import InputError, RunError
from effv2.evidence.answers import NONE
from effv2.evidence.exports import PREDICTIONS
from effv2.evidence.quantities import QUANTITIES, decimal, percent
from effv2.evidence.statistics import LEVEL, mcnemar, p_text
from effv2.evidence.study import Rows, StudyResults, line_of
from effv2.tracking.read import RunRecord, read_artifacts, read_run
from effv2.tracking.registry import CHAMPION, ServedModel, Version, find_champion, find_model, registered
from effv2.tracking.store import check_store, tracking_faults
from effv2.tracking.tags import CONFIG_HASH, OUTCOME, PROMOTION

MILLISECONDS, PARAMETERS = QUANTITIES["inference/single_image_milliseconds"], QUANTITIES["model/parameters"]
Answers = Mapping[str, tuple[str, str]]  # true and predicted class of each test image, by its id


@dataclass(frozen=True)
class Contender:
    """A served model: what it is called, what its run measured, what it answered, and its size in MB, if known."""

    name: str
    run: RunRecord
    answers: Answers
    megabytes: float | None = None

    def right(self) -> np.ndarray:
        """Return which images it got right (bool (N)), in the order of their ids."""
        return np.array([true == predicted for _, (true, predicted) in sorted(self.answers.items())], bool)

    @property
    def accuracy(self) -> float:
        """Return the share of them."""
        return float(self.right().mean())


class Outcome(Enum):
    """What becomes of a model."""

    PROMOTED = "promoted"
    REFUSED = "refused"
    THERE = "it is the champion"


@dataclass(frozen=True)
class Decision:
    """What becomes of a model, in one sentence, with a table of both and the figures by name."""

    outcome: Outcome
    reason: str
    table: Rows = field(default_factory=list)
    figures: Mapping[str, str] = field(default_factory=dict)
    version: Version | None = None  # which was made the champion


def promote(address: str, options: PromotionOptions, *, dry_run: bool = False) -> Decision:
    """Make a model (models:/ID, or runs:/ID of its run) the champion of a registered one if it is better.

    The first one is unopposed, but for the limits. What is refused isn't registered; a dry run changes nothing.
    InputError for a model that can't be judged, RunError for a champion that can't.
    """
    check_store()
    with tracking_faults():
        model = find_model(address)
        candidate = Contender(model.address, *_judged(model.run_id), model.megabytes)
        decision = _against_champion(candidate, options)
        if decision.outcome is Outcome.PROMOTED and not dry_run:
            with registered(options.name, model) as promotion:
                decision = _against_champion(candidate, options)  # perhaps another one by now
                if decision.outcome is Outcome.PROMOTED:
                    described = StudyResults(answers=[decision.reason], table=decision.table).markdown()
                    figures = {f"{PROMOTION}{name}": value for name, value in decision.figures.items()}
                    promotion.finish(described, figures)
                    decision = replace(decision, version=promotion.version)
        return decision


def _judged(run_id: str) -> tuple[RunRecord, Answers]:
    """Return a run and its answers; InputError where it has none to be judged by."""
    run, text = read_run(run_id) if run_id else None, ""
    if run is not None:
        text = read_artifacts(run_id, PREDICTIONS[:1]).get(PREDICTIONS[0], "")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if {"id", "true", "predicted"} <= row.keys()]
    problem = ""
    if run is None:
        problem = "it has no run, or that was deleted"
    elif CONFIG_HASH not in run.tags:
        problem = "its run is none of effv2's"
    elif run.status != "FINISHED" or run.tags.get(OUTCOME) != "complete":
        problem = f"its run is not complete: {run.tags.get(OUTCOME, run.status.lower())}"
    elif not rows:
        problem = "its run has no predictions of test images"
    if run is None or problem:
        raise InputError("model", f"of the run {run_id}", problem, "give one that can be judged")
    return run, {row["id"]: (row["true"], row["predicted"]) for row in rows}


def _against_champion(candidate: Contender, options: PromotionOptions) -> Decision:
    """Decide about a model, with what the registry says now; RunError for a champion that can't be judged."""
    version = find_champion(options.name)
    if version is None:
        return decide(candidate, None, options)
    if version.source == candidate.name:
        return Decision(Outcome.THERE, f"{candidate.name} is the champion already, as {version.words}.")
    return decide(candidate, _champion(version), options)


def _champion(version: Version) -> Contender:
    model: ServedModel | None = None
    with suppress(InputError):  # no logged model, or one that was deleted: its run may still tell
        model = find_model(version.source)
    try:
        judged = _judged(version.run_id or (model.run_id if model else ""))
    except InputError as error:
        problem = f"The champion, {version.words}, can't be judged, since {error.problem}"
        remedy = f"correct that, or take the alias {CHAMPION} away from it in MLflow"
        raise RunError(f"{problem}; {remedy}.") from error
    return Contender(version.words, *judged, model.megabytes if model else None)


def decide(candidate: Contender, champion: Contender | None, options: PromotionOptions) -> Decision:
    """Decide whether a model is within the limits and better than the champion, if there is one.

    Better is which has more right answers to the same images, and p < 0.05 by McNemar's exact test, two-sided: of
    equally good models at most one in forty is taken for better.
    """
    held = {"this model": candidate} | ({champion.name: champion} if champion else {})
    table = _table(held)
    figures = {"accuracy": f"{candidate.accuracy:.6f}", "images": str(len(candidate.answers))}
    against = list(_too_much(candidate, options))
    reason = f"{candidate.name} is unopposed: no version of {options.name} was the champion"
    if champion is not None and (other := _other_images(candidate, champion)):
        against.append(other)
    elif champion is not None:
        ours, theirs, p = mcnemar(candidate.right(), champion.right())
        table[3:3] = [
            ("right where the other is wrong", f"{ours:,}", f"{theirs:,}"),
            ("exact McNemar test", p_text(p), ""),
        ]
        figures |= {"champion": champion.name, "champion_accuracy": f"{champion.accuracy:.6f}", "p": f"{p:.3g}"}
        figures |= {"right_alone": str(ours), "champion_right_alone": str(theirs)}
        shares = f"{percent(candidate.accuracy)} of {len(candidate.answers):,} test images right against "
        shares += percent(champion.accuracy)
        numbers = f"{shares}, alone right on {ours:,} against {theirs:,} (exact McNemar test, {p_text(p)})"
        reason = f"{candidate.name} is better than the champion, {champion.name}: {numbers}"
        if p >= LEVEL or ours <= theirs:
            against.append(f"it isn't better than the champion, {champion.name}: {numbers}")
    if against:
        return Decision(Outcome.REFUSED, f"{candidate.name} isn't promoted: {'; '.join(against)}.", table, figures)
    return Decision(Outcome.PROMOTED, f"{reason}.", table, figures | _costs(candidate))


def _too_much(candidate: Contender, options: PromotionOptions) -> Iterator[str]:
    """Say which limits a model exceeds."""
    limits = (options.max_milliseconds, MILLISECONDS.value(candidate.run), "ms for one image")
    for limit, found, unit in (limits, (options.max_megabytes, candidate.megabytes, "MB of files")):
        if limit is not None and (found is None or found > limit):
            words = "an unknown number of" if found is None else f"{found:.3g}"
            yield f"it takes {words} {unit}, where {limit:g} are allowed"


def _other_images(candidate: Contender, champion: Contender) -> str:
    """Say how the test images of two models differ; empty where they are the same ones."""
    ours, theirs = candidate.answers, champion.answers
    if apart := sorted(ours.keys() ^ theirs.keys()):
        return f"its test images aren't the champion's: {len(apart):,} belong to one of them alone, as {apart[0]}"
    if apart := sorted(id_ for id_, (true, _) in ours.items() if theirs[id_][0] != true):
        words = f"{len(apart):,} test images have other labels than for the champion"
        return f"{words}, as {apart[0]}: {ours[apart[0]][0]}, {theirs[apart[0]][0]}"
    both = [(each.run.params.get("data.image_size"), each.run.images.get("test")) for each in (candidate, champion)]
    (size, one), (other_size, other) = both
    comparable = one and other and (size, one.classes) == (other_size, other.classes) and list(ours) == list(theirs)
    if comparable and one and other and one.digest != other.digest:
        return "its test images have the names of the champion's, but other pixels"
    return ""


def _costs(candidate: Contender) -> dict[str, str]:
    found = {
        "milliseconds": MILLISECONDS.value(candidate.run),
        "megabytes": candidate.megabytes,
        "parameters": PARAMETERS.value(candidate.run),
    }
    return {name: f"{value:.6g}" for name, value in found.items() if value is not None}


def _table(held: Mapping[str, Contender]) -> Rows:
    groups = {name: [each.run] for name, each in held.items()}
    costs = [line for what in (MILLISECONDS, PARAMETERS) for line in line_of(groups, what.name)]
    sizes = (NONE if each.megabytes is None else decimal(each.megabytes) for each in held.values())
    return [
        ("", *held),
        ("test images", *(f"{len(each.answers):,}" for each in held.values())),
        ("test accuracy", *(percent(each.accuracy) for each in held.values())),
        *costs,
        ("files, MB", *sizes),
    ]
