"""The options of the commands and of their Python functions: settings, and how studies are run and stored."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from effv2.architecture import VARIANTS
from effv2.config.layers import Layer, Written, validate
from effv2.config.schema import OPTIMISERS, Group, TrainConfig, field_of
from effv2.core.errors import InputError, nearest

MOST_SEEDS = 10_000
LogModel = Literal["best", "all", "none"]


def _distinct_seeds(value: Any) -> Any:
    words = value if isinstance(value, (list, tuple)) else str(value).split(",")
    found = [re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", str(word).strip(), re.ASCII) for word in words]
    ranges = [range(int(each[1]), int(each[2] or each[1]) + 1) for each in found if each]
    valid = len(ranges) == len(words) and all(each and each[-1] < 2**32 for each in ranges)
    if not valid or sum(map(len, ranges)) > MOST_SEEDS:
        problem = f"must be at most {MOST_SEEDS:,} whole numbers of at least 0, such as 0,1,2 or 0-2"
        raise ValueError(f"{problem}; the option `seeds` also takes auto or race")
    seeds = [*chain.from_iterable(ranges)]
    if len(set(seeds)) < len(seeds):
        raise ValueError("the same seed appears twice; remove one")
    return seeds


Seeds = Annotated[tuple[int, ...], BeforeValidator(_distinct_seeds)]
MaxSeeds = Annotated[int | None, Field(ge=3, le=50)]
Margin = Annotated[float | None, Field(gt=0, lt=1)]
AUTO, RACE = "auto", "race"  # instead of seeds: as many as needed to decide each difference, or the best arm


class CheckpointOptions(Group):
    """Where and how often checkpoints are written."""

    checkpoint_dir: str = Field("checkpoints", description="Folder for checkpoints. A killed run resumes from them.")
    checkpoint_minutes: float = Field(
        10.0, ge=0, description="Minutes of training that a kill may cost. Checkpoints take at most 2 % of the time."
    )
    checkpoint_upload_minutes: float = Field(
        0.0, ge=0, description="Minutes between checkpoint uploads. Another machine can resume from them. 0 = never."
    )


class StudyOptions(CheckpointOptions):
    """Where a study is stored and logged, and how it is run. `seeds` and `trials` override those of the study file."""

    workers: int = Field(1, ge=1, le=100_000, description="Processes on this machine that share the study.")
    storage: str = Field(
        "sqlite:///optuna.db",
        description="Optuna's storage for the state of studies: sqlite:///FILE. For several machines: "
        "postgresql://USER@HOST/DATABASE, or journal:///FOLDER/FILE in a shared folder.",
    )
    experiment: str = Field("", description="Name of the MLflow experiment.  [default: MLflow's choice, else effv2]")
    log_model: LogModel = Field("all", description="Which runs log their model: the best of the study, all, or none.")
    fresh: bool = Field(False, description="Start over and repeat finished runs.")
    seeds: Annotated[
        tuple[int, ...] | Literal["auto", "race"],
        BeforeValidator(lambda value: value if value in (AUTO, RACE) else _distinct_seeds(value)),
    ] = Field(
        (),
        description="Seeds of each arm, such as 0,1,2 or 0-2. auto: three seeds, then more until each arm's difference "
        "from the baseline is decided. race: until the best arm is known.  [default: 0, or the study's]",
    )
    max_seeds: MaxSeeds = Field(
        None,
        description="Maximum number of seeds per arm, fixed before the study begins.  [default: 30, or the study's]",
    )
    margin: Margin = Field(
        None,
        description="Smallest difference of interest, 0.01 = one point. Closer arms count as equal.  "
        "[default: the study's]",
    )
    budget_hours: float | None = Field(
        None, gt=0, description="Maximum hours for auto seeds, summed over runs. The first round always runs."
    )
    plan: bool = Field(False, description="Only print the runs and hours needed, and what the study could find.")
    trials: int | None = Field(
        None, ge=1, le=100_000, description="Total trials of the search.  [default: 12, or the study's]"
    )


class Options(StudyOptions):
    """All options that aren't settings. Each command takes some. A title is the word for the value in its help."""

    variant: str = Field(
        "all",
        title="LIST",
        description=f"What to compare with the baseline, separated by commas: {', '.join(VARIANTS)}, arms of the "
        "study file, or all arms.",
    )
    check: str = Field(
        "all",
        title="NAME",
        description="The change to compare with the default, or all: depth (depth multiplier 0.1), half_layers, "
        "dropout (0.6), stochastic_depth (0.5), or a change in the study file.",
    )
    scheduler: str = Field("both", title="[both|plateau|none]", description="With ReduceLROnPlateau, without, or both.")
    study: str = Field(
        "",
        title="NAME",
        description="The study: the path of a YAML file, or a name such as ablate-mnist. Options change its settings.",
    )
    set: tuple[str, ...] = Field(
        (),
        title="SETTING=VALUE",
        description=f"Any setting, such as optimiser.name=sgd (one of {', '.join(OPTIMISERS.names())}). Repeat it, "
        "or separate several settings by commas or spaces.",
    )
    models: str = Field(
        "efficientnet_v2_s,efficientnet_b0,resnet50",
        title="LIST",
        description="Classification networks, separated by commas. Of torchvision: resnet50 with its default weights, "
        "resnet50:IMAGENET1K_V1 with others, or resnet50=FILE with your state dict (not verified). From a training: "
        "mine=runs:/ID or mine=models:/ID. They may have the classes of the data instead of ImageNet's.",
    )
    weights_dir: str = Field(
        "",
        title="FOLDER",
        description="Folder with published weight files. It is searched before torchvision's cache and download.",
    )
    export: str = Field(
        "",
        title="FOLDER",
        description="Also write the report to this folder, with its data as CSV and a manifest of hashes.",
    )
    from_export: str = Field(
        "",
        title="LIST",
        description="Read and combine these exports (folders separated by commas) instead of the tracking server. "
        "The last export of a run counts. Needs `export` with another folder.",
    )
    claims: str = Field("", title="FILE", description="YAML file with your claims, in addition to the published ones.")


OTHER_NAMES = {"data.dir": "data_dir", "schedule.name": "scheduler"}


def options_for(settings: str) -> dict[str, str]:
    """Return settings by the names of their options: the last part of each setting's name, with few exceptions."""
    return {OTHER_NAMES.get(setting, setting.rpartition(".")[2]): setting for setting in settings.split()}


DATA = options_for(
    "data.dataset data.dir data.train_dir data.test_dir data.labels data.allow_incomplete_classes data.skip_broken "
    "data.max_megapixels data.download data.image_size"
)
SHARED = DATA | options_for(
    "data.per_class data.split_seed schedule.epochs optimiser.batch_size optimiser.lr schedule.name execution.device "
    "execution.precision execution.compile model.weights model.weights_partial"
)
ONE_RUN = SHARED | options_for(
    "model.variant model.dropout model.stochastic_depth model.depth_multiplier model.width_multiplier random.seed"
)
QUEUE = ("workers", "storage")
CHECKPOINTS = ("checkpoint_dir", "checkpoint_minutes", "checkpoint_upload_minutes")
LOGGING = ("fresh", "log_model", "experiment")
STUDY = (*QUEUE, *CHECKPOINTS, *LOGGING)
GRID = ("seeds", "max_seeds", "margin", "budget_hours", "plan", *STUDY)


@dataclass(frozen=True)
class Taken:
    """The options of a command by name: its `own`, those of `settings` of a configuration, and `more`.

    `defaults` holds the defaults that differ for this command. For settings they are those of its own study.
    """

    own: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    more: Sequence[str] = ()
    config: type[Group] = TrainConfig
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """Return all options, in the order of the help."""
        known = Options.model_fields
        settings = {name: field_of(setting, self.config) for name, setting in self.settings.items()}
        return {name: known[name] for name in self.own} | settings | {name: known[name] for name in self.more}

    def default(self, name: str) -> Any:
        """Return the default of an option."""
        return self.defaults.get(name, self.fields[name].default)

    def read(self, given: Mapping[str, Any]) -> tuple[Layer, Options]:
        """Return the settings and the validated options among those that were given; InputError."""
        names = (*self.own, *self.more)
        values = {name: value for name, value in (*self.defaults.items(), *given.items()) if name in names}
        how = validate(Options, values)
        options = {setting: given[name] for name, setting in self.settings.items() if name in given}
        return _layer(options, how.set), how


def _layer(options: Mapping[str, Any], more: Sequence[str]) -> Layer:
    """Return settings from their own options, and from `more`, which is in the form of the option `set`."""
    layer = {name: Written(value) for name, value in options.items()}
    known = list(TrainConfig().flat())
    for part in chain.from_iterable(re.split(r"[,\s]+(?=\w+\.\w+=)", text.strip(", ")) for text in more):
        name, sign, value = part.partition("=")
        problem, remedy = "", "remove one"
        if not sign:
            problem, remedy = "has no value", "write SETTING=VALUE"
        elif name not in known:
            same = [each for each in known if each.endswith(f".{name}")]
            problem, remedy = "no such setting", f"give {same[0]}" if same else nearest(name, known)
        elif name in layer:
            problem = f"{name} is given as well" if name in options else "is given twice"
        if problem:
            raise InputError(f"set {name}", value, problem, remedy)
        layer[name] = Written(value, f"set {name}")
    return layer
