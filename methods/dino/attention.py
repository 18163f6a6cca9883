"""Where a ViT teacher's CLS token looks: a section of the report (paper Figures 1 and 3)."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from common.html import image_tag
from common.vit import is_vit, last_attention
from eval.features import normalizer
from eval.load import load


def attention_section(directory: Path, store, count: int = 8) -> list[tuple[str, str]]:
    """(title, HTML) of the exported backbone's last attention on the first images of `store`; nothing without a ViT."""
    backbone, spec = load(directory)
    if not is_vit(spec.name):
        return []
    images = store.eval_images(0, min(count, len(store)), spec.image_size).cpu()
    maps = cls_attention(backbone, normalizer(spec.mean, spec.std, "cpu")(images))
    shown = interpolate(maps / maps.amax((2, 3), keepdim=True), size=images.shape[-2:])  # nearest: patches stay visible
    shown = (255 * shown).round().to(torch.uint8)
    rows = []
    for i, image in enumerate(images):
        tags = [image_tag(image, f"image {i + 1}", width=76, css="original")]
        tags += [
            image_tag(head[None], f"image {i + 1}, head {h}", width=76) for h, head in enumerate(shown[i], start=1)
        ]
        rows.append(f'<div class="sample">{"".join(tags)}</div>')
    text = (
        f"Attention of the teacher's CLS token to the {maps.shape[2]} x {maps.shape[3]} patches in the last block, one "
        f"map for each of its {maps.shape[1]} heads, each scaled to its own largest value."
    )
    return [("Attention", f'<p class="muted">{text}</p><div class="samples">{"".join(rows)}</div>')]


def cls_attention(backbone, images: Tensor) -> Tensor:
    """Attention of CLS to each patch in the last block, [N, heads, rows, columns], from images [N, 3, H, W]."""
    attention = last_attention(backbone, images)[:, :, 0, backbone.num_prefix_tokens :]
    patch = backbone.patch_embed.patch_size
    return attention.unflatten(2, (images.shape[2] // patch[0], images.shape[3] // patch[1]))
