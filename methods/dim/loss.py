"""Three estimators of mutual information between a summary and the parts of its image, and the prior's two losses.

Deep InfoMax, arXiv:1808.06670, equations 4 to 7. B: global batch; n = B / processes; L: locations (1 for the global
term); U: units of the score space. A score u[i, j, l] is the dot product of image i's summary with part l of image j;
pairs of the same image (j = i) are positive, all others negative.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from common.distributed import all_gather, rank, world_size

ESTIMATORS = ("jsd", "dv", "infonce")


def information_loss(summaries: Tensor, parts: Tensor, estimator: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus an estimate of the information (lower is better), of this process's summaries [n, U] and parts [n, L, U].

    jsd      mean over negatives of sp(u) + mean over positives of sp(-u) - 2 ln 2, sp(u) = ln(1 + e^u)
    dv       ln of the mean of e^u over all negatives of all processes - mean over positives of u (Donsker-Varadhan)
    infonce  mean over i, l of -ln softmax of u[i, i, l] among itself and all parts of all *other* images: the other
             parts of the same image are no negatives
    Pairs of the same image are masked out by -inf (infonce, dv) or zero weight (jsd), never by a constant score, which
    would compete.

    Parts are gathered with gradients, so negatives are global; computed in float32 (float64 stays). The mean over
    processes of the losses, and of all gradients, equals that of one: jsd and infonce are means over local rows, and
    for dv each process has the complete logarithm, whose gathered inputs return the gradients of all processes.
    Returns the loss and, detached, `retrieval`, `positive` and `negative` (mean scores). Levels: `chance_level`.
    """
    with torch.autocast(summaries.device.type, enabled=False):
        if summaries.dtype != torch.float64:
            summaries, parts = summaries.float(), parts.float()
        u = scores(summaries, all_gather(parts))  # [n, B, L]
        n, batch, locations = u.shape
        rows = torch.arange(n, device=u.device)
        own = rank() * n + rows
        positive = u[rows, own]  # [n, L]
        is_own = (torch.arange(batch, device=u.device) == own[:, None]).unsqueeze(2)  # [n, B, 1]
        count = n * (batch - 1) * locations
        match estimator:
            case "jsd":
                apart = -logsigmoid(-u).masked_fill(is_own, 0.0).sum() / count
                loss = apart - logsigmoid(positive).mean() - 2 * math.log(2)
            case "dv":
                every = u.masked_fill(is_own, -torch.inf).logsumexp((0, 1, 2))
                every = all_gather(every.view(1)).logsumexp(0)
                loss = every - math.log(count * world_size()) - positive.mean()
            case "infonce":
                others = u.masked_fill(is_own, -torch.inf).logsumexp((1, 2))  # [n]
                loss = (torch.logaddexp(positive, others.unsqueeze(1)) - positive).mean()
            case _:
                raise ValueError(f"unknown estimator {estimator!r}: {', '.join(ESTIMATORS)}")
        with torch.no_grad():
            negative = (u.sum() - positive.sum()) / count
            parts = {"retrieval": retrieval(u, own), "positive": positive.mean(), "negative": negative}
    return loss, parts


def scores(summaries: Tensor, parts: Tensor) -> Tensor:
    """u [n, B, L] of summaries [n, U] and parts [B, L, U]."""
    return (summaries @ parts.flatten(0, 1).T).unflatten(1, parts.shape[:2])


def retrieval(u: Tensor, own: Tensor) -> Tensor:
    """Share of i, l where, of the B images' parts at location l, that of image i scores highest with summary i; 0-d.

    u: [n, B, L]; own: long [n], the image of each summary. Chance: 1 / B.
    """
    return (u.argmax(1) == own.unsqueeze(1)).double().mean()


def chance_level(estimator: str, batch: int, locations: int) -> float:
    """The loss when all scores are equal. 0 for the f-divergences (jsd: at scores of 0)."""
    return math.log(1 + (batch - 1) * locations) if estimator == "infonce" else 0.0


def discriminator_loss(discriminator, prior: Tensor, codes: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """GAN loss of the discriminator with a gradient penalty, of prior samples and codes, both [n, D] in [0, 1].

    mean sp(-D(prior)) + mean sp(D(codes)) + weight (1/2 mean |grad D(prior)|^2 + 1/2 mean |grad D(codes)|^2), the
    penalty over *all* samples (Mescheder et al. 2018). Codes are detached: the encoder has `fooling_loss`.
    Returns the loss and, detached, `discriminator_accuracy` (0.5 if codes and prior are indistinguishable).
    """
    x = torch.cat([prior.to(codes.dtype), codes.detach()]).requires_grad_()
    logits = discriminator(x)  # [2n]: one pass, so that DistributedDataParallel sees one forward per backward
    real, fake = logits.chunk(2)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = gradient.square().sum(1).mean()  # over both halves: 1/2 mean + 1/2 mean
    loss = -logsigmoid(real).mean() - logsigmoid(-fake).mean() + weight * penalty
    with torch.no_grad():
        right = 0.5 * (real > 0).double().mean() + 0.5 * (fake < 0).double().mean()
    return loss, {"discriminator_accuracy": right, "gradient_penalty": penalty.detach()}


def fooling_loss(discriminator: nn.Module, codes: Tensor) -> Tensor:
    """The encoder's side, non-saturating: mean sp(-D(codes)); ln 2 if the discriminator is at chance.

    The gradient goes into `codes` [n, D] alone. `discriminator`: without DistributedDataParallel.
    """
    discriminator.requires_grad_(False)
    loss = -logsigmoid(discriminator(codes)).mean()
    discriminator.requires_grad_(True)
    return loss
