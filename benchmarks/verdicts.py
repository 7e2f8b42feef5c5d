"""How often verdicts are wrong, and what they cost: studies drawn from normal distributions, judged by effv2's own code.

    python benchmarks/verdicts.py claims     # no effect: claims of runs that are looked at after every seed
    python benchmarks/verdicts.py power      # an effect: how often it is found, and with how many seeds
    python benchmarks/verdicts.py auto       # seeds=auto: five variants against a baseline, with margins
    python benchmarks/verdicts.py race       # seeds=race: how often the best of six is lost

Each line ends with what it took. The standard deviation of an arm is 1 unless a line says otherwise.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml

from effv2.evidence.answers import answers
from effv2.evidence.claims import Claims, read_claims
from effv2.evidence.judge import Verdict, judge
from effv2.evidence.statistics import Outcome
from effv2.tracking.read import RunRecord

FEWEST, MOST = 3, 30
Values = dict[str, np.ndarray]  # of arms, in the order of their seeds


def record(arm: str, seed: int, value: float, **parent: str) -> RunRecord:
    """Return a finished run of an arm."""
    params = {"my.arm": arm, "random.seed": str(seed), "data.split_seed": "0"}
    return RunRecord(f"{arm}-{seed}", arm, "FINISHED", params, {"score": float(value)}, dict(parent), started=seed + 1)


def study(most: int, once: bool) -> RunRecord:
    """Return the run of a study that stamped its number of seeds."""
    params = {"study.kind": "ablate", "study.max_seeds": str(most), "study.looks": "once" if once else "every"}
    return RunRecord("study", "study", "FINISHED", params, {}, {}, started=0)


def claims_of(count: int, checks: int) -> Claims:
    """Return so many claims of one family, each of so many checks on arms of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "claims.yaml"
        arms = {
            f"{kind}{c}{k}": {"my.arm": f"{kind}{c}{k}"} for kind, c, k in product("ab", range(count), range(checks))
        }
        found = {
            f"S{c}": {
                "words": "drawn",
                "protocol": {"arms": arms},
                "family": "drawn",
                "checks": [
                    {"kind": "difference", "metric": "score", "arm": f"a{c}{k}", "against": f"b{c}{k}"}
                    for k in range(checks)
                ],
            }
            for c in range(count)
        }
        path.write_text(yaml.safe_dump({"claims": found}))
        return read_claims(path)


def false_claims(
    looks: Sequence[int], ratio: float, count: int, checks: int, plan: tuple[int, bool] | None, seed: int
) -> bool:
    """Draw runs without any effect; say whether any claim is ever supported or contradicted at these looks."""
    random, claims = np.random.default_rng(seed), claims_of(count, checks)
    mine = {id_: claim for id_, claim in claims.claims.items() if id_.startswith("S")}
    claims = Claims(claims.protocols, mine)
    deviations = {"a": ratio, "b": 1.0}
    runs: list[RunRecord] = [study(*plan)] if plan else []
    parent = {"mlflow.parentRunId": "study"} if plan else {}
    for n in range(max(looks)):
        for kind, c, k in product("ab", range(count), range(checks)):
            runs.append(record(f"{kind}{c}{k}", n, deviations[kind] * random.standard_normal(), **parent))
        if n + 1 in looks:
            verdicts = {each.verdict for each in judge(claims, runs, lambda run: {})}
            if verdicts & {Verdict.SUPPORTED, Verdict.CONTRADICTED}:
                return True
    return False


def looks_of_one(effect: float, ratio: float, seed: int) -> tuple[bool, int]:
    """Return whether an effect is found by 30 seeds, and with how many."""
    random = np.random.default_rng(seed)
    first, second = ratio * random.standard_normal(MOST) + effect, random.standard_normal(MOST)
    for n in range(FEWEST, MOST + 1):
        values = {arm: {("", str(k)): each[k] for k in range(n)} for arm, each in (("a", first), ("b", second))}
        if answers(values, {"a": "b"})["a"].comparison.outcome in (Outcome.BETTER, Outcome.WORSE):
            return True, n
    return False, MOST


def measured(what: Callable[[int], object], count: int) -> tuple[list[object], float]:
    """Return what came of so many studies, and the seconds that it took."""
    began = time.perf_counter()
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(what, range(count), chunksize=max(1, count // 50)))
    return found, time.perf_counter() - began
