"""MBConv blocks in training on CPUs: all between the two dense convolutions as one function (blocks.cpp).

Only the maps before each norm are stored, and far fewer are written. It differs from the layers by rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from effv2.execution import norms
from effv2.execution.norms import call, fits, statistics

LANES = 16  # a multiple of those in blocks.cpp


class MBConvBlock(nn.Sequential):
    """Expansion, depthwise convolution, squeeze-excitation and projection."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the maps (N, C', H', W') of maps (N, C, H, W)."""
        parts: tuple[Any, ...] = tuple(self)
        expand, depthwise, squeeze, project = parts
        both = expand[1], depthwise[1]
        if not all(norm.training for norm in both) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            plain: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return plain
        maps = expand[0](input).contiguous(memory_format=torch.channels_last)
        if not all(fits(maps[:, :, :1, :1], norm) for norm in both):
            rest: Tensor = nn.Sequential(*expand[1:], depthwise, squeeze, project)(maps)
            return rest
        parameters = [each for norm in both for each in (norm.weight, norm.bias)]
        layers = squeeze.fc1.weight.flatten(1), squeeze.fc1.bias, squeeze.fc2.weight.flatten(1), squeeze.fc2.bias
        weights = (each.to(maps.dtype) for each in layers)
        middle = _Middle.apply(maps, depthwise[0].weight, *parameters, *weights, both, depthwise[0].stride[0])
        output: Tensor = project(middle)
        return output


def applies(layer: nn.Module) -> bool:
    """Return whether a layer can become an MBConvBlock, on this machine."""
    parts: list[Any] = [*layer.children()] if type(layer) is nn.Sequential else []
    kinds = [Conv2dNormActivation, Conv2dNormActivation, SqueezeExcitation, Conv2dNormActivation]
    if [*map(type, parts)] != kinds or not all(norms.applies(each) and len(each) == 3 for each in parts[:2]):
        return False
    convolution, squeeze = parts[1][0], parts[2]
    settings = convolution.kernel_size, convolution.padding, convolution.dilation, convolution.padding_mode
    usual = settings == ((3, 3), (1, 1), (1, 1), "zeros") and convolution.stride in ((1, 1), (2, 2))
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels and convolution.bias is None
    return usual and depthwise and has_usual_activations(squeeze) and convolution.in_channels % LANES == 0


def has_usual_activations(squeeze: Any) -> bool:
    """Return whether a squeeze-excitation has the activations of EfficientNet."""
    return isinstance(squeeze.activation, nn.SiLU) and isinstance(squeeze.scale_activation, nn.Sigmoid)


class _Middle(torch.autograd.Function):
    """Norm, SiLU, depthwise 3x3 convolution, norm, SiLU, squeeze-excitation, of maps in channels-last memory."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, *others: Any) -> Tensor:
        *parameters, both, stride = others
        count, channels, *size = maps.shape
        after = [-(-side // stride) for side in size]
        shape = torch.tensor([count, channels, *size, *after, stride])
        convolved = maps.new_empty(count, *after, channels).permute(0, 3, 1, 2)
        output, means = torch.empty_like(convolved), torch.empty(count, channels)
        taps = weight.flatten(1).t().float().contiguous()
        norm1 = torch.cat([torch.stack(parameters[:2]), statistics(maps, both[0])])
        call("depthwise", (maps, convolved, norm1, taps, shape))
        norm2 = torch.cat([torch.stack(parameters[2:4]), statistics(convolved, both[1])])
        call("excited", (convolved, maps.new_empty(0), norm2, means, shape))
        pooled = means.to(maps.dtype)
        hidden, scale = excitation(pooled, *parameters[4:])
        call("excited", (convolved, output, norm2, scale.float(), shape))
        kept = maps, convolved, norm1, norm2, taps, shape
        ctx.save_for_backward(*kept, pooled, hidden, scale, parameters[4], parameters[6])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, convolved, norm1, norm2, taps, shape, *saved = ctx.saved_tensors
        gradient = gradients[0].to(maps.dtype).contiguous(memory_format=torch.channels_last)
        (count, channels), pixels = convolved.shape[:2], convolved[0, 0].numel()
        sums, of_maps, found = torch.empty(5, count, channels), torch.empty_like(maps), torch.empty(11, channels)
        call("sums", (convolved, gradient, norm2, sums, shape))
        of_means, *of_weights = of_excitation(sums[0], *saved)
        scale, of_pixels = saved[2].float(), of_means.float() / pixels
        of_norm2 = (scale * sums[1::2] + of_pixels * sums[2::2]).sum(1, dtype=torch.float64).float()
        factors = scale, of_pixels, of_norm2 / (count * pixels)
        call("back", (maps, convolved, gradient, of_maps, norm1, norm2, *factors, taps, found, shape))
        of_taps = found[:9].t().reshape(channels, 1, 3, 3)
        return of_maps, of_taps, found[10], found[9], of_norm2[1], of_norm2[0], *of_weights, None, None


def excitation(pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden values and the excitation (N, C) of means over pixels (N, C)."""
    hidden = F.linear(pooled, weight1, bias1)
    return hidden, F.linear(F.silu(hidden), weight2, bias2).sigmoid_()


def of_excitation(of_scale: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the means, and of the weights and biases."""
    pooled, hidden, scale, weight1, weight2 = saved
    of_scale = torch.ops.aten.sigmoid_backward(of_scale.to(scale.dtype), scale)
    of_hidden = torch.ops.aten.silu_backward(of_scale @ weight2, hidden)
    weights = of_hidden.t() @ pooled, of_hidden.sum(0), of_scale.t() @ F.silu(hidden), of_scale.sum(0)
    return of_hidden @ weight1, *weights
