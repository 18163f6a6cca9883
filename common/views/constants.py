"""Constant tensors, copied to a device once."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the numbers, which the caller must not change; a copy in every step could wait for the device."""
    return torch.tensor(values, dtype=dtype, device=device)
