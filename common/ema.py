"""Exponential moving average of parameters: the target network of BYOL, the teacher of DINO."""

import copy

import torch
from torch import Tensor, nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy in train mode: BatchNorm uses batch statistics and keeps separate running buffers.

    Make it before DistributedDataParallel wraps the student, and after converting norms, so that every process holds
    the same copy.
    """
    teacher = copy.deepcopy(student).train()
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters only: buffers are never averaged.

    Call it after the optimizer's step, once per step, with the schedule's momentum of that step. One fused pass over
    all parameters (lerp), without a loop in Python.
    """
    targets: list[Tensor] = list(teacher.parameters())
    sources = [p.detach() for p in student.parameters()]
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)
