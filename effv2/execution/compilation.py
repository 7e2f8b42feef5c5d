"""The blocks of a network, compiled: what torch.compile makes of each is kept in the cache folder and used again.

Only the layers of a block are compiled, without its shortcut and stochastic depth, so that equal blocks share their
code and random draws stay those of the eager network. What it costs and gains is in docs/performance.md.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torchvision.models.efficientnet import FusedMBConv, MBConv

from effv2.core.errors import InputError
from effv2.core.paths import cache_folder

FIRST_ON_CUDA = (2, 11)  # reported to refuse our settings of TF32 before (pytorch issue 166387); not tried
CODES = 256  # compiled forms of torchvision's one block function: as many as a network has different blocks


def check_compiler(device: str) -> None:
    """InputError where a network can't be compiled: for want of a C++ compiler, or of a torch that can."""
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    if device == "cuda" and release < FIRST_ON_CUDA:
        raise InputError(
            f"--compile true: on a GPU it needs torch 2.11 or newer, and this is {torch.__version__}; update it, or "
            "give false."
        )
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"--compile true: the C++ compiler {compiler} isn't there; install it, name another in CXX, or give false."
        )


def compile_blocks(model: nn.Module) -> None:
    """Let the blocks of `model` be compiled when they are first used, in place; its state dict stays as it is."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    torch._dynamo.config.recompile_limit = CODES
    torch._dynamo.config.accumulated_recompile_limit = CODES
    for module in model.modules():
        if isinstance(module, (MBConv, FusedMBConv)):
            module.block.compile(dynamic=False)


def eager(wanted: bool) -> AbstractContextManager[None]:
    """Return a context in which compiled blocks run as they are written: for the odd last batch of an epoch."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()
