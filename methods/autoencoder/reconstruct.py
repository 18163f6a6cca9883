"""Originals, inputs and reconstructions of test images: a section of the report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import escape

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec
from common.html import image_tag
from eval.features import normalizer

from .augment import Corruption


def levels(corruption: Corruption) -> list[tuple[str, Corruption]]:
    """(name, corruption): the one trained with among weaker and stronger ones; one where there is nothing to vary."""
    if corruption.variant == "denoising":
        values = sorted({corruption.noise * factor for factor in (0.5, 1, 2)})
        return [(f"noise {v:g}", replace(corruption, noise=v)) for v in values]
    if corruption.variant == "masked":
        allowed = [r for r in (0.25, 0.5, 0.75) if 0 < round(r * corruption.blocks) < corruption.blocks]
        ratios = sorted({*allowed, corruption.mask_ratio})
        return [(f"{100 * r:g} % removed", replace(corruption, mask_ratio=r)) for r in ratios]
    return [("as it is", corruption)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def reconstruction_section(
    model: nn.Module, corruption: Corruption, spec: BackboneSpec, store, *, seed: int, device, count: int = 8
) -> list[tuple[str, str]]:
    """(title, HTML): for the first test images the original, and for each level the input and its reconstruction."""
    images = store.eval_images(0, min(count, len(store)), spec.image_size)
    target = normalizer(spec.mean, spec.std, device)(images)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (spec.mean, spec.std))

    def shown(x: Tensor) -> Tensor:
        return ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    columns, told = [], []
    with evaluating(model):
        for name, level in levels(corruption):
            inputs, _ = level(target, level.draw(len(target), seed, "report", device))
            output, _ = model(inputs)
            error = float(((output.float() - target) * std).square().mean())
            columns.append((name, shown(inputs), shown(output)))
            told.append(f"{name}{' (as trained)' * (level == corruption)}: {error:.4f}")
    rows = []
    for i, image in enumerate(images.cpu()):
        tags = [image_tag(image, f"image {i + 1}", width=76, css="original")]
        for name, before, after in columns:
            tags += [
                image_tag(before[i], f"image {i + 1}, {name}", width=76),
                image_tag(after[i], f"image {i + 1}, reconstructed, {name}", width=76),
            ]
        rows.append(f'<div class="sample">{"".join(tags)}</div>')
    text = (
        f"Test images: the original (framed), then for each level the input and its reconstruction. Squared error of "
        f"pixels in [0, 1] on these {len(images)} images: {'; '.join(told)}."
    )
    return [("Reconstructions", f'<p class="muted">{escape(text)}</p><div class="samples">{"".join(rows)}</div>')]
