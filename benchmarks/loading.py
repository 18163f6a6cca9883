"""How fast large JPEGs become views: decoding alone, and the stream of `ViewLoader`. Run manually:

    python -m benchmarks.loading [--images 500] [--seconds 4] [--threads 2]

Draws JPEGs of 500x375 (smooth random content, quality 92) into a temporary folder, then prints images/s, each image
decoded once for two SimCLR views of 224 px. The floor is what torchvision's decoder reached on one quiet core of
another machine, 840 images/s; the last column compares with the decoding alone, on as many threads, of this run.
On a busy machine use --threads 1: OpenMP threads that wait for a descheduled one spin, and "whole views" collapses.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.arguments import check
from common.cli import run_cli
from common.data import ViewLoader, decode, mean_std, open_data
from common.views.recipe import ViewRecipe
from common.views.spec import View

FLOOR = 840  # images/s, one thread, 500x375


def draw(folder: Path, count: int) -> float:
    """Write `count` JPEGs; returns their mean size in kB. Noise at four scales makes them about as large as photos."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((375, 500, 3), 128.0)
        for cells, strength in ((4, 60), (16, 30), (64, 16), (250, 8)):
            noise = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            layer = np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float64)
            pixels += (layer - 128) / 64 * strength
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        (folder / f"{i:05}.jpg").write_bytes(buffer.getvalue())
    return sum(file.stat().st_size for file in folder.iterdir()) / count / 1000


def rate(work: Callable[[], int], seconds: float) -> float:
    """Images/s of `work`, which returns how many it did, after one call to warm up."""
    work()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += work()
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    check(args, {"seconds": 0})
    mean, std = mean_std("imagenet-1k")
    colors = {
        "color_jitter_prob": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grayscale": 0.2,
    }
    recipe = ViewRecipe([View(size=224, blur=0.5, blur_kernel=23, mean=mean, std=std, **colors)] * 2)

    with tempfile.TemporaryDirectory() as name:
        size = draw(Path(name), args.images)
        print(f"{args.images} JPEGs of 500x375, {size:.0f} kB; {os.cpu_count()} cores; views on {args.device}")
        data = [file.read_bytes() for file in sorted(Path(name).iterdir())]
        print(f"{'':44}{'images/s':>10}{'/ floor':>10}{'/ decode':>10}")
        alone: dict[int, float] = {}

        def row(text: str, speed: float, threads: int) -> None:
            print(f"{text:44}{speed:10.0f}{speed / FLOOR:10.2f}{speed / alone[threads]:10.2f}", flush=True)

        for threads in (1, 2):
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                parts = [data[i::threads] for i in range(threads)]

                def decode_all(pool: ThreadPoolExecutor = pool, parts: list[list[bytes]] = parts) -> int:
                    return sum(pool.map(lambda part: sum(decode(bytearray(d)) is not None for d in part), parts))

                alone[threads] = rate(decode_all, args.seconds)
            row(f"decode only, {threads} thread{'s' * (threads > 1)}", alone[threads], threads)

        torch.set_num_threads(args.threads)
        stream = open_data(name, memory_budget=0, log=lambda line: None)
        for workers in (1, 2):
            for what in ("decode and two crops", "whole views"):
                loader = ViewLoader(
                    stream, recipe, batch_size=args.batch_size, seed=0, device=args.device, workers=workers
                )
                if what != "whole views":  # leave out what the device does, to see the workers alone
                    loader.recipe = _CropsOnly(recipe)
                step = iter(range(10**9))

                def one_step(loader: ViewLoader = loader, step=step) -> int:
                    views = loader(next(step)).views
                    views[0].flatten()[0].item()  # waits for a GPU
                    return len(views[0])

                speed = rate(one_step, args.seconds)
                loader.close()
                row(f"stream, {what}, {workers} worker{'s' * (workers > 1)}", speed, workers)


class _CropsOnly:
    """A recipe that stops after the workers' part."""

    def __init__(self, recipe: ViewRecipe) -> None:
        self.views, self.sample, self.crop_one = recipe.views, recipe.sample, recipe.crop_one

    def finish(self, crops: list[torch.Tensor], params: object) -> list[torch.Tensor]:
        return crops


if __name__ == "__main__":
    run_cli(main)
