"""Speed of the views alone, against the same recipe per sample in PIL. By hand: `python -m benchmarks.views`.

Prints images/s (source images, two views each) of SimCLR's recipe at 32 px without blur and at 224 px with blur:

    pil        torchvision on PIL images, sample by sample, in a DataLoader with as many workers as threads
    eager      common.views.recipe.ViewRecipe on a resident uint8 batch, drawing the random numbers included
    compiled   the same with compile=True
    stream     crop_one in as many threads, then finish (224 px only; decoding is not part of it)

All take turns within one process, medians over the rounds, so that other load on the machine affects them equally.
Goals on two threads at 32 px: at least 8 times PIL eager and 15 times compiled. With `--device cuda` eager and compiled
run on the GPU. A ViewRecipe raises malloc's thresholds itself; MALLOC_MMAP_THRESHOLD_=1000000000 in the environment
changes only batches above 30 MB.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.arguments import check
from common.cli import run_cli
from common.rng import generator
from common.views.recipe import ViewRecipe
from common.views.spec import View

TURN = 6  # batches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def simclr(size: int) -> View:
    """CIFAR: strength 0.5, no blur; ImageNet: strength 1 and blur (SimCLR, appendices A and B.9)."""
    s, blur = (0.5, 0.0) if size < 96 else (1.0, 0.5)
    return View(
        size,
        color_jitter_prob=0.8,
        brightness=0.8 * s,
        contrast=0.8 * s,
        saturation=0.8 * s,
        hue=0.2 * s,
        grayscale=0.2,
        blur=blur,
        mean=MEAN,
        std=STD,
    )


class PilViews(Dataset):
    """Two views per item by torchvision on PIL images held in memory: the loop most code bases run."""

    def __init__(self, images: Tensor, view: View, length: int):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
        self.length = length
        jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps = [
            transforms.RandomResizedCrop(view.size, view.scale, view.ratio),
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomApply([jitter], view.color_jitter_prob),
            transforms.RandomGrayscale(view.grayscale),
        ]
        if view.blur:
            blur = transforms.GaussianBlur(view.blur_kernel, view.blur_sigma)
            steps.append(transforms.RandomApply([blur], view.blur))
        self.views = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(view.mean, view.std)])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images[i % len(self.images)]
        return self.views(image), self.views(image)


def worker_setup(_: int) -> None:
    torch.set_num_threads(1)


def batch_makers(size: int, batch: int, threads: int, device: str) -> dict[str, Callable[[int], None]]:
    """Name -> function that makes the views of TURN batches."""
    side = size if size < 96 else round(size * 8 / 7)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator("benchmark"))
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    view = simclr(size)
    # one turn is one epoch of persistent workers, so that nothing is prefetched while others have their turn
    loader = DataLoader(
        PilViews(images, view, TURN * batch),
        batch,
        num_workers=threads,
        persistent_workers=True,
        worker_init_fn=worker_setup,
    )

    def pil(turn: int) -> None:
        for _ in loader:
            pass

    resident = images.to(device)

    def make(recipe: ViewRecipe) -> Callable[[int], None]:
        def turn(i: int) -> None:
            for k in range(TURN):
                recipe(resident, recipe.sample(batch, generator("views", i, k)))
            if device != "cpu":
                torch.cuda.synchronize()

        return turn

    makers = {"pil": pil}
    makers |= {name: make(ViewRecipe([view, view], compile=name == "compiled")) for name in ("eager", "compiled")}
    if size >= 96:
        recipe, pool = ViewRecipe([view, view]), ThreadPoolExecutor(threads)

        def stream(i: int) -> None:
            for k in range(TURN):
                params = recipe.sample(batch, generator("views", i, k))
                crops = list(pool.map(recipe.crop_one, images, [params] * batch, range(batch)))
                recipe.finish([torch.stack(x).to(device) for x in zip(*crops, strict=True)], params)
            if device != "cpu":
                torch.cuda.synchronize()

        makers["stream"] = stream
    return makers


def measure(makers: dict[str, Callable[[int], None]], batch: int, rounds: int) -> dict[str, float]:
    """Images per second, the median over the rounds."""
    seconds = {name: [] for name in makers}
    for i in range(rounds + 1):
        for name, turn in makers.items():
            start = time.perf_counter()
            turn(i)
            if i > 0:  # the first round starts workers and compiles
                seconds[name].append(time.perf_counter() - start)
    return {name: TURN * batch / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=[], help="leave these out, e.g. compiled")
    options = parser.parse_args()
    check(options)
    for size in options.sizes:
        batch = 256 if size < 96 else 16
        if options.device != "cpu":
            batch = 4096 if size < 96 else 512
        for threads in options.threads:
            torch.set_num_threads(threads)
            makers = batch_makers(size, batch, threads, options.device)
            makers = {name: make for name, make in makers.items() if name not in options.skip}
            rates = measure(makers, batch, options.rounds)
            print(f"\n{size} px, batch {batch}, {threads} threads, {options.device}")
            for name, rate in rates.items():
                print(f"  {name:9} {rate:9.0f} images/s" + f"  {rate / rates['pil']:6.1f} x PIL" * ("pil" in rates))


if __name__ == "__main__":
    run_cli(main)
