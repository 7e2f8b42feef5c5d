"""Fast paths: cheaper exact computations of layers on CPUs, in channels-last memory.

With small images, most layers have maps of a few pixels, where oneDNN's overhead dominates. Some other kernels of
oneDNN and torch are far slower than similar ones. Each path computes the same sum in another order, and uses torch's
own layer where it doesn't apply. Parameters keep their names. docs/performance.md has the gain of each path. Layers
take and return maps (N, C, H, W). SiLUs no longer work in place, because they would copy their input.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from effv2.execution import blocks, norms

LARGEST_POINTWISE_MAP = 16
FEWEST_IMAGES = 8  # images from which on a matrix between the pixels of 2x2 maps is worth building


class _PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a matrix product over pixels, on maps of at most 16 pixels."""

    def forward(self, input: Tensor) -> Tensor:
        pixels = input.shape[2] * input.shape[3]
        if pixels > LARGEST_POINTWISE_MAP or not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _DenseConv2d(nn.Conv2d):
    """A dense 3x3 convolution, padding 1, as one matrix product, on maps of one pixel, and of 2x2 from 8 images on."""

    def forward(self, input: Tensor) -> Tensor:
        size = tuple(input.shape[2:])
        if size != (1, 1) and (size != (2, 2) or len(input) < FEWEST_IMAGES):
            return super().forward(input)
        output: Tensor = _DenseOnFewPixels.apply(*_as_autocast(input, self.weight), self.stride[0])
        return output if self.bias is None else output + self.bias.to(output.dtype).view(-1, 1, 1)


class _DepthwiseConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution, padding 1, without the taps that only meet padding.

    Maps of one pixel need only the centre tap. Maps of 2x2 use, for each pixel, the taps that meet the image. On larger
    maps, with stride 2 in bfloat16, gradients are computed in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        size, stride = tuple(input.shape[2:]), self.stride[0]
        output: Tensor
        if size == (1, 1):
            input, weight = _as_autocast(input, self.weight)
            output = input * weight[:, 0, 1:2, 1:2]
        elif size == (2, 2) and self.stride in ((1, 1), (2, 2)):
            output = _DepthwiseOn2x2.apply(*_as_autocast(input, self.weight), stride)
        elif self.stride == (2, 2) and torch.is_grad_enabled() and _autocast_dtype(input) == torch.bfloat16:
            output = _DepthwiseStride2.apply(*_as_autocast(input, self.weight))
        else:
            return super().forward(input)
        return output if self.bias is None else output + self.bias.to(output.dtype).view(-1, 1, 1)


class _SqueezeExcitation(SqueezeExcitation):  # type: ignore[misc]
    """Squeeze and excitation (Hu et al. 2018) with SiLU and sigmoid. The backward pass stores no broadcasts."""

    def forward(self, input: Tensor) -> Tensor:
        weights = self.fc1.weight.flatten(1), self.fc1.bias, self.fc2.weight.flatten(1), self.fc2.bias
        output: Tensor = _Excitation.apply(input, *_as_autocast(*weights))
        return output


def use_fast_paths(model: nn.Module) -> None:
    """Switch the layers of `model` that have a fast path to it, in place."""
    for module in model.modules():
        if type(module) is nn.SiLU:
            module.inplace = False
        elif path := _path(module):
            module.__class__ = path


def _path(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class with the fast path of a layer; None if there is none."""
    if type(layer) is SqueezeExcitation:
        return _SqueezeExcitation if blocks.has_usual_activations(layer) else None
    if blocks.applies(layer):
        return blocks.MBConvBlock
    if norms.applies(layer):
        return norms.ConvNorm
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or layer.dilation != (1, 1):
        return None
    dense, depthwise = layer.groups == 1, layer.groups == layer.in_channels == layer.out_channels
    if layer.kernel_size == (3, 3) and layer.padding == (1, 1):
        return _DenseConv2d if dense and layer.stride in ((1, 1), (2, 2)) else _DepthwiseConv2d if depthwise else None
    plain = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    return _PointwiseConv2d if plain and dense else None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors as autocast passes them to a convolution."""
    return tuple(tensor.to(_autocast_dtype(tensor)) for tensor in tensors)


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


def _taps(side: int, stride: int) -> list[list[int]]:
    """Return the tap (of nine) from an input pixel to an output pixel, as [output][input], of a tiny map."""
    outputs = [(y, x) for y in range(0, side, stride) for x in range(0, side, stride)]
    inputs = [(y, x) for y in range(side) for x in range(side)]
    return [[3 * (i - y + 1) + (j - x + 1) for i, j in inputs] for y, x in outputs]


TAPS = {(side, stride): _taps(side, stride) for side in (1, 2) for stride in (1, 2)}
TAPS_ON_2X2 = {stride: torch.tensor(TAPS[2, stride]) for stride in (1, 2)}


class _DenseOnFewPixels(torch.autograd.Function):
    """Dense 3x3, padding 1, of 1x1 or 2x2 maps, as one matrix product from all input to all output pixels."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: int) -> Tensor:
        count, _, side, _ = input.shape
        pixels, matrix = input.permute(0, 2, 3, 1).flatten(1), _between_pixels(weight, TAPS[side, stride])
        ctx.save_for_backward(pixels, matrix)
        ctx.side, ctx.stride, ctx.shape = side, stride, weight.shape
        side = -(-side // stride)
        return (pixels @ matrix.t()).view(count, side, side, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pixels, matrix = ctx.saved_tensors
        taps, side, (outputs, inputs, *_) = TAPS[ctx.side, ctx.stride], ctx.side, ctx.shape
        gradient = gradients[0].permute(0, 2, 3, 1).flatten(1)
        of_matrix = (gradient.t() @ pixels).view(len(taps), outputs, -1, inputs)
        exact = torch.promote_types(pixels.dtype, torch.float32) if side > 1 else pixels.dtype
        of_taps = pixels.new_zeros(outputs, 9, inputs, dtype=exact)
        for output, row in enumerate(taps):
            for pixel, tap in enumerate(row):
                of_taps[:, tap] += of_matrix[output, :, pixel]
        of_weight = of_taps.to(matrix.dtype).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
        return (gradient @ matrix).view(len(pixels), side, side, inputs).permute(0, 3, 1, 2), of_weight, None


def _between_pixels(weight: Tensor, taps: list[list[int]]) -> Tensor:
    """Return the matrix (output pixels x channels, input pixels x channels) that equals a kernel (O, I, 3, 3)."""
    of_taps = weight.permute(0, 2, 3, 1).flatten(1, 2)  # (O, 9, I)
    if taps == TAPS[1, 1]:
        return of_taps[:, taps[0][0]]
    outputs, _, inputs = of_taps.shape
    matrix = weight.new_empty(len(taps), outputs, len(taps[0]), inputs)
    for output, row in enumerate(taps):
        for pixel, tap in enumerate(row):
            matrix[output, :, pixel] = of_taps[:, tap]
    return matrix.flatten(2).flatten(0, 1)


class _DepthwiseOn2x2(torch.autograd.Function):
    """Depthwise 3x3, padding 1, of 2x2 maps."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: int) -> Tensor:
        count, channels = input.shape[:2]
        pixels = input.permute(0, 2, 3, 1).reshape(count, 4, channels)
        factors = weight.reshape(channels, 9).t()[TAPS_ON_2X2[stride]]  # (outputs, 4, channels)
        output = pixels[:, :1] * factors[:, 0]
        for pixel in range(1, 4):
            output.addcmul_(pixels[:, pixel : pixel + 1], factors[:, pixel])
        ctx.save_for_backward(pixels, factors)
        ctx.stride, ctx.shape = stride, weight.shape
        side = 2 // stride
        return output.view(count, side, side, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pixels, factors = ctx.saved_tensors
        count, _, channels = pixels.shape
        gradient = gradients[0].permute(0, 2, 3, 1).reshape(count, -1, channels)
        outputs = gradient.shape[1]
        of_input = gradient[:, :1] * factors[0]
        for output in range(1, outputs):
            of_input.addcmul_(gradient[:, output : output + 1], factors[output])
        of_pairs = (gradient[:, :, None] * pixels[:, None]).sum(0)  # (outputs, 4, channels)
        of_taps = gradient.new_zeros(9, channels, dtype=torch.float32)
        of_taps.index_add_(0, TAPS_ON_2X2[ctx.stride].flatten(), of_pairs.flatten(0, 1).float())
        of_weight = of_taps.t().reshape(ctx.shape).to(factors.dtype)
        return of_input.view(count, 2, 2, channels).permute(0, 3, 1, 2), of_weight, None


class _DepthwiseStride2(torch.autograd.Function):
    """Depthwise 3x3, padding 1, stride 2: forward in bfloat16, backward in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return F.conv2d(input, weight, None, 2, 1, 1, input.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad, False]
        of_input, of_weight, _ = torch.ops.aten.convolution_backward(
            gradients[0].float(), input.float(), weight.float(), None,
            [2, 2], [1, 1], [1, 1], False, [0, 0], input.shape[1], wanted,
        )  # fmt: skip
        return tuple(None if found is None else found.to(input.dtype) for found in (of_input, of_weight))


class _Excitation(torch.autograd.Function):
    """Squeeze and excitation, in the precision of its weights, except for the map that is scaled."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *weights: Tensor) -> Tensor:
        pooled = _sum_of_pixels(input, input.shape[2] * input.shape[3]).to(weights[0].dtype)
        hidden, scale = blocks.excitation(pooled, *weights)
        ctx.save_for_backward(input, pooled, hidden, scale, weights[0], weights[2])
        return input * scale[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, *saved = ctx.saved_tensors
        gradient, scale = gradients[0], saved[2]
        of_pooled, *weights = blocks.of_excitation(_sum_of_pixels(gradient * input, 1), *saved)
        of_pooled /= input.shape[2] * input.shape[3]
        of_input = torch.addcmul(of_pooled.to(input.dtype)[:, :, None, None], gradient, scale[:, :, None, None])
        return of_input.to(input.dtype), *weights


def _sum_of_pixels(images: Tensor, divisor: int) -> Tensor:
    """Sum (N, C, H, W) over the pixels and divide: (N, C). torch's pooling does this faster than its sums."""
    size = images.shape[2:]
    return (images if size == (1, 1) else F.avg_pool2d(images, size, divisor_override=divisor)).flatten(1)
