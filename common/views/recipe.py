"""Random views of a batch of images, made on the images' device, with random numbers per sample.

A `View` describes one view, a `ViewRecipe` all views of a method. Its work has two separate halves:

    params = recipe.sample(n, generator)    every random number for n samples, on the CPU, whatever the image size
    views = recipe(images, params)          pixels only: no randomness, so a process's slice of params gives its slice
                                            of the views, and a test can replay each sample through another library

Order of the operations: crop and resize, flip, color jitter, grayscale, blur, solarize, further operations, normalize.
Pixels are float32 in [0, 1] from the crop on and are never rounded to 8 bits again. README.md in this directory lists
how exact and how fast this is, and where libraries differ.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import UserError
from common.transfer import to_device
from common.views import sampling
from common.views.crop import crop_boxes, crop_by_interpolate, reflect_borders
from common.views.fixed_shape import FixedShape
from common.views.grouped import Grouped
from common.views.pixel_params import pixel_rows
from common.views.sampling import Columns, ViewParams
from common.views.spec import View
from common.views.stack import stack_views


class ViewRecipe:
    """All views of one training step.

    views    one View each; views of one size and interpolation are made in one batch
    shared   random numbers that all views of a sample have in common, those of the first view: "flip", or any other
             name of `Columns`
    compile  torch.compile the color operations (on accelerators everything): some seconds at the first call, and on
             accelerators again for another batch or image size

    `_form` ("cpu", "accelerator") and `_crop` ("rows", "native") override the choice by device and image size, so that
    tests reach every path on a CPU.

    Raises UserError without a view or for an unknown name in `shared`.
    """

    def __init__(
        self,
        views: Sequence[View],
        compile: bool = False,
        *,
        shared: Sequence[str] = (),
        _form: str | None = None,
        _crop: str | None = None,
    ):
        if not views:
            raise UserError("ViewRecipe: needs at least one View.")
        self.views, self.shared = tuple(views), tuple(shared)
        if unknown := set(self.shared) - set(Columns._fields):
            raise UserError(
                f"ViewRecipe: {', '.join(sorted(unknown))} cannot be shared: choose from {', '.join(Columns._fields)}."
            )
        self._border = max(view.translate for view in self.views)
        self._stacks = stack_views(self.views)
        self._override, self._grouped, self._fixed_shape = _form, Grouped(compile, _crop), FixedShape(compile)

    def describe(self) -> str:
        """One line per view, in plain words; equal neighbors share a line."""
        lines = []
        for view, same in itertools.groupby(self.views):
            count = len(list(same))
            lines.append(f"{count} view{'s' if count > 1 else ''}: {view.describe()}")
        if self.shared:
            lines.append(f"the same for all views of an image: {', '.join(self.shared)}")
        return "\n".join(lines)

    def sample(self, n: int, generator: torch.Generator) -> ViewParams:
        """All random numbers for n samples, on the CPU. Draw for the global batch, then slice the process's part."""
        return sampling.sample(n, self.views, generator, self.shared)

    @torch.no_grad()
    def __call__(self, images: Tensor, params: ViewParams) -> list[Tensor]:
        """Views of uint8 images [n, 3, H, W]: one float32 [n, 3, s, s] each, contiguous, on the images' device.

        params: the numbers of these n samples, on any device. Raises ValueError when shapes or types do not fit, and
        UserError when the images are too small for the translations.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(params):
            raise ValueError(
                f"needs uint8 images [{len(params)}, 3, H, W] for {len(params)} samples' parameters, "
                f"not {images.dtype} {list(images.shape)}"
            )
        height, width = images.shape[2:]
        rows = to_device(pixel_rows(params, self.views, height, width, self._border), images.device)
        images = reflect_borders(images, self._border)
        form = self._form(images)
        views: dict[int, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            for stack in self._stacks:
                # no indexing by a list: it would copy the list to the device and wait
                made = form.from_images(stack, images, torch.stack([rows[:, i] for i in stack.views]))
                views |= dict(zip(stack.views, made.unbind(0), strict=True))
        return [views[i] for i in range(len(self.views))]

    @torch.no_grad()
    def crop_one(self, image: Tensor, params: ViewParams, i: int) -> list[Tensor]:
        """Worker path: crop, resize and flip sample i's image uint8 [3, H, W] to uint8 [3, s, s] for each view."""
        sample = params[i : i + 1]
        boxes = crop_boxes(sample, self.views, *image.shape[1:])[0].long()
        boxes[:, :2] += self._border
        image = reflect_borders(image, self._border)
        return [
            crop_by_interpolate(image, box, flip > 0, view.size, view.interpolation == "bicubic").contiguous()
            for view, box, flip in zip(self.views, boxes.tolist(), sample.columns.flip[0].tolist(), strict=True)
        ]

    @torch.no_grad()
    def finish(self, crops: list[Tensor], params: ViewParams) -> list[Tensor]:
        """The remaining operations on batches of crop_one's crops: uint8 [n, 3, s, s] per view, on the device, to
        float32."""
        device = crops[0].device
        rows = to_device(pixel_rows(params, self.views, 1, 1), device)  # the boxes are not used
        form = self._form(crops[0])
        views: dict[int, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            for stack in self._stacks:
                made = form.from_crops(
                    stack, torch.cat([crops[i] for i in stack.views]), torch.cat([rows[:, i] for i in stack.views])
                )
                views |= dict(zip(stack.views, made.chunk(len(stack.views)), strict=True))
        return [views[i] for i in range(len(self.views))]

    def _form(self, x: Tensor) -> Grouped | FixedShape:
        return self._grouped if (self._override or x.device.type) == "cpu" else self._fixed_shape
