"""InfoNCE with log-bilinear scores (CPC, arXiv:1807.03748, eq. 3 and 4) against sampled or all candidates.

An anchor is one context vector and one target; its prediction W c is made by the model, with one bias-free W for
each offset. The score of a candidate z is the plain dot product z . W c: no normalization and no temperature.

A: anchors; N: candidates in the pool; M: negatives an anchor; E: width of predictions and candidates.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.distributed import all_gather, rank

CHUNK_BYTES = 1 << 21  # temporaries on a CPU that stay in its cache
DEVICE_CHUNK_BYTES = 1 << 28


def info_nce_sampled(
    predictions: Tensor, pool: Tensor, positive: Tensor, negatives: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_a weight_a * -log softmax of the positive among itself and the M negatives of anchor a.

    predictions: [A, E]; pool: [N, E]; positive: long [A] and negatives: long [A, M], rows of the pool; weight: [A],
    1 / A each for a plain mean. Computed in float32 (float64 stays).
    Returns the loss and its detached parts: `retrieval` (weighted share of anchors whose positive beats all negatives;
    a tie is a miss, so that a collapsed network has 0) and `positive_score` (weighted mean of the positives' scores).
    Chance level: ln(1 + M). A sampled negative may be the positive itself, or of the same image, as in the paper.
    """
    predictions, pool, weight = _floats(predictions, pool, weight)
    with torch.autocast(predictions.device.type, enabled=False):
        scores = _SampledScores.apply(predictions, pool, torch.cat([positive[:, None], negatives], 1))  # [A, 1 + M]
        loss = -(scores.log_softmax(1)[:, 0] * weight).sum()
    with torch.no_grad():
        hits = scores[:, 0] > scores[:, 1:].amax(1)
        return loss, {"retrieval": (hits * weight).sum(), "positive_score": (scores[:, 0] * weight).sum()}


def info_nce_all(
    predictions: Tensor, pool: Tensor, positive: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_a weight_a * -log softmax of the positive among all N candidates: one positive, the rest negatives.

    Arguments and parts as `info_nce_sampled`. Chance level: ln N. The [A, N] scores exist a block of rows at a time.
    """
    predictions, pool, weight = _floats(predictions, pool, weight)
    with torch.autocast(predictions.device.type, enabled=False):
        loss, hits, score = _AllInfoNCE.apply(predictions, pool, positive, weight)
    return loss, {"retrieval": hits, "positive_score": score}


def _floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All float64 if the first is, otherwise all float32: half precision would round scores that nothing bounds."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def _rows_per_chunk(x: Tensor, numbers_per_row: int) -> int:
    budget = CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, budget // (x.element_size() * numbers_per_row))


class _SampledScores(torch.autograd.Function):
    """scores[a, m] = predictions[a] . pool[index[a, m]] without an [A, M, E] tensor in memory, forward or backward.

    Both gradients are weighted sums of rows, which is what `embedding_bag` does: for a prediction over its M
    candidates, for a candidate over the anchors that it was drawn for (the index, sorted). No scatter, so a GPU is
    deterministic.
    """

    @staticmethod
    def forward(ctx, predictions: Tensor, pool: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(predictions, pool, index)
        scores = predictions.new_empty(index.shape)
        rows = _rows_per_chunk(pool, index.shape[1] * pool.shape[1])
        for start in range(0, len(index), rows):
            part = index[start : start + rows]
            candidates = pool.index_select(0, part.flatten()).view(*part.shape, -1)  # [rows, M, E]
            scores[start : start + rows] = torch.bmm(candidates, predictions[start : start + rows, :, None])[..., 0]
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        predictions, pool, index = ctx.saved_tensors
        grad = grad.contiguous()
        d_predictions = F.embedding_bag(index, pool, mode="sum", per_sample_weights=grad)
        drawn, order = index.flatten().sort(stable=True)
        bags = torch.searchsorted(drawn, torch.arange(len(pool), device=drawn.device))
        anchors, weights = order // index.shape[1], grad.flatten()[order]
        d_pool = F.embedding_bag(anchors, predictions, bags, mode="sum", per_sample_weights=weights)
        return d_predictions, d_pool, None


class _AllInfoNCE(torch.autograd.Function):
    """Loss and gradient in one sweep over blocks of anchors: a block's softmax is used while it is there."""

    @staticmethod
    def forward(ctx, predictions, pool, positive, weight):
        d_predictions, d_pool = torch.empty_like(predictions), torch.zeros_like(pool)
        loss, hits, score = (predictions.new_zeros(()) for _ in range(3))
        rows = max(64, _rows_per_chunk(pool, len(pool)))
        for start in range(0, len(predictions), rows):
            part = slice(start, start + rows)
            q, w, own = predictions[part], weight[part, None], positive[part, None]
            s = q @ pool.T  # [rows, N]
            right = s.gather(1, own)
            log_sum = s.logsumexp(1, keepdim=True)
            loss += ((log_sum - right) * w).sum()
            score += (right * w).sum()
            best_other = s.scatter(1, own, -torch.inf).amax(1, keepdim=True)
            hits += ((right > best_other) * w).sum()
            p = s.sub_(log_sum).exp_().mul_(w)  # weighted softmax
            p.scatter_add_(1, own, -w)
            d_predictions[part] = p @ pool
            d_pool.addmm_(p.T, q)
        ctx.save_for_backward(d_predictions, d_pool)
        ctx.mark_non_differentiable(hits, score)
        return loss, hits, score

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        d_predictions, d_pool = ctx.saved_tensors
        return grad * d_predictions, grad * d_pool, None, None


# ---- patches of a grid -----------------------------------------------------------------------------------------------


def cpc_loss(
    compared: Tensor,
    predictions: Sequence[Tensor],
    offsets: tuple[int, ...],
    negatives: Sequence[Tensor] | None,
    *,
    everywhere: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE of this process's anchors, averaged over directions, over offsets and over the anchors of an offset.

    compared: [n, R, Q, E], this process's patches; predictions: for each direction [A, E], in the order of `positives`
    on the grid `turned` for it. negatives: for each direction the result of `draw_negatives`, long [A, M]; None: all
    patches of the pool. everywhere: the pool is the patches of all processes (gathered with gradients), otherwise those
    of this process. Returns loss and parts as `info_nce_sampled`. With `everywhere` the mean over processes, and of the
    gradients, equals that of one process with all images.
    """
    n = len(compared)
    first = rank() * n if everywhere else 0
    compared = compared if compared.dtype == torch.float64 else compared.float()
    pool = all_gather(compared) if everywhere else compared
    losses, parts = [], []
    for direction, prediction in enumerate(predictions):
        candidates = turned(pool, direction)  # [B, R, Q, E]
        rows, columns = candidates.shape[1:3]
        positive, weight = _on_device(n, rows, columns, offsets, first, compared.device)
        candidates = candidates.flatten(0, 2)
        if negatives is None:
            loss, part = info_nce_all(prediction, candidates, positive, weight)
        else:
            loss, part = info_nce_sampled(prediction, candidates, positive, negatives[direction], weight)
        losses.append(loss)
        parts.append(part)
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    return torch.stack(losses).mean(), means


def turned(grid: Tensor, direction: int) -> Tensor:
    """[n, R, Q, D] oriented so that the targets lie below: direction 0 unchanged (down), 1 flipped (up), 2 transposed
    (right), 3 both (left)."""
    grid = grid.transpose(1, 2) if direction >= 2 else grid
    return grid.flip(1) if direction % 2 else grid


def positives(images: int, rows: int, columns: int, offsets: tuple[int, ...], first: int = 0) -> tuple[Tensor, Tensor]:
    """(positive, weight), each [A]: for every offset o, image, row i < rows - o and column j, in this order.

    positive: the index of the patch (i + o, j) of the same image among patches flattened as (image, row, column), the
    first image being number `first`. Weights sum to 1 over this process's anchors, with an equal share for each offset:
    the mean over offsets of each offset's mean (GIM), regardless of its number of anchors.
    """
    place = torch.arange(images * rows * columns).view(images, rows, columns) + first * rows * columns
    targets = [place[:, o:].flatten() for o in offsets]
    weight = torch.cat([torch.full((len(t),), 1 / (len(t) * len(offsets)), dtype=torch.float64) for t in targets])
    return torch.cat(targets), weight


@lru_cache(maxsize=16)
def _on_device(images, rows, columns, offsets, first, device) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in positives(images, rows, columns, offsets, first))


def draw_negatives(
    images: int,
    pool: int,
    rows: int,
    columns: int,
    offsets: tuple[int, ...],
    count: int,
    generator: torch.Generator,
    part: slice = slice(None),
) -> Tensor:
    """`count` negatives for each anchor of the images `part` of a batch, long [A, count], in the order of `positives`.

    Uniform with replacement over all patches of `pool` images that the offset can have as targets (rows o and below),
    so a negative may be of the same image, or the positive itself (GIM's code). Sampled for all `images` of the global
    batch, so that a process's slice is what a single process would have sampled.
    """
    drawn = []
    for o in offsets:
        targets = (rows - o) * columns  # of one image
        draws = torch.randint(pool * targets, (images, targets, count), generator=generator)[part]
        image = torch.div(draws, targets, rounding_mode="floor")
        drawn.append((draws + (image + 1) * (o * columns)).flatten(0, 1))  # skip the first o rows of every image
    return torch.cat(drawn)
