"""The parts of the documentation that the code generates: reference tables, and the tables of the protocols.

    python -m tests.reference

fills in the text between `<!-- NAME -->` and `<!-- end -->` on every page in docs/. NAME is a key of BLOCKS or the name
of a study. For a study, the text is a table of its settings with their sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import torch

from effv2.architecture import VARIANTS, build_model, count_gflops, count_parameters
from effv2.cli.main import main
from effv2.config.layers import build
from effv2.config.registry import Registry
from effv2.config.schema import Group, TrainConfig, field_of
from effv2.config.studies import SWEEPS, SearchFile, Sources, Study, open_study
from effv2.evidence.claims import read_claims
from effv2.evidence.quantities import ALL
from effv2.tracking import tags
from tests.conftest import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
EVALUATION = "evaluate-pretrained"  # it has settings of its own
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

STUDY_KEYS = {
    "name": "Name of the study: letters, digits and `.`, `_`, `-`. Required.",
    "description": "One sentence for the report.",
    "config": "Settings that all arms share, by group.",
    "arms": "Arms by name. Each holds the settings in which it differs.",
    "baseline": "The arm that the others are compared with. Default: the first.",
    "seeds": "A list such as `[0, 1, 2]`, or a single seed.",
    "splits": "Number of splits. Every seed runs on every split; `--seeds auto` gives each seed its own. Default: 1.",
    "max_seeds": "Maximum number of seeds per arm, as `--max-seeds`. Default: 30.",
    "margin": "Smallest difference of interest, as `--margin`. Closer arms count as equal. Default: none.",
    "paired": "`true` compares runs of equal seed with each other. Default: false.",
    "show": "More rows of the tables: the training time to an accuracy, such as `[seconds/to_test_accuracy_0.9]`.",
    "retries": "How often a failed run is tried again. Default: 1.",
    "search": "Ranges to search, instead of arms.",
    "protocol": "How each published setting is [known](../protocols.md): `stated`, `shown`, `inferred`, `assumed`.",
    "published": "Published figures, the number of test images, and what the runs need.",
    "command": "The command that the report prints. Default: the first line of the file.",
}
SEARCH_KEYS = {
    "trials": "Number of trials. Default: 12.",
    "space": "Ranges by setting, each with `low`, `high` and, for a log scale, `log: true`.",
    "prune": "Whether poor trials end early. Default: true.",
    "min_epochs": "Epochs before a trial may be pruned. Default: a quarter of all epochs.",
}
EPOCH_METRICS = {
    "train/loss": "Mean loss over the training images.",
    "train/accuracy": "Accuracy on the training images.",
    "val/loss": "Loss on the validation images, if there are any.",
    "val/accuracy": "Accuracy on the validation images, if there are any.",
    "test/loss": "Loss on the test images.",
    "test/accuracy": "Accuracy on the test images.",
    "learning_rate": "The highest learning rate of all layers at the end of the epoch.",
    "time/epoch_seconds": "Seconds of training and evaluation together.",
    "time/train_seconds": "Seconds of training. Evaluation and logging are excluded.",
    "time/evaluate_seconds": "Seconds of evaluation.",
    "throughput/train_images_per_second": "Training images per second.",
    "throughput/evaluate_images_per_second": "Evaluated images per second.",
    "progressive/stage": "Stage of the training, if it has stages.",
    "progressive/image_size": "Size of the training images in pixels, if there are stages.",
}
FINAL_METRICS = {
    "best/test_accuracy": "The highest test accuracy of all epochs.",
    "best/epoch": "The epoch with the highest test accuracy.",
    "selected/test_accuracy": "Test accuracy at the selected epoch: best on validation, or last without validation.",
    "selected/val_accuracy": "Validation accuracy at the selected epoch, if there are validation images.",
    "selected/epoch": "The selected epoch.",
    "selected/test_ece": "Expected calibration error on the test images, 15 bins.",
    "final/test_accuracy": "Test accuracy after the last epoch.",
    "time/total_train_seconds": "Seconds of training, all epochs together.",
    "inference/single_image_seconds": "Seconds for a batch of one image.",
    "model/parameters": "Number of parameters.",
    "model/gflops": "Billions of multiply-accumulate operations per image.",
}
TAGS = {
    tags.CONFIG_HASH: "Hash of the configuration.",
    tags.DATA_DIGEST: "Hash of the pixels, labels and names of every split.",
    tags.CODE_VERSION: "Versions of the parts of the code that decide a result, and of torch.",
    tags.STUDY: "Name of the study.",
    tags.ARM: "Name of the arm.",
    tags.GROUP: "Arm, study, data and epochs. MLflow's views group by it.",
    tags.VARIANT: "Name of the architecture.",
    tags.SEED: "Seed of the run.",
    tags.COMMAND: "The command that resumes the run or study.",
    tags.PID: "Id of the process that trains.",
    tags.PROCESS: "The process and the machine that work on the run.",
    tags.CREATION: "A unique id, to find runs that were created twice.",
    tags.OUTCOME: "`complete`, `pruned` or `failed`; empty in a resumed run until it ends.",
    tags.ERROR: "The error that ended the run; empty in a resumed run.",
    tags.WEIGHTS: "The weights that the run started from, and the share of parameters that they supplied.",
    tags.CONTINUES: "On a run that `mlflow run` opened: the id of the run that was resumed instead.",
    tags.GIT_COMMIT: "The git commit.",
    tags.GIT_DIRTY: "Whether there were uncommitted changes.",
    tags.MACHINE: "Several tags: processor, cores, threads, memory, accelerator, system and package versions.",
    tags.CALIBRATION: "The timing behind `precision=auto` on a CPU.",
    tags.NORMS: "The form of batch norm on a CPU: `compiled`, or `torch` without a C++ compiler.",
    tags.QUEUE: "On a study: its name in Optuna's storage.",
    tags.PLANNED: "On a study: the names of its planned runs.",
    tags.REUSED: "On a study: finished runs that it reuses.",
    tags.SHOWN: "On a study: the extra rows of its tables, which `show` in its file names.",
    tags.ANSWER: "On a study: its answers in sentences.",
    tags.BEST_RUN: "On a search: the id of the best run.",
    tags.LOOKS: "On a search: the trials that were evaluated on the test set.",
    tags.REPORT: "On a run: it holds the report of the experiment.",
    tags.WRITTEN: "On an experiment: the description that effv2 wrote.",
    tags.PROMOTING: "On a model version: its promotion is being judged.",
    tags.PROMOTION: "On a model version: several tags with the figures of its promotion.",
}


def rows(titles: str, lines: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table; `titles` are separated by commas."""
    names = titles.split(", ")
    return "\n".join(f"| {' | '.join(line)} |" for line in [tuple(names), ("---",) * len(names), *lines])


def all_commands() -> dict[str, click.Command]:
    """Return all commands by their full names, including those of groups."""
    found: dict[str, click.Command] = {}
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            found |= {f"{name} {each}": inner for each, inner in command.commands.items()}
        else:
            found[name] = command
    return found


def options_of(command: click.Command) -> list[click.Option]:
    """Return the options of a command."""
    return [each for each in command.params if isinstance(each, click.Option)]


def commands() -> str:
    """Return a section for each command: usage, help, and the names of its options."""
    parts = []
    for name, command in all_commands().items():
        arguments = [each for each in command.params if isinstance(each, click.Argument)]
        words = [each.make_metavar(click.Context(command)) for each in arguments]
        text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
        names = ", ".join(f"`{each.opts[0]}`" for each in options_of(command))
        usage = " ".join(["effv2", name, "[OPTIONS]", *words])
        parts.append(
            f"### {name}\n\n```text\n{usage}\n```\n\n{text}"
            + (f"\n\nOptions: {names}.{own_defaults(command)}" if names else "")
        )
    return "\n\n".join(parts)


def own_defaults(command: click.Command) -> str:
    """Return a sentence on the defaults of a command that differ from those of the settings."""
    found = {
        each.opts[0]: re.search(r"default: ([^;\]]*)", each.help or "")
        for each in options_of(command)
        if setting_of(each)
    }
    usual = {name: default_of(setting) for setting, name in option_names().items()}
    given = [f"`{name} {default[1]}`" for name, default in found.items() if default and name in usual]
    other = [words for words in given if words.strip("`").split()[1] != usual[words.strip("`").split()[0]]]
    return f" Its own defaults: {', '.join(other)}." if other and command.name != EVALUATION else ""


def options() -> str:
    """Return the options without a setting, and those of evaluations, with the commands that take them."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, command in all_commands().items():
        for each in options_of(command):
            if not setting_of(each) or name == EVALUATION:
                found.setdefault((each.opts[0], " ".join((each.help or "").split())), []).append(name)
    return rows("option, meaning, commands", [(f"`{o}`", cell(text), ", ".join(n)) for (o, text), n in found.items()])


def cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return text.replace("|", "\\|")


def setting_of(option: click.Option) -> str:
    """Return the setting that an option gives, if it gives one."""
    return str(getattr(option, "setting", ""))


def option_names() -> dict[str, str]:
    """Return the option for each setting that has one."""
    found = [each for command in all_commands().values() for each in options_of(command)]
    return {setting_of(each): each.opts[0] for each in found if setting_of(each) in TrainConfig().flat()}


def default_of(setting: str) -> str:
    """Return the default of a setting as the commands show it."""
    default = field_of(setting).default
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


def kind_of(setting: str) -> str:
    """Return the type, choices and bounds of a setting in words."""
    field = field_of(setting)
    annotation: Any = field.annotation
    names = next((each.names() for each in field.metadata if isinstance(each, Registry)), [])
    if get_origin(annotation) is Literal:
        names = [*get_args(annotation)]
    if names:
        return ", ".join(f"`{name}`" for name in names)
    words = {int: "integer", float: "number", bool: "true or false", str: "text"}
    rules = ((sign, getattr(rule, name, None)) for name, sign in SIGNS.items() for rule in field.metadata)
    limits = [f"{sign} {limit:g}" for sign, limit in rules if limit is not None]
    return ", ".join([words[annotation], *limits])


def settings() -> str:
    """Return a section for each group of settings, with a table."""
    names, parts = option_names(), []
    for group, field in TrainConfig.model_fields.items():
        kind: Any = field.annotation
        lines = []
        for name, own in kind.model_fields.items():
            setting = f"{group}.{name}"
            option = f"`{names[setting]}`" if setting in names else ""
            default = default_of(setting) or "none"
            lines.append((f"`{setting}`", option, kind_of(setting), default, cell(own.description or "")))
        text = " ".join((kind.__doc__ or "").split())
        parts.append(f"### {group}\n\n{text}\n\n" + rows("setting, option, values, default, meaning", lines))
    return "\n\n".join(parts)


def described(names: dict[str, str]) -> str:
    """Return names with their meaning as a table."""
    return rows("name, meaning", [(f"`{name}`", text) for name, text in names.items()])


def quantities() -> str:
    """Return the quantities that claims and tables can name, with their words."""
    lines = [(f"`{each.name}`", each.words, f"from `{each.metric}`" if each.metric else "logged") for each in ALL]
    return rows("name, meaning, logged or derived", lines)


def studies() -> str:
    """Return the study files that are installed with the package."""
    lines = []
    for path in sorted(SWEEPS.glob("*.yaml")):
        study = open_study(path.stem)
        command = study.command.split()[1]
        lines.append((f"`{study.name}`", command, study.description, ", ".join(study.arms)))
    return rows("study, command, description, arms", lines)


def variants() -> str:
    """Return the named architectures with their parameters, and their FLOPs at 32x32 for ten classes."""
    lines = []
    for name, table in VARIANTS.items():
        with torch.device("meta"):  # counting needs no memory
            parameters = count_parameters(build_model(table, 10))
        lines.append((f"`{name}`", f"`{table}`", f"{parameters / 1e6:.1f} M", f"{count_gflops(table, 10, 32):.3f}"))
    return rows("variant, stages, parameters, GFLOPs at 32x32", lines)


def claims() -> str:
    """Return the published claims with the commands whose runs they use, and what to prepare first."""
    known, lines = read_claims(), []
    for id_, claim in known.claims.items():
        protocols = [known.protocols[name] for name in dict.fromkeys(each.protocol for each in known.contrasts(id_))]
        needed = ["; ".join(filter(None, (f"`{each.command}`", each.needs))) for each in protocols if each.command]
        lines.append((id_, claim.words, "<br>".join(dict.fromkeys(needed))))
    return rows("claim, words, runs that it needs", lines)


def protocol(name: str) -> str:
    """Return the settings of a study as a table: setting, value, how it is known, from where."""
    study = open_study(name)
    config = build(TrainConfig, study.base).flat()
    lines = []
    for kind in Sources.model_fields:
        for keys, source in getattr(study.protocol, kind).items():
            names = keys.split(", ")
            values = ", ".join(f"{config[key]}" or "none" for key in names if key in config)
            named = ", ".join(f"`{key}`" if key in config else key for key in names)
            lines.append((named, values, kind, source))
    return rows("setting, value, known, from", lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "options": options,
    "settings": settings,
    "variants": variants,
    "studies": studies,
    "study-keys": lambda: described(STUDY_KEYS),
    "search-keys": lambda: described(SEARCH_KEYS),
    "epoch-metrics": lambda: described(EPOCH_METRICS),
    "final-metrics": lambda: described(FINAL_METRICS),
    "quantities": quantities,
    "claims": claims,
    "tags": lambda: described(TAGS),
}


def keys_of(group: type[Group]) -> set[str]:
    """Return the keys that a file may give for a group."""
    return {field.alias or name for name, field in group.model_fields.items()}


KEYS = ((STUDY_KEYS, Study), (SEARCH_KEYS, SearchFile))


def filled(page: str) -> str:
    """Return the page with its generated parts up to date."""
    return BLOCK.sub(lambda found: f"<!-- {found[1]} -->\n\n{block(found[1])}\n\n<!-- end -->", page)


def block(name: str) -> str:
    """Return the generated part of a name."""
    return BLOCKS[name]() if name in BLOCKS else protocol(name)


def pages() -> list[Path]:
    """Return the hand-written pages: those in docs/ except the results."""
    return sorted(path for path in DOCS.rglob("*.md") if DOCS / "results" not in path.parents)


if __name__ == "__main__":
    for path in pages():
        if (new := filled(old := path.read_text())) != old:
            path.write_text(new)
            print(f"written: {path.relative_to(ROOT)}")
