"""InfoNCE over time (CPC, arXiv:1807.03748v2, eq. 4) with a log-bilinear score, and where its negatives come from.

B windows in the global batch, n = B / processes of them here; T frames a window; K steps; N negatives; D channels.
"""

from typing import Literal

import torch
from torch import Tensor

from common.distributed import all_gather, rank, world_size
from common.errors import UserError
from common.transfer import to_device

NEVER = -1e30  # a score that no softmax sees; finite, because the gradient of an empty log-sum-exp is not
Pool = Literal["mixed", "mixed-excl", "same-speaker", "same-speaker-excl", "own"]


def pool_matrix(pool: Pool, count: int, speakers: Tensor | None = None) -> Tensor:
    """bool [B, B]: whether frames of window j may be negatives for window i.

    The five rows of the paper's ablation (Table 2): mixed: every window, the anchor's included (the default, 64.6 %
    phones; without the anchor's window, mixed-excl, 57.3); same-speaker: windows of the same speaker, with the anchor's
    or without it (-excl); own: only the anchor's window.
    """
    own = torch.eye(count, dtype=torch.bool)
    if pool.startswith("same-speaker"):
        if speakers is None:
            raise ValueError("negatives of the same speaker need the speakers")
        allowed = speakers[:, None] == speakers
    else:
        allowed = own.clone() if pool == "own" else torch.ones_like(own)
    return allowed & ~own if pool.endswith("-excl") else allowed


def draw_negatives(allowed: Tensor, frames: Tensor, size: int, count: int, draw: torch.Generator) -> Tensor:
    """long [B, N]: for each window, `count` frames sampled with replacement from its pool, as b * size + t.

    allowed: bool [B, B] (`pool_matrix`); frames: long [B], so that padding is never sampled; size: T. One set serves
    all anchors and steps of its window: the loss excludes a negative where it is the target.
    Raises UserError if a window has an empty pool.
    """
    sizes = allowed * frames  # [B, B]: candidates of window i in window j
    ends = sizes.cumsum(1)
    total = ends[:, -1:]
    if not bool((total > 0).all()):
        raise UserError(
            "a window of the batch has no frame to serve as a negative: choose --negatives mixed, or a larger batch"
        )
    place = torch.rand(len(frames), count, generator=draw, dtype=torch.float64).mul_(total).long()
    place = torch.minimum(place, total - 1)  # a rounded-up product
    window = torch.searchsorted(ends, place, right=True)
    return window * size + place - (ends - sizes).gather(1, window)


def anchor_mask(frames: Tensor, size: int, steps: int, complete: bool) -> Tensor:
    """bool [B, T, K]: whether anchor t of a window predicts frame t + k (k = 1 .. K at index k - 1).

    Both must be frames of the recording, not of its padding. complete: only anchors that have all K targets, as
    CPC_audio (116 of 128 frames); otherwise an anchor predicts the targets it has, which keeps more anchors of short
    recordings.
    """
    t, k = torch.arange(size)[:, None], torch.arange(1, steps + 1)
    last = t + (steps if complete else k)  # [T, K] or [T, 1]
    return (last < frames[:, None, None]).expand(-1, -1, steps)


def info_nce(
    z: Tensor, predictions: Tensor, frames: Tensor, negatives: Tensor, *, complete: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over steps k of the mean over the global batch's anchors of -log softmax of z_{t+k} among the candidates.

    z: [n, T, D], this process's frames; predictions: [n, T, K, D], W_k c_t; scores are plain dot products, in float32
    (float64 stays). frames: long [B] and negatives: long [B, N] of the *global* batch, on the CPU, equal on all
    processes. A negative that is the positive itself is no candidate. Steps for which no window is long enough are
    skipped.

    Returns the loss and its detached parts: `chance` (its value if all scores were equal, ln(1 + N) without
    collisions), `retrieval` (share of anchors whose target scores highest, mean over the steps), and per step [K]
    `hits` and `anchors` (sums over this process). The mean over processes of loss and gradients equals that of one.
    """
    n, size, steps, _ = predictions.shape
    device, own = z.device, slice(rank() * n, (rank() + 1) * n)
    mask = anchor_mask(frames, size, steps, complete)  # [B, T, K]
    counts = mask.sum((0, 1))  # of the global batch, so that processes with short recordings weigh as they should
    if not bool(counts.any()):
        raise UserError("no recording of the batch has two frames: nothing can be predicted; use longer recordings")
    weights = world_size() * mask[own].double() / (counts.clamp(min=1) * (counts > 0).sum())
    drawn = to_device(negatives[own], device)  # [n, N]
    with torch.autocast(device.type, enabled=False):
        z, predictions = (x if x.dtype == torch.float64 else x.float() for x in (z, predictions))
        others = all_gather(z).flatten(0, 1)[drawn]  # [n, N, D]
        later = torch.nn.functional.pad(z, (0, 0, 0, steps))  # [n, T + K, D]
        right = torch.stack([(predictions[:, :, k] * later[:, k + 1 : k + 1 + size]).sum(2) for k in range(steps)], 2)
        wrong = torch.bmm(predictions.flatten(1, 2), others.transpose(1, 2)).unflatten(1, (size, steps))  # [n, T, K, N]
        where = _collisions(negatives[own], own.start, size, steps)
        wrong = wrong.index_put(to_device(torch.stack(where), device).unbind(), wrong.new_full((), NEVER))
        others_sum = wrong.logsumexp(3)
        weights, asked = to_device(weights.to(z.dtype), device), to_device(mask[own], device)
        loss = (weights * (torch.logaddexp(right, others_sum) - right)).sum()  # -log softmax of the target
        with torch.no_grad():
            found = (right - wrong.amax(3) > 1e-5 * right.abs()) & asked  # a tie, up to rounding, is a miss
            hidden = torch.zeros(n, size, steps, dtype=torch.long)
            hidden.index_put_(where[:3], torch.ones((), dtype=torch.long), accumulate=True)
            candidates = to_device((1 + negatives.shape[1] - hidden).to(z.dtype), device)
            parts = {
                "chance": (weights * candidates.log()).sum(),
                "retrieval": (weights * found).sum(),
                "hits": found.sum((0, 1)),
                "anchors": asked.sum((0, 1)),
            }
    return loss, parts


def _collisions(drawn: Tensor, first: int, size: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices (row, t, k, place) of negatives that are the target: a negative frame u is the target of t = u - k."""
    window, frame = drawn // size, drawn % size
    row, place = (window == first + torch.arange(len(drawn))[:, None]).nonzero(as_tuple=True)
    k = torch.arange(1, steps + 1)
    t = frame[row, place][:, None] - k  # [draws, K]
    draw, index = (t >= 0).nonzero(as_tuple=True)
    return row[draw], t[draw, index], index, place[draw]
