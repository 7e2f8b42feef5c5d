"""The results of a study from tracked runs: the runs that it uses, missing runs, and its arms side by side."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from effv2.architecture import VARIANTS, parse_table, unlike
from effv2.core.errors import joined
from effv2.core.figures import accuracy_against_time, accuracy_curves, bars, forest
from effv2.core.words import counted, percent, points
from effv2.evidence import protocols
from effv2.evidence.answers import NONE, NOTHING_YET, Arms, Held, hold
from effv2.evidence.claims import Claims, published_runs
from effv2.evidence.judge import FEW_IMAGES
from effv2.evidence.protocols import RightAnswers, has, is_like, machine_of, pair_of, split_of, that_count
from effv2.evidence.quantities import CURVES, TRAIN, TRAIN_SECONDS, Quantity, over_time, quantity, shown_for
from effv2.evidence.statistics import FEWEST, TINY, Estimate
from effv2.tracking import tags
from effv2.tracking.read import BEST_TEST, LAST_TEST, SELECTED_TEST, SELECTED_VALIDATION, RunRecord
from effv2.tracking.studies import NO_STUDY, TrackedStudy, arm_in, complete

DIFFERENCES = "differences"  # the first figure
OF_TABLES = {"model.variant", "model.table"}
NEAR_CHANCE = 0.03  # accuracy above chance level
MOST_DRAWN = 20  # single runs: with more, there is only the table
Rows = list[tuple[str, ...]]  # of a table, its titles first


@dataclass(frozen=True)
class StudyResults:
    """The results of a study, made once for the terminal, the report, MLflow and exports."""

    title: str = ""
    description: str = ""
    run_id: str = ""
    answers: Sequence[str] = ()  # what makes them void, and a sentence per variant
    short: str = ""  # the same without estimates of what would decide, for a cell
    table: Rows = field(default_factory=list)
    warnings: Sequence[str] = ()
    details: Rows = field(default_factory=list)  # a second table, with the other figures
    notes: Sequence[str] = ()  # how to read them
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by the words in the names of their files
    missing: str = ""  # a description of missing runs
    commands: Sequence[str] = ()
    environment: Rows = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the study's run, as are the files
    files: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)
    held: Held | None = None  # the arms against their baseline, if there are any

    def markdown(self, links: str = "") -> str:
        """Write answers, links, description, tables, remarks on them, and commands as Markdown."""
        answers = "\n".join(f"- {cell(each)}" for each in self.answers)
        missing = f"**Not complete:** {cell(self.missing)}" if self.missing else ""
        first = answers, links, cell(self.description), ruled(self.table), missing, *map(cell, self.warnings)
        commands = (f"    {' '.join(command.split())}" for command in self.commands)
        return "\n\n".join(filter(None, (*first, ruled(self.details), *map(cell, self.notes), *commands)))


def ruled(rows: Rows) -> str:
    """Write a table in Markdown."""
    rows = [*rows[:1], *(("---",) * len(titles) for titles in rows[:1]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows)


def cell(text: object) -> str:
    """Write a text for a cell of a table, or a line, in Markdown."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"(\||(?<=\])\()", r"\\\1", str(text))).split())


def values_of(groups: Mapping[str, Sequence[RunRecord]], name: str) -> dict[str, list[float]]:
    """Return a quantity of the runs of each group, for groups that have it."""
    return {group: found for group, runs in groups.items() if (found := quantity(name).values(runs))}


def line_of(groups: Mapping[str, Sequence[RunRecord]], name: str) -> Rows:
    """Return a quantity as a row with one cell per group: mean ± standard deviation. No row if all groups lack it.

    A time to an accuracy has no mean if a run doesn't reach it. It always has a row, because the study requires it.
    """
    what, values = quantity(name), values_of(groups, name)
    cells = dict.fromkeys(groups, NONE)
    for group, each in values.items():
        spread = f" ± {what.text(statistics.stdev(each))}" if len(set(each)) > 1 and math.inf not in each else ""
        missed = f"not reached by {each.count(math.inf)} of {len(each)}" if math.inf in each else ""
        cells[group] = missed or what.text(statistics.fmean(each)) + spread
    return [(what.words, *cells.values())] if values or what.over_time else []


def arms_results(study: TrackedStudy, claims: Claims) -> StudyResults:
    """Return the results of an ablation, a hyper-parameter check, or single runs, each of which is an arm."""
    alone = study.parent is NO_STUDY
    found: dict[str, list[RunRecord]] = {}
    for run in complete(study.in_order()):
        arm = run.tags.get(tags.ARM) or run.params.get("model.variant") or run.name
        found.setdefault(f"{run.name}, run {run.run_id[:8]}" if alone else arm, []).append(run)
    if not found:
        return StudyResults(answers=[NOTHING_YET])
    arms = {arm: list({pair_of(run): run for run in runs}.values()) for arm, runs in found.items()}
    held = hold(arms, study.parent)
    void, (published, protocol) = near_chance(arms, held.what), _published_curves(arms, claims)
    asked = tags.names_in(study.parent.tags, tags.SHOWN)
    results = StudyResults(
        answers=void,
        table=_table(arms, held, asked),
        warnings=list(_warnings(arms, held.what)),
        notes=list(_notes(arms, protocol, held)),
        figures={} if alone and len(arms) > MOST_DRAWN else _figures(arms, study.parent.name, published, held),
    )
    if alone:
        return results
    runs = [(arm, run) for arm, of_arm in arms.items() for run in of_arm]
    quantities = shown_for(run for _, run in runs) | {name: quantity(name) for name in asked}
    shown = [what for what in quantities.values() if what.values(run for _, run in runs)]
    rows = [(arm, run.tags.get(tags.SEED), run.run_id, *(what.value(run) for what in shown)) for arm, run in runs]
    return replace(
        results,
        description=_what_arms_are(arms, held),
        answers=[*void, *held.sentences()],
        held=held,
        short=" ".join([*void, *held.sentences(short=True)]),
        warnings=[*_counts(study, found, held), *results.warnings],
        details=_details(arms, quantities, held.what.name),
        # Metrics that runs log under these names: accuracies and the time of training.
        metrics={
            f"{arm}/{name}": statistics.fmean(values)
            for name, what in quantities.items()
            if not what.metric and not what.fixed
            for arm, values in values_of(arms, name).items()
        },
        files={"comparison.csv": [("variant", "seed", "run_id", *(what.words for what in shown)), *rows]},
    )


def shared_settings(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the settings that all runs have in common, by name."""
    return dict(set.intersection(*(set(run.params.items()) for run in runs))) if runs else {}


def _what_arms_are(arms: Arms, held: Held) -> str:
    """Name the stages and settings of each arm that the baseline has not, in one sentence."""
    baseline = next(arm for arm, other in held.others.items() if not other)
    base, said = shared_settings(arms.get(baseline, ())), list[str]()
    for arm, own in ((arm, shared_settings(runs)) for arm, runs in arms.items()):
        texts = [one.get("model.table") or VARIANTS.get(one.get("model.variant", "")) for one in (own, base)]
        words = unlike(*(parse_table(str(text)) for text in texts)) if all(texts) else []
        names = protocols.DEFAULTS.keys() - protocols.FREE - (OF_TABLES if words else set())
        pairs = ((name, own[name] or "none", base[name] or "none") for name in sorted(names & own.keys() & base.keys()))
        words += [f"{name} {mine} instead of {theirs}" for name, mine, theirs in pairs if mine != theirs]
        said += [f"{arm} has {', '.join(words)}"] if words else []
    return f"Unlike {baseline}, {'; '.join(said)}." if said else ""


def images_apart(study: TrackedStudy, right: RightAnswers) -> Rows:
    """Return the share of each arm's runs that get a test image right, first the images on which arms differ most.

    `right` reads which images are right in a run. Empty if there is only one arm, or no image that all runs have.
    """
    arms: dict[str, list[Mapping[str, bool]]] = {}
    for run in complete(study.in_order()):
        if answers := right(run):
            arms.setdefault(run.tags.get(tags.ARM, ""), []).append(answers)
    if len(arms) < 2:
        return []
    shared = set.intersection(*(set(answers) for of_arm in arms.values() for answers in of_arm))
    shares = {image: [statistics.fmean(each[image] for each in of_arm) for of_arm in arms.values()] for image in shared}
    apart = sorted(shares, key=lambda image: (min(shares[image]) - max(shares[image]), image))
    return [("image", *arms), *((image, *(f"{share:.3f}" for share in shares[image])) for image in apart)]


def _counts(study: TrackedStudy, found: Arms, held: Held) -> Iterator[str]:
    """Describe runs that don't count (repeated, failed, missing, without a figure, beyond the plan) or are older."""
    failed = Counter(run.tags.get(tags.ARM, "") for run in study.runs if run.status == "FAILED")
    over = {run.name for run in study.runs if run.status in ("FINISHED", "FAILED")}
    missing = Counter(arm_in(name) for name in study.planned if name not in over)
    for arm in dict.fromkeys([*found, *failed, *missing]):
        runs, values = found.get(arm, []), held.values.get(arm, {})
        counts = {
            "replaced by a later one of the same seed": len(runs) - len(set(map(pair_of, runs))),
            "failed": failed[arm],
            "not finished": missing[arm],
            f"without {held.what.words}": len(runs) - len(held.what.values(runs)),
            f"beyond {held.looks.counted(len({split for split, _ in values}))}, left out of the verdict": len(values)
            - len(that_count(values, held.looks)),
        }
        if words := [f"{counted(count, 'run')} {why}" for why, count in counts.items() if count]:
            yield f"{arm}: {', '.join(words)}."
    older = sum(run.started < study.parent.started for runs in found.values() for run in runs)
    if older and "study.max_seeds" in study.parent.params:
        begun = f"{counted(older, 'run')} had begun before this study named its largest number of seeds"
        yield f"{begun}, so its intervals are wider: those of {held.looks.text()}. `fresh` repeats these runs."


def _figures(arms: Arms, title: str, published: Mapping[str, RunRecord], held: Held) -> dict[str, Figure]:
    figures, one_machine = dict[str, Figure](), len({machine_of(run) for runs in arms.values() for run in runs}) == 1
    if drawn := {arm: each.drawn() for arm, each in held.answers.items()}:
        unit = f"difference from {held.against or 'its reference'}, percentage points"
        figures[DIFFERENCES] = forest(drawn, f"{title}: differences", unit, 100 * held.margin)
    for name, metric in CURVES.items():
        having = {arm: [run for run in runs if run.history.get(metric)] for arm, runs in arms.items()}
        logged = {arm: runs for arm, runs in having.items() if runs}
        if logged and not (name == "validation accuracy" and "test accuracy" in figures):
            curves = {arm: [run.history[metric] for run in runs] for arm, runs in logged.items()}
            theirs = {arm: run.history[metric] for arm, run in published.items() if metric in run.history}
            figures[name] = accuracy_curves(curves, f"{title}: {name}", theirs)
            timed = {arm: [over_time(run, metric) for run in runs] for arm, runs in logged.items()}
            if metric != TRAIN and one_machine and all(map(all, timed.values())):
                figures["accuracy against time"] = accuracy_against_time(timed, f"{title}: {name} and training time")
    if seconds := values_of(arms, TRAIN_SECONDS):
        figures["training time"] = bars(seconds, f"{title}: training", "seconds")
    return figures


def _table(arms: Arms, held: Held, asked: Sequence[str]) -> Rows:
    """Return the short table, one row per arm: the deciding accuracy, the difference, costs, requested columns."""
    last = [LAST_TEST] if held.what.name == BEST_TEST else []  # next to a maximum over epochs
    columns: Rows = [("variant", *arms), ("runs", *(str(len(runs)) for runs in arms.values()))]
    for name in (held.what.name, *last):
        columns += line_of(arms, name)
    if held.answers:
        title = f"minus {held.against}" if held.against else "difference"
        columns.append((f"{title} [interval]", *(held.cell(arm) for arm in arms)))
    for name in (TRAIN_SECONDS, *asked, "model/parameters"):
        columns += line_of(arms, name)
    return list(zip(*columns, strict=True))


def _details(arms: Arms, quantities: Mapping[str, Quantity], decisive: str) -> Rows:
    """Return one row per figure and one column per arm, accuracies with intervals."""
    rows: Rows = [("variant", *arms)]
    for name, what in quantities.items():
        rows += line_of(arms, name)
        if name in (BEST_TEST, SELECTED_TEST, decisive):
            rows += _intervals(arms, what)
    return rows


def _intervals(arms: Arms, what: Quantity) -> Rows:
    """Return rows with the intervals of a quantity's mean and of one more run, if there are enough runs.

    Equal values don't show how much they vary. Runs of several splits are not independent.
    """
    lines = ["95 % interval of the mean, at every look"], ["range of a single re-run (95 %)"]
    for runs in arms.values():
        estimate = Estimate(what.values(runs) or [math.nan])
        enough = estimate.n >= FEWEST and estimate.deviation > TINY and len(set(map(split_of, runs))) == 1
        for line, interval in zip(lines, (estimate.interval(), estimate.prediction()), strict=True):
            line.append(interval.within(what.possible).text(percent) if enough else NONE)
    return [(f"{words}, {what.words}", *cells) for words, *cells in lines if set(cells) != {NONE}]


def _published_curves(arms: Arms, claims: Claims) -> tuple[dict[str, RunRecord], str]:
    """Return the published runs of arms that follow, or nearly follow, a published protocol, and its name."""
    for source, published in published_runs().items():
        for protocol in (claims.protocols[name] for name in (source, claims.protocols[source].nearest) if name):
            pairs = product(arms, published)
            alike = {arm: their for arm, their in pairs if all(is_like(run, protocol, their) for run in arms[arm])}
            if alike:
                return {arm: published[their] for arm, their in alike.items()}, source
    return {}, ""


def is_near_chance(accuracy: float, chance: float, images: float) -> bool:
    """Say whether an accuracy on so many images hardly differs from chance level."""
    return accuracy < chance + max(NEAR_CHANCE, 2 * math.sqrt(chance * (1 - chance) / images))


def near_chance(arms: Arms, what: Quantity) -> list[str]:
    """Warn of networks that have learned nothing."""
    part = "validation" if what.name == SELECTED_VALIDATION else "test"
    tests = [each for runs in arms.values() for run in runs if (each := run.images.get(part)) and each.classes]
    classes, images = {len(each.classes) for each in tests}, min((each.images or math.inf for each in tests), default=0)
    means = {arm: statistics.fmean(values) for arm, values in values_of(arms, what.name).items()}
    one = len(classes) == 1
    low = [arm for arm, mean in means.items() if one and is_near_chance(mean, 1 / min(classes), images)]
    if not low:
        return []
    chance = f"{percent(1 / min(classes))} for {min(classes)} classes"
    if len(low) < len(means):
        return [f"Near chance level, {chance}: {joined(low)}."]
    found = f"All networks are near chance level, {chance}, so their differences mean little."
    trained = [run.metrics[TRAIN] for runs in arms.values() for run in runs if TRAIN in run.metrics]
    lags = trained and not is_near_chance(statistics.fmean(trained), 1 / min(classes), images)
    if lags and all(has(run, "evaluation.batch_norm_images", 0) for runs in arms.values() for run in runs):
        found += f" In training they reach {percent(statistics.fmean(trained))}. If batch norm lags behind, set "
        found += "evaluation.batch_norm_images=1024 (docs/few-images.md)."
    return [found]


def _warnings(arms: Arms, what: Quantity) -> Iterator[str]:
    """Describe what limits the answers."""
    runs = [run for of_arm in arms.values() for run in of_arm]
    tests = [each for run in runs if (each := run.images.get("test"))]
    means = [statistics.fmean(values) for values in values_of(arms, what.name).values()]
    if len({pair_of(run, other_images=True)[0] for run in runs}) == 1 < len(runs):
        yield "All runs share one split of the images, so the answers only hold for that split."
    if (machines := len(set(map(machine_of, runs)))) > 1:
        yield f"The runs are from {machines} machines. Times and rates are only comparable on the same machine."
    few = min((each.images for each in tests if each.images), default=FEW_IMAGES)
    if few < FEW_IMAGES and means and "test" in what.name:
        share = statistics.fmean(means)
        error = math.sqrt(max(0, share * (1 - share)) / few)
        vary = f"On other images, an accuracy would vary by {points(error, '')} (standard error)."
        seeds = " The intervals cover training seeds, on these images." if len(runs) > 1 else ""
        yield f"The test set has {few} images. {vary}{seeds}"
    if what.name == BEST_TEST and all(has(run, "data.validation_fraction", 0) for run in runs):
        watched = any(has(run, "schedule.name", "plateau") or not has(run, "stopping.patience", 0) for run in runs)
        yield (
            "The protocol has no validation split: the best epoch is the best on the test set itself, which flatters "
            f"every arm{', and plateau and stopping watch the test set' if watched else ''}."
        )
    if what.name == SELECTED_VALIDATION:
        yield "The test set was not evaluated: this is validation at its best epoch, which flatters every arm."


def _notes(arms: Arms, protocol: str, held: Held) -> Iterator[str]:
    """Explain how to read the tables and the figures."""
    if sum(map(len, arms.values())) > len(arms):
        yield "± is the standard deviation over runs."
    if held.answers:
        level = f"the level of its arm's test ({'Bonferroni' if held.leads else 'Holm'}, {held.looks.text()})"
        twice = ", or twice that level if the arm is equal within the margin" if held.margin else ""
        yield f"Differences are in percentage points. Each interval has {level}{twice}."
    if protocol:
        yield f"Dotted: the post's own curves ({protocol}), one run per arm."
