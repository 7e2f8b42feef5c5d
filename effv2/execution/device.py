"""Where and how the network is computed: device, precision, memory format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from effv2.config.schema import ExecutionConfig
from effv2.data.dataset import to_device
from effv2.execution.compilation import compile_blocks
from effv2.execution.cuda_graphs import Function, Recording
from effv2.execution.fast_paths import use_fast_paths
from effv2.execution.folding import fold_batch_norm, sharing_copy

Module = TypeVar("Module", bound=nn.Module)
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Execution:
    """A resolved device, precision and memory format."""

    device: torch.device
    bf16: bool
    channels_last: bool
    fast_paths: bool = True
    compiled: bool = False
    recorded: bool = True

    def place(self, model: Module) -> Module:
        """Move a network to the device, in the memory format of its inputs, on the fast paths of the device."""
        if self.device.type == "cpu" and self.channels_last and self.fast_paths:
            use_fast_paths(model)
        if self.device.type == "cuda":
            _use_tf32(self.bf16)
        if self.compiled:
            compile_blocks(model)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=memory_format)

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """Return a form of a placed network for evaluation alone: the same up to rounding, and the quickest there is.

        Batch norms are folded, and the weights are already in the precision that autocast would give them.
        """
        form = sharing_copy(model).eval()
        fold_batch_norm(form)
        for module in form.modules() if self.bf16 else ():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
        return form

    def recording(self, function: Function, parameters: Iterable[nn.Parameter]) -> Function:
        """Return the quickest form of `function`, which sets the gradients of `parameters`; see Recording."""
        return Recording(function, parameters) if self._records else function

    def following(self, model: nn.Module) -> Callable[[], Forward]:
        """Return a function that gives a form of `model` for evaluation, to be called after the weights have changed.

        What the form returns may be overwritten by its next call. Where work is recorded, the form reads the weights
        where they lie, so that it is recorded once; elsewhere it is for_evaluation's.
        """
        if not self._records:
            return lambda: self.for_evaluation(model)
        plain = sharing_copy(model).eval()
        recording = Recording(lambda inputs: (plain(inputs),))

        def form(inputs: Tensor) -> Tensor:
            # What a recording makes in inference mode couldn't be used outside of it, the generators' state neither.
            with torch.inference_mode(False), torch.no_grad():
                return recording(inputs)[0]

        return lambda: form

    @property
    def _records(self) -> bool:
        return self.recorded and not self.compiled and self.device.type == "cuda"

    def room_for_data(self) -> int:
        """Return how many bytes of images may lie on the device for good: half of what an accelerator has free."""
        return torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else 0

    def to_device(self, tensor: Tensor) -> Tensor:
        """Move a batch to the device."""
        return to_device(tensor, self.device)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Let what is computed inside without autocast be computed in float32 itself."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            _use_tf32(False)
        try:
            yield
        finally:
            if on_cuda:
                _use_tf32(self.bf16)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def make_execution(config: ExecutionConfig) -> Execution:
    """Build the execution of a resolved config."""
    bf16 = config.precision == "bf16"
    return Execution(torch.device(config.device), bf16, config.channels_last, compiled=config.compile)


def _use_tf32(wanted: bool) -> None:
    """Compute what is left in float32 in TF32 or not, process-wide: fp32 means float32, as published protocols ask."""
    precision = "tf32" if wanted else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.fp32_precision = precision
    # With torch 2.11 convolutions keep a setting of their own: TF32.
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
