"""Work on a GPU captured as CUDA graphs: one launch each, not one for each short kernel (docs/performance.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from effv2.core.processes import uninterrupted

# So often a shape is computed eagerly before it is captured: libraries must have chosen their kernels by then.
WARM_UP = 3

Function = Callable[..., tuple[Tensor, ...]]
Tensors = tuple[Tensor, ...]
# A captured graph, the tensors that it reads and writes, and the gradients that it leaves on the parameters.
Captured = tuple[torch.cuda.CUDAGraph, Tensors, Tensors, tuple[Tensor | None, ...]]


class GraphedFunction:
    """A function of tensors on the current GPU that is captured for each shape of its inputs, then replayed.

    The function must consist of kernels alone, wait for none, and read nothing beside its inputs that is ever moved:
    parameters and buffers are to be changed in place. It may set the gradients of `parameters`. Random draws follow the
    global generator's seed, as always. Every call must come in the same modes (autocast, gradients, inference) and with
    the same type and layout of inputs; what it returns and the gradients are good until the next call of any shape.
    """

    def __init__(self, function: Function, parameters: Iterable[nn.Parameter] = ()) -> None:
        self._function, self._parameters = function, tuple(parameters)
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._graphs: dict[tuple[torch.Size, ...], Captured] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the function."""
        shapes = tuple(each.shape for each in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM_UP:
            # On the stream that will be captured: autograd remembers where a gradient was first added up.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                outputs = self._function(*inputs)
            current.wait_stream(self._stream)
            return outputs
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs)
        graph, kept, outputs, gradients = self._graphs[shapes]
        for own, given in zip(kept, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient  # another shape may have left its own
        return outputs

    def _capture(self, inputs: Tensors) -> Captured:
        """Capture without computing. Shapes share the memory of what lies between their inputs and their results."""
        kept = tuple(each.clone() for each in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile. A signal must not leave a capture that never ends.
        with uninterrupted(), torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = self._function(*kept)
        return graph, kept, outputs, tuple(parameter.grad for parameter in self._parameters)
