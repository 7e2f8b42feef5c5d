"""Work on a GPU captured as CUDA graphs, one launch each instead of one a kernel.

On small images most of a step of this network is spent on launching its many short kernels from Python. What graphs
gain is in docs/performance.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effv2.core.signals import uninterrupted

# So often a shape is computed eagerly before it is captured: libraries must have chosen their kernels by then.
WARM_UP = 3

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Graph:
    """A captured graph, the tensors that it reads and writes, and the gradients that it leaves on the parameters."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


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
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the function."""
        shapes = tuple(each.shape for each in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM_UP:
            return self._eagerly(inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs)
        found = self._graphs[shapes]
        for kept, given in zip(found.inputs, inputs, strict=True):
            kept.copy_(given)
        found.graph.replay()
        for parameter, gradient in zip(self._parameters, found.gradients, strict=True):
            parameter.grad = gradient  # another shape may have left its own
        return found.outputs

    def _eagerly(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute on the stream that will be captured: autograd remembers where a gradient was first added up."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._function(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph:
        """Capture without computing. Shapes share the memory of what lies between their inputs and their results."""
        kept = tuple(each.clone() for each in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile. A signal must not leave a capture that never ends.
        with uninterrupted(), torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = self._function(*kept)
        return _Graph(graph, kept, outputs, tuple(parameter.grad for parameter in self._parameters))
