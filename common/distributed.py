"""Gather, reduce and batch statistics over processes, with gradients.

Convention: each process computes the mean loss of *its* rows against the rows gathered from all processes, and
DistributedDataParallel averages the gradients. This equals one process with the global batch exactly if the gather's
backward pass sums over processes and then takes the local slice, as it does here. (`accelerator.gather` drops
gradients; `torch.distributed.nn.functional` is deprecated.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import batch_norm

from common.errors import UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# Their names from torch 2.14 on, where the older ones warn.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gathered(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    _all_gather_into(out, x.contiguous())
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        _reduce_scatter_into(own, grad.contiguous())
        return own


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def all_gather(x: Tensor) -> Tensor:
    """[n, ...] on each of W processes -> [W * n, ...] in rank order; gradients are summed over processes, then sliced.

    n must be equal on all processes.
    """
    return _AllGather.apply(x) if world_size() > 1 else x


def all_reduce(x: Tensor) -> Tensor:
    """Sum over processes, any shape; the backward pass also sums the gradients over processes."""
    return _AllReduceSum.apply(x) if world_size() > 1 else x


@contextmanager
def buffers_of_the_first(module: nn.Module) -> Iterator[None]:
    """Inside, every process's `module` has the buffers of the first process's; afterwards its own again.

    They differ where BatchNorm keeps statistics per process. Waits for all processes.
    """
    if world_size() == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for buffer, value in own:
        shared = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(shared, 0)
        buffer.copy_(shared)
    try:
        yield
    finally:
        for buffer, value in own:
            buffer.copy_(value)


class _PlainKernels:
    """torch's kernels of SyncBatchNorm, which are for GPUs only, in plain torch: the same arguments and results."""

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(_wide(x), _all_but_channels(x), correction=0)
        return mean, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        _: Tensor,
        means: Tensor,
        invstds: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        mean = means.mean(0)  # counts are equal
        var = (invstds.pow(-2) - eps + (means - mean).square()).mean(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (counts.sum() / (counts.sum() - 1))).to(running_var.dtype), momentum)
        return mean, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
    ) -> Tensor:
        y = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd if weight is None else invstd * weight, x)
        return (y if bias is None else y + _per_channel(bias, x)).to(x.dtype)

    @staticmethod
    def batch_norm_backward_reduce(
        grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *needed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad, dims = _wide(grad), _all_but_channels(x)
        sum_dy, sum_dy_xmu = grad.sum(dims), (grad * (_wide(x) - _per_channel(mean, x))).sum(dims)
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy

    @staticmethod
    def batch_norm_backward_elemt(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        sum_dy: Tensor,
        sum_dy_xmu: Tensor,
        counts: Tensor,
    ) -> Tensor:
        rows = counts.sum()
        centered = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd.square() * sum_dy_xmu / rows, x)
        scale = _per_channel(invstd if weight is None else invstd * weight, x)
        return ((_wide(grad) - _per_channel(sum_dy / rows, x) - centered) * scale).to(x.dtype)


class _BatchNorm(torch.autograd.Function):
    """Normalize by the statistics of all processes; statistics and sums in float32 where x is narrower."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = _dense(x)
        kernels: Any = torch if x.is_cuda else _PlainKernels
        means, invstds = _gathered(torch.stack(kernels.batch_norm_stats(x, eps))).unflatten(0, (-1, 2)).unbind(1)
        counts = means.new_full((len(means),), x.numel() // x.shape[1])
        mean, invstd = kernels.batch_norm_gather_stats_with_counts(
            means, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd)
        return kernels.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        grad = _dense(grad)
        kernels: Any = torch if x.is_cuda else _PlainKernels
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = kernels.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, needs_x, needs_weight, needs_bias
        )
        grad_x = None
        if needs_x:
            sums = torch.stack([sum_dy, sum_dy_xmu])
            dist.all_reduce(sums)
            counts = torch.full((world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
            grad_x = kernels.batch_norm_backward_elemt(grad, x, mean, invstd, weight, sums[0], sums[1], counts)
        return grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, *[None] * 4


def _dense(x: Tensor) -> Tensor:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.ndim - 2))


class SyncBatchNorm(nn.Module):
    """BatchNorm over all processes, which must hold equally many rows, on any device.

    Input [N, C] or [N, C, H, W]. Statistics, running buffers and state_dict keys are those of the BatchNorm it
    replaces (`act` and `drop` of timm's BatchNormAct2d are kept). torch's own SyncBatchNorm computes the same with the
    same kernels, but asks the GPU in every layer which processes hold rows: the host waits three times, and a compiled
    graph breaks there.
    """

    running_mean: Tensor  # these three are None where the BatchNorm tracks no statistics
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        self.track_running_stats = norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.drop, self.act = getattr(norm, "drop", None), getattr(norm, "act", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self._normalized(x)
        x = x if self.drop is None else self.drop(x)
        return x if self.act is None else self.act(x)

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            own = self.running_mean is None  # as nn.BatchNorm2d
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own, 0.0, self.eps)
        if not self.track_running_stats:
            return _BatchNorm.apply(x, self.weight, self.bias, None, None, 0.0, self.eps)
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return _BatchNorm.apply(x, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps)


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm computing its statistics over all processes; unchanged with one process.

    Call before `accelerator.prepare`. (torch's own conversion loses the activation of timm's BatchNormAct2d.)
    """
    return module if world_size() == 1 else replace_batchnorm(module, SyncBatchNorm)


def replace_batchnorm(module: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    """`module` with `make(norm)` in the place of every BatchNorm, in the mode of the one before."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | BatchNormAct2d):
        return make(module).train(module.training)
    for name, child in module.named_children():
        setattr(module, name, replace_batchnorm(child, make))
    return module


def per_rank(batch_size: int, ranks: int) -> int:
    """Images per process of a global batch. Raises UserError if the batch does not divide evenly."""
    if batch_size % ranks:
        lower, upper = batch_size // ranks * ranks, -(-batch_size // ranks) * ranks
        raise UserError(
            f"--batch-size is the global batch: {batch_size} images do not divide among {ranks} processes. "
            f"Use {upper}{f' or {lower}' if lower else ''}."
        )
    return batch_size // ranks
