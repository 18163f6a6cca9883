"""What each method's features keep of an image: a small decoder reconstructs it."""

from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.data import open_data
from common.html import PALETTE
from eval.decoder import Constants, PixelPCA, decode, mean_of, sheet, squared_error, train_decoder
from eval.features import extract_features
from eval.figures import GRAY, styled
from eval.linear import linear_probe
from eval.load import load, random_init
from eval.protocols import RANDOM

from .cards import Cards
from .figures import legend, points
from .study import SMALL, Run, Study, Table, directory_name

METHODS = ("simclr", "barlow", "byol", "simsiam", "swav", "dino", "amdim", "cpc", "dim", "mae", "ijepa", "autoencoder")
SHOWN = 10
FILE = "decoded.safetensors"
PCA = "PCA of pixels"  # to as many numbers as the network has features
CONSTANTS = Constants(train_images=5_000)
FACTORS = ("hue", "background_hue", "size", "x", "y", "rotation")


def measure(directory: Path, card: dict) -> list[dict]:
    """Train a decoder on the run's frozen features: R2 on test images, some of which stay in the directory.

    Seed 0 has the references too: decoder and linear probe on features of random weights, and PCA of the pixels to as
    many numbers.
    """
    backbone, spec = load(directory)
    size = spec.image_size
    train = open_data(card["config"]["data"], "train", limit=CONSTANTS.train_images, image_size=size)
    test = open_data(card["config"]["data"], "test", image_size=size)
    images, test_images = (store.eval_images(0, len(store), size) for store in (train, test))
    mean = mean_of(images)
    base = squared_error(test_images, test_images, lambda _: mean)

    def decoded(network: nn.Module) -> tuple[Tensor, Tensor, nn.Module, float]:
        """Features of the training and test images, the decoder, and its R2."""
        x, test_x = (
            extract_features(network, store, image_size=size, mean=spec.mean, std=spec.std) for store in (train, test)
        )
        decoder = train_decoder(x, images, constants=CONSTANTS, seed=card["seed"])
        return x, test_x, decoder, 1 - squared_error(test_x, test_images, lambda part: decode(decoder, part)) / base

    x, test_x, decoder, r2 = decoded(backbone)
    pictures = {"decoded": decode(decoder, test_x[:SHOWN]).contiguous(), "originals": test_images[:SHOWN].contiguous()}
    save_file(pictures, directory / FILE)
    text = "R2 of test images that a small decoder draws from the frozen features; 0: the mean image."
    row = {"protocol": "decoder", "target": "pixels", "metric": "R2", "value": r2, "text": text}
    rows = [row | {"settings": {"dimensions": x.shape[1], "epochs": CONSTANTS.epochs}, "baselines": {}}]
    if card["seed"] == 0:
        pca = PixelPCA(images)
        error = squared_error(test_images, test_images, lambda part: pca.reconstruct(part, x.shape[1]))
        random_x, random_test_x, _, random_r2 = decoded(random_init(spec, 0))
        rows[0]["baselines"] = {RANDOM: random_r2, PCA: 1 - error / base}
        probe = linear_probe(
            random_x, train.labels, random_test_x, test.labels, num_classes=len(train.class_names), seed=0
        )
        text = "As linear, on the same network with random weights."
        row = {"protocol": "untrained", "target": "label", "metric": "top-1", "value": probe.accuracy, "text": text}
        rows.append(row | {"settings": {}, "baselines": {}})
    return rows


def draw_sheet(place: Path, cards: Cards) -> None:
    """`sheet.webp`: the same test images, decoded from each method's features, of the first seed."""
    rows, originals = {}, None
    for run in RUNS:
        path = place / directory_name(run, STUDY.seeds[0]) / FILE
        if path.exists():
            tensors = load_file(path)
            rows[run.name], originals = tensors["decoded"], tensors["originals"]
    if rows:
        figure = sheet(originals, rows, "The same test images, decoded from each method's frozen features")
        figure.savefig(place / "sheet.webp", dpi=110, pil_kwargs={"quality": 90})


def references(cards: Cards, run: str, name: str) -> list[float]:
    rows = [row for card in cards.of(run) for row in card["evaluations"] if row["protocol"] == "decoder"]
    return [row["baselines"][name] for row in rows if name in row.get("baselines", {})]


@styled
def draw(cards: Cards) -> Figure:
    """Pixels against the shape: what a decoder gives back, and what a linear probe reads."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    places = range(len(RUNS))
    names = [run.name for run in RUNS]
    points(
        left,
        places,
        [cards.values(n, "decoder", "pixels") for n in names],
        color=PALETTE[0],
        label="trained",
        line=False,
    )
    for shift, reference, color in ((0.2, RANDOM, "#b8860b"), (0.35, PCA, GRAY)):
        found = [references(cards, n, reference) for n in names]
        points(left, [p + shift for p in places], found, color=color, label=f"{reference}, one seed", line=False)
    left.axhline(0, color="#1e2429", linewidth=0.8)
    left.set_xticks(places, names, rotation=35, ha="right")
    left.set_title("decoded test images: R2 of pixels")
    legend(left, fontsize=8)
    both = [(n, cards.values(n, "decoder", "pixels"), cards.values(n, "linear")) for n in names]
    spots = sorted((fmean(y), fmean(x), n) for n, x, y in both if x and y)
    free = -1.0  # no label below this height
    for y, x, name in spots:
        right.plot(x, y, "o", color=PALETTE[0])
        free = max(y, free + 3.4)
        right.annotate(
            name,
            (x, y),
            (x - 0.05, free),
            fontsize=7.5,
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": GRAY, "linewidth": 0.6},
        )
    right.set_xlim(left=0)
    right.set(title="shape known against pixels known", xlabel="R2 of pixels", ylabel="linear probe on the shape, %")
    return figure


def tables(cards: Cards) -> list[Table]:
    factors = (f"R2 {f.replace('_', ' ')}" for f in FACTORS)
    head = (
        "method",
        "R2 of pixels",
        f"R2 of pixels, {RANDOM}",
        f"R2, {PCA} to as many numbers",
        "linear, %",
        f"linear, {RANDOM}, %",
        *factors,
    )
    rows = [
        (
            run.name,
            cards.text(run.name, "decoder", "pixels", "R2", ".2f"),
            *(", ".join(f"{v:.2f}" for v in references(cards, run.name, name)) or "–" for name in (RANDOM, PCA)),
            cards.text(run.name, "linear"),
            cards.text(run.name, "untrained"),
            *(cards.text(run.name, "factor-linear", f, "R2", ".2f") for f in FACTORS),
        )
        for run in RUNS
    ]
    return [Table(head, rows)]


RUNS = tuple(Run(method, method, SMALL, baselines=method == METHODS[0]) for method in METHODS)
STUDY = Study(
    name="decoder",
    title="Looking into a representation",
    question="What of an image can be drawn from each method's features after ten epochs, and what has been forgotten?",
    runs=RUNS,
    draw=draw,
    tables=tables,
    protocols=("linear", "metrics", "factors", "rotation"),
    measure=measure,
    after=draw_sheet,
)
