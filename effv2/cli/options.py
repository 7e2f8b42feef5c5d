"""The common parts of commands: options from the schema, as text, and errors as one sentence and an exit code."""

import os
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from effv2.config.options import Taken
from effv2.config.registry import Registry
from effv2.core.errors import InputError, RunError, Terminated
from effv2.core.processes import ending_signals, leave, work_where_typed
from effv2.core.secrets import mask_command_line, masked

TRUE = ("true", "t", "1", "yes", "y", "on")  # as pydantic reads them


class Option(click.Option):
    """An option that takes a text, and the dotted setting that it sets, if any."""

    def __init__(self, names: list[str], setting: str = "", **about: Any) -> None:
        super().__init__(names, **about)
        self.setting = setting

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the text. An empty text counts as not given, because `mlflow run -P lr=` passes it."""
        text = super().type_cast_value(ctx, value)
        return tuple(filter(None, text)) if self.multiple else text or None


class Command(click.Command):
    """A command that ends with one sentence and exit code 2, 1, 130 or 143 after wrong input, a fault or a signal.

    Its options are those of `taken`, after its own.
    """

    def __init__(self, name: str, taken: Taken | None = None, **about: Any) -> None:
        # Options may be spelt with underscores, like the parameters of `mlflow run`.
        about["context_settings"] = {"token_normalize_func": lambda token: token.replace("_", "-")}
        options = [_option(each, field, taken) for each, field in taken.fields.items()] if taken else []
        about["params"] = [*about.get("params", ()), *options]
        super().__init__(name, short_help=about["help"].partition("\n\n")[0], **about)  # whole: click would cut it

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options, without showing secrets in the process's name or in click's errors."""
        mask_command_line()
        given = " ".join(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if masked(given) == given:
                raise
            raise click.UsageError(" ".join((masked(error.message), "; ".join(_logged()))), ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        work_where_typed()
        true = [name for name, text in ctx.params.items() if str(text).lower() in TRUE]
        again = "the same command without `fresh`" if "fresh" in true else "the same command"
        with ending_signals():
            try:
                _refuse_logged(ctx.params)
                return super().invoke(ctx)
            except InputError as error:
                text, code = f"Error: {_with_options(error, self)}", 2
            except RunError as error:
                text, code = f"Error: {error}{f' Then {again} resumes.' if error.resumes else ''}", 1
            except (KeyboardInterrupt, Terminated) as error:
                text, code = ("Terminated", 143) if isinstance(error, Terminated) else ("Interrupted", 130)
                runs = "fresh" in ctx.params and "plan" not in true
                text += f"; unfinished runs end as KILLED, and {again} resumes them." if runs else "."
            click.echo((text if code == 2 else in_options(text, self)).replace("\n", " "), err=True)
        return leave(code)


def _refuse_logged(params: Mapping[str, Any]) -> None:
    """Refuse an option with a password under `mlflow run`, which has logged it as it was given."""
    secret = ((name, text) for name, value in params.items() if masked(text := str(value or "")) != text)
    if (logged := _logged()) and (found := next(secret, None)):
        raise InputError(*found, *logged)


def _logged() -> tuple[str, ...]:
    """Return the problem that `mlflow run` has logged a password, and the remedy; nothing if it did not start this."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        deleted = f"delete that by `mlflow runs delete --run-id {run_id}` and `mlflow gc --run-ids {run_id}`"
        remedy = f"{deleted}, and give the password in another way, such as PGPASSWORD or ~/.pgpass"
        return f"`mlflow run` has logged its password in the run {run_id}", remedy
    return ()


def _options_by_name(command: click.Command) -> dict[str, str]:
    """Return the command's options by the parameters and settings that they set."""
    names = {name: each.opts[0] for each in command.params for name in (each.name, getattr(each, "setting", ""))}
    return {name: option for name, option in names.items() if name}


def in_options(text: str, command: click.Command, settings: bool = True) -> str:
    """Replace settings (if wanted) and parameters in backticks by the command's options for them."""
    options = _options_by_name(command)
    pattern = r"`(\w+)`|(?<![\w./=-])([a-z]+\.[a-z_]+)(?!\w|\.\w)" if settings else r"`(\w+)`()"
    return re.sub(pattern, lambda found: options.get(found[1] or found[2], found[0]), text)


def _with_options(error: InputError, command: click.Command) -> InputError:
    """Return the text of an error, with the options of the command instead of the names in it."""
    what = error.renamed(_options_by_name(command)).what
    return InputError(what, error.value, in_options(error.problem, command), in_options(error.remedy, command))


def _option(name: str, field: FieldInfo, taken: Taken) -> Option:
    about: dict[str, Any] = {"help": _help(field, taken.default(name)), "metavar": field.title or _metavar(field)}
    if field.annotation is bool:
        about |= {"is_flag": False, "flag_value": "true"}
    option = f"--{name.replace('_', '-')}"
    setting = taken.settings.get(name, "")
    return Option([option], setting=setting, multiple=field.annotation == tuple[str, ...], **about)


def _metavar(field: FieldInfo) -> str:
    kind: Any = field.annotation
    names = [*get_args(kind)] if get_origin(kind) is Literal else []
    names = next((each.names() for each in field.metadata if isinstance(each, Registry)), names)
    words: dict[Any, str] = {int: "INTEGER", float: "NUMBER", bool: "[true|false]"}
    words |= {int | None: "INTEGER", float | None: "NUMBER"}
    return f"[{'|'.join(names)}]" if names else words.get(kind, "TEXT")


def _help(field: FieldInfo, default: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    rules = ((sign, getattr(rule, name, None)) for name, sign in signs.items() for rule in field.metadata)
    limits = ", ".join(f"{sign} {limit}" for sign, limit in rules if limit not in (None, 2**32))
    shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
    notes = "; ".join(filter(None, ("" if default in ("", None, ()) else f"default: {shown}", limits)))
    return f"{field.description}  [{notes}]" if notes else str(field.description)
