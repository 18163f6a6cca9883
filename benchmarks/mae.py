"""MAE's full step against the bare cost of its tokens: encoder blocks on the visible, decoder blocks on all of them.

    python -m benchmarks.mae                                           # quickstart's network on the CPU or the GPU
    python -m benchmarks.mae --preset imagenet-vitb --batch-size 256   # on a GPU

bare: forward and backward of all blocks, norms and projections on ready-made tokens, and AdamW; no image, no patches,
no mask, no target. step: views, noise, patches, masks, loss, reference and the same update. Both in
one process, in turns.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch
import tyro

from benchmarks.arguments import check
from common.cli import run_cli
from common.data import ViewLoader, mean_std, open_data
from common.optim import decay_groups
from common.rng import generator
from methods import preset_of
from methods.mae.augment import one_view
from methods.mae.loss import make_targets, masked_error, visible_mean_error
from methods.mae.masking import keep_count, mask_noise
from methods.mae.train import build


@dataclass
class Arguments:
    preset: str = "quickstart"
    """Preset of MAE: its network, image size and masks. The images are shapes."""
    batch_size: int = 0
    """Images; 0: the preset's."""
    rounds: int = 12
    """Timed steps of each kind after two to warm up."""
    threads: int = 2
    """Intra-op threads on a CPU."""
    compile: bool = False
    """torch.compile for the network (only the complete step; the bare one stays eager)."""


def main(args: Arguments) -> None:
    check(args, {"batch_size": 0})
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = preset_of("mae", args.preset)
    batch = args.batch_size or cfg.batch_size
    mean, std = mean_std(cfg.normalize)
    model = build(cfg, mean, std)[0].to(device)
    vit, decoder = model.backbone, model.decoder
    grid, patches = vit.patch_embed.grid_size, vit.patch_embed.num_patches
    keep = keep_count(patches, cfg.mask_ratio)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), lr=1e-6, betas=cfg.betas)
    data = open_data("shapes", "train", limit=max(4 * batch, 256), image_size=cfg.image_size, device=device, workers=2)
    recipe = one_view(
        cfg.image_size, crop_scale=cfg.crop_scale, flip=cfg.flip, interpolation=cfg.interpolation, mean=mean, std=std
    )
    loader = ViewLoader(data, recipe, batch_size=batch, seed=0, device=device)
    visible = torch.randn(batch, 1 + keep, vit.embed_dim, device=device)
    everything = torch.randn(batch, 1 + patches, decoder.mask_token.shape[-1], device=device)
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    forward = torch.compile(model) if args.compile else model

    def bare(_step: int) -> None:
        with half:
            x = decoder.embed(vit.norm(vit.blocks(visible)))
            # the decoder gets all its tokens; the encoder's are added to some, so that the gradient flows on
            y = torch.cat([x, everything[:, 1 + keep :]], 1)
            out = decoder.predict(decoder.norm(decoder.blocks(y)))
        update(out.float().square().mean())

    def step(number: int) -> None:
        (images,) = loader(number).views
        stream = generator(0, "mask", number)
        noise = mask_noise(cfg.masking, batch, *grid, stream, cfg.mask_window).to(device, non_blocking=True)
        with half:
            predictions, mask, _ = forward(images, noise, keep)
        targets = make_targets(images, model.patch, cfg.norm_pix)
        visible_mean_error(targets, mask)
        update(masked_error(predictions, targets, mask))

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {"bare": [], "step": []}
    for number in range(args.rounds + 2):
        for name, work in (("bare", bare), ("step", step)):
            start = time.perf_counter()
            work(number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    rate = {name: batch / median(times) for name, times in seconds.items()}
    print(f"{args.preset}, batch {batch}, {keep} of {patches} patches visible, {device}, {args.threads} threads")
    for name, value in rate.items():
        print(f"  {name}  {value:8.0f} images/s")
    print(f"  step / bare  {rate['step'] / rate['bare']:.2f} (goal 0.9)")


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Arguments)))
