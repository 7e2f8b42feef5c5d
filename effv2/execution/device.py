"""The execution of a network: device, precision, memory format, compiled blocks, CUDA graphs."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.efficientnet import FusedMBConv, MBConv

from effv2.config.schema import ExecutionConfig
from effv2.core.internals import set_up_compiler
from effv2.core.paths import cache_folder
from effv2.core.processes import uninterrupted
from effv2.data.batches import Statistics, normalised
from effv2.data.dataset import to_device
from effv2.execution.fast_paths import use_fast_paths

Module = TypeVar("Module", bound=nn.Module)
Forward = Callable[[Tensor], Tensor]
Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
COMPILED_FORMS = 4096  # compiled forms of torchvision's block function: one per different block of a network and size
# Eager computations of a shape before it is captured: libraries must have chosen their kernels by then.
WARM_UP = 3


@dataclass(frozen=True)
class Execution:
    """A resolved device, precision and memory format."""

    device: torch.device
    bf16: bool
    channels_last: bool
    fast_paths: bool = True
    compiled: bool = False
    cuda_graphs: bool = False

    def place(self, model: Module) -> Module:
        """Move a network to the device, in the memory format of its inputs, on the fast paths of the device."""
        if self.device.type == "cpu" and self.channels_last and self.fast_paths:
            use_fast_paths(model)
        self.set_float32()
        if self.compiled:
            _compile_blocks(model)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=memory_format)

    def inference_copy(self, model: nn.Module) -> nn.Module:
        """Return a copy of a placed network only for inference: norms folded, weights in autocast's precision."""
        network = sharing_copy(model).eval()
        fold_batch_norm(network)
        for module in network.modules() if self.bf16 else ():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
        return network

    def inference_factory(self, model: nn.Module, statistics: Statistics) -> Callable[[], Forward]:
        """Return a function that returns `logits` of `model`.

        Call it after each change of weights. Only its latest result is valid.
        """
        if not self.cuda_graphs:
            return lambda: partial(self.logits, self.inference_copy(model), statistics)
        network = sharing_copy(model).eval()
        graphed = GraphedFunction(lambda inputs: (network(inputs),))

        def forward(inputs: Tensor) -> Tensor:
            # Graphs captured in inference mode can't be used outside of it, and neither can the generators' state.
            with torch.inference_mode(False), torch.no_grad():
                return graphed(inputs)[0]

        return lambda: partial(self.logits, forward, statistics)

    def logits(self, network: Forward, statistics: Statistics, images: Tensor) -> Tensor:
        """Return float32 logits (B, outputs), a tensor of its own on the device, of bytes (B, 3, H, W)."""
        inputs = normalised(to_device(images, self.device), statistics, self.channels_last)
        with torch.inference_mode(), self.autocast():
            return network(inputs).to(torch.float32, copy=True)

    def graphed(self, function: Function, parameters: Iterable[nn.Parameter]) -> Function:
        """Return `function`, which sets the gradients of `parameters`, as CUDA graphs if they are used."""
        return GraphedFunction(function, parameters) if self.cuda_graphs else function

    def eager(self, wanted: bool) -> AbstractContextManager[None]:
        """Return a context in which compiled blocks run eagerly if wanted, for the smaller last batch of an epoch."""
        return torch.compiler.set_stance("force_eager") if wanted and self.compiled else nullcontext()

    def room_for_data(self) -> int:
        """Return how many bytes of images may remain on the device: half of an accelerator's free memory."""
        return torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else 0

    def set_float32(self) -> None:
        """Set CUDA's float32 arithmetic for the whole process: TF32 along with bfloat16, otherwise exact float32.

        Convolutions then use deterministic algorithms. Some of cuDNN's other float32 algorithms are not.
        """
        if self.device.type == "cuda":
            precision = "tf32" if self.bf16 else "ieee"
            torch.backends.cuda.matmul.fp32_precision = precision
            torch.backends.cudnn.fp32_precision = precision
            torch.backends.cudnn.deterministic = True
            # In torch 2.11, convolutions keep a separate setting: TF32.
            torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def make_execution(config: ExecutionConfig) -> Execution:
    """Build the execution of a resolved config."""
    device, bf16 = torch.device(config.device), config.precision == "bf16"
    graphs = device.type == "cuda" and not config.compile
    return Execution(device, bf16, config.channels_last, compiled=config.compile, cuda_graphs=graphs)


def _compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of `model` at their first use, and keep them in the cache folder (docs/performance.md).

    Shortcuts and stochastic depth stay eager: equal blocks share their code, and random draws equal the eager ones.
    """
    set_up_compiler(COMPILED_FORMS, cache_folder() / "compiled")
    for module in model.modules():
        if isinstance(module, (MBConv, FusedMBConv)):
            module.block.compile(dynamic=False)


def fold_batch_norm(model: nn.Module) -> None:
    """Fold every batch norm that directly follows a convolution, in place and in eval mode: exact up to rounding.

    Modules that can't be traced, or are used several times, don't change. The state dict has other keys afterwards.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:
        return
    modules = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = str(before.target), str(node.target)
        conv, norm = map(modules.__getitem__, names)
        once = all(calls.count(name) == 1 for name in names)
        if once and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            both = conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(*both)  # type: ignore[arg-type]
            model.set_submodule(names[1], nn.Identity())


def sharing_copy(module: Module) -> Module:
    """Return a copy that shares the parameters and buffers of `module`."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]})


class _Tracer(fx.Tracer):
    """Treats layers on a fast path like torch's own layers, as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == use_fast_paths.__module__ or super().is_leaf_module(m, module_qualified_name)


class GraphedFunction:
    """A function of tensors on the current GPU: captured as a CUDA graph for each shape of its inputs, then replayed.

    A graph is one launch instead of one per short kernel (docs/performance.md). The function must consist only of
    kernels and wait for none. Besides its inputs it may only read tensors that never move: parameters and buffers
    change in place. It may set the gradients of `parameters`. Random draws follow the seed of the global generator.
    Every call needs the same modes (autocast, gradients, inference) and the same type and layout of inputs. Results
    and gradients are valid until the next call of any shape.
    """

    def __init__(self, function: Function, parameters: Iterable[nn.Parameter] = ()) -> None:
        self._function, self._parameters = function, tuple(parameters)
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._graphs: dict[tuple[torch.Size, ...], Function] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Compute the function."""
        shapes = tuple(each.shape for each in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM_UP:
            # On the stream that will be captured: autograd remembers the stream of a gradient's first accumulation.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                outputs = self._function(*inputs)
            current.wait_stream(self._stream)
            return outputs
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs)
        return self._graphs[shapes](*inputs)

    def _capture(self, inputs: Tensors) -> Function:
        """Return the captured function. Shapes share the memory of their intermediate results."""
        kept, parameters = tuple(each.clone() for each in inputs), self._parameters
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile. A signal must not leave a capture that never ends.
        with uninterrupted(), torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = self._function(*kept)
        gradients = [parameter.grad for parameter in parameters]

        def replay(*inputs: Tensor) -> Tensors:
            for own, given in zip(kept, inputs, strict=True):
                own.copy_(given)
            graph.replay()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient  # another shape may have set other tensors
            return outputs

        return replay
