"""DINO's loss and center (arXiv:2104.14294, eq. 1 to 4 and Algorithm 1), in float32.

B: global batch in images; n = B / processes; V views, the first two global; K prototypes (dimensions of the output).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import all_reduce, world_size

GLOBAL_VIEWS = 2


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the 2V - 2 pairs (teacher's global view i, student's view v != i), over this
    process's images.

    student: raw outputs [V * n, K], view by view, the two global first; teacher: [2n, K], the same two; center: [K].
    P_t = softmax((teacher - center) / teacher_temperature) without gradient, P_s = softmax(student / temperature).
    center None: P_t = sinkhorn(teacher / teacher_temperature) instead.
    Returns the loss and detached signals: `teacher_entropy` (mean entropy of P_t), `kl` (loss - teacher_entropy, the
    mean KL(P_t | P_s) of the pairs), `agreement` (share of images where student and teacher, each from another global
    view, have the same largest dimension) and `largest_share` (largest dimension of the mean P_t over all processes).
    The loss is near ln K at the start. Averaged over processes, loss and gradients are those of one process.
    """
    n = len(teacher) // GLOBAL_VIEWS
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        with torch.no_grad():
            if center is None:
                log_p = sinkhorn(teacher.to(dtype) / teacher_temperature).clamp_min(1e-30).log()
            else:
                log_p = ((teacher.to(dtype) - center) / teacher_temperature).log_softmax(1)
            targets = log_p.exp()
            entropy = -(targets * log_p).sum(1).mean()
        scores = student.to(dtype) / student_temperature
        first, second = targets.chunk(GLOBAL_VIEWS)
        # Targets of one student view add up: sum_i CE(P_i, P_s) = count * logsumexp(s) - (sum_i P_i) . s
        both = first + second
        total = 0.0
        for v, s in enumerate(scores.split(n)):
            target, count = ((second, 1), (first, 1))[v] if v < GLOBAL_VIEWS else (both, GLOBAL_VIEWS)
            total = total + (count * s.logsumexp(1) - (target * s).sum(1)).mean()
        loss = total / (GLOBAL_VIEWS * (len(scores) // n - 1))
    with torch.no_grad():
        seen = scores[: GLOBAL_VIEWS * n].argmax(1)
        parts = {
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,
            "agreement": (seen == targets.argmax(1).roll(n)).to(dtype).mean(),
            "largest_share": (all_reduce(targets.mean(0)) / world_size()).amax(),
        }
    return loss, parts


@torch.no_grad()
def sinkhorn(scores: Tensor, iterations: int = 3) -> Tensor:
    """Assignments [2n, K] of scores [2n, K], both global views in one problem: each row sums to 1, and all prototypes
    get almost equal shares of the rows of all processes.

    Sinkhorn-Knopp in place of centering (paper Table 7; the form of DINOv2, arXiv:2304.07193): divide by the sums of
    the columns and of the rows in turn, the rows last.
    """
    top = scores.max()
    if world_size() > 1:  # one constant for all processes, so that their rows weigh alike
        dist.all_reduce(top, dist.ReduceOp.MAX)
    q = (scores - top).exp()
    for _ in range(iterations):
        q /= all_reduce(q.sum(0)).clamp_min(torch.finfo(q.dtype).tiny)
        q /= q.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    return q


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, momentum: float) -> None:
    """center <- momentum * center + (1 - momentum) * mean of the raw teacher outputs of all processes (eq. 4), in
    place.

    Call it after the loss of the step, which uses the center of the step before. teacher: [2n, K].
    """
    mean = all_reduce(teacher.to(center.dtype).sum(0)) / (len(teacher) * world_size())
    center.lerp_(mean, 1 - momentum)


def teacher_temperature(epoch: int, *, start: float, final: float, warmup_epochs: int) -> float:
    """Linear from `start` in epoch 0 to `final` in epoch warmup_epochs - 1 (numpy.linspace), then constant.

    A function of the epoch, not of the step.
    """
    if epoch >= warmup_epochs:
        return final
    return start + (final - start) * epoch / max(warmup_epochs - 1, 1)
