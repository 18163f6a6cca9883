"""Large batches in little memory: gradient caching (not exact with BatchNorm) and activation checkpointing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError


class _Norm(Protocol):
    """A norm with running statistics: torch's, timm's and `common.distributed.SyncBatchNorm` share no class."""

    track_running_stats: bool


@contextmanager
def running_statistics_off(module: nn.Module) -> Iterator[None]:
    """Inside, norms in train mode use batch statistics without moving their running buffers or counters."""
    norms = [cast(_Norm, m) for m in module.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def running_statistics_restored(module: nn.Module) -> Iterator[None]:
    """Inside, running buffers move; afterwards they are as before. Unlike `running_statistics_off` the same operations
    save the same tensors, which a recomputation must."""
    before = [
        (b, b.clone()) for m in module.modules() if getattr(m, "track_running_stats", False) for b in m.buffers(False)
    ]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # .data: autograd holds the buffer, whose value it does not use


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a norm in train mode mixes the rows of a batch, so that splitting the batch changes the gradient."""
    return any(getattr(m, "track_running_stats", False) and m.training for m in module.modules())


def grad_cache_backward(
    model: nn.Module,
    views: Sequence[Tensor],
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    micro_batch: int,
    *,
    backward: Callable[[Tensor], None],
    no_sync: Callable[[nn.Module], AbstractContextManager] = lambda model: nullcontext(),
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate in `model` the gradient of a loss over the whole batch, with the activations of one micro-batch.

    views: [n, ...] each, of the same n images; a micro-batch is `micro_batch` images in all their views, concatenated,
    and model(micro-batch) -> [rows, D]. loss_of(z1, z2, ...) -> (scalar loss, metrics), of each view's outputs [n, D].
    The outputs are computed without graph, the loss gives their gradients, and each micro-batch runs again with its own
    gradient (GradCache, Gao et al. 2021). Cost: one more forward pass. Without batch statistics
    (`uses_batch_statistics`) the gradient is the whole batch's. BatchNorm takes its statistics per micro-batch, as B/M
    processes without SyncBN would; its running buffers are updated in the second pass only. `no_sync`: skips
    DDP's reduction except for the last one. Returns the loss and the metrics.
    """
    inputs = [torch.cat(parts) for parts in zip(*(view.split(micro_batch) for view in views), strict=True)]
    with torch.no_grad(), running_statistics_off(model):
        outputs = []
        for i, x in enumerate(inputs):
            torch.manual_seed(seed + i)  # an nn.Dropout of the network must draw the same mask in both passes
            outputs.append(model(x))
    leaves = [z.detach().requires_grad_() for z in outputs]
    by_view = zip(*(z.chunk(len(views)) for z in leaves), strict=True)
    loss, metrics = loss_of(*(torch.cat(parts) for parts in by_view))
    gradients = torch.autograd.grad(loss, leaves)
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        with nullcontext() if i == len(inputs) - 1 else no_sync(model):
            torch.manual_seed(seed + i)
            backward((model(x) * gradient).sum())
    return loss.detach(), metrics


def checkpoint_blocks(backbone: Any) -> None:
    """Recompute each residual or transformer block in the backward pass instead of keeping its activations.

    The batch is not split, so BatchNorm uses its full statistics and the gradient is unchanged; running statistics are
    updated in the first pass only. Cost: about one more forward pass. Networks whose blocks have other names than a
    ResNet's and a ViT's are cut into parts as timm cuts them. Raises UserError where timm cannot either.
    """
    stages = [getattr(backbone, f"layer{i}", ()) for i in range(1, 5)]
    blocks = [block for stage in stages for block in stage] or list(getattr(backbone, "blocks", ()))
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(_checkpointed, block.forward, contexts)
    if blocks:
        return
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # timm asserts
        raise UserError(
            f"{type(backbone).__name__} cannot recompute its blocks: leave --activation-checkpointing out"
        ) from None
    for norm in backbone.modules():
        if getattr(norm, "track_running_stats", False):
            norm.forward = partial(_counted_once, norm, norm.forward)


def _counted_once(norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A norm's forward pass, whose running statistics stay as they are where the backward pass recomputes it."""
    recomputes = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks
    with running_statistics_restored(norm) if recomputes else nullcontext():
        return forward(x)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), running_statistics_restored(block)


def _checkpointed(forward: Callable, contexts: Callable, *args: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)
