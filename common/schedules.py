"""Schedules as pure functions of the optimizer step (0-based): nothing to save, nothing that can step too often."""

import math


def cosine_schedule(
    step: int,
    *,
    base: float,
    total: int,
    warmup: int = 0,
    start: float = 0.0,
    final: float = 0.0,
    endpoint: bool = False,
) -> float:
    """Linear warm-up from `start` to `base` over `warmup` steps, then a half cosine to `final` at step `total`.

    endpoint=False (SimCLR, BYOL, Barlow Twins): start + (base - start) * step / warmup, so `base` is first reached at
    step `warmup`, and with start=0 the first step does nothing.
    endpoint=True (SwAV, DINO: numpy.linspace): `base` is reached at step `warmup - 1` and repeated at `warmup`.
    The last step is `total - 1`, so `final` itself is never reached, as in all official codes.
    """
    if step < warmup:
        return start + (base - start) * step / max(warmup - endpoint, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def scaled_lr(base: float, batch_size: int, rule: str) -> float:
    """Peak learning rate of a global batch.

    "linear": base * B / 256 (Goyal et al. 2017; all methods here). "sqrt": base * sqrt(B) (SimCLR App. B.1, base
    0.075: equal to 0.3 * B / 256 at B = 4096, and better for small batches and few epochs). "none": base.
    """
    match rule:
        case "linear":
            return base * batch_size / 256
        case "sqrt":
            return base * math.sqrt(batch_size)
        case "none":
            return base
    raise ValueError(f"unknown learning-rate rule {rule!r}: linear, sqrt or none")
