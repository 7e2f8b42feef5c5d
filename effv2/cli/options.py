"""What the commands share: options from the schema, wrong input and signals as one sentence and an exit code.

Every value is taken as text and validated by pydantic, so that an error reads the same wherever the value was written.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from effv2.config.layers import Layer, option_layer, validate
from effv2.config.options import StudyOptions
from effv2.config.registry import OPTIMISERS, Registry
from effv2.config.schema import Group, TrainConfig, field_of
from effv2.core.errors import InputError, RunError, Terminated, same_command
from effv2.core.provenance import COMMAND, without_password
from effv2.core.signals import ending_signals
from effv2.execution.allocator import tune_allocator

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

OTHER_NAMES = {"data.dir": "data_dir", "schedule.name": "scheduler"}


def _options_for(settings: str) -> dict[str, str]:
    """Return settings by the names of their options: their own last names, but for a few."""
    return {OTHER_NAMES.get(setting, setting.rpartition(".")[2]): setting for setting in settings.split()}


SHARED = _options_for(
    "data.dataset data.dir data.download data.image_size data.per_class data.split_seed schedule.epochs "
    "optimiser.batch_size optimiser.lr schedule.name execution.device execution.precision execution.compile"
)
ONE_RUN = SHARED | _options_for(
    "model.variant model.dropout model.stochastic_depth model.depth_multiplier model.width_multiplier random.seed"
)
EVALUATION = _options_for(
    "data.dataset data.dir data.download data.per_class data.limit data.seed execution.device execution.precision "
    "execution.batch_size"
)
# Names of options that are fields of StudyOptions.
QUEUE = ("workers", "storage")
CHECKPOINTS = ("checkpoint_dir", "checkpoint_minutes", "checkpoint_upload_minutes")
LOGGING = ("fresh", "log_model", "experiment")


class Option(click.Option):
    """An option that takes a text, and the dotted setting that it gives, if it gives one."""

    def __init__(self, names: list[str], setting: str = "", **about: Any) -> None:
        super().__init__(names, **about)
        self.setting = setting

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the text; an empty one is none: `mlflow run -P lr=` passes it."""
        text = super().type_cast_value(ctx, value)
        return tuple(filter(None, text)) if self.multiple else text or None


class Command(click.Command):
    """A command that ends wrong input, faults and signals with one sentence and exit code 2, 1, 130 or 143.

    Its options may be spelt with underscores, as the parameters of `mlflow run` are.
    """

    def __init__(self, name: str, **about: Any) -> None:
        about["context_settings"] = {"token_normalize_func": lambda token: token.replace("_", "-")}
        super().__init__(name, **about)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        tune_allocator()  # before torch is imported
        token, fresh = COMMAND.set(_command_line(ctx)), ctx.params.get("fresh") == "true"
        resumes = f"; runs that had begun end KILLED, and {same_command(fresh)} resumes them"
        with ending_signals():
            try:
                return super().invoke(ctx)
            except InputError as error:
                text, code = f"Error: {_with_options(error, self)}", 2
            except RunError as error:
                text, code = in_options(f"Error: {error.sentences(fresh)}", self), 1
            except (KeyboardInterrupt, Terminated) as error:
                word, code = ("Terminated", 143) if isinstance(error, Terminated) else ("Interrupted", 130)
                text = in_options(f"{word}{resumes if 'fresh' in ctx.params else ''}.", self)
            finally:
                COMMAND.reset(token)
            click.echo(text.replace("\n", " "), err=True)
            sys.exit(code)


def _command_line(ctx: click.Context) -> str:
    """Return the command as it may be given again to resume: without empty options, passwords and --fresh."""
    words = ["effv2", str(ctx.command.name)]
    for option in ctx.command.params:
        value = ctx.params.get(str(option.name))
        for text in value if isinstance(value, tuple) else (value,):
            words += [option.opts[0], without_password(text)] if text and option.name != "fresh" else []
    return shlex.join(words)


def _options_by_name(command: click.Command) -> dict[str, str]:
    """Return the command's options by the parameters and settings that they give."""
    names = {name: each.opts[0] for each in command.params for name in (each.name, getattr(each, "setting", ""))}
    return {name: option for name, option in names.items() if name}


def in_options(text: str, command: click.Command, settings: bool = True) -> str:
    """Name settings, unless they are to stay, and parameters in backticks by the command's options for them."""
    options = _options_by_name(command)
    pattern = r"`(\w+)`|(?<![\w./=-])([a-z]+\.[a-z_]+)(?!\w|\.\w)" if settings else r"`(\w+)`()"
    return re.sub(pattern, lambda found: options.get(found[1] or found[2], found[0]), text)


def _with_options(error: InputError, command: click.Command) -> InputError:
    """Return the error with the options of the command for the names in it."""
    first, space, more = error.what.partition(" ")
    what = _options_by_name(command).get(first, first) + space + more
    return InputError(what, error.value, in_options(error.problem, command), in_options(error.remedy, command))


def option(name: str, text: str, metavar: str = "NAME", **about: Any) -> Decorator:
    """Add an option that no schema describes."""
    return click.option(f"--{name}", cls=Option, metavar=metavar, help=text, **about)


study_option = option(
    "study", "Study whose settings the options then change: the path of a file (YAML), or a name, as ablate-mnist."
)
set_option = option(
    "set",
    f"Any setting, as optimiser.name=sgd (of {', '.join(OPTIMISERS.names())}). May be given again; may hold several, "
    "separated by commas or spaces.",
    "SETTING=VALUE",
    multiple=True,
)


def setting_options(settings: Mapping[str, str], config: type[Group] = TrainConfig, **defaults: Any) -> Decorator:
    """Add an option for each setting; `defaults` are those of the command, where it has its own."""
    return _all_of(
        _field_option(name, field_of(setting, config), defaults, setting=setting) for name, setting in settings.items()
    )


def study_options(*names: str, **defaults: Any) -> Decorator:
    """Add options that are fields of StudyOptions."""
    return _all_of(_field_option(name, StudyOptions.model_fields[name], defaults) for name in names)


def _all_of(decorators: Iterable[Decorator]) -> Decorator:
    return lambda function: reduce(lambda decorated, each: each(decorated), reversed([*decorators]), function)


def _field_option(name: str, field: FieldInfo, defaults: Mapping[str, Any], **about: Any) -> Decorator:
    if field.annotation is bool:
        about |= {"is_flag": False, "flag_value": "true"}
    text = _help(field, defaults.get(name, field.default))
    return option(name.replace("_", "-"), text, _metavar(field), **about)


def _metavar(field: FieldInfo) -> str:
    kind: Any = field.annotation
    names = [*get_args(kind)] if get_origin(kind) is Literal else []
    names = next((each.names() for each in field.metadata if isinstance(each, Registry)), names)
    words = {int: "INTEGER", int | None: "INTEGER", float: "NUMBER", bool: "[true|false]"}
    return f"[{'|'.join(names)}]" if names else words.get(kind, "TEXT")


def _help(field: FieldInfo, default: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    rules = ((sign, getattr(rule, name, None)) for name, sign in signs.items() for rule in field.metadata)
    limits = ", ".join(f"{sign} {limit}" for sign, limit in rules if limit not in (None, 2**32))
    shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
    notes = "; ".join(filter(None, ("" if default in ("", None, ()) else f"default: {shown}", limits)))
    return f"{field.description}  [{notes}]" if notes else str(field.description)


def given_layer(options: Mapping[str, Any], settings: Mapping[str, str]) -> Layer:
    """Return the settings that a command was given, by their options and by --set."""
    others: dict[str, str] = {}
    for text in options.get("set", ()):
        for part in re.split(r"[,\s]+(?=[\w.]+=)", text.strip(", ")):
            name, sign, value = part.partition("=")
            if not sign or name in others:
                problem, remedy = ("is given twice", "remove one") if sign else ("has no value", "write SETTING=VALUE")
                raise InputError(f"set {name}", "", problem, remedy)
            others[name] = value
    return option_layer({setting: options[name] for name, setting in settings.items() if options[name]}, others)


def given_options(options: Mapping[str, Any], **defaults: Any) -> StudyOptions:
    """Return those of a command's options that are no settings; `defaults` are the command's own."""
    return validate(
        StudyOptions, defaults | {name: options[name] for name in StudyOptions.model_fields if options.get(name)}
    )
