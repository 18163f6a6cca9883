"""AMDIM's objective (arXiv:1906.00910; code costs.py, LossMultiNCE): multi-scale noise-contrastive prediction.

B: global batch in images; n = B / processes; L: positions of a feature map (25 or 49); R: width of the features.
A source is one vector of an image in one view, the targets are the features of all positions of all B images in the
other.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.distributed import all_gather, all_reduce, rank, world_size
from common.errors import UserError
from common.rng import generator

POSITIONS5, POSITIONS7 = 25, 49


# Scores of one matrix product, and of one sweep of elementwise operations on a CPU, whose cache should hold them.
_PRODUCT, _SWEEP = 1 << 24, 1 << 17


def nce(sources: Tensor, targets: Tensor, *, first: int, clip: float, penalty: float) -> tuple[Tensor, dict]:
    """Mean over sources and over the positions of their image of
    -log [e^s+ / (e^s+ + sum over other images of e^s)], plus penalty * mean(raw^2).

    sources: [n, R], of the images first ... first + n - 1 of the batch; targets: [B, L, R]; computed at least in
    float32. raw = source . target / sqrt(R); s = clip tanh(raw / clip). The other positions of the same image are in no
    denominator, and the penalty is over all raw scores, before clipping.
    Returns the loss and detached 0-d tensors: `nce` (without penalty; chance level ln(1 + L (B - 1))), `score_rms`
    (root mean square of the raw scores) and `hits` (share of sources that score highest, of all B L, at a position of
    their image; by chance 1 / B).
    """
    if not 0 < clip <= 40:
        raise UserError(f"--clip {clip:g}: choose it above 0 and up to 40, where e^-2C still is a float32")
    with torch.autocast(sources.device.type, enabled=False):
        sources, targets = (x if x.dtype == torch.float64 else x.float() for x in (sources, targets))
        loss, plain, squares, hits = _NCE.apply(sources, targets, first, clip, penalty)
    return loss, {"nce": plain, "score_rms": squares.sqrt(), "hits": hits}


class _NCE(torch.autograd.Function):
    """Loss and gradient in one pass: the loss is a scalar, so the backward pass only multiplies by a factor.

    No score exceeds C, so e^(s - C) needs no maximum subtracted: it lies in [e^-2C, 1]. Scores are overwritten by their
    gradients.
    """

    @staticmethod
    def forward(ctx, sources, targets, first, clip, penalty):
        n, width = sources.shape
        images, positions = targets.shape[:2]
        flat = targets.flatten(0, 1)  # [B L, R]
        unit = 2 / (clip * width**0.5)  # 2 raw / C = unit * source . target
        own = (torch.arange(n, device=flat.device)[:, None] + first) * positions
        own = own + torch.arange(positions, device=flat.device)  # [n, L], columns of the same image
        product = max(1, _PRODUCT // len(flat))
        sweep = max(1, _SWEEP // len(flat)) if flat.device.type == "cpu" else product
        d_sources, d_flat = torch.empty_like(sources), torch.zeros_like(flat)
        sums = sources.new_zeros(3)
        for rows in torch.arange(n).split(product):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            q = sources[rows] * unit  # [c, R]
            x = q @ flat.T  # [c, B L], 2 raw / C
            for part, part_own in zip(x.split(sweep), own[rows].split(sweep), strict=True):
                sums += _sweep_(part, part_own, clip, penalty * (clip / 2) ** 2 / images)
            d_sources[rows] = (x @ flat).mul_(unit)
            d_flat.addmm_(x.T, q)
        count = n * positions
        ctx.save_for_backward(d_sources.div_(count), d_flat.div_(count).view(targets.shape))
        plain, squares, hits = sums[0] / count, sums[1] * ((clip / 2) ** 2 / (count * images)), sums[2] / n
        ctx.mark_non_differentiable(plain, squares, hits)
        return plain + penalty * squares, plain, squares, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        d_sources, d_targets = ctx.saved_tensors
        return grad * d_sources, grad * d_targets, None, None, None


def _sweep_(x: Tensor, own: Tensor, clip: float, penalty: float) -> Tensor:
    """x [c, B L], 2 raw / C, becomes the gradient of (sum of losses) + penalty * sum x^2 with respect to x.

    Returns [sum of losses, sum of x^2, hits]. tanh(x / 2) = 2 sigmoid(x) - 1, and sigmoid takes a ninth of its time.
    """
    squares = x.flatten().dot(x.flatten())
    half = torch.sigmoid(x)  # s = C (2 half - 1)
    mine = half.gather(1, own)  # [c, L]
    positive = 2 * clip * (mine - 1)  # s - C
    e = torch.add(x.new_full((), -2 * clip), half, alpha=2 * clip).exp_()  # e^(s - C)
    e.scatter_(1, own, 0.0)  # no position of the same image is a negative
    others, best = e.sum(1, keepdim=True), e.amax(1)
    mine = positive.exp()
    denominator = mine + others  # [c, L]: one problem per position
    loss = (denominator.log() - positive).sum()
    hits = (mine.amax(1) > best).sum()
    # d loss / d s of a negative is e^(s - C) sum_l 1 / denominator_l; then the sigmoid; raw scores get the penalty.
    e.mul_(denominator.reciprocal().sum(1, keepdim=True))
    e.scatter_(1, own, mine / denominator - 1)
    torch.add(x.mul_(2 * penalty), torch.ops.aten.sigmoid_backward(e, half), alpha=2 * clip, out=x)
    return torch.stack([loss, squares, hits.to(x.dtype)])


def multi_scale(
    f1: Tensor, f5: Tensor, f7: Tensor, positions: Tensor, *, clip: float, penalty: float, alone: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the pairs 1-5, 1-7 and 5-5 of the mean of both directions, view 1 -> 2 and 2 -> 1, with the penalty.

    f1: [2, n, R]; f5: [2, n, 25, R]; f7: [2, n, 49, R], this process's images in both views; positions: long [2, n],
    the position of each view's f5 that is the source in 5-5. Targets are gathered from all processes, with gradient;
    sources stay local. `alone`: without the other processes, n is the whole batch.
    Returns the loss and its detached parts: `nce_1_5`, `nce_1_7`, `nce_5_5`, `score_rms` of the raw scores and
    `retrieval`, the share of 1-5's sources whose highest score is at a position of their image (by chance 1 / B).
    Chance level: 2 ln(1 + 25 (B - 1)) + ln(1 + 49 (B - 1)). A mean over local sources: the mean over processes, and of
    the gradients, equals that of one process.
    """
    n = f1.shape[1]
    single = f5.gather(2, positions[..., None, None].expand(-1, -1, 1, f5.shape[-1]))[:, :, 0]  # [2, n, R]
    gather = (lambda x: x) if alone else all_gather  # views apart: no copy on one process
    all5, all7 = ([gather(view if view.dtype == torch.float64 else view.float()) for view in f] for f in (f5, f7))
    pairs = {"1_5": (f1, all5), "1_7": (f1, all7), "5_5": (single, all5)}
    options = dict(first=0 if alone else rank() * n, clip=clip, penalty=penalty)
    loss, parts, squares = 0.0, {}, []
    for name, (sources, targets) in pairs.items():
        both = [nce(sources[view], targets[1 - view], **options) for view in (0, 1)]
        loss = loss + (both[0][0] + both[1][0]) / 2
        parts[f"nce_{name}"] = (both[0][1]["nce"] + both[1][1]["nce"]) / 2
        squares += [part["score_rms"].square() for _, part in both]
        if name == "1_5":
            parts["retrieval"] = (both[0][1]["hits"] + both[1][1]["hits"]) / 2
    mean_square = torch.stack(squares).mean()
    parts["score_rms"] = (mean_square if alone else all_reduce(mean_square) / world_size()).sqrt()
    return loss, parts


def probe_loss(logits: tuple[Tensor, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of 10 tanh(logit / 10) plus 1e-3 mean(logit^2), summed over the linear and the MLP probe.

    logits: two of [2n, C]; labels: long [n], negative where there is none. Returns the loss, whose mean over processes
    equals that of one process, and the accuracies in percent on the training views, `online_linear` and `online_mlp`.
    """
    labels = torch.cat([labels, labels])
    known = labels >= 0
    count = (all_reduce(known.sum().float()) / world_size()).clamp(min=1)  # a process's share of the labeled rows
    loss, parts = 0.0, {}
    for name, raw in zip(("online_linear", "online_mlp"), logits, strict=True):
        raw = raw if raw.dtype == torch.float64 else raw.float()
        with torch.autocast(raw.device.type, enabled=False):
            terms = torch.nn.functional.cross_entropy(10 * torch.tanh(raw / 10), labels.clamp(min=0), reduction="none")
            loss = loss + (terms * known).sum() / count + 1e-3 * raw.square().mean()
        parts[name] = 100 * ((raw.detach().argmax(1) == labels) & known).sum() / count
    return loss, parts


@torch.no_grad()
def effective_dimensions(f1: Tensor) -> Tensor:
    """Participation ratio of the covariance of features [n, R] of all processes, (tr C)^2 / tr C^2: 1 if all lie on one
    line, at most R.

    f1 ends in a BatchNorm, so its spread is no signal; the number of directions is.
    """
    f1 = all_gather(f1.float())
    x = f1 - f1.mean(0)
    gram = x @ x.T
    return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


def chance(batch: int) -> dict[str, float]:
    """Chance levels of `multi_scale`'s loss (without penalty), of its three terms and of `retrieval`."""
    one5, one7 = (math.log(1 + positions * (batch - 1)) for positions in (POSITIONS5, POSITIONS7))
    return {"loss": 2 * one5 + one7, "nce_1_5": one5, "nce_1_7": one7, "nce_5_5": one5, "retrieval": 1 / batch}


def draw_positions(seed: int, step: int, batch: int) -> Tensor:
    """The 5x5 position that is an image's source in the pair 5-5, long [2, B]: one for each image and direction."""
    return torch.randint(POSITIONS5, (2, batch), generator=generator(seed, "places", step))
