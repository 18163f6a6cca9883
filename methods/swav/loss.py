"""Balanced codes by Sinkhorn and the swapped prediction of SwAV (arXiv:2006.09882, eq. 1 to 5).

V: views of an image, the first two of which get codes; B: global batch; n = B / processes; K: prototypes; D: width of
the projections.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.distributed import all_gather, all_reduce, rank, world_size


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """Codes [..., N, K] of scores [..., N, K]: each row sums to 1, and prototypes get almost equal shares.

    Leading dimensions are separate problems; each process holds some of the rows, and the shares are those of all rows.

    Q = diag(v) exp(scores / epsilon) diag(u), u and v updated in turn: u spreads the mass over the prototypes (sums
    over all processes), v over the samples (own rows). Samples come last, so every code sums to 1. Scaling two vectors
    instead of the matrix is the same iteration with one read of it per half-step; constant factors of u cancel.
    iterations=0 skips the balancing: a softmax, which collapses. Computed in float32 (float64 stays).
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
        top = scores.max()
        if world_size() > 1:  # one constant for all processes: different ones would weigh their samples differently
            dist.all_reduce(top, dist.ReduceOp.MAX)
        m = (scores - top).exp_()  # [..., N, K]
        v = m.new_ones(m.shape[:-1])
        u = torch.ones_like(m[..., 0, :])
        for _ in range(iterations):
            u = all_reduce((v.unsqueeze(-2) @ m).squeeze(-2)).reciprocal()  # [..., K]
            v = (m @ u.unsqueeze(-1)).squeeze(-1).reciprocal()  # [..., N]
        codes = m.mul_(u.unsqueeze(-2))
        return codes.div_(codes.sum(-1, keepdim=True))  # v once more, by a sum that rounds less than the product


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over the two codes i and the V - 1 other views v of the cross-entropy of softmax(scores[v] / T) with code i.

    scores: [V, n, K], the two views with codes first; codes: [2, n, K], constants. Computed in float32 (float64 stays).
    Returns the loss and its detached parts: `code_entropy` (mean entropy of a code in nats; ln K if the codes carry
    no information) and `prototypes_used` (perplexity of the mean prediction over all processes: the effective number
    of prototypes in use). Chance level: ln K. A mean over own rows: averaged over processes, loss and gradients are
    those of one process.
    """
    views = len(scores)
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores if scores.dtype == torch.float64 else scores.float()
        log_p = (scores / temperature).log_softmax(-1)  # [V, n, K]
        both = codes.sum(0)  # a view never predicts its own code: views 1 and 2 meet the other's, the rest both
        terms = (log_p[:2] * codes.flip(0)).sum() + (log_p[2:] * both).sum()
        loss = -terms / (2 * (views - 1) * scores.shape[1])
    with torch.no_grad():
        mean = all_reduce(log_p[:2].exp().mean((0, 1))) / world_size()  # [K]
        parts = {
            "code_entropy": torch.special.entr(codes).sum(-1).mean(),
            "prototypes_used": torch.special.entr(mean).sum().exp(),
        }
    return loss, parts


class Queue(nn.Module):
    """Earlier projections of the two views with codes, so that small batches have enough samples to balance.

    rows: [2, length, D], newest first, the same on all processes (so that the checkpoint of one holds all of it). Each
    scores its `part`: the parts together are the queue, and Sinkhorn does not depend on which process holds a row.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(2, length, width))

    def part(self) -> Tensor:
        """This process's share, [2, length / processes, D]."""
        return self.rows.chunk(world_size(), dim=1)[rank()]

    @torch.no_grad()
    def push(self, z: Tensor) -> None:
        """z: this process's projections [2, n, D]; the oldest B rows leave."""
        everyone = all_gather(z.detach().transpose(0, 1).to(self.rows.dtype)).transpose(0, 1)  # [2, B, D]
        self.rows = torch.cat([everyone, self.rows], 1)[:, : self.rows.shape[1]].contiguous()
