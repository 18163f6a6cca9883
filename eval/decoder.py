"""Looking into a representation: what a decoder can reconstruct of an image from its frozen features.

    python -m eval.decoder runs/simclr-quickstart runs/dim-quickstart --out decoded.png --json decoded.json
    python -m eval.decoder runs/*-cifar10 --data path/to/cifar10 --images 12 --out decoded.png

For every run a small convolutional decoder, with the same constants for all, is trained to reconstruct the training
images from the backbone's frozen features [N, D]. Then it reconstructs held-out test images: a row of the originals and
a row per run. What a row gets wrong for all images (colors, positions, texture) is not encoded in the features, or
not in a form that a small decoder can read.

The picture comes with a number: R2 = 1 - MSE / MSE of the mean training image, in pixels of [0, 1] on held-out images:
0 is no better than the mean image, 1 is exact. The same table lists the same network with random weights, raw pixels
through the same decoder (the decoder's own loss), and PCA of raw pixels with D components, the best linear code of
that width on the training images.

The decoder predicts a conditional mean: blur marks what the features do not determine, not "known to be blurred".
Samples instead of means would need a conditional diffusion model (RCDM, Bordes et al. 2021, arXiv:2112.09164). A high
R2 is no merit in itself: most methods are supposed to discard pixels.
"""

import copy
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common.backbones import BackboneSpec
from common.cli import run_cli
from common.data import open_data
from common.errors import UserError
from common.files import write_atomic
from common.rng import generator
from common.schedules import cosine_schedule
from eval.features import RawPixels, extract_features
from eval.figures import STYLE, styled
from eval.load import device_of, load, random_init, run_record
from eval.rotation import sample
from eval.setup import RANDOM, RAW

PCA_SIDE = 48  # px: beyond, the eigenvectors of all pixels take many minutes
BLUR = "The decoder predicts a conditional mean: blur marks what the features do not determine."


@dataclass(frozen=True)
class Constants:
    """The decoder and its training: our choice, the same for every method and tuned on none of them."""

    grid: int = 4
    """Side of the first feature map, the output of one linear layer."""
    channels: tuple[int, ...] = (64, 64, 32)
    """Width of that map and after each doubling but the last, which outputs the image; above 32 px the last repeats."""
    epochs: int = 16
    min_steps: int = 500
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps."""
    validation: int = 10
    """One in so many training images, at random, is left out and chooses the epoch that is kept; 0: the last one."""
    train_images: int = 10_000
    """Evenly spaced over the training set."""
    test_images: int = 2_000


# ---- the decoder -----------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Features [B, D] -> images [B, 3, size, size] in pixels of [0, 1], not clamped.

    Standardize, a linear layer to a map of 4 x 4, up-sampling by transposed convolutions (4 x 4, stride 2, so that all
    pixels get equally many terms), and the mean training image added. The last layer starts at zero: an untrained
    decoder gives the mean image, R2 = 0, and so does one whose features are the same for all images.
    """

    mean: Tensor
    scale: Tensor
    mean_image: Tensor

    def __init__(self, features: Tensor, mean_image: Tensor, constants: Constants):
        super().__init__()
        variance, mean = torch.var_mean(features, 0, correction=0)
        # The floor: dead dimensions come out as 0, and rounding of constant ones is not blown up.
        floor = 1e-6 * variance.mean() + 1e-12 * mean.square().mean() + 1e-30
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (variance + floor).rsqrt())
        self.register_buffer("mean_image", mean_image)
        size, width = mean_image.shape[-1], constants.channels[0]
        stages = max(1, math.ceil(math.log2(size / constants.grid)))
        layers: list[nn.Module] = [nn.Linear(features.shape[1], width * constants.grid**2)]
        layers += [nn.Unflatten(1, (width, constants.grid, constants.grid))]
        for stage in range(1, stages):
            after = constants.channels[min(stage, len(constants.channels) - 1)]
            layers += [nn.ConvTranspose2d(width, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
            width = after
        last = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        layers += [last]
        if constants.grid * 2**stages != size:
            layers += [nn.Upsample((size, size), mode="bilinear", align_corners=False)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features - self.mean) * self.scale) + self.mean_image


def mean_of(images: Tensor) -> Tensor:
    """The mean image [3, S, S] in pixels of [0, 1] of uint8 images [N, 3, S, S]."""
    total = sum(part.sum(0, dtype=torch.float64) for part in images.split(1024))
    return (total / (255 * len(images))).float()


def train_decoder(
    train_x: Tensor,
    train_images: Tensor,
    *,
    constants: Constants | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder that reconstructs `train_images` (uint8 [N, 3, S, S]) from the frozen features `train_x` [N, D].

    AdamW on the squared error in pixels, warm-up and cosine to zero, `epochs` or more where these are fewer than
    `min_steps` steps. A tenth of the training images, never trained on, chooses the epoch, the untrained decoder (the
    mean image) included: otherwise uninformative features would be fitted image by image and end below the mean image.
    Weights, order and that tenth depend on `seed` alone: on a CPU the result is the same to the bit.
    Raises UserError where features and images are not equally many, or there are fewer than 20 to leave some out of.
    """
    constants = constants or Constants()
    if not len(train_x) or len(train_x) != len(train_images):
        raise UserError(
            f"a decoder needs one image for every feature, but there are {len(train_x)} features and "
            f"{len(train_images)} images."
        )
    if constants.validation and len(train_x) < 2 * constants.validation:
        raise UserError(
            f"a decoder needs at least {2 * constants.validation} training images to choose its epoch on a "
            f"part of them, but there are {len(train_x)}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator(seed, "decoder"))))
        decoder = Decoder(train_x.float(), mean_of(train_images), constants).to(device)
    parts = torch.randperm(len(train_x), generator=generator(seed, "decoder split"))
    count = len(train_x) // constants.validation if constants.validation else 0
    held_out, fit = parts[:count], parts[count:]

    def validation() -> float:
        return squared_error(train_x[held_out], train_images[held_out], lambda part: decode(decoder, part))

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=constants.lr, weight_decay=constants.weight_decay)
    batch_size = min(constants.batch_size, len(fit))
    per_epoch = len(fit) // batch_size
    epochs = max(constants.epochs, math.ceil(constants.min_steps / per_epoch))
    total = epochs * per_epoch
    warmup = round(constants.warmup * total)
    best, kept = (validation(), copy.deepcopy(decoder.state_dict())) if count else (math.inf, None)
    for epoch in range(epochs):
        order = fit[torch.randperm(len(fit), generator=generator(seed, "decoder order", epoch))]
        for i in range(per_epoch):
            index = order[i * batch_size : (i + 1) * batch_size]
            target = train_images[index].to(device).float() / 255
            optimizer.param_groups[0]["lr"] = cosine_schedule(
                epoch * per_epoch + i, base=constants.lr, total=total, warmup=warmup, endpoint=True
            )
            loss = (decoder(train_x[index].to(device, torch.float32)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if count and (error := validation()) < best:
            best, kept = error, copy.deepcopy(decoder.state_dict())
    if kept is not None:
        decoder.load_state_dict(kept)
    return decoder.eval()


@torch.no_grad()
def decode(decoder: Decoder, x: Tensor, batch_size: int = 512) -> Tensor:
    """Reconstructions from features [N, D]: float32 [N, 3, S, S] on the CPU, pixels of [0, 1] but not clamped."""
    device = decoder.mean.device
    return torch.cat([decoder(part.to(device, torch.float32)).cpu() for part in x.split(batch_size)])


def squared_error(x: Tensor, images: Tensor, reconstruct: Callable[[Tensor], Tensor], batch_size: int = 512) -> float:
    """Mean over pixels of (reconstruct(x) - images / 255)^2, images uint8 [N, 3, S, S], a batch at a time."""
    total = 0.0
    for part, target in zip(x.split(batch_size), images.split(batch_size), strict=True):
        total += (reconstruct(part) - target.float() / 255).square().sum(dtype=torch.float64).item()
    return total / images.numel()


# ---- the best linear code --------------------------------------------------------------------------------------------


class PixelPCA:
    """PCA of the raw pixels of uint8 images [N, 3, S, S], in closed form and float64.

    Of all linear codes with D numbers an image, its first D components have the smallest squared error on these images.
    """

    def __init__(self, images: Tensor):
        self.mean = mean_of(images).double().flatten()
        pixels = self.mean.numel()
        if len(images) < pixels:  # the same vectors from the smaller of the two Gram matrices
            x = self._centered(images)
            values, vectors = torch.linalg.eigh(x @ x.T)
            kept = values > 1e-10 * values[-1]
            self.components = (x.T @ vectors[:, kept] / values[kept].sqrt()).flip(1)
        else:
            gram = torch.zeros(pixels, pixels, dtype=torch.float64)
            for part in images.split(1024):
                x = self._centered(part)
                gram.addmm_(x.T, x)
            self.components = torch.linalg.eigh(gram)[1].flip(1)  # [P, up to P], the largest first

    def _centered(self, images: Tensor) -> Tensor:
        return images.flatten(1).double() / 255 - self.mean

    def reconstruct(self, images: Tensor, width: int) -> Tensor:
        """`images` from their first `width` components: float32 [N, 3, S, S]."""
        basis = self.components[:, :width]
        return (self._centered(images) @ basis @ basis.T + self.mean).float().view(images.shape)


# ---- the sheet -------------------------------------------------------------------------------------------------------


@styled
def sheet(originals: Tensor, rows: Mapping[str, Tensor], title: str = "") -> Figure:
    """Images side by side: the originals, and below them one row for each entry of `rows`, its key at its left.

    All are [n, 3, S, S]: uint8, or float in [0, 1], clamped here.
    """
    names = ["original", *rows]
    bands = [_pixels(images) for images in (originals, *rows.values())]
    count, size = len(originals), originals.shape[-1]
    if any(band.shape != bands[0].shape for band in bands):
        raise UserError(f"the rows of a sheet must be {count} images of {size} px each")
    gap = max(1, size // 16)
    pitch = size + gap
    canvas = torch.ones(len(bands) * pitch - gap, count * pitch - gap, 3)
    for r, band in enumerate(bands):
        for c, image in enumerate(band):
            canvas[r * pitch : r * pitch + size, c * pitch : c * pitch + size] = image.permute(1, 2, 0)
    cell, left = 0.62, 0.3 + 0.085 * max(len(line) for name in names for line in name.split("\n"))  # inches
    width, height, top, foot = max(5.0, left + cell * count + 0.15), cell * len(bands), 0.4 if title else 0.1, 0.3
    total = height + top + foot
    figure = Figure(figsize=(width, total))
    axes = figure.add_axes((left / width, foot / total, cell * count / width, height / total))
    axes.imshow(canvas.numpy(), interpolation="nearest", aspect="auto")
    axes.set_yticks([r * pitch + size / 2 for r in range(len(bands))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if title:
        figure.text(0.15 / width, 1 - 0.12 / total, title, fontsize=STYLE["axes.titlesize"], weight="bold", va="top")
    figure.text(0.15 / width, 0.1 / total, BLUR, fontsize=7, color="#626b73")
    return figure


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)


# ---- command line ----------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    """The runs to decode, and where to write the picture and the numbers."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, .safetensors files (each with its .json next to it) or timm model names, of one image size."""
    data: str | None = None
    """shapes, a hub name, or a path. Default: the data that all runs were trained on."""
    image_column: str | None = None
    """Column of the images, if it cannot be inferred from the features."""
    limit: int | None = None
    """Use only N images of each split. At most 10,000 training and 2,000 test images are used, evenly spaced."""
    epochs: int | None = None
    """Epochs of each decoder. Default: 16, or more where these are fewer than 500 steps."""
    images: int = 8
    """Columns of the picture: test images, evenly spaced."""
    baselines: bool = True
    """Also random weights (one more decoder per network), raw pixels (one more) and PCA of raw pixels."""
    seed: int = 0
    """Seed of the decoders and of the random weights."""
    batch_size: int = 512
    """Images per forward pass of a backbone; affects only speed and memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ... auto: the GPU if there is one."""
    out: Path | None = None
    """File for the picture, .png."""
    json: Path | None = None
    """File for the numbers."""


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog="python -m eval.decoder", description=__doc__)
    constants = _constants(args)
    device = device_of(args.device)
    names = _names(args.runs)
    loaded = [load(run) for run in args.runs]
    specs = [spec for _, spec in loaded]
    sizes = {name: f"{spec.image_size} px" for name, spec in zip(names, specs, strict=True)}
    if len(set(sizes.values())) > 1:
        raise UserError(f"these runs were trained at different sizes, so they cannot share one sheet: {_listed(sizes)}")
    size = specs[0].image_size
    spec, column = _data(args, names)

    stores = [
        open_data(spec, split=split, image_column=column, limit=args.limit, image_size=size)
        for split in ("train", "test")
    ]
    counts = (constants.train_images, constants.test_images)
    train, test = (sample(store, count)[0] for store, count in zip(stores, counts, strict=True))
    train_images, test_images = (store.eval_images(0, len(store), size).cpu() for store in (train, test))
    shown = sample(test, args.images)[1]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    mean = mean_of(train_images)
    base = squared_error(test_images, test_images, lambda _: mean)
    rows: list[dict] = []
    pictures: dict[str, Tensor] = {}

    def scored(name: str, module: nn.Module, about: BackboneSpec, of: str | None = None) -> int:
        """Train and score one decoder; returns the features' width."""
        start = time.perf_counter()
        module = module.to(device)
        x, test_x = (
            extract_features(
                module,
                store,
                image_size=size,
                mean=about.mean,
                std=about.std,
                device=device,
                batch_size=args.batch_size,
            )
            for store in (train, test)
        )
        decoder = train_decoder(x, train_images, constants=constants, seed=args.seed, device=device)
        add(name, x.shape[1], squared_error(test_x, test_images, lambda part: decode(decoder, part)), of)
        pictures[_caption(rows[-1])] = decode(decoder, test_x[shown])
        console.print(f"{name}: {x.shape[1]} features, R2 {rows[-1]['r2']:.3f}, {time.perf_counter() - start:.0f} s")
        return x.shape[1]

    def add(name: str, width: int, error: float, of: str | None = None) -> None:
        rows.append(
            {"name": name, "of": of, "features": width, "mse": error, "r2": 1 - error / base if base > 0 else None}
        )

    widths = [scored(name, backbone, about) for name, (backbone, about) in zip(names, loaded, strict=True)]
    if args.baselines:
        first = [i for i, about in enumerate(specs) if about not in specs[:i]]  # one network's serve all its runs
        for i in first:
            random = random_init(specs[i], args.seed)
            scored(RANDOM, random, specs[i], of=names[i] if len(first) > 1 else None)
        scored(RAW, RawPixels(), specs[0])
        if size <= PCA_SIDE:
            pca = PixelPCA(train_images)
            for width in sorted({min(width, pca.components.shape[1]) for width in widths}):
                error = squared_error(test_images, test_images, partial(pca.reconstruct, width=width))
                add("PCA of pixels", width, error)
                pictures[_caption(rows[-1])] = pca.reconstruct(test_images[shown], width)
        else:
            console.print(f"no PCA: {size} px have more than {3 * PCA_SIDE**2:,} numbers an image")
    console.print(_table(rows, f"{train.name}: {len(train):,} training images, R2 on {len(test):,} test images"))
    if args.out is not None:
        figure = sheet(test_images[shown], pictures, f"What a decoder gives back of held-out images of {test.name}")
        write_atomic(args.out, _png(figure))
        console.print(f"written to {args.out}")
    if args.json is not None:
        content = {
            "format": 1,
            "seed": args.seed,
            "constants": dataclasses.asdict(constants),
            "mse_of_mean": base,
            "data": {
                "name": train.name,
                "fingerprint": stores[0].fingerprint,
                "image_size": size,
                "train_images": len(train),
                "test_images": len(test),
                "shown": shown.tolist(),
            },
            "results": rows,
        }
        write_atomic(args.json, json.dumps(content, indent=1) + "\n")
        console.print(f"written to {args.json}")
    if args.out is None and args.json is None:
        console.print("not saved: --out FILE.png writes the picture, --json FILE the numbers")


def _constants(args: Arguments) -> Constants:
    """The constants with the command line's epochs; raises UserError for options that make no sense."""
    if not args.runs:
        raise UserError("no run is given: python -m eval.decoder RUN [RUN ...]")
    for name, value in (("images", args.images), ("epochs", args.epochs), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1")
    if args.out is not None and args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: the picture is a PNG, so give a name that ends in .png")
    return Constants() if args.epochs is None else Constants(epochs=args.epochs, min_steps=0)


def _names(runs: tuple[str, ...]) -> list[str]:
    """Names of the rows: the run directory's name, or that of a file; the full path if two agree."""

    def short(run: str) -> str:
        path = Path(run).resolve() if Path(run).exists() else Path(run)
        if path.suffix == ".safetensors":
            path = path.parent if path.stem == "backbone" else path.with_suffix("")
        return path.name

    twice = [run for i, run in enumerate(runs) if run in runs[:i]]
    if twice:
        raise UserError(f"{twice[0]} is given twice")
    names = [short(run) for run in runs]
    return [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _data(args: Arguments, names: list[str]) -> tuple[str, str | None]:
    """(data, image column) from the command line, otherwise those that all runs agree on."""
    if args.data is not None:
        return args.data, args.image_column
    configs = [run_record(Path(run)).get("config", {}) if Path(run).is_dir() else {} for run in args.runs]
    known = {name: config["data"] for name, config in zip(names, configs, strict=True) if config.get("data")}
    if not known:
        raise UserError("say which data to decode: --data shapes, a hub name such as cifar10, or a path")
    if len(set(known.values())) > 1:
        raise UserError(f"these runs were trained on different data: {_listed(known)}. Say with --data which to decode")
    columns = {config.get("image_column") or None for config in configs if config.get("data")}
    return next(iter(known.values())), args.image_column or (columns.pop() if len(columns) == 1 else None)


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _label(row: dict) -> str:
    if row["name"] == RANDOM and row["of"]:
        return f"{RANDOM} ({row['of']})"
    return f"PCA, {row['features']}" if row["name"].startswith("PCA") else row["name"]


def _caption(row: dict) -> str:
    return _label(row) if row["r2"] is None else f"{_label(row)}\nR2 {row['r2']:.2f}"


def _table(rows: list[dict], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for header in ("features", "MSE", "R2"):
        table.add_column(header, justify="right")
    for row in rows:
        r2 = "" if row["r2"] is None else f"{row['r2']:.3f}"
        table.add_row(_label(row), f"{row['features']:,}", f"{row['mse']:.5f}", r2)
    return table


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


if __name__ == "__main__":
    run_cli(main)
