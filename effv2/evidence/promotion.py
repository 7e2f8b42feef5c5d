"""Promotion: a model replaces the champion, the one in service, only if the evidence says that it is better."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np

from effv2.core.errors import InputError, RunError
from effv2.core.words import decimal, percent
from effv2.evidence.answers import NONE
from effv2.evidence.exports import PREDICTIONS, predictions_of
from effv2.evidence.quantities import QUANTITIES
from effv2.evidence.statistics import LEVEL, mcnemar, p_text
from effv2.evidence.study import Rows, StudyResults
from effv2.tracking.exports import Answers
from effv2.tracking.models import find_model
from effv2.tracking.read import RunRecord, read_run
from effv2.tracking.registry import CHAMPION, find_champion, promote_version
from effv2.tracking.store import open_store, tracking_faults
from effv2.tracking.tags import OUTCOME, PROMOTION

MILLISECONDS, PARAMETERS = QUANTITIES["inference/single_image_milliseconds"], QUANTITIES["model/parameters"]


class Contender(NamedTuple):
    """A served model: its name, its run, true and predicted class of each test image, by id, and its size, if known."""

    name: str
    run: RunRecord
    answers: Mapping[str, tuple[str, str]]
    megabytes: float | None = None


class Decision(NamedTuple):
    """The decision on a model, its reason, and its figures next to the champion's."""

    verdict: Literal["promoted", "refused", "there"]
    reason: str
    table: Rows

    def of_version(self) -> tuple[str, dict[str, str]]:
        """Return description and tags of a promoted version."""
        titles, *rows = self.table
        sides = list(zip(("", "champion "), range(1, len(titles)), strict=False))
        tags = {f"{PROMOTION}{side}{row[0]}".replace(" ", "_"): row[column] for row in rows for side, column in sides}
        return StudyResults(answers=[self.reason], table=self.table).markdown(), tags


def promote(address: str, name: str, *, dry_run: bool = False, **limits: float | None) -> Decision:
    """Make a model (models:/ID, or runs:/ID of its run) the champion of a registered one if it is better.

    `limits` are max_milliseconds for one image, max_megabytes of files. InputError for a model that can't be judged,
    RunError for a champion that can't.
    """
    open_store(None)
    with tracking_faults():
        model, megabytes = find_model(address)
        candidate = Contender(model.model_uri, *_judged(model.source_run_id), megabytes)
        found = [_against_champion(candidate, name, limits)]

        def judge() -> tuple[str, dict[str, str]] | None:
            found.append(_against_champion(candidate, name, limits))  # perhaps there is another one by now
            return found[-1].of_version() if found[-1].verdict == "promoted" else None

        if found[0].verdict == "promoted" and not dry_run:
            promote_version(name, model, judge)
        return found[-1]


def _judged(run_id: str | None) -> tuple[RunRecord, dict[str, tuple[str, str]]]:
    """Return a run and its answers; InputError if it has none for a judgement."""
    run, problem = read_run(run_id) if run_id else None, "it has no run, or its run was deleted"
    found: Answers = ()
    if run is not None and "weights.name" in run.params:
        problem = "its run evaluated weights, on images that they may have been trained on"
    elif run is not None and (run.status != "FINISHED" or run.tags.get(OUTCOME) != "complete"):
        problem = "its run was pruned, is incomplete, or is not a run of effv2"
    elif run is not None:
        found = predictions_of(run).get(PREDICTIONS[0], found)
        problem = "its run has no predictions of test images, or several for one image"
    answers = {image: (true, predicted) for image, true, predicted, _ in found}
    if run is None or not answers or len(answers) < len(found):
        raise InputError("model", f"of the run {run_id}", problem, "give one that can be judged")
    return run, answers


def _against_champion(candidate: Contender, name: str, limits: Mapping[str, float | None]) -> Decision:
    """Decide on the current state of the registry; RunError for a champion that can't be judged."""
    if (version := find_champion(name)) is None:
        return decide(candidate, None, limits)
    called, megabytes = f"version {version.version} of {name}", None
    if version.source == candidate.name:
        return Decision("there", f"{candidate.name} is already the champion, as {called}.", [])
    with suppress(InputError):  # no logged model, or a deleted one: its run may have the facts
        _, megabytes = find_model(version.source or "")
    try:
        champion = Contender(called, *_judged(version.run_id), megabytes)
    except InputError as error:
        problem = f"The champion, {called}, can't be judged, because {error.problem}"
        raise RunError(f"{problem}; correct that, or remove its alias {CHAMPION}.") from error
    return decide(candidate, champion, limits)


def decide(candidate: Contender, champion: Contender | None, limits: Mapping[str, float | None]) -> Decision:
    """Decide whether a model is within the limits and better than the champion, if there is one.

    Better means more right answers on the same images, and p < 0.05 by McNemar's exact test, two-sided. Of equally good
    models, at most one in forty is called better.
    """
    held = [candidate, *([champion] if champion else [])]
    right = [np.array([t == predicted for _, (t, predicted) in sorted(each.answers.items())]) for each in held]
    against, words = list(_too_much(candidate, limits)), "unopposed: there was no champion"
    table: Rows = [
        ("", "candidate", *(each.name for each in held[1:])),
        ("accuracy", *(percent(each.mean()) for each in right)),
    ]
    if champion and (differ := _other_images(candidate, champion)):
        against.append(differ)
    elif champion:
        *alone, p = mcnemar(*right)
        table += [("right alone", *map(decimal, alone)), ("McNemar", p_text(p), p_text(p))]
        shares, images = f"{table[1][1]} against {table[1][2]}", f"{len(right[0]):,} test images"
        alone_right = f"{alone[0]:,} against {alone[1]:,} where only one is right"
        words = f"better than {champion.name}: {shares} of {images} right, {alone_right} (exact McNemar, {p_text(p)})"
        against += [f"it isn't {words}"] if p >= LEVEL or alone[0] <= alone[1] else []
    figures: dict[str, Sequence[float | None]] = {
        "images": [len(each) for each in right],
        "milliseconds": [MILLISECONDS.value(each.run) for each in held],
        "megabytes": [each.megabytes for each in held],
        "parameters": [PARAMETERS.value(each.run) for each in held],
    }
    table += [(name, *(NONE if n is None else decimal(n) for n in values)) for name, values in figures.items()]
    if against:
        return Decision("refused", f"{candidate.name} is not promoted: {'; '.join(against)}.", table)
    return Decision("promoted", f"{candidate.name} is {words}.", table)


def _too_much(candidate: Contender, limits: Mapping[str, float | None]) -> Iterator[str]:
    """Describe the limits that a model exceeds."""
    found = {"max_milliseconds": MILLISECONDS.value(candidate.run), "max_megabytes": candidate.megabytes}
    for name, limit in limits.items():
        value = found[name]
        if limit is not None and (value is None or not value <= limit):
            yield f"it takes {'unknown' if value is None else decimal(value)} {name[4:]}, but {limit:g} are allowed"


def _other_images(candidate: Contender, champion: Contender) -> str:
    """Describe the difference of two models' test images; empty if they are the same."""
    ours, theirs = candidate.answers, champion.answers
    if apart := sorted(ours.keys() ^ theirs.keys()):
        return f"its test images aren't the champion's: only one of the two has {len(apart):,}, such as {apart[0]}"
    if apart := [id_ for id_, (true, _) in ours.items() if theirs[id_][0] != true]:
        one, other = ours[apart[0]][0], theirs[apart[0]][0]
        return f"{len(apart):,} test images have other labels than the champion's: {apart[0]} is {one}, was {other}"
    its, seen = candidate.run.images.get("test"), champion.run.images.get("test")
    sizes = {each.run.params.get("data.image_size") for each in (candidate, champion)}
    alike = len(sizes) == 1 and list(ours) == list(theirs)
    if alike and its and seen and its.classes == seen.classes and its.digest != seen.digest:
        return "its test images have the names of the champion's, but other pixels"
    return ""
