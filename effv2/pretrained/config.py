"""Settings of an evaluation of published weights: the images and the execution."""

from typing import Annotated

from pydantic import Field

from effv2.config.schema import DATASETS, Device, Group, Precision

QUICK_LOOK = "Maximum of test images{}, and of other images from ImageNet's validation set, for a quick look. 0 = all."


class ImagesConfig(Group):
    """The images."""

    dataset: Annotated[str, DATASETS] = Field("imagenette", description="It has ImageNet's or your networks' classes.")
    dir: str = Field("", description="Folder of the data set.")
    download: bool = Field(False, description="Download imagenette into the folder if it is missing.")
    skip_broken: bool = Field(False, description="Leave out unreadable images. The run logs which.")
    max_megapixels: float = Field(200.0, gt=0, le=10_000, description="Maximum pixels per image, in millions.")
    per_class: int = Field(0, ge=0, description=QUICK_LOOK.format(" per class"))
    limit: int = Field(0, ge=0, description=QUICK_LOOK.format(""))
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the random choice of images.")


class ComputeConfig(Group):
    """Device, precision and batches."""

    device: Device = Field("auto", description="auto = cuda if available, then mps, then cpu.")
    precision: Precision = Field(
        "fp32", description="bf16 also reports what it changes. auto = fp32, because published figures are compared."
    )
    batch_size: int = Field(
        0,
        ge=0,
        le=65_536,
        description="Images per forward pass. 0 = 128, or on a CPU 8 of 224x224, or more smaller ones.",
    )


class PretrainedConfig(Group):
    """All settings, logged as params of the run under dotted names."""

    data: ImagesConfig = ImagesConfig()
    execution: ComputeConfig = ComputeConfig()
