"""Which layers of a network learn in an epoch. The body of EfficientNetV2 is its `features`, the head `classifier`."""

from torch import nn

from effv2.config.schema import OptimiserConfig


def set_modes(network: nn.Module, config: OptimiserConfig, epoch: int) -> None:
    """Put a network into training mode for an epoch, counted from 1, but for what is frozen.

    That is in eval mode and gets no gradients, so that neither steps nor weight decay nor batches change it.
    """
    body, frozen = network.get_submodule("features"), body_is_frozen(config, epoch)
    network.train()
    body.train(not frozen).requires_grad_(not frozen)
    if norms_are_frozen(config, epoch):
        for layer in body.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval().requires_grad_(False)


def body_is_frozen(config: OptimiserConfig, epoch: int) -> bool:
    """Say whether the head alone is trained in an epoch."""
    return config.frozen_epochs < 0 or epoch <= config.frozen_epochs


def norms_are_frozen(config: OptimiserConfig, epoch: int) -> bool:
    """Say whether batch norm stays as it is in an epoch."""
    return config.freeze_batch_norm or body_is_frozen(config, epoch)
