"""Options shared by the commands. Help, defaults and bounds come from effv2.config.schema, the one place of both.

Every value is taken as text and validated with the configuration, so that an error reads the same wherever the
value was written. An empty text means 'not given': `mlflow run` passes every declared parameter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from effv2.config.options import DEFAULT_STORAGE, LogModel, StudyOptions
from effv2.config.schema import Group, TrainConfig, field_of
from effv2.core.errors import InputError, RunError, Terminated, same_command
from effv2.core.signals import ending_signals
from effv2.execution.allocator import tune_allocator
from effv2.training.saving import Saving

Command = TypeVar("Command", bound=Callable[..., Any])

# Option names (as in MLproject) and the fields that they set.
SHARED = {
    "dataset": "data.dataset",
    "data_dir": "data.dir",
    "download": "data.download",
    "image_size": "data.image_size",
    "per_class": "data.per_class",
    "split_seed": "data.split_seed",
    "epochs": "schedule.epochs",
    "batch_size": "optimiser.batch_size",
    "lr": "optimiser.lr",
    "scheduler": "schedule.name",
    "device": "execution.device",
    "precision": "execution.precision",
    "compile": "execution.compile",
}
ONE_RUN = {
    "variant": "model.variant",
    "dropout": "model.dropout",
    "stochastic_depth": "model.stochastic_depth",
    "depth_multiplier": "model.depth_multiplier",
    "width_multiplier": "model.width_multiplier",
    "seed": "random.seed",
}


def config_options(
    fields: dict[str, str], config: type[Group] = TrainConfig, defaults: Mapping[str, Any] | None = None
) -> Callable[[Command], Command]:
    """Add an option for each field of a configuration; `defaults` are those of the command, where it has its own."""

    def decorate(command: Command) -> Command:
        for name, dotted in reversed(fields.items()):
            info, default = field_of(dotted, config)
            command = _config_option(name, info, (defaults or {}).get(name, default))(command)
        return command

    return decorate


def _config_option(name: str, info: Any, default: Any) -> Callable[[Command], Command]:
    kind = info.annotation
    metavar = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "[true|false]"}.get(kind, "TEXT")
    if get_origin(kind) is Literal:
        metavar = f"[{'|'.join(get_args(kind))}]"
    limits = _limits(info.metadata)
    shown = str(default).lower() if kind is bool else default
    default_text = f"default: {shown}" if default != "" else ""
    extra = "; ".join(filter(None, (default_text, limits)))
    text = f"{info.description}  [{extra}]" if extra else info.description
    flag: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if kind is bool else {}
    return click.option(f"--{name.replace('_', '-')}", name, default=None, metavar=metavar, help=text, **flag)


def _limits(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = {sign: getattr(rule, name) for name, sign in signs.items() for rule in metadata if hasattr(rule, name)}
    return ", ".join(f"{sign} {value}" for sign, value in found.items() if value != 2**32)


study_option = click.option(
    "--study",
    default="",
    metavar="NAME",
    help="Study whose settings the options then change: the path of a file (YAML), or a name, as ablate-mnist.",
)
experiment_option = click.option(
    "--experiment",
    default="",
    metavar="NAME",
    help="MLflow experiment to log to.  [default: MLflow's own choice]",
)


seeds_option = click.option(
    "--seeds", default="", metavar="LIST", help="Seeds of every arm, as 0,1,2.  [default: 0, or the study's]"
)
fresh_option = click.option(
    "--fresh",
    default="",
    metavar="[true|false]",
    is_flag=False,
    flag_value="true",
    help="Start over, repeating what was finished.  [default: false]",
)


checkpoint_dir_option = click.option(
    "--checkpoint-dir",
    default="",
    metavar="FOLDER",
    help=f"Folder for checkpoints, from which a run that was killed goes on.  [default: {Saving.folder}]",
)
checkpoint_minutes_option = click.option(
    "--checkpoint-minutes",
    default="",
    metavar="NUMBER",
    help="Minutes of training that a kill may cost at most; checkpoints never take more than 2 % of the time.  "
    f"[default: {Saving.minutes:g}; ≥ 0]",
)


checkpoint_upload_minutes_option = click.option(
    "--checkpoint-upload-minutes",
    default="",
    metavar="NUMBER",
    help="Minutes between checkpoints that are uploaded to the run's artifacts, so that another machine can go on; 0 = "
    f"never.  [default: {Saving.upload_minutes:g}; ≥ 0]",
)


def saving_options(command: Command) -> Command:
    """Add the options of checkpoints."""
    return checkpoint_dir_option(checkpoint_minutes_option(checkpoint_upload_minutes_option(command)))


def take_saving(options: dict[str, Any]) -> Saving:
    """Take the options of checkpoints out of a command's, validated."""
    folder = options.pop("checkpoint_dir") or Saving.folder
    names = ("checkpoint_minutes", "checkpoint_upload_minutes")
    minutes, upload_minutes = (_parse_minutes(name, options.pop(name) or "") for name in names)
    return Saving(folder, Saving.minutes if minutes is None else minutes, upload_minutes or 0.0)


def _parse_minutes(name: str, text: str) -> float | None:
    try:
        number = float(text) if text else None
    except ValueError:
        number = math.nan
    if number is not None and not 0 <= number < math.inf:
        raise InputError(f"--{name.replace('_', '-')} {text}: must be a number of minutes from 0.")
    return number


def log_model_option(default: LogModel) -> Callable[[Command], Command]:
    """Add --log-model."""
    text = f"Which runs log their model: the best of the study, all, none.  [default: {default}]"
    return click.option("--log-model", default="", metavar="[best|all|none]", help=text)


def study_options(log_model: LogModel) -> Callable[[Command], Command]:
    """Add the options of every study: how it is run and where it is logged."""
    options = (
        click.option(
            "--workers", default="", metavar="INTEGER", help="Processes that share the study here.  [default: 1; ≥ 1]"
        ),
        click.option(
            "--storage",
            default="",
            metavar="URL",
            help=f"Optuna's storage, which keeps the state of studies: sqlite:///FILE, or for several machines "
            f"postgresql://USER@HOST/DATABASE.  [default: {DEFAULT_STORAGE}]",
        ),
        saving_options,
        fresh_option,
        log_model_option(log_model),
        experiment_option,
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def take_study_options(options: dict[str, Any], log_model: LogModel) -> StudyOptions:
    """Take the options of every study out of a command's, validated; `log_model` is the command's default."""
    return StudyOptions(
        workers=parse_count("workers", options.pop("workers") or "1"),
        storage=options.pop("storage") or DEFAULT_STORAGE,
        fresh=parse_fresh(options.pop("fresh")),
        log_model=parse_log_model(options.pop("log_model"), log_model),
        experiment=options.pop("experiment"),
        saving=take_saving(options),
    )


def parse_count(option: str, text: str) -> int:
    """Read a whole number from 1 on."""
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise InputError(f"--{option} {text}: must be a whole number from 1 to 100,000.")
    return int(text)


def parse_fresh(text: str) -> bool:
    """Read --fresh."""
    if text not in ("", "true", "false"):
        raise InputError(f"--fresh {text}: must be true or false.")
    return text == "true"


def parse_log_model(text: str, default: LogModel) -> Any:
    """Validate --log-model."""
    if text not in ("", "best", "all", "none"):
        raise InputError(f"--log-model {text}: no such choice; use best, all or none.")
    return text or default


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`; an empty text gives none."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() and int(word) < 2**32 for word in words) or len(set(words)) < len(words):
        raise InputError(f"--seeds {text}: must be different whole numbers from 0 on, separated by commas, as 0,1,2.")
    return tuple(map(int, words))


def reports_errors(command: Command) -> Command:
    """Turn our errors and signals into one sentence and their exit code: 2, 1, 130 or 143."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tune_allocator()  # before torch is imported
        fresh = kwargs.get("fresh") == "true"
        ended = f"runs that had begun end KILLED, and {same_command(fresh)} resumes them."
        with ending_signals():
            try:
                return command(*args, **kwargs)
            except InputError as error:
                option = "--" if error.problem and error.what in kwargs else ""
                message, code = f"Error: {option}{str(error).replace('weights_dir', 'weights-dir', 1)}", 2
            except RunError as error:
                message, code = f"Error: {error.sentences(fresh)}", 1
            except KeyboardInterrupt:
                message, code = f"Interrupted; {ended}", 130
            except Terminated:
                message, code = f"Terminated; {ended}", 143
            click.echo(message.replace("\n", " "), err=True)
            sys.exit(code)

    return wrapped  # type: ignore[return-value]
