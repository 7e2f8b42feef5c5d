"""The results of the API's functions: verdicts, runs, models and figures from tracked runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from effv2.core.errors import InputError
from effv2.evidence import publication
from effv2.evidence.answers import Answer
from effv2.evidence.claims import read_claims
from effv2.evidence.exports import tracked
from effv2.evidence.results import results_of
from effv2.evidence.study import Rows, StudyResults
from effv2.pretrained.own import open_logged, open_network
from effv2.run.weights import Requested
from effv2.serving.classifier import Classifier
from effv2.tracking import tags
from effv2.tracking.models import model_address
from effv2.tracking.read import BEST_TEST, RunRecord, reached_accuracy
from effv2.tracking.studies import studies_of
from effv2.tracking.writer import run_address

if TYPE_CHECKING:
    from effv2.config.options import LogModel
    from effv2.run.run import Attempt
    from effv2.studies.engine import StudyEnd
    from effv2.studies.plan import Plan


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a call: what the command prints, in this order, and its place in MLflow."""

    answers: Sequence[str] = ()
    table: Rows = field(default_factory=list)
    notes: Sequence[str] = ()
    address: str = ""
    run_id: str = ""
    experiment_id: str = ""
    trouble: str = ""  # a sentence about failed runs of a study
    networks: Mapping[str, Requested] = field(default_factory=dict)  # published ones, by the names of their runs

    def __repr__(self) -> str:
        return "\n".join([*self.answers, self.address])

    @cached_property
    def records(self) -> Sequence[RunRecord]:
        """Return the tracked runs with their parent."""
        return tracked(self.experiment_id, parent=self.run_id).runs if self.run_id else ()

    @cached_property
    def studies(self) -> Sequence[StudyResults]:
        """Return the tables, warnings and figures of each study."""
        return results_of(self.records, read_claims(), lambda run: {})

    @property
    def verdicts(self) -> pd.DataFrame:
        """Return one row per verdict: on arms against their baseline, on pairs of networks, or on claims."""
        held = [answer for study in self.studies if study.held for answer in study.held.answers.values()]
        pairs = [row for study in self.studies for row in study.files.get("pairs.csv", ())]
        return pd.DataFrame(pairs[1:], columns=pairs[0]) if pairs else pd.DataFrame(map(_verdict, held))

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Return one row per run: its study, arm and seed, status, parameters (a.b) and last metrics (a/b)."""
        about = {"arm": tags.ARM, "seed": tags.SEED}
        return pd.DataFrame(
            {"study": study.parent.name, "name": run.name, "run_id": run.run_id, "status": run.status}
            | {column: run.tags.get(tag) for column, tag in about.items()}
            | run.params
            | run.metrics
            for study in studies_of(self.records)
            for run in study.in_order()
        )

    @property
    def figures(self) -> dict[str, Figure]:
        """Return all figures by name. If there are several studies, a name begins with that of its study."""
        several = len(self.studies) > 1
        drawn = [(each.title, name, drawn) for each in self.studies for name, drawn in each.figures.items()]
        return {f"{title}: {name}" if several else name: figure for title, name, figure in drawn}

    def figure(self, name: str = "") -> Figure:
        """Return a figure by its name, by default the first; InputError if there is none."""
        figures = self.figures
        if not figures or (name and name not in figures):
            raise InputError("figure", name, "no such figure", choices=figures or ["there are no figures yet"])
        return figures[name or next(iter(figures))]

    def model(self, name: str = "") -> Classifier:
        """Return the network of a run or an arm by its name, of several the best; InputError if none was logged.

        The best is by validation accuracy, if there is any.
        """
        runs = {run.run_id: run for study in studies_of(self.records) for run in study.in_order()}
        named = {run_id: (run_id, run.name, run.tags.get(tags.ARM, "")) for run_id, run in runs.items()}
        chosen = [run for run_id, run in runs.items() if not name or name in named[run_id]]
        if not chosen:
            choices = dict.fromkeys(arm or run_name for _, run_name, arm in named.values())
            raise InputError("model", name, "no such run", choices=choices or ["there are no runs yet"])
        for run in sorted(chosen, key=reached_accuracy, reverse=True):
            if run.name in self.networks:
                return open_network(self.networks[run.name])
            if address := model_address(run.run_id):
                return open_logged(address)
        raise InputError("model", name, "no run logged its model", "repeat it with `fresh` and another `log_model`")


@dataclass(frozen=True, repr=False)
class Training(Result):
    """A training run. It `was_finished` if an earlier call had the same settings."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    model_address: str = ""
    was_finished: bool = False

    @classmethod
    def of(cls, ended: Attempt, log_model: LogModel) -> Training:
        """Return the result of a training."""
        run, metrics, answers, address = ended.run, ended.metrics, list[str](), ended.model_address
        if ended.found:
            without = ", but without a model" if log_model != "none" and not address else ""
            answers = [f"Finished before, with the same configuration, data and code{without}; `fresh` repeats it."]
        if BEST_TEST in metrics:
            selected = f"{metrics['selected/test_accuracy']:.2%} at the selected epoch {metrics['selected/epoch']:.0f}"
            answers.append(f"test accuracy {selected}, {metrics[BEST_TEST]:.2%} at its best epoch")
        return cls(
            answers,
            notes=[f"model {address}"] if address else [],
            address=run_address(run.run_id, run.experiment_id),
            run_id=run.run_id,
            experiment_id=run.experiment_id,
            metrics=metrics,
            model_address=address,
            was_finished=ended.found is not None,
        )


@dataclass(frozen=True, repr=False)
class StudyResult(Result):
    """A study, or a forecast of one. `failed` holds errors by run."""

    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, end: StudyEnd) -> StudyResult:
        """Return the result of a study."""
        run, found = end.parent, end.results
        result = cls(
            [*filter(None, (*found.answers, found.description))],
            table=found.table,
            notes=[*filter(None, (*found.warnings, end.model))],
            address=run_address(run.run_id, run.experiment_id),
            run_id=run.run_id,
            experiment_id=run.experiment_id,
            trouble=end.trouble,
            networks={name: each.requested for name, each in getattr(plan, "evaluations", {}).items()},
            failed=end.failed,
        )
        result.__dict__["studies"] = [found]  # as it was published
        return result

    def __repr__(self) -> str:
        if self.run_id or not self.table:
            return super().__repr__()
        titles, *rows = self.table
        return "\n".join([*self.answers, pd.DataFrame(rows, columns=titles).to_string(index=False)])

    def _repr_markdown_(self) -> str:
        shown = self.studies if self.run_id else [StudyResults(answers=self.answers, table=self.table)]
        return "\n\n".join([*(study.markdown() for study in shown), self.address])


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The report of an experiment. `file` is its page, if it was exported."""

    file: Path | None = None
    made: publication.Report | None = None

    @classmethod
    def of(cls, made: publication.Report, address: str, target: Path | None) -> Report:
        """Return the result of a report."""
        file, answers = target and target / "report.html", [*made.answers, *made.own, made.summary]
        result = cls(answers, notes=[str(file)] if file else [], address=address, file=file, made=made)
        result.__dict__.update(records=made.runs, studies=made.studies)
        return result

    @property
    def verdicts(self) -> pd.DataFrame:
        """Return one row per claim with runs, or with near ones."""
        judged = self.made.judgements if self.made else ()
        rows = [(each.id, each.verdict.value, publication.why(each)) for each in judged]
        return pd.DataFrame(rows, columns=["claim", "verdict", "why"])


def _verdict(answer: Answer) -> dict[str, object]:
    low, high = (None, None) if answer.waits else answer.interval
    return {
        "arm": answer.arm,
        "against": answer.other,
        "verdict": answer.outcome.value,
        "difference": answer.estimate.mean,
        "low": low,
        "high": high,
        "seeds": answer.estimate.n,
        "sentence": f"{answer.sentence()}.",
    }
