"""The settings, which decide a run: frozen, validated and hashed.

Each field has its meaning, unit and bounds. The command line takes its help and defaults from here. This module imports
no large package, because commands build their options before they import any.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from effv2 import architecture
from effv2.config.registry import Registry
from effv2.core.errors import nearest
from effv2.core.provenance import sha256_of_values

DATASETS = Registry("data set", "effv2.data.torchvision_sets")
OPTIMISERS = Registry("optimiser", "effv2.training.optimisers")
SCHEDULES = Registry("schedule", "effv2.training.optimisers")
OF_KEY = "of_key"  # type of an error about a key of the group

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16", "auto"]

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Group(BaseModel):
    """Frozen, finite and free of unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                about = {"key": str(key), "remedy": nearest(str(key), known)}
                raise PydanticCustomError(OF_KEY, "unknown key '{key}'; {remedy}", about)
        return values

    def flat(self) -> dict[str, Any]:
        """Return every field of a group of groups under its dotted name."""
        groups = self.model_dump()
        return {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}

    def updated(self, group: str, **values: Any) -> Self:
        """Return a group of groups with other values in one of them. They are not validated."""
        return self.model_copy(update={group: getattr(self, group).model_copy(update=values)})


class DataConfig(Group):
    """The images, their sampling and their splits."""

    dataset: Annotated[str, DATASETS] = Field("digits", description="The data set; `digits` needs no files.")
    dir: str = Field("", description="Folder of the data set, if it consists of files.")
    train_dir: str = Field("", description="Folder of the training images, if it has an unusual name.")
    test_dir: str = Field("", description="Folder of the test images.")
    labels: str = Field("", description="CSV with columns of image files and labels, instead of class folders.")
    allow_incomplete_classes: bool = Field(
        False, description="Train even if a class has no images, or too few, in the data set or in one part of it."
    )
    skip_broken: bool = Field(False, description="Leave out unreadable images. The run logs which.")
    max_megapixels: float = Field(200.0, gt=0, le=10_000, description="Maximum pixels per image, in millions.")
    download: bool = Field(False, description="Download the data set into the folder if it is missing.")
    image_size: int = Field(32, ge=8, le=1024, description="Side of the square input in pixels.")
    per_class: int = Field(
        0, ge=0, description="Training images per class, 0 = all. With published sampling, test images are included."
    )
    sampling: Literal["standard", "published"] = Field(
        "standard", description="How images are drawn and split. published: the post's rule."
    )
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Share for testing, without a test part or if published.")
    validation_fraction: Fraction = Field(0.1, description="Share of the train part for validation, 0 = none.")
    split_seed: int = Field(0, ge=0, lt=2**32, description="Seed of sampling and splits.")
    balance: bool = Field(False, description="Draw training images of all classes equally often, with replacement.")
    normalise: Literal["none", "half", "imagenet"] = Field(
        "none", description="Mean and deviation: none, 0.5 and 0.5, or ImageNet's."
    )


class AugmentConfig(Group):
    """Augmentation of training images, drawn separately for each sample. All off by default."""

    crop: int = Field(0, ge=0, le=256, description="Pixels of reflected padding before a random crop, 0 = off.")
    resized_crop: Probability = Field(
        0.0,
        description="Minimum share of the image in a resized random crop, before its sides are cut at the border "
        "(Szegedy et al. 2015), 0 = off.",
    )
    flip: bool = Field(False, description="Mirror left and right with probability 0.5.")
    rand_augment: float = Field(
        0.0, ge=0, le=30, description="Magnitude of RandAugment (Cubuk et al. 2020), 0 = off. 10 rotates by 30 degrees."
    )
    trivial_augment: bool = Field(False, description="TrivialAugment (Mueller & Hutter 2021), wide.")
    erasing: Probability = Field(0.0, description="Probability of erasing a rectangle (Zhong et al. 2017).")
    mixup: float = Field(0.0, ge=0, le=10, description="Alpha of mixup's Beta(alpha, alpha), 0 = off.")
    cutmix: float = Field(0.0, ge=0, le=10, description="Alpha of CutMix's Beta, 0 = off. With mixup, a coin decides.")


class ModelConfig(Group):
    """The network: a named architecture or a custom stage table."""

    table: str = Field("", description="Custom stage table, rows separated by slashes. `variant` is then its name.")
    variant: str = Field("default", description=f"The architecture: {', '.join(architecture.VARIANTS)}.")
    depth_multiplier: float = Field(1.0, gt=0, le=10, description="Multiplies the layers of MBConv stages.")
    width_multiplier: float = Field(1.0, gt=0, le=10, description="Multiplies the channels of all stages.")
    dropout: Fraction = Field(0.2, description="Dropout before the classifier.")
    stochastic_depth: Fraction = Field(0.2, description="Stochastic depth of the last block, rising from 0.")
    outputs: int = Field(0, ge=0, le=100_000, description="Width of the head, 0 = the number of classes.")
    zero_init_residual: bool = Field(False, description="Start residual branches at zero (Goyal et al. 2017).")
    weights: str = Field(
        "", description="Initial weights: `published`, a name such as IMAGENET1K_V1, a file, runs:/ID or models:/ID."
    )
    weights_partial: bool = Field(False, description="Load only the weights that match by name and shape.")
    weights_sha256: Annotated[str, AfterValidator(str.lower)] = Field(
        "", description="Expected SHA-256 of the weights."
    )

    @field_validator("table")
    @classmethod
    def _canonical_table(cls, text: str) -> str:
        return str(architecture.parse_table(text)) if text.strip() else ""

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, name: str, info: ValidationInfo) -> str:
        if not info.data.get("table") and name not in architecture.VARIANTS:
            several = "ablate compares several" if "," in name else nearest(name, list(architecture.VARIANTS))
            raise ValueError(f"no such variant; {several}")
        return name

    @model_validator(mode="after")
    def _named_table(self) -> Self:
        if self.table and self.table != str(architecture.VARIANTS.get(self.variant, self.table)):
            problem = "a custom table needs a name of its own, not that of a variant; set model.variant"
            raise PydanticCustomError(OF_KEY, problem, {"key": "table"})
        return self

    def build_table(self) -> architecture.Table:
        """Return the stage table that these fields describe."""
        table = architecture.parse_table(self.table) if self.table else architecture.VARIANTS[self.variant]
        return architecture.scale_width(architecture.scale_depth(table, self.depth_multiplier), self.width_multiplier)


class OptimiserConfig(Group):
    """The optimiser and the loss."""

    name: Annotated[str, OPTIMISERS] = Field("adamw", description="The optimiser.")
    lr: float = Field(1e-3, gt=0, le=100, description="Peak learning rate.")
    batch_size: int = Field(32, ge=2, le=65_536, description="Images per step.")
    weight_decay: float = Field(0.05, ge=0, le=10, description="Weight decay. Biases and norms have none.")
    momentum: Fraction = Field(0.9, description="Momentum of SGD and Muon (Nesterov).")
    clip_norm: float = Field(1.0, ge=0, description="Largest L2 norm of the gradient, 0 = unlimited.")
    label_smoothing: Fraction = Field(0.0, description="Label smoothing (Szegedy et al. 2016).")
    ema_decay: Fraction = Field(0.0, description="Decay per step of the weight average that is evaluated, 0 = off.")
    head_lr_factor: float = Field(1.0, gt=0, le=1e4, description="Learning rate of the head, divided by the rest's.")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Learning rate of a stage, divided by the next one's (Clark et al. 2020)."
    )
    frozen_epochs: int = Field(
        0, ge=-1, le=100_000, description="First epochs that train only the head. -1 = all epochs: a linear probe."
    )
    freeze_batch_norm: bool = Field(False, description="Keep batch norm as it is in the initial weights.")


class ScheduleConfig(Group):
    """The number of epochs and the learning rate over time."""

    name: Annotated[str, SCHEDULES] = Field(
        "cosine", description="Learning rate schedule. plateau follows validation accuracy, or else test accuracy."
    )
    epochs: int = Field(
        6, ge=1, le=100_000, description="Maximum epochs. If unset, some sets get up to 100 (docs/few-images.md)."
    )
    warmup_epochs: int = Field(0, ge=0, description="Epochs of linear warm-up (not with onecycle).")

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_ends(cls, warmup: int, info: ValidationInfo) -> int:
        if warmup and warmup >= info.data.get("epochs", warmup + 1):
            raise ValueError("the warm-up must end before the last epoch; lower it or raise the epochs")
        return warmup

    plateau_factor: float = Field(0.1, gt=0, lt=1, description="Factor by which ReduceLROnPlateau lowers the rate.")
    plateau_patience: int = Field(10, ge=0, description="Evaluated epochs without gain before ReduceLROnPlateau acts.")


class ProgressiveConfig(Group):
    """Progressive learning (Tan & Le 2021, section 4): size and regularisation rise from stage to stage.

    Stages have equal length. Settings rise linearly to their values in the last stage (algorithm 1 of the paper).
    """

    stages: int = Field(1, ge=1, le=100, description="Stages of the training, 1 = off.")
    image_size: int = Field(0, ge=0, le=1024, description="Training image size of the first stage, 0 = as in the last.")
    last_image_size: int = Field(
        0, ge=0, le=1024, description="Training image size of the last stage, 0 = data.image_size, as in evaluation."
    )
    rand_augment: float = Field(-1, ge=-1, le=30, description="RandAugment of the first stage, -1 = as in the last.")
    mixup: float = Field(-1, ge=-1, le=10, description="Mixup's alpha in the first stage, -1 = as in the last.")
    dropout: float = Field(-1, ge=-1, lt=1, description="Dropout in the first stage, -1 = as in the last.")

    @field_validator("image_size", "last_image_size", "rand_augment", "mixup", "dropout")
    @classmethod
    def _in_stages(cls, value: float, info: ValidationInfo) -> float:
        if isinstance(value, int) and 0 < value < 8:
            raise ValueError("it is less than 8 pixels; raise it")
        if -1 < value < 0:
            raise ValueError("it is below 0; give -1 for the value of the last stage")
        rises = info.field_name != "last_image_size" and value != cls.model_fields[str(info.field_name)].default
        if rises and info.data.get("stages") == 1:
            raise ValueError("nothing rises in one stage; set progressive.stages to 2 or more")
        return value


class StoppingConfig(Group):
    """Early stopping on validation accuracy, or on test accuracy without a validation split."""

    min_epochs: int = Field(0, ge=0, description="Epoch from which patience is counted.")
    patience: int = Field(
        0, ge=0, description="Epochs without gain before a training stops, from min_epochs on, 0 = off."
    )
    best_since: Literal["start", "min_epochs"] = Field(
        "start", description="The best to exceed: that of all epochs, or of those from min_epochs on."
    )


class EvaluationConfig(Group):
    """What is evaluated, and after which epochs."""

    train_set: bool = Field(
        False, description="Measure train accuracy after each epoch, not on its batches in training."
    )
    test_set: bool = Field(
        True, description="Evaluate the test set after each epoch. A search evaluates only its best trial on it."
    )
    batch_size: int = Field(256, ge=1, le=65_536, description="Images per forward pass.")
    batch_norm_images: int = Field(
        0, ge=0, description="Training images to re-estimate batch norm from, 0 = off. Unset, 1,024 if steps are few."
    )
    every: int = Field(1, ge=1, description="Epochs between evaluations. The last epoch is always evaluated.")

    @field_validator("every")
    @classmethod
    def _epochs_are_alike(cls, every: int, info: ValidationInfo) -> int:
        if every > 1 and info.data.get("train_set"):
            raise ValueError("the train set must be evaluated in every epoch or in none; give 1, or train_set false")
        return every


class ExecutionConfig(Group):
    """Device, number format and compilation."""

    device: Device = Field("auto", description="auto = cuda if available, then mps, then cpu.")
    precision: Precision = Field(
        "auto",
        description="auto = bf16 if the device supports it and, on CPUs, a short timing shows a tenth more speed.",
    )
    channels_last: bool = Field(True, description="Channels-last memory format of images and kernels.")
    compile: bool = Field(False, description="Compile for training (torch.compile). It takes 1 to 2 minutes per shape.")


class RandomConfig(Group):
    """The seed of training. Each random stream has its own, derived from it."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of image order, augmentation, initialisation and dropout.")

    @field_validator("seed", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip().isdecimal():
            raise ValueError("must be a whole number of at least 0; only a study takes several, by its option `seeds`")
        return value


class TrainConfig(Group):
    """All settings of a run. Equal hashes mean equal runs on equal data, code and machine."""

    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimiser: OptimiserConfig = Field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    progressive: ProgressiveConfig = Field(default_factory=ProgressiveConfig)
    stopping: StoppingConfig = Field(default_factory=StoppingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)
    random: RandomConfig = Field(default_factory=RandomConfig)

    def with_seed(self, seed: int, split: int = 0) -> "TrainConfig":
        """Return this configuration with another seed, and with its split seed raised by `split`."""
        return self.updated("data", split_seed=(self.data.split_seed + split) % 2**32).updated("random", seed=seed)

    @property
    def in_short(self) -> str:
        """Describe data and length in a few words."""
        return f"{self.data.dataset} {self.data.image_size}x{self.data.image_size}, {self.schedule.epochs} epochs"

    def identity(self) -> dict[str, Any]:
        """Return what decides a run: the fields under dotted names, and the resolved stage table.

        The place of the images is left out. So is a field that was added later, as long as it has its default: a run
        then computes what it did before the field existed.
        """
        values, defaults, table = self.flat(), type(self)().flat(), self.model.build_table()
        absent = NO_IDENTITY | {name for name in values if name not in FIRST_FIELDS and values[name] == defaults[name]}
        kept = {name: value for name, value in values.items() if name not in absent}
        return kept | {"model.stages": " / ".join([*table.rows, str(table.last_channels)])}

    def hash(self) -> str:
        """Return 16 hexadecimal digits of SHA-256 over the identity."""
        return sha256_of_values(self.identity())[:16]


WHERE = "dir download train_dir test_dir labels allow_incomplete_classes skip_broken max_megapixels"
# The places of images and weights: digests identify their content.
NO_IDENTITY = {"model.weights", *(f"data.{name}" for name in WHERE.split())}
# The fields that every identity holds. A field added later need not be listed, but its default must never change.
FIRST_FIELDS = {
    f"{group}.{name}"
    for group, names in {
        "data": "dataset image_size per_class sampling test_fraction validation_fraction split_seed normalise",
        "augment": "crop flip trivial_augment erasing mixup cutmix",
        "model": "table variant depth_multiplier width_multiplier dropout stochastic_depth outputs zero_init_residual",
        "optimiser": "name lr batch_size weight_decay momentum clip_norm label_smoothing ema_decay",
        "schedule": "name epochs warmup_epochs plateau_factor plateau_patience",
        "stopping": "min_epochs patience",
        "evaluation": "train_set test_set batch_size",
        "execution": "device precision channels_last compile",
        "random": "seed",
    }.items()
    for name in names.split()
}


def field_of(setting: str, config: type[Group] = TrainConfig) -> FieldInfo:
    """Return the field of a dotted setting such as `optimiser.lr`."""
    group, name = setting.split(".")
    return cast(type[Group], config.model_fields[group].annotation).model_fields[name]
