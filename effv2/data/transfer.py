"""How what lies in the CPU's memory gets to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; CUDA takes its copy before this returns, and the step needn't wait for the rest."""
    return tensor.to(device, non_blocking=device.type == "cuda")
