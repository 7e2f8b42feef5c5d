"""How often verdicts are wrong, and what they cost: studies drawn from normal distributions, judged by effv2's code.

    python benchmarks/verdicts.py claims    # no effect: claims that are judged after every seed
    python benchmarks/verdicts.py power     # two arms: how often a difference is found, and with how many seeds
    python benchmarks/verdicts.py auto      # seeds=auto: five variants against a baseline, with margins

The standard deviation of an arm is 1 unless a line says otherwise.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import yaml

from effv2.evidence.answers import answers
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.judge import Verdict, judge
from effv2.evidence.statistics import Looks, Outcome
from effv2.studies.seeds import next_seeds
from effv2.tracking.read import RunRecord

FEWEST, MOST = 3, 30
DIFFER = (Outcome.BETTER, Outcome.WORSE)
T = TypeVar("T")


def study(most: int, looks: str) -> RunRecord:
    """Return the run of a study that stamped its number of seeds before its first run."""
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
    """Draw runs without any effect; say whether a claim is supported or contradicted after any seed."""
    random, runs = np.random.default_rng(seed), [study(most, looks)]
    arms = list(dict.fromkeys(arm for id_ in claims.claims for each in claims.contrasts(id_) for arm in each.arms))
    for n in range(most):
        runs += [record(arm, n, (ratio if arm[0] == "a" else 1) * random.standard_normal()) for arm in arms]
        if n + 1 >= FEWEST:
            verdicts = {each.verdict for each in judge(claims, runs, lambda run: {})}
            if verdicts & {Verdict.SUPPORTED, Verdict.CONTRADICTED}:
                return True
    return False


def found(effect: float, ratio: float, seed: int) -> int:
    """Return with how many of at most 30 seeds a difference is found; 0 if it isn't."""
    random = np.random.default_rng(seed)
    drawn = {"a": effect + ratio * random.standard_normal(MOST), "b": random.standard_normal(MOST)}
    for n in range(FEWEST, MOST + 1):
        values = {arm: {("", str(k)): float(each[k]) for k in range(n)} for arm, each in drawn.items()}
        if answers(values, {"a": "b"})["a"].comparison.outcome in DIFFER:
            return n
    return 0


def automatic(effects: tuple[float, ...], margin: float, seed: int) -> tuple[int, bool]:
    """Return how many runs seeds=auto takes, and whether it says anything that isn't so."""
    random = np.random.default_rng(seed)
    drawn = {str(k): effect + random.standard_normal(MOST) for k, effect in enumerate((0.0, *effects))}
    others = {arm: "" if arm == "0" else "0" for arm in drawn}
    counts, wrong = dict.fromkeys(drawn, FEWEST), False
    while True:
        values = {arm: {("", str(k)): float(drawn[arm][k]) for k in range(n)} for arm, n in counts.items()}
        more, said = next_seeds(counts, values, others, Looks(MOST), most=MOST, margin=margin)
        for arm, each in said.items():
            true = effects[int(arm) - 1]
            outcome = each.comparison.outcome
            wrong |= (outcome in DIFFER and true == 0) or (outcome is Outcome.EQUIVALENT and abs(true) >= margin)
        if more == counts:
            return sum(counts.values()), wrong
        counts = dict(more)


def drawn(what: Callable[[int], T], count: int) -> list[T]:
    """Return the results of `count` studies."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(what, range(count), chunksize=max(1, count // 40)))


def lines(kind: str, count: int) -> Iterator[str]:
    """Yield the lines of a table."""
    if kind == "claims":
        yield "| claims x checks | seeds, looks | ratio of standard deviations | false verdicts |\n|---|---|---|---|"
        for (claims, checks), (most, looks), ratio in (
            *product([(1, 1)], [(30, "every"), (10, "every"), (5, "every"), (5, "once")], [1.0, 3.0, 9.0]),
            ((5, 3), (30, "every"), 1.0),
            ((5, 1), (30, "every"), 3.0),
        ):
            of = drawn(partial(judged, most, looks, ratio, claims_of(claims, checks)), count)
            yield f"| {claims} x {checks} | {most}, {looks} | {ratio:g} | {np.mean(of):.3f} |"
    elif kind == "power":
        yield "| difference, SD of a difference | found | mean seeds of an arm |\n|---|---|---|"
        for effect in (0.0, 0.5, 1.0, 2.0, 3.0):
            seeds = drawn(partial(found, effect * 2**0.5, 1.0), count)
            yield f"| {effect:g} | {np.mean(np.array(seeds) > 0):.3f} | {np.mean([n or MOST for n in seeds]):.1f} |"
    else:
        yield "| variants differ from the baseline by | margin | mean runs | most runs | wrong |\n|---|---|---|---|---|"
        for effects, margin in product([(0.0,) * 5, (2.0, 0.0, 0.0, 0.0, 0.0)], (0.0, 1.0, 1.5, 2.0)):
            of_runs, wrong = zip(*drawn(partial(automatic, effects, margin), count), strict=True)
            words = ", ".join(f"{each:g}" for each in effects)
            yield f"| {words} SD | {margin:g} SD | {np.mean(of_runs):.0f} | {max(of_runs)} | {np.mean(wrong):.3f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("claims", "power", "auto"))
    parser.add_argument("--studies", type=int, default=1000)
    given = parser.parse_args()
    for line in lines(given.kind, given.studies):
        print(line, flush=True)
