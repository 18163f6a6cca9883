"""Views of one size, interpolation and further operations, which are made in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from common.views.spec import Augmentation, View


class Operations(NamedTuple):
    """The operations that any view of a stack uses, in their order (hue comes between the steps)."""

    jitter_steps: bool
    hue: bool
    grayscale: bool
    blur: bool
    solarize: bool
    extra: tuple[Augmentation, ...]
    normalize: bool

    def apply_extra(self, x: Tensor, uniform: Tensor) -> Tensor:
        """x [n, 3, s, s] after the further operations, with their columns uniform [n, E]."""
        start = 0
        for augmentation in self.extra:
            x = augmentation(x, uniform[:, start : start + augmentation.columns])
            start += augmentation.columns
        return x


@dataclass(frozen=True)
class ViewStack:
    views: tuple[int, ...]  # their numbers in the recipe
    size: int
    cubic: bool
    blur_radius: int
    operations: Operations


def stack_views(views: Sequence[View]) -> list[ViewStack]:
    members: dict[tuple[int, str, int, tuple[Augmentation, ...]], list[int]] = {}
    for i, view in enumerate(views):
        members.setdefault((view.size, view.interpolation, view.blur_kernel, view.extra), []).append(i)
    stacks = []
    for (size, interpolation, blur_kernel, extra), numbers in members.items():
        stack = [views[i] for i in numbers]
        jittered = [view for view in stack if view.color_jitter_prob > 0]
        operations = Operations(
            jitter_steps=any(view.brightness + view.contrast + view.saturation > 0 for view in jittered),
            hue=any(view.hue > 0 for view in jittered),
            grayscale=any(view.grayscale > 0 for view in stack),
            blur=any(view.blur > 0 for view in stack),
            solarize=any(view.solarize > 0 for view in stack),
            extra=extra,
            normalize=any(view.normalizes for view in stack),
        )
        stacks.append(ViewStack(tuple(numbers), size, interpolation == "bicubic", blur_kernel // 2, operations))
    return stacks
