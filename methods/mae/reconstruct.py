"""Reconstructions of partly masked images: a section of the report (paper Figures 2 to 4)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import encode_png, read_image

from common.backbones import BackboneSpec
from common.files import write_atomic
from common.html import image_tag, table
from common.rng import generator
from eval.features import normalizer

from .loss import make_targets, masked_error, patch_statistics, patchify, unpatchify, visible_mean_error
from .masking import Masking, keep_count, mask_noise
from .model import MAE

GRAY = 0.5  # value of removed patches


@torch.no_grad()
def reconstruct(model: MAE, images: Tensor, noise: Tensor, keep: int, norm_pix: bool) -> tuple[Tensor, Tensor]:
    """(mask [N, L], images [N, 3, H, W] whose removed patches are predicted and whose visible ones are their own).

    images: normalized, as the network gets them, and so is the result. A network trained on normalized patches does
    not predict a patch's mean and contrast: predictions get those of the true patch.
    """
    predictions, mask, _ = model(images, noise, keep)
    patches = patchify(images, model.patch)
    if norm_pix:
        mean, std = patch_statistics(patches)
        predictions = predictions * std + mean
    rows = images.shape[2] // model.patch
    return mask, unpatchify(torch.where(mask[..., None], predictions.to(patches.dtype), patches), model.patch, rows)


@dataclass
class Gallery:
    """The same test images under the same masks throughout training: PNG strips on the way, the report's section at the
    end. Masks depend on `seed` alone, and so the files of a resumed run are those of one never interrupted."""

    directory: Path
    store: object
    spec: BackboneSpec
    masking: Masking
    window: int
    mask_ratio: float
    norm_pix: bool
    seed: int
    device: torch.device
    count: int = 8

    def __post_init__(self):
        self.count = min(self.count, len(self.store))
        images = self.store.eval_images(0, self.count, self.spec.image_size)
        self.images = normalizer(self.spec.mean, self.spec.std, self.device)(images)

    def _noise(self, model: MAE, count: int) -> Tensor:
        grid, stream = model.backbone.patch_embed.grid_size, generator(self.seed, "report-mask")
        return mask_noise(self.masking, count, *grid, stream, self.window).to(self.device)

    def _pictures(self, model: MAE, ratio: float) -> tuple[Tensor, Tensor]:
        """uint8 [count, 3, S, S]: what the network sees, and its reconstructions."""
        p, noise = model.patch, self._noise(model, self.count)
        mask, images = reconstruct(model, self.images, noise, keep_count(noise.shape[1], ratio), self.norm_pix)
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.spec.mean, self.spec.std))
        seen = patchify(self.images * std + mean, p).masked_fill(mask[..., None], GRAY)
        both = (unpatchify(seen, p, images.shape[2] // p), images * std + mean)
        return tuple((255 * x.clamp(0, 1)).round().to(torch.uint8).cpu() for x in both)

    def snapshot(self, model: MAE, step: int) -> None:
        """Write the reconstructions after `step` updates side by side into reconstructions/step-NNNNNNNN.png."""
        strip = torch.cat(list(self._pictures(model, self.mask_ratio)[1]), dim=2)  # [3, S, count * S]
        write_atomic(self.directory / f"step-{step:08d}.png", encode_png(strip).numpy().tobytes())

    def _snapshots(self) -> dict[int, list[Tensor]]:
        size = self.spec.image_size
        strips = {
            int(path.stem.removeprefix("step-")): read_image(str(path))
            for path in sorted(self.directory.glob("step-*.png"))
        }
        return {step: list(strip.split(size, dim=2)) for step, strip in strips.items()}

    @torch.no_grad()
    def errors(self, model: MAE, ratio: float, limit: int = 1000, batch: int = 250) -> tuple[float, float]:
        """(masked-patch error, that of each image's visible mean) on up to `limit` test images."""
        count = min(limit, len(self.store))
        noise, sums = self._noise(model, count), torch.zeros(2, dtype=torch.float64)
        keep = keep_count(noise.shape[1], ratio)
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            images = self.store.eval_images(start, stop, self.spec.image_size)
            images = normalizer(self.spec.mean, self.spec.std, self.device)(images)
            predictions, mask, _ = model(images, noise[start:stop], keep)
            targets = make_targets(images, model.patch, self.norm_pix)
            pair = masked_error(predictions, targets, mask), visible_mean_error(targets, mask)
            sums += torch.stack(pair).double().cpu() * (stop - start)
        return tuple((sums / count).tolist())

    def sections(self, model: MAE, ratios: tuple[float, ...]) -> list[tuple[str, str]]:
        """(title, HTML) of the report: a grid of mask ratios, their errors on test images, and the way there."""
        made = {ratio: self._pictures(model, ratio) for ratio in ratios}
        originals = self.store.eval_images(0, self.count, self.spec.image_size).cpu()
        rows = []
        for i, original in enumerate(originals):
            tags = [image_tag(original, f"image {i + 1}, original", width=76, css="original")]
            for ratio, (seen, guessed) in made.items():
                name = f"image {i + 1}, {100 * ratio:g} % removed"
                tags.append(image_tag(seen[i], name, width=76))
                tags.append(image_tag(guessed[i], f"{name}, reconstructed", width=76))
            rows.append(f'<div class="sample">{"".join(tags)}</div>')
        shares = ", ".join(f"{100 * ratio:g} %" for ratio in ratios)
        text = (
            f"Test images, framed; then, for {shares} of the patches removed ({self.masking} masks), what the encoder "
            "sees and the reconstruction of the gray patches. Trained at "
            f"{100 * self.mask_ratio:g} %. Visible patches are shown unchanged: they get no loss."
        )
        if self.norm_pix:
            text += (
                " Trained on normalized patches, so each predicted patch is shown with the mean and the contrast of "
                "the true one, which the network does not predict."
            )
        errors = {ratio: self.errors(model, ratio) for ratio in ratios}
        cells = [(f"{100 * r:g} %", f"{a:.4g}", f"{b:.4g}", f"{a / b:.2f}") for r, (a, b) in errors.items()]
        head = ("removed", "masked-patch error", "error of each image's visible mean", "share")
        caption = "Mean squared error per number of the target on removed patches, up to 1,000 test images."
        body = f'<p class="muted">{text}</p><div class="samples">{"".join(rows)}</div>'
        body += table(head, cells, caption=caption, numeric=(1, 2, 3))
        return [("Reconstructions", body), *self._progress(originals)]

    def _progress(self, originals: Tensor) -> list[tuple[str, str]]:
        shots = self._snapshots()
        if not shots:
            return []
        rows = []
        for i, original in enumerate(originals):
            tags = [image_tag(original, f"image {i + 1}, original", width=76, css="original")]
            tags += [image_tag(shot[i], f"image {i + 1}, step {s}", width=76) for s, shot in shots.items()]
            rows.append(f'<div class="sample">{"".join(tags)}</div>')
        steps = ", ".join(str(step) for step in shots)
        text = f"The same images and masks ({100 * self.mask_ratio:g} % removed) after {steps} steps, left to right."
        html = f'<p class="muted">{text}</p><div class="samples">{"".join(rows)}</div>'
        return [("Reconstructions over training", html)]


def snapshot_steps(total: int) -> set[int]:
    """Updates after which a snapshot is taken: none, and a 64th, a 16th, a quarter of all (the end is taken apart)."""
    return {0, *(total // share for share in (64, 16, 4))}
