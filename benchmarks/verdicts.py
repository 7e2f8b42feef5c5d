"""Errors and cost of verdicts: effv2's code judges studies that are drawn from normal distributions.

    python benchmarks/verdicts.py claims    # no effect: claims are judged after every seed
    python benchmarks/verdicts.py power     # two arms: how often is a difference found, with how many seeds?
    python benchmarks/verdicts.py auto      # --seeds auto: five variants against a baseline, with margins
    python benchmarks/verdicts.py later     # no effect: --seeds auto for one variant after the other
    python benchmarks/verdicts.py race      # seeds=race: the best of six
    python benchmarks/verdicts.py splits    # no effect: several splits, planned or growing in number or in seeds
    python benchmarks/verdicts.py level     # a level: three runs in ten learn, the others stay low

The standard deviation of an arm is 1 unless a line says otherwise.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from effv2.config.schema import TrainConfig
from effv2.evidence.answers import answers
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.judge import Judgement, Verdict, judge
from effv2.evidence.statistics import EVERY_LOOK, LEVEL, Estimate, Looks, Outcome
from effv2.studies.seeds import ACCURACY, AutoSeeds
from effv2.tracking.read import RunRecord

FEWEST, MOST, WORKERS = 3, 30, 4
DIFFER = (Outcome.BETTER, Outcome.WORSE)
T = TypeVar("T")


def study(most: int, looks: str) -> RunRecord:
    """Return the parent run of a study that planned its number of seeds before its first run."""
    params = {"study.kind": "ablate", "study.max_seeds": str(most), "study.looks": looks}
    return RunRecord("study", "study", "FINISHED", params, {}, {}, started=0)


def record(arm: str, seed: int, value: float) -> RunRecord:
    """Return a finished run of an arm."""
    params = {"my.arm": arm, "random.seed": str(seed), "data.split_seed": "0"}
    tags = {"mlflow.parentRunId": "study"}
    return RunRecord(f"{arm}-{seed}", arm, "FINISHED", params, {"score": value}, tags, started=seed + 1)


def claims_of(count: int, checks: int) -> Claims:
    """Return `count` claims of one family, each with its own arms and number of `checks`."""
    arms = {f"{kind}{c}{k}": {"my.arm": f"{kind}{c}{k}"} for kind, c, k in product("ab", range(count), range(checks))}
    pairs = {c: [(f"a{c}{k}", f"b{c}{k}") for k in range(checks)] for c in range(count)}
    written = {
        f"S{c}": {
            "words": "drawn",
            "protocol": {"arms": arms},
            "family": "drawn",
            "checks": [{"kind": "difference", "metric": "score", "arm": a, "against": b} for a, b in pairs[c]],
        }
        for c in range(count)
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "claims.yaml"
        path.write_text(yaml.safe_dump({"claims": written}))
        found = read_claims(path)
    return Claims(found.protocols, {id_: each for id_, each in found.claims.items() if id_ in written})


def judged(most: int, looks: str, ratio: float, claims: Claims, seed: int) -> bool:
    """Draw runs without an effect; say whether a claim is supported or contradicted at any look.

    `looks` are after every seed, once at `most` seeds, or at the numbers of seeds that verdicts advise.
    """
    random, parent = np.random.default_rng(seed), study(most, "once" if looks == "once" else "every")
    arms = list(dict.fromkeys(arm for id_ in claims.claims for each in claims.contrasts(id_) for arm in each.arms))
    drawn = [(ratio if arm[0] == "a" else 1) * random.standard_normal(most) for arm in arms]
    runs = [record(arm, n, value[n]) for n in range(most) for arm, value in zip(arms, drawn, strict=True)]
    seeds = most if looks == "once" else FEWEST
    while True:
        judgements = judge(claims, [parent, *runs[: seeds * len(arms)]], lambda run: {})
        if {each.verdict for each in judgements} & {Verdict.SUPPORTED, Verdict.CONTRADICTED}:
            return True
        if seeds >= most:
            return False
        seeds = advised(judgements, seeds, most) if looks == "advised" else seeds + 1


def advised(judgements: Sequence[Judgement], seeds: int, most: int) -> int:
    """Return the smallest number of seeds that a verdict names as enough; all if it names none."""
    words = " ".join(finding.lacking for each in judgements for finding in each.findings)
    named = [int(number) for number in re.findall(r"as seen, (\d+) seeds \(", words)]
    return min((number for number in named if number > seeds), default=most)


def found(effect: float, ratio: float, seed: int) -> int:
    """Return the number of seeds, up to 30, that find a difference; 0 if none is found."""
    random = np.random.default_rng(seed)
    drawn = {"a": effect + ratio * random.standard_normal(MOST), "b": random.standard_normal(MOST)}
    for n in range(FEWEST, MOST + 1):
        values = {arm: {("", str(k)): float(each[k]) for k in range(n)} for arm, each in drawn.items()}
        if answers(values, {"a": "b"})["a"].outcome in DIFFER:
            return n
    return 0


def automatic(
    effects: tuple[float, ...], margin: float, race: bool, seed: int, one_by_one: bool = False
) -> tuple[int, bool]:
    """Return the number of runs of --seeds auto, or of a race, and whether it ever says something wrong.

    Workers end the runs of a round in any order, and want more after every few. The commands name all variants, or one
    each.
    """
    random = np.random.default_rng(seed)
    drawn = {str(k): effect + random.standard_normal(MOST) for k, effect in enumerate((0.0, *effects))}
    first, *others = drawn
    trials, wrong = dict[str, FrozenTrial](), False
    for names in [(first, each) for each in others] if one_by_one else [tuple(drawn)]:
        rules: dict[str, Any] = {"margin": margin, "race": race, "before": tuple(trials)}
        plan = AutoSeeds(dict.fromkeys(drawn, TrainConfig()), names, first, most=MOST, **rules)
        while missing := {n: p for n, p in plan.trials(plan.rounds(trials)[-1].counts).items() if n not in trials}:
            for name in random.permutation(list(missing))[:WORKERS]:
                arm, index = missing[name]["arm"], missing[name]["seed"]
                trials[name] = finished(len(trials), missing[name], float(drawn[arm][index]))
        for arm, each in ((arm, each) for of_round in plan.rounds(trials) for arm, each in of_round.answers.items()):
            difference = (0.0, *effects)[int(arm)] - (0.0, *effects)[int(each.other)]
            outcome = each.outcome
            wrong |= outcome is Outcome.BETTER and difference <= 0
            wrong |= outcome is Outcome.WORSE and difference >= 0
            wrong |= outcome is Outcome.EQUIVALENT and abs(difference) >= margin
    return len(trials), wrong


def finished(number: int, params: Mapping[str, Any], accuracy: float) -> FrozenTrial:
    """Return a trial that reached an accuracy."""
    trial = create_trial(state=TrialState.COMPLETE, value=accuracy, user_attrs={ACCURACY: accuracy})
    trial.number, trial.params = number, dict(params)
    return trial


def misjudged(seeds: int, seed: int) -> bool:
    """Say whether runs on this number of seeds decide anything about their true mean, if three in ten learn."""
    random = np.random.default_rng(seed)
    values = np.where(random.random(seeds) < 0.3, 0.4, 0.1) + 0.01 * random.standard_normal(seeds)
    return Estimate(list(values)).p(0.19) < LEVEL


def misjudged_on_splits(how: str, splits: int, seeds: int, spread: float, seed: int) -> bool:
    """Say whether any look decides between equal arms. Their difference varies by `spread` between splits.

    There is one planned look, a look after each further seed on the same splits, or a look after each further split, as
    with auto seeds.
    """
    random = np.random.default_rng(seed)
    of_split = {"a": random.normal(0, spread, (splits, 1)), "b": np.zeros((splits, 1))}
    drawn = {arm: mean + random.standard_normal((splits, seeds)) for arm, mean in of_split.items()}
    steps = {"planned": [(splits, seeds)], "more seeds": [(splits, k + 1) for k in range(seeds)]}
    steps["more splits"] = [(k, seeds) for k in range(FEWEST, splits + 1)]
    looks = Looks(seeds, once=True, splits=splits) if how == "planned" else EVERY_LOOK
    for step in steps[how]:
        pairs = list(product(*map(range, step)))
        values = {arm: {(f"{s}", f"{k}"): float(each[s, k]) for s, k in pairs} for arm, each in drawn.items()}
        if answers(values, {"a": "b"}, looks)["a"].outcome in DIFFER:
            return True
    return False


def drawn(what: Callable[[int], T], count: int) -> list[T]:
    """Return the results of `count` studies."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(what, range(count), chunksize=max(1, count // 40)))


def lines(kind: str, count: int) -> Iterator[str]:
    """Yield the lines of a table."""
    if kind == "claims":
        yield "| claims x checks | seeds, looks | ratio of standard deviations | studies | false verdicts |"
        yield "|---|---|---|---|---|"
        planned = [(30, "every"), (30, "advised"), (10, "every"), (10, "once"), (5, "every"), (5, "once")]
        for (claims, checks), (most, looks), ratio in (
            *product([(1, 1)], planned, [1.0, 3.0, 9.0]),
            *product([(5, 1), (5, 3)], planned[:2], [1.0, 3.0]),
        ):
            studies = count if claims == 1 else count // 4
            of = drawn(partial(judged, most, looks, ratio, claims_of(claims, checks)), studies)
            yield f"| {claims} x {checks} | {most}, {looks} | {ratio:g} | {studies} | {np.mean(of):.3f} |"
    elif kind == "power":
        yield "| difference, SD of a difference | found | mean seeds of an arm |\n|---|---|---|"
        for effect in (0.0, 0.5, 1.0, 2.0, 3.0):
            seeds = drawn(partial(found, effect * 2**0.5, 1.0), count)
            yield f"| {effect:g} | {np.mean(np.array(seeds) > 0):.3f} | {np.mean([n or MOST for n in seeds]):.1f} |"
    elif kind == "splits":
        yield "| looks | splits | seeds on each | spread of splits, SD | false verdicts |\n|---|---|---|---|---|"
        fixed = [(how, splits, each) for how, each in (("planned", 3), ("more seeds", 10)) for splits in (3, 5, 10)]
        for (how, splits, each), spread in product([*fixed, ("more splits", MOST, 1)], (0.0, 0.5)):
            share = np.mean(drawn(partial(misjudged_on_splits, how, splits, each, spread), count))
            yield f"| {how} | {splits} | {each} | {spread:g} | {share:.3f} |"
    elif kind == "level":
        yield "| runs | false verdicts |\n|---|---|"
        for runs in (3, 5, 6, 8, 10, 15, 20):
            yield f"| {runs} | {np.mean(drawn(partial(misjudged, runs), count)):.3f} |"
    elif kind == "later":
        yield "| variants | false verdicts |\n|---|---|"
        for variants in (1, 2, 5):
            later = partial(automatic, (0.0,) * variants, 0.0, False, one_by_one=True)
            yield f"| {variants} | {np.mean([wrong for _, wrong in drawn(later, count)]):.3f} |"
    else:
        yield "| variants differ from the baseline by | margin | mean runs | most runs | wrong |\n|---|---|---|---|---|"
        steps = ((1.0, 2.0, 3.0, 4.0, 5.0), (2.0, 0.0, 0.0, 0.0, 0.0), (0.0,) * 5)
        for effects, margin in product(steps if kind == "race" else steps[:0:-1], (0.0, 1.0, 1.5, 2.0)):
            of_runs, wrong = zip(*drawn(partial(automatic, effects, margin, kind == "race"), count), strict=True)
            words = ", ".join(f"{each:g}" for each in effects)
            yield f"| {words} SD | {margin:g} SD | {np.mean(of_runs):.0f} | {max(of_runs)} | {np.mean(wrong):.3f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("claims", "power", "auto", "later", "race", "splits", "level"))
    parser.add_argument("--studies", type=int, default=1000)
    given = parser.parse_args()
    for line in lines(given.kind, given.studies):
        print(line, flush=True)
