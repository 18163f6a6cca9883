"""A section of the report: test images, what the context encoder sees of them, and the blocks to predict (Figure 4)."""

import torch
from torch import Tensor

from common.html import image_tag

from .masking import BlockMasks

GRAY = 128  # value of hidden patches


def shown(image: Tensor, ids: Tensor, masks: BlockMasks) -> Tensor:
    """The image uint8 [3, S, S] with all patches gray but `ids`."""
    visible = torch.zeros(masks.rows * masks.columns, dtype=torch.bool).index_fill(0, ids, True)
    patch = image.shape[1] // masks.rows
    visible = visible.view(masks.rows, masks.columns).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return torch.where(visible, image, torch.tensor(GRAY, dtype=torch.uint8))


def mask_section(store, size: int, masks: BlockMasks, seed: int, count: int = 6) -> list[tuple[str, str]]:
    """(title, HTML). Masks are sampled per image, as if it came from another step, so block sizes differ too."""
    images = store.eval_images(0, min(count, len(store)), size).cpu()
    rows = []
    for i, image in enumerate(images):
        context, targets = masks.draw(1, seed, f"report-{i}")
        tags = [image_tag(image, f"image {i + 1}, original", width=76, css="original")]
        tags.append(image_tag(shown(image, context[0], masks), f"image {i + 1}, context", width=76))
        for m, block in enumerate(targets[0]):
            tags.append(image_tag(shown(image, block, masks), f"image {i + 1}, target block {m + 1}", width=76))
        rows.append(f'<div class="sample">{"".join(tags)}</div>')
    text = (
        f"Test images, framed; what the context encoder sees; the {masks.blocks} target blocks. Targets are shown as "
        "pixels, but the prediction is of the target encoder's features of these patches, computed from the full image."
    )
    return [("Context and targets", f'<p class="muted">{text}</p><div class="samples">{"".join(rows)}</div>')]
