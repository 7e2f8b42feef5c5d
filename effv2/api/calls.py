"""A function for each command, with the names of its options. Large packages are imported inside."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial, wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effv2.api.console import ConsoleReporter
from effv2.config.layers import Layer, build, read_document
from effv2.config.options import CHECKPOINTS, GRID, LOGGING, ONE_RUN, QUEUE, SHARED, STUDY, Options, Taken, options_for
from effv2.config.schema import DataConfig, TrainConfig
from effv2.config.studies import SWEEPS, Study, open_study
from effv2.core.errors import InputError, nearest
from effv2.core.processes import ending_signals, tune_allocator
from effv2.core.provenance import COMMAND
from effv2.core.reporter import Reporter
from effv2.core.secrets import masked
from effv2.data.sources import refuse_missing
from effv2.pretrained.config import PretrainedConfig
from effv2.run.early import refuse_missing_networks, refuse_missing_weights

if TYPE_CHECKING:
    from effv2.api.results import Report, StudyResult, Training

SHORT_EPOCHS = 3  # the studies that hparam_check and search run by default
SHORT = {"epochs": SHORT_EPOCHS, "log_model": "best"}
EVALUATION = options_for(" ".join(PretrainedConfig().flat()))
WITHOUT_SCHEDULER = {name: setting for name, setting in SHARED.items() if name != "scheduler"}


class Call:
    """A function of the API: it takes options as keyword arguments, which `taken` describes.

    A `reporter` receives the progress. Without one, a terminal or a notebook shows what the commands show there.
    InputError before anything is created; RunError for a fault.
    """

    def __init__(self, function: Callable[[Layer, Options, Reporter], Any], taken: Taken) -> None:
        self.function, self.taken = function, taken
        wraps(function)(self)
        fields = taken.fields.items()
        words = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=taken.default(name), annotation=field.annotation)
            for name, field in fields
        ]
        returns = function.__annotations__["return"]
        self.__signature__ = Signature([*words, Parameter("reporter", Parameter.KEYWORD_ONLY, default=None)])
        self.__signature__ = self.__signature__.replace(return_annotation=returns)
        self.help = str(function.__doc__)
        self.__doc__ = f"{self.help}\n" + "".join(f"\n    {name}: {field.description}" for name, field in fields)

    def __call__(self, *, reporter: Reporter | None = None, **options: Any) -> Any:
        """Call the function. Options that are None or empty count as not given."""
        fields, name = self.taken.fields, self.function.__name__
        if unknown := [each for each in options if each not in fields]:
            words = unknown[0].replace("_", " ")
            meant = [each for each in fields if " " in words and words in str(fields[each].description).lower()]
            raise TypeError(f"{name}() has no option {unknown[0]!r}; {nearest([*meant, *unknown][0], list(fields))}")
        given = {each: _plain(options[each], fields[each].annotation) for each in fields if each in options}
        given = {each: value for each, value in given.items() if value not in (None, "", (), [])}
        tune_allocator()  # before torch is imported
        token = COMMAND.set("")
        try:
            read = self.taken.read(given)
            COMMAND.set(command_line(name.replace("_", "-"), given))
            if "storage" in given:
                from effv2.tracking.addresses import storage_address

                storage_address(given["storage"])
            own = nullcontext(reporter) if reporter else ConsoleReporter(lines=False)
            with ending_signals(repeated=False), own as shown:  # a notebook may be interrupted twice
                shown.progress("loading PyTorch and MLflow")
                return self.function(*read, shown)
        except InputError as error:
            names = {setting: option for option, setting in self.taken.settings.items()}
            raise error.renamed(names) from error.__cause__
        finally:
            COMMAND.reset(token)


def call(taken: Taken) -> Callable[[Callable[[Layer, Options, Reporter], Any]], Call]:
    """Make a function of the API."""
    return partial(Call, taken=taken)


def _plain(value: Any, kind: Any) -> Any:
    """Return the values that a command would get: text for paths, and for lists if the option is a text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return tuple(f"{name}={each}" for name, each in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = tuple(value)
        return ",".join(map(str, value)) if kind is str else value
    return (value,) if kind == tuple[str, ...] and isinstance(value, str) else value


def command_line(name: str, given: Mapping[str, Any]) -> str:
    """Return the command that resumes a call, without secrets and `fresh`."""
    words = ["effv2", name]
    for option, value in given.items():
        texts = value if option == "set" else [",".join(map(str, value)) if isinstance(value, tuple) else value]
        for text in texts if option != "fresh" else ():
            words += [f"--{option.replace('_', '-')}", masked(str(text).lower() if text is True else str(text))]
    return shlex.join(words)


@call(Taken(("study", "set"), ONE_RUN, (*CHECKPOINTS, *LOGGING)))
def train(layer: Layer, how: Options, reporter: Reporter) -> Training:
    """Train one EfficientNetV2 and track it in MLflow.

    Without options, it trains the default variant on scikit-learn's digits. This takes a minute on two cores.
    """
    file = open_study(how.study) if how.study else None
    config = file.config(layer) if file else build(TrainConfig, layer)
    _refuse_missing(config)

    from effv2.api.results import Training
    from effv2.run.run import train_single

    name = file.name if file else f"{config.model.variant}, seed {config.random.seed}"
    return Training.of(train_single(config, name, file.name if file else "", how, reporter), how.log_model)


@call(Taken(("variant", "study", "set"), SHARED, GRID))
def ablate(layer: Layer, how: Options, reporter: Reporter) -> StudyResult:
    """Train architecture variants and their baseline, and compare them in MLflow.

    Without a study file, it trains the five published variants of EfficientNetV2-S with a short protocol on
    scikit-learn's digits. The same command again resumes an interrupted study.
    """
    chosen = open_study(how.study or f"{SWEEPS}/ablate.yaml").with_variants(how.variant)
    return _grid("ablate", chosen, chosen.select(how.variant), layer, how, reporter=reporter)


@call(Taken(("check", "scheduler", "study", "set"), WITHOUT_SCHEDULER, GRID, defaults=SHORT))
def hparam_check(layer: Layer, how: Options, reporter: Reporter) -> StudyResult:
    """Change one hyper-parameter at a time, with and without ReduceLROnPlateau, and compare in MLflow.

    Without a study, it runs hparam-digits: the changes of the published check, on scikit-learn's digits, with three
    epochs per run. The studies hparam-* have the full protocols. The same command again resumes an interrupted study.
    """
    if "schedule.name" in layer:
        problem = "the check compares the schedules none and plateau"
        raise InputError("set", f"schedule.name={layer['schedule.name'].value}", problem, "use `scheduler`")
    chosen = open_study(how.study or f"{SWEEPS}/hparam-digits.yaml").with_plateau()
    return _grid("hparam-check", chosen, chosen.select_checks(how.check, how.scheduler), layer, how, reporter=reporter)


@call(Taken(("study", "set"), ONE_RUN, ("trials", *STUDY), defaults=SHORT))
def search(layer: Layer, how: Options, reporter: Reporter) -> StudyResult:
    """Search for the best hyper-parameters on the validation split with Optuna, and test the best once.

    Without a study file, it varies dropout, stochastic depth and depth multiplier on scikit-learn's digits. The same
    command again resumes an interrupted search. With more trials, it extends the search.
    """
    chosen = open_study(how.study or f"{SWEEPS}/search.yaml")
    _refuse_missing(build(TrainConfig, chosen.base | layer))

    from effv2.studies.plan import make_search

    return _run(partial(make_search, chosen, layer, how.trials or 0), how, reporter)


@call(Taken(("models", "weights_dir"), EVALUATION, (*QUEUE, *LOGGING), PretrainedConfig, {"log_model": "none"}))
def evaluate_pretrained(layer: Layer, how: Options, reporter: Reporter) -> StudyResult:
    """Evaluate published ImageNet weights, each with its own transforms, and report which are better.

    The images are Imagenette, or a folder with classes of ImageNet or of your networks. Rankings use only images that
    the weights were not trained on, as far as that is known. The same command again resumes an interrupted evaluation.
    """
    config = build(PretrainedConfig, layer)
    refuse_missing_networks(how.models)
    refuse_missing(DataConfig(**config.data.model_dump(include={"dataset", "dir", "download"})))

    from effv2.studies.comparison import make_comparison

    shows = sys.stderr.isatty()
    make = partial(make_comparison, how.models, config, _path(how.weights_dir), progress=shows)
    return _run(lambda load, reporter: make(reporter=reporter), how, reporter)


@call(Taken(("export", "from_export", "claims"), {}, ("experiment",)))
def report(layer: Layer, how: Options, reporter: Reporter) -> Report:
    """Report the results of the studies of an experiment, and judge your claims and the published ones on its runs.

    The report is one page (HTML and Markdown) that needs no network. It is logged to a separate run.
    """
    target = (_path(how.export) or Path()).resolve()
    sources = [path.resolve() for word in how.from_export.split(",") if (path := _path(word.strip()))]
    if how.from_export and not sources:
        raise InputError("from_export", how.from_export, "names no folder", "give some, separated by commas")
    if sources and (not how.export or target in sources):
        problem = "the report needs a separate folder"
        raise InputError("from_export", how.from_export, problem, "name one with `export`")
    if own := _path(how.claims):
        read_document(own, "claims")  # an unreadable file is refused before imports that take seconds

    from effv2.api.results import Report
    from effv2.evidence.publication import publish, rebuild

    if sources:
        made, address = rebuild(sources, own, target, reporter), ""
    else:
        made, address = publish(how.experiment, own, target if how.export else None, reporter)
    return Report.of(made, address, target if how.export else None)


def _refuse_missing(*configs: TrainConfig) -> None:
    """Refuse folders and weights that aren't there, before anything is imported that takes seconds."""
    for config in configs:
        refuse_missing(config.data)
        if not config.model.weights_sha256:  # which finds a finished run without them
            refuse_missing_weights(config.model)


def _path(text: str) -> Path | None:
    """Return the path that an option gave, if any. `~` is expanded if the system knows that user."""
    return Path(os.path.expanduser(text)) if text else None


def _grid(kind: str, study: Study, arms: list[str], layer: Layer, how: Options, *, reporter: Reporter) -> StudyResult:
    """Run a grid or, with `plan`, forecast it."""
    _refuse_missing(*(study.arm(name, layer) for name in study.arms))

    from effv2.studies.grid import make_grid

    return (_plan if how.plan else _run)(partial(make_grid, kind, study, arms, layer, how), how, reporter)


def _plan(make: Callable[..., Any], how: Options, reporter: Reporter) -> StudyResult:
    from effv2.api.results import StudyResult
    from effv2.data.dataset import load_once
    from effv2.studies.forecast import as_begun, forecast
    from effv2.tracking.store import is_begun, open_store

    load = load_once(reporter)
    plan, there = make(load=load, reporter=reporter), None
    try:  # this does not create a missing experiment
        there = open_store(how.experiment, create=False) if is_begun() else None
    except InputError as error:
        if error.what != "experiment":
            raise
    plan, begun, done, wanted = as_begun(plan, there, how) if there is not None else (plan, None, 0, 0)
    if done and done == wanted:
        return StudyResult(["The study is complete: nothing is left to train. Leave out `plan` for the verdicts."])
    lines, table = forecast(plan, how, load, there, reporter, begun=begun)
    if done:
        lines.insert(0, f"The study has begun: {done} of {wanted} runs are finished. The figures below are for all.")
    return StudyResult(lines, table=list(map(tuple, table)))


def _run(make: Callable[..., Any], how: Options, reporter: Reporter) -> StudyResult:
    """Make the plan of a study (`make` takes `load` and `reporter`) and run it."""
    from effv2.api.results import StudyResult
    from effv2.data.dataset import load_once
    from effv2.studies.engine import run_study
    from effv2.studies.storage import check_storage
    from effv2.tracking.run import open_experiment

    check_storage(how.storage)  # before anything is timed or created
    plan = make(load=(load := load_once(reporter)), reporter=reporter)
    reporter.progress("opening the tracking store")
    experiment_id = open_experiment(how.experiment, reporter.message)
    return StudyResult.of(plan, run_study(plan, experiment_id, how, load, reporter))
