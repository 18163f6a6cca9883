"""Deep InfoMax's recipes. Defaults are DIM(L) with Jensen-Shannon on CIFAR-10; every other recipe is a preset.

"paper" is arXiv:1808.06670; "code" is rdevon/DIM.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.run import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    # ---- data
    data: str = "cifar10"
    """shapes, a hub name (cifar10, stl10, org/name ...), an image folder or a folder of parquet files."""
    split: str = "train"
    """Images to train on; probes are always trained on "train". Paper section 4: STL-10's "unlabeled"."""
    image_column: str = ""
    """Column with the images; default: found from the features."""
    label_column: str = ""
    """Column with the labels; default: found from the features, none is fine for pretraining."""
    limit: int = 0
    """Use only this many training images (0: all), a fixed random subset."""
    image_size: int = 32
    """Side of the input in pixels. Paper section 4: 32 for CIFAR, 64 for STL-10."""
    normalize: str = "cifar10"
    """Mean and std of the inputs: none, or those of shapes, cifar10, stl10 ... Not in the paper."""

    # ---- network
    layout: Literal["basic32", "alex64"] = "basic32"
    """Encoder. Paper App. A.2, code configs/convnets.py: basic32 (DCGAN) for CIFAR, alex64 (AlexNet) for STL-10."""
    width: float = 1.0
    """Factor on the encoder's hidden widths. 1: the paper's (basic32: 64-128-256 channels, 1024)."""
    y_dim: int = 64
    """Numbers in the summary y. Paper section 4."""
    grey: bool = False
    """The encoder sees luminance alone. Not in the paper."""
    contrast: bool = False
    """Each image is standardised by its own mean and deviation before the first layer. Not in the paper."""
    output: Literal["conv", "fc", "y"] = "conv"
    """Layer that is exported and evaluated; the report has all three. Paper Tables 1 and 2 give all three: conv is the
    best under a linear SVM."""
    mi_units: int = 2048
    """Width of the score space. Code models/dim.py."""
    sync_bn: bool = True
    """BatchNorm over all ranks. Code: one process with DataParallel, BatchNorm per GPU."""

    # ---- objective
    estimator: Literal["jsd", "dv", "infonce"] = "jsd"
    """Bound of the information: Jensen-Shannon (code's default), Donsker-Varadhan, infoNCE (paper eq. 4 to 6)."""
    alpha: float = 0.0
    """Weight of the global term. Paper section 4: DIM(G) 1, DIM(L) 0, DIM(L+G) 0.5."""
    beta: float = 1.0
    """Weight of the local term, a mean over locations. Paper section 4: DIM(G) 0, DIM(L) 1, DIM(L+G) 0.1."""
    gamma: float = 0.1
    """Weight of prior matching in the encoder's loss; 0: none. Paper section 4: DIM(G) 1, DIM(L) 0.1."""
    penalty: float = 1.0
    """Weight of the discriminator's gradient penalty. Code models/discriminator.py."""

    # ---- input
    crop_area: float = 1.0
    """Area of a random square crop, without resizing where it fits. Paper section 4: CIFAR none, STL-10 64 of 96 px."""
    flip: float = 0.0
    """Probability of a left-right flip. Paper section 4: CIFAR none, STL-10 one half."""

    # ---- optimisation
    epochs: int = 1000
    """Code models/dim.py."""
    batch_size: int = 64
    """Global batch in images, over all processes. Code models/dim.py."""
    lr: float = 1e-4
    """Of Adam, for encoder and scorers. Code models/dim.py."""
    discriminator_lr: float = 1e-4
    """Of Adam, for the discriminator. Code models/prior_matching.py."""
    decay: Literal["none", "cosine"] = "none"
    """Schedule of both rates. Code: none."""

    # ---- precision, randomness, evaluation
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs, float32 on CPUs. Scores, losses and the discriminator are always float32."""
    compile: bool = False
    """torch.compile for the encoder and colour operations."""
    deterministic: bool = False
    """Deterministic GPU kernels, slower: a resumed run is then bit-identical (CPU runs are anyway)."""
    seed: int = 0
    """Of initialisation, order, views, prior samples and probes."""
    knn_every: int = 0
    """Epochs between online kNN evaluations (0: none)."""
    mlp_epochs: int = 0
    """Epochs of the paper's 200-unit classifier on each layer, at the end (0: none; code: rates fall at 50 and 100)."""


DIM_L = Config()

# 5.7 MMAC an image in the encoder, 2.1 in the scorers, 1.0 in the scores.
TINY = dict(width=0.5, mi_units=128, batch_size=128, lr=1e-3, discriminator_lr=1e-3, decay="cosine")

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    grey=True,  # all places of an image share its colours, which would identify it without its figure
    contrast=True,
    output="fc",
    estimator="infonce",
    epochs=20,
    knn_every=5,
    save_every=400,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": ("embedded shapes, half the width: minutes on two cores, to see DIM learn", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES, limit=256, width=0.25, epochs=4, batch_size=64, alpha=0.5, knn_every=0, log_every=2, save_every=4
        ),
    ),
    "cifar10": ("CIFAR-10, DIM(L) with Jensen-Shannon: the paper, 73.25 % on conv with its 200-unit probe", DIM_L),
    "cifar10-infonce": (
        "CIFAR-10, DIM(L) with infoNCE: the paper, 75.21 % on conv with its 200-unit probe",
        replace(DIM_L, estimator="infonce"),
    ),
    "cifar10-global": (
        "CIFAR-10, DIM(G) with Jensen-Shannon: the paper's weak baseline, 52.2 % on conv",
        replace(DIM_L, alpha=1.0, beta=0.0, gamma=1.0),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on one core: half the width, infoNCE, 10 epochs",
        replace(DIM_L, **TINY, estimator="infonce", epochs=10, knn_every=5),
    ),
    "stl10": (
        "STL-10 at 64 px, its unlabelled images, AlexNet-like, DIM(L) with infoNCE, 200 epochs: 72.57 % on conv",
        replace(
            DIM_L,
            data="stl10",
            split="unlabeled",
            image_size=64,
            normalize="stl10",
            layout="alex64",
            estimator="infonce",
            crop_area=(64 / 96) ** 2,
            flip=0.5,
            epochs=200,
        ),
    ),
}


def _published(accuracies: tuple[float, float, float], table: str) -> list[dict]:
    note = "200-unit probe, mean of the last 100 epochs"
    return [
        {"value": value, "metric": "top-1", "protocol": f"{layer}-mlp", "source": f"arXiv:1808.06670 {table}",
         "note": note}
        for layer, value in zip(("conv", "fc", "y"), accuracies, strict=True)
    ]  # fmt: skip


# What the paper reports, shown beside our number under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10": _published((73.25, 73.62, 66.96), "Table 1"),
    "cifar10-infonce": _published((75.21, 75.57, 69.13), "Table 1"),
    "cifar10-global": _published((52.2, 52.84, 43.17), "Table 1"),
    "stl10": _published((72.57, 70.00, 67.08), "Table 2"),
}
