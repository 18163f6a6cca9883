"""Deep InfoMax's recipes. Defaults are DIM(L) with Jensen-Shannon on CIFAR-10; every other recipe is a preset.

"paper" is arXiv:1808.06670; "code" is rdevon/DIM.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import ImageConfig, published


@dataclass(kw_only=True)
class Config(ImageConfig):
    # ---- data: see common/config.py for the other settings
    data: str = "cifar10"
    split: str = "train"
    """Split to train on; probes are always trained on "train". Paper section 4: STL-10's "unlabeled"."""
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
    grayscale: bool = False
    """Restrict the encoder's input to luminance. Not in the paper."""
    contrast: bool = False
    """Standardize each image by its mean and standard deviation before the first layer. Not in the paper."""
    output: Literal["conv", "fc", "y"] = "conv"
    """Layer to export and evaluate; the report has all three. Paper Tables 1 and 2 give all three: conv is the best
    under a linear SVM."""
    mi_units: int = 2048
    """Width of the score space. Code models/dim.py."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes. Code: one process with DataParallel, BatchNorm per GPU."""

    # ---- objective
    estimator: Literal["jsd", "dv", "infonce"] = "jsd"
    """Estimator of the information: Jensen-Shannon (code's default), Donsker-Varadhan, infoNCE (paper eq. 4 to 6)."""
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
    """Area of a random square crop, not resized if it fits. Paper section 4: CIFAR none, STL-10 64 of 96 px."""
    flip: float = 0.0
    """Probability of a left-right flip. Paper section 4: CIFAR none, STL-10 one half."""

    # ---- optimization
    epochs: int = 1000
    """Passes over the training images. Code models/dim.py."""
    batch_size: int = 64
    """Global batch size, over all processes. Code models/dim.py."""
    lr: float = 1e-4
    """Learning rate of Adam for encoder and scorers. Code models/dim.py."""
    discriminator_lr: float = 1e-4
    """Learning rate of Adam for the discriminator. Code models/prior_matching.py."""
    decay: Literal["none", "cosine"] = "none"
    """Schedule of both learning rates. Code: none."""

    # ---- evaluation
    mlp_epochs: int = 0
    """Epochs of the paper's 200-unit classifier on each layer, at the end (0: none; code: rates fall at 50 and 100)."""


DIM_L = Config(mlp_epochs=150)

# 5.7 MMAC an image in the encoder, 2.1 in the scorers, 1.0 in the scores.
TINY = dict(width=0.5, mi_units=128, batch_size=128, lr=1e-3, discriminator_lr=1e-3, decay="cosine")

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    grayscale=True,  # all positions of an image share its colors, which would identify it without its shape
    contrast=True,
    output="fc",
    estimator="infonce",
    epochs=20,
    knn_every=5,
    save_every=400,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, half the width: minutes on two cores, to see DIM learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=8),
    ),
    "shapes": ("embedded single shapes, half the width: a task with easier answers than the shape", SHAPES),
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
        replace(DIM_L, **TINY, estimator="infonce", epochs=10, knn_every=5, mlp_epochs=0),
    ),
    "stl10": (
        "STL-10 at 64 px, its unlabeled images, AlexNet-like, DIM(L) with infoNCE, 200 epochs: 72.57 % on conv",
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


def _layers(accuracies: tuple[float, float, float], table: str) -> list[dict]:
    """The paper's accuracies on conv, fc and y."""
    source, note = f"arXiv:1808.06670 {table}", "200-unit probe, mean of the last 100 epochs"
    names = ("conv-mlp", "fc-mlp", "y-mlp")
    return [published(value, name, source, note) for name, value in zip(names, accuracies, strict=True)]


# The paper's numbers, shown next to ours under the same protocol id. Ours is always the last epoch.
PUBLISHED: dict[str, list[dict]] = {
    "cifar10": _layers((73.25, 73.62, 66.96), "Table 1"),
    "cifar10-infonce": _layers((75.21, 75.57, 69.13), "Table 1"),
    "cifar10-global": _layers((52.2, 52.84, 43.17), "Table 1"),
    "stl10": _layers((72.57, 70.00, 67.08), "Table 2"),
}
