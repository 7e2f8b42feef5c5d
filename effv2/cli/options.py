"""Options shared by the commands. Help, defaults and bounds come from effv2.config, the one place of both.

Every value is taken as text and validated with the configuration, so that an error reads the same wherever the
value was written. An empty text means 'not given': `mlflow run` passes every declared parameter.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import click

from effv2.config import field_of
from effv2.errors import InputError, RunError, Terminated

ENDING_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
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
}
ONE_RUN = {
    "variant": "model.variant",
    "dropout": "model.dropout",
    "stochastic_depth": "model.stochastic_depth",
    "depth_multiplier": "model.depth_multiplier",
    "width_multiplier": "model.width_multiplier",
    "seed": "random.seed",
}


def config_options(fields: dict[str, str]) -> Callable[[Command], Command]:
    """Add an option for each field."""

    def decorate(command: Command) -> Command:
        for name, dotted in reversed(fields.items()):
            command = _config_option(name, dotted)(command)
        return command

    return decorate


def _config_option(name: str, dotted: str) -> Callable[[Command], Command]:
    info, default = field_of(dotted)
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
    "--study", default="", metavar="FILE", help="Study file (YAML) whose settings the options then change."
)
experiment_option = click.option(
    "--experiment",
    default="",
    metavar="NAME",
    help="MLflow experiment to log to.  [default: MLflow's own choice]",
)


log_model_option = click.option(
    "--log-model",
    default="all",
    metavar="[best|all|none]",
    help="Which runs log their model: the best of the study, all, none.  [default: all]",
)


def parse_log_model(text: str) -> Any:
    """Validate --log-model."""
    if text not in ("", "best", "all", "none"):
        raise InputError(f"--log-model {text}: no such choice; use best, all or none.")
    return text or "all"


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
        # A signal that is ignored stays so: nohup and background jobs of a shell ask for it.
        heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, _end) for number in heard}
        try:
            return command(*args, **kwargs)
        except InputError as error:
            _leave(f"Error: {error}", 2)
        except RunError as error:
            _leave(f"Error: {error}", 1)
        except KeyboardInterrupt:
            _leave("Interrupted; runs that had begun are marked KILLED.", 130)
        except Terminated:
            _leave("Terminated; runs that had begun are marked KILLED.", 143)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapped  # type: ignore[return-value]


def _end(number: int, _frame: Any) -> NoReturn:
    """Raise once; further signals are ignored, so that they don't cut short the marking of runs."""
    for other in ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _leave(message: str, code: int) -> NoReturn:
    click.echo(message.replace("\n", " "), err=True)
    sys.exit(code)
