"""InfoNCE against a queue of earlier keys (MoCo, arXiv:1911.05722, eq. 1), and the queue.

B: global batch in images; n = B / processes; D: width of the projections; K: keys in the queue; V: directions, 1, or 2
where each view is a query once.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common import rng


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over rows of -log softmax of the positive among itself and the K keys of the queue, all over `temperature`.

    q, k: [n, D], row i of each is image i; queue: [K, D]; all rows of unit length. No gradient goes into keys and
    queue. Computed in float32 (float64 stays).
    Returns the loss and its detached parts: `positive` (mean cosine of query and positive key), `negative` (mean cosine
    of queries and queue) and `retrieval` (share of queries whose positive is the nearest of the 1 + K keys; a tie is a
    miss). Chance level of the loss: ln(1 + K). A mean over own rows, and the queue is the same on all processes:
    averaged over them, loss and gradients are those of one process with all rows.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = (x if x.dtype == torch.float64 else x.float() for x in (q, k.detach(), queue))
        positive = (q * k).sum(1, keepdim=True)  # [n, 1]
        negatives = q @ queue.T  # [n, K]
        loss = -(torch.cat([positive, negatives], 1) / temperature).log_softmax(1)[:, 0].mean()
    positive, negatives = positive.detach(), negatives.detach()
    parts = {
        "positive": positive.mean(),
        "negative": negatives.mean(),
        "retrieval": (negatives < positive - 1e-5).all(1).float().mean(),  # float32 rounds cosines by less
    }
    return loss, parts


class Queue(nn.Module):
    """The last K keys of each direction, the same on all processes: keys [V, K, D], at first random unit vectors.

    Random ones and not zeros, which would be easy negatives for the first K / B steps.
    """

    keys: Tensor

    def __init__(self, directions: int, length: int, width: int, *, seed: int):
        super().__init__()
        random = torch.randn(directions, length, width, generator=rng.generator(seed, "queue"))
        self.register_buffer("keys", normalize(random, dim=2))

    @torch.no_grad()
    def push(self, keys: Tensor, step: int) -> None:
        """Put the keys [V, B, D] of all processes in the place of the oldest; B divides K.

        The place is a function of the step, so no pointer is saved: after step s the rows (s B) mod K and following
        are the batch of step s.
        """
        start = step * keys.shape[1] % self.keys.shape[1]
        self.keys[:, start : start + keys.shape[1]] = keys
