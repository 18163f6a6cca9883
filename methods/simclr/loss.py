"""NT-Xent (SimCLR, arXiv:2002.05709, eq. 1) over the global batch, without a [2B, 2B] matrix in memory.

B: global batch in images; n = B / processes; z: projections, [n, D] per view and process.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.distributed import all_gather, rank


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float, *, decoupled: bool = False, chunk: int = 1024
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over this process's 2n rows of -log softmax of the positive among the other 2B - 1 projections.

    z1, z2: [n, D], the two views' projections in the same order; normalized here, computed in float32 (float64 stays).
    decoupled: leave the positive out of the denominator (Yeh et al. 2021, arXiv:2110.06848, eq. 6).
    Returns the loss and its detached parts: `alignment` (mean positive similarity / temperature), `log_sum_exp` (mean
    log denominator; loss = log_sum_exp - alignment) and `retrieval` (share of rows whose positive is the nearest; a tie
    is a miss).
    Chance level of the loss: ln(2B - 1). Averaged over processes, loss and gradients equal one process's with 2B rows.
    """
    n = len(z1)
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2])
        z = torch.nn.functional.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)  # [2n, D]
        everyone = all_gather(z)  # [2B, D]: rank 0's view 1, rank 0's view 2, rank 1's view 1, ...
        own = torch.arange(2 * n, device=z.device)
        offset = rank() * 2 * n
        loss, alignment, lse, hits = _NTXent.apply(
            z, everyone, offset + own, offset + (own + n) % (2 * n), temperature, decoupled, chunk
        )
    return loss, {"alignment": alignment, "log_sum_exp": lse, "retrieval": hits}


class _NTXent(torch.autograd.Function):
    """Loss and gradient in one sweep over chunks of rows: a chunk's softmax is used while it is there.

    Memory: chunk x 2B instead of several copies of 2B x 2B; no second pass, because the loss is a scalar and its
    gradient only waits for a factor.
    """

    @staticmethod
    def forward(ctx, rows, columns, self_index, positive_index, temperature, decoupled, chunk):
        count = len(rows)
        d_rows, d_columns = torch.empty_like(rows), torch.zeros_like(columns)
        alignment, lse, hits = rows.new_zeros(()), rows.new_zeros(()), rows.new_zeros(())
        scale, tie = 1 / (temperature * count), 1e-5 / temperature  # float32 rounds similarities by less
        for start in range(0, count, chunk):
            q = rows[start : start + chunk]
            own, positive = self_index[start : start + chunk, None], positive_index[start : start + chunk, None]
            s = q @ columns.T  # [c, 2B]
            s.div_(temperature).scatter_(1, own, -torch.inf)
            aligned = s.gather(1, positive)
            hits += ((s > aligned - tie).sum(1) == 1).sum()  # the positive alone
            if decoupled:
                s.scatter_(1, positive, -torch.inf)
            log_denominator = s.logsumexp(1, keepdim=True)
            alignment += aligned.sum()
            lse += log_denominator.sum()
            p = s.sub_(log_denominator).exp_()  # softmax, in place; the own column is 0
            d_rows[start : start + chunk] = (p @ columns - columns[positive[:, 0]]) * scale
            d_columns.addmm_(p.T, q, alpha=scale)
            d_columns.index_add_(0, positive[:, 0], q, alpha=-scale)
        ctx.save_for_backward(d_rows, d_columns)
        alignment, lse, hits = alignment / count, lse / count, hits / count
        ctx.mark_non_differentiable(alignment, lse, hits)
        return lse - alignment, alignment, lse, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        d_rows, d_columns = ctx.saved_tensors
        return grad * d_rows, grad * d_columns, None, None, None, None, None
