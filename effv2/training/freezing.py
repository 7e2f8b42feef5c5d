"""Frozen layers by epoch. The body of EfficientNetV2 is its `features`, and the head is its `classifier`."""

from torch import nn

from effv2.config.schema import OptimiserConfig


def set_modes(network: nn.Module, config: OptimiserConfig, epoch: int) -> None:
    """Put a network into training mode for an epoch, counted from 1, except frozen layers.

    Frozen layers are in eval mode and get no gradients, so neither steps nor weight decay nor batches change them.
    """
    body, frozen = network.get_submodule("features"), body_is_frozen(config, epoch)
    network.train()
    body.train(not frozen).requires_grad_(not frozen)
    if norms_are_frozen(config, epoch):
        for layer in body.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval().requires_grad_(False)


def body_is_frozen(config: OptimiserConfig, epoch: int) -> bool:
    """Say whether only the head is trained in an epoch."""
    return config.frozen_epochs < 0 or epoch <= config.frozen_epochs


def norms_are_frozen(config: OptimiserConfig, epoch: int) -> bool:
    """Say whether batch norm is frozen in an epoch."""
    return config.freeze_batch_norm or body_is_frozen(config, epoch)
