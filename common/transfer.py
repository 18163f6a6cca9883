"""From the host to the device without waiting."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; the host goes on at once, whatever the device is still doing.

    CUDA copies asynchronously from pinned memory alone: from elsewhere the host may wait until the copy's turn comes.
    """
    if x.device.type == "cpu" and torch.device(device).type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
