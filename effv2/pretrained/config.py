"""Settings of an evaluation of published weights, besides the weights: which images, and how it is computed."""

from typing import Annotated

from pydantic import Field

from effv2.config.schema import DATASETS, Device, Group, Precision

QUICK_LOOK = "For a quick look: so many test images{}, and as many of ImageNet's validation set; 0 = all."


class ImagesConfig(Group):
    """Which images."""

    dataset: Annotated[str, DATASETS] = Field("imagenette", description="A data set whose classes are ImageNet's.")
    dir: str = Field("", description="Folder of the data set.")
    download: bool = Field(False, description="Download imagenette into the folder if it isn't there.")
    skip_broken: bool = Field(False, description="Leave out images that can't be read; the run logs which.")
    max_megapixels: float = Field(200.0, gt=0, le=10_000, description="Pixels that an image may have, in millions.")
    per_class: int = Field(0, ge=0, description=QUICK_LOOK.format(" per class"))
    limit: int = Field(0, ge=0, description=QUICK_LOOK.format(""))
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of what is drawn.")


class ComputeConfig(Group):
    """Where and how it is computed."""

    device: Device = Field("auto", description="auto = cuda where there is one, then mps, then cpu.")
    precision: Precision = Field(
        "fp32", description="bf16 also says what it changes; auto = fp32, since published figures are compared."
    )
    batch_size: int = Field(
        0, ge=0, le=65_536, description="Images a forward pass, 0 = 128; on a CPU 8 of 224 pixels, or as many pixels."
    )


class PretrainedConfig(Group):
    """All of it; params of the run under dotted names."""

    data: ImagesConfig = ImagesConfig()
    execution: ComputeConfig = ComputeConfig()
