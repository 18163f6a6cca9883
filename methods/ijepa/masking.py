"""Multi-block masks (arXiv:2301.08243, section 3 and Figure 4): M target blocks, and a large context without them.

Block sizes are sampled once per step, so that all images have equal numbers of patches; positions are per image.
Both come from keyed generators, positions for the global batch, so that all processes agree without communication.

How contexts of a batch become equally long. Every image has another number of context patches left, C_i. The length C
is the smallest of the first 128 images (code: of the 128 images of a process); an image with fewer gets new positions.
Longer contexts lose patches at random. So C does not shrink with the batch: the smallest of 2048 images would be a
fifth below the smallest of 128.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.rng import generator

COUNTED = 128  # images whose smallest context is the length of all
ATTEMPTS = 100  # new positions for an image with too little context


def block_size(rows: int, columns: int, scale: float, aspect: float) -> tuple[int, int]:
    """Height and width in patches of a block with a share `scale` of the grid and height / width `aspect`.

    Rounded to the nearest integer, at most the full grid. The code stays one below the full side.
    """
    area = scale * rows * columns
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(height, 1), rows), min(max(width, 1), columns)


def place_blocks(count: int, rows: int, columns: int, size: tuple[int, int], stream: torch.Generator) -> Tensor:
    """long [count, height * width]: the patches, ascending, of a block of `size` at a random position for each, all
    positions equally likely.

    The code's corner is from randint(0, rows - height), whose upper bound is exclusive: no block ever reaches the
    last row or column.
    """
    free = torch.tensor([rows - size[0] + 1, columns - size[1] + 1])
    top, left = (torch.rand(count, 2, generator=stream) * free).floor().long().clamp_max(free - 1).unbind(1)
    block = torch.arange(size[0])[:, None] * columns + torch.arange(size[1])
    return (top * columns + left)[:, None] + block.flatten()


@dataclass(frozen=True)
class BlockMasks:
    """The masks of a run; `draw` is a pure function of (seed, step, index in the global batch)."""

    rows: int
    columns: int
    blocks: int
    target_scale: tuple[float, float]
    target_aspect: tuple[float, float]
    context_scale: tuple[float, float]
    min_keep: int

    def sizes(self, seed: int, step: int | str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size of the target blocks and of the context block at a step."""
        return self.sizes_at(*torch.rand(3, generator=generator(seed, "mask-size", step)).tolist())

    def sizes_at(self, *shares: float) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes at these points, 0 to 1, of the ranges: target area, target aspect, context area (a square)."""
        ranges = (self.target_scale, self.target_aspect, self.context_scale)
        scale, aspect, context = (low + u * (high - low) for u, (low, high) in zip(shares, ranges, strict=True))
        grid = self.rows, self.columns
        return block_size(*grid, scale, aspect), block_size(*grid, context, 1.0)

    def check(self) -> None:
        """Raise UserError unless `min_keep` is easily met for every block size a step may sample."""
        points = torch.linspace(0, 1, 9).tolist()
        for sizes in {self.sizes_at(*shares) for shares in itertools.product(points, repeat=3)}:
            self._draw(COUNTED, *sizes, generator("check"), ATTEMPTS // 4)

    def draw(self, count: int, seed: int, step: int | str) -> tuple[Tensor, Tensor]:
        """Patches of the global batch: context [count, C] and targets [count, M, T], long, ascending, on the CPU.

        No patch is in an image's context and in one of its targets; targets may overlap. Raises UserError where no
        place of the targets leaves `min_keep` patches of context.
        """
        return self._draw(count, *self.sizes(seed, step), generator(seed, "mask-place", step), ATTEMPTS)

    def _draw(self, count: int, target, context, stream: torch.Generator, attempts: int) -> tuple[Tensor, Tensor]:
        length = 0
        asked, left = self._places(count, target, context, stream)
        for _ in range(attempts):
            numbers = left.sum(1)
            length = length or max(int(numbers[:COUNTED].min()), self.min_keep)
            again = (numbers < length).nonzero().flatten()
            if not len(again):
                break
            asked[again], left[again] = self._places(len(again), target, context, stream)
        else:
            raise UserError(
                f"{self.blocks} target blocks of {target[0]} x {target[1]} patches rarely leave an image of "
                f"{self.rows} x {self.columns} its --min-keep {self.min_keep} patches of context: lower it, "
                "--target-scale or --blocks, or take smaller patches"
            )
        # The `length` patches of least noise; of equal ones, which float32 does not exclude, the first. Noise is a
        # multiple of 2^-24. numpy's partition takes a quarter of the time of torch's kthvalue, a tenth of a sort's.
        order = torch.rand(left.shape, generator=stream).mul_(1 << 24).long().mul_(left.shape[1])
        order.add_(torch.arange(left.shape[1])).masked_fill_(~left, torch.iinfo(torch.long).max)
        kept = order <= torch.from_numpy(np.partition(order.numpy(), length - 1, axis=1)[:, length - 1 : length])
        return kept.nonzero()[:, 1].view(count, length), asked

    def _places(self, count: int, target, context, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Patches of the targets, long [count, M, T], and what is left of the context block, bool [count, L]."""
        asked = place_blocks(count * self.blocks, self.rows, self.columns, target, stream).view(count, self.blocks, -1)
        left = torch.zeros(count, self.rows * self.columns, dtype=torch.bool)
        left.scatter_(1, place_blocks(count, self.rows, self.columns, context, stream), True)
        return asked, left.scatter_(1, asked.flatten(1), False)
