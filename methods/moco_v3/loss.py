"""MoCo v3's loss (arXiv:2104.02057, eq. 1 and Algorithm 1): the keys of the batch are the negatives, there is no queue.

B: global batch in images; n = B / processes; D: width of the projections.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.distributed import all_gather, rank


def contrast(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over own rows of 2 T times -log softmax of the positive among the B keys of the other view, all over T.

    q: predictions [n, D]; k: the momentum encoder's projections [n, D] of the other view, row i of each is image i;
    normalized here, computed in float32 (float64 stays). No gradient goes into k. The factor 2 T keeps the gradient's
    size independent of T.
    Returns the loss, at chance 2 T ln B, and its detached parts: `positive` and `negative` (mean cosine with the own
    key and with the B - 1 others; 0 without others) and `retrieval` (share of queries whose own key is the nearest; a
    tie is a miss). Averaged over processes, loss and gradients are those of one process with B rows.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = (normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (q, k.detach()))
        cosines = q @ all_gather(k).T  # [n, B]: rank 0's keys, rank 1's keys, ...
        n, batch = cosines.shape
        own = torch.arange(n, device=q.device)[:, None] + rank() * n
        loss = -2 * temperature * (cosines / temperature).log_softmax(1).gather(1, own).mean()
    cosines = cosines.detach()
    positive = cosines.gather(1, own)  # [n, 1]
    parts = {
        "positive": positive.mean(),
        "negative": (cosines.sum() - positive.sum()) / max(n * (batch - 1), 1),
        "retrieval": ((cosines > positive - 1e-5).sum(1) == 1).float().mean(),  # float32 rounds cosines by less
    }
    return loss, parts


def moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Both directions added, q1 with k2 and q2 with k1; all [n, D]. Chance level 4 T ln B. Parts: means of the two."""
    (loss1, parts1), (loss2, parts2) = contrast(q1, k2, temperature), contrast(q2, k1, temperature)
    return loss1 + loss2, {name: (parts1[name] + parts2[name]) / 2 for name in parts1}
