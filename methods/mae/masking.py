"""Which patches are removed: four ways to draw noise, one way to turn noise into a mask (arXiv:2111.06377, section 3).

The patches with the lowest noise stay. Noise is sampled for the global batch from a keyed generator and sliced, so
processes and resumed runs agree, and tests can pass noise of their choice.
"""

from typing import Literal

import torch
from torch import Tensor

from common.errors import UserError

Masking = Literal["random", "block", "grid", "window"]
BLOCKS = 32  # tried in order; together they cover the grid but for one patch in a thousand


def keep_count(patches: int, ratio: float) -> int:
    """Number of `patches` that stay when a share `ratio` is removed, rounded to the nearest integer.

    The code truncates L * (1 - ratio), which in floats gives 9 of 100 at ratio .9. Raises UserError if none would stay
    or none would be removed.
    """
    keep = round(patches * (1 - ratio))
    if not 0 < keep < patches:
        none = "leaves no patch" if keep < 1 else "removes no patch"
        low, high = 0.5 / patches, 1 - 0.5 / patches
        raise UserError(
            f"--mask-ratio {ratio:g} {none} of the {patches} patches of an image: choose one between {low:.3g} and "
            f"{high:.3g}, or smaller patches"
        )
    return keep


def mask_noise(kind: Masking, count: int, rows: int, columns: int, generator: torch.Generator, window: int) -> Tensor:
    """Noise [count, rows * columns] on the CPU, float32, one row per image, in the order of the patches.

    random   every patch independently: the paper's choice
    block    rectangles of 8 to 40 % of the grid and aspect 0.3 to 3.3 are removed one after another until enough is
             gone (section 4.1 "block-wise", after BEiT)
    grid     the same positions in every window x window cell, sampled per image; at .75 and window 2 one of every four
             patches stays (section 4.1 "grid-wise")
    window   positions sampled per cell, so that every cell keeps the same number (uniform sampling of UM-MAE,
             arXiv:2205.10063)
    """
    noise = torch.rand(count, rows, columns, generator=generator)
    if kind == "block":
        noise += _blocks(count, rows, columns, generator)
    elif kind in ("grid", "window"):
        cells = (-(-rows // window), -(-columns // window))
        ranks = torch.rand(count, *(cells if kind == "window" else (1, 1)), window**2, generator=generator)
        ranks = ranks.argsort(dim=-1, stable=True).unflatten(-1, (window, window))  # each cell in random order
        ranks = ranks.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)  # [count, rows or window, columns or window]
        row, column = torch.arange(rows) % ranks.shape[1], torch.arange(columns) % ranks.shape[2]
        noise += ranks[:, row][:, :, column]
    return noise.flatten(1)


def _blocks(count: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[count, rows, columns]: the higher, the earlier a random rectangle covers the patch; 0 if none does."""
    area, aspect, y, x = torch.rand(4, count, BLOCKS, generator=generator).mT.contiguous().unbind()  # [BLOCKS, count]
    area, aspect = (0.08 + 0.32 * area) * rows * columns, 0.3 ** (1 - 2 * aspect)
    edges = []
    for side, size, place in (
        ((area * aspect).sqrt(), rows, y),
        ((area / aspect).sqrt(), columns, x),
    ):
        side = side.round().clamp(1, size)
        start = (place * (size - side + 1)).floor()
        index = torch.arange(size)[:, None]
        inside = (index >= start[:, None]) & (index < (start + side)[:, None])  # [BLOCKS, size, count]
        edges.append(inside.byte().mul_(torch.arange(BLOCKS, 0, -1, dtype=torch.uint8)[:, None, None]))
    # Images in the last dimension, and bytes: some ten times as fast as one comparison of everything.
    first = torch.zeros(rows, columns, count, dtype=torch.uint8)
    for vertical, horizontal in zip(*edges, strict=True):
        torch.maximum(first, torch.minimum(vertical[:, None], horizontal), out=first)
    return first.permute(2, 0, 1).float()


def split(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [N, L] -> patches that stay [N, keep], ids_restore [N, L], mask [N, L] (True: removed).

    ids_restore undoes the shuffle: `shuffled` has the kept patches first, and patch l of the image is
    shuffled[ids_restore[l]]. Sorting is stable, so that ties do not depend on the device.
    """
    shuffle = noise.argsort(dim=1, stable=True)
    restore = shuffle.argsort(1)
    return shuffle[:, :keep], restore, restore >= keep
