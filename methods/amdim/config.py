"""AMDIM's recipes. Defaults are the code's for CIFAR-10 on one GPU; every other recipe is a preset.

"paper" is arXiv:1906.00910; "code" is Philip-Bachman/amdim-public (train.py, model.py, datasets.py, costs.py,
task_self_supervised.py); "bolts" is Lightning-Universe/lightning-bolts.
"""

from dataclasses import dataclass, replace

from common.config import ImageConfig, published


@dataclass(kw_only=True)
class Config(ImageConfig):
    # ---- data: see common/config.py for the other settings
    data: str = "cifar10"
    split: str = "train"
    """Splits to train on, as train+unlabeled; probes are always trained on "train". Code datasets.py: both of STL-10's,
    105,000 images."""
    image_size: int = 32
    """Side of a view in pixels: 32, 64 or 128, each with its own encoder. Code model.py, encoder_size."""
    normalize: str = "amdim-cifar"
    """Mean and std of the inputs: amdim-cifar or amdim-stl10 (code datasets.py), none, or those of shapes, cifar10,
    imagenet-1k ..."""

    # ---- network
    ndf: int = 128
    """Channels of the stem; the maps have 4 (32 px) or 8 times as many. Code train.py: 128; its large model 320."""
    n_rkhs: int = 1024
    """Width of the compared features and of the output. Code train.py: 1024; large 2560."""
    n_depth: int = 3
    """Units per block, all but one of them 1x1. Code train.py: 3; large 10."""
    hidden_bn: bool = False
    """BatchNorm inside units too. Code train.py, use_bn: off; the embeddings and f1 always end in one."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes. The code's are per GPU."""

    # ---- objective
    clip: float = 20.0
    """C in C tanh(s / C), which bounds the scores. Code train.py, tclip; bolts: 10."""
    penalty: float = 5e-2
    """Weight of the mean squared raw score. Code costs.py: 5e-2; the paper's 4e-2 is unverified."""
    online_probes: bool = False
    """Also train a linear and an MLP probe on detached f1 of the training views and log them as online_* (code
    model.py, Evaluator). Never the result, which is measured on frozen features."""

    # ---- views
    translate: int = 4
    """Pixels by which a view is translated, borders reflected, p 0.8; 0: crop instead. Code datasets.py: 4 at 32 px."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Area of a random crop, if --translate is 0. Code datasets.py, STL-10 and ImageNet."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    """Brightness, contrast, saturation, hue. Code datasets.py; hue 0.1 on ImageNet."""
    color_jitter_prob: float = 0.8
    """Probability of the jitter. Code datasets.py."""
    grayscale: float = 0.25
    """Probability of grayscale. Code datasets.py."""

    # ---- optimization
    epochs: int = 300
    """Passes over the data. Code task_self_supervised.py: 300 on CIFAR and STL-10, 50 on ImageNet (best: 100)."""
    batch_size: int = 200
    """Global batch size, over all processes: negatives are all positions of the other images. Code train.py: 200."""
    lr: float = 2e-4
    """Peak learning rate of Adam, not scaled with the batch. Code train.py."""
    betas: tuple[float, float] = (0.8, 0.999)
    """Adam's betas. Code task_self_supervised.py."""
    weight_decay: float = 1e-5
    """Weight decay added to the gradient (L2), for all tensors. Code task_self_supervised.py."""
    warmup_steps: int = 500
    """Steps of linear warm-up, the first one at lr / 500. Code task_self_supervised.py."""
    milestones: tuple[int, ...] = (250, 280)
    """Epochs after which the rate is multiplied by 0.2. Code task_self_supervised.py; ImageNet: 30 and 45."""


CIFAR10 = Config()

# 5.6 million multiply-adds a 32-px image, 0.9 of them in the embeddings.
TINY = dict(ndf=16, n_rkhs=64, n_depth=1)

SHAPES = Config(
    data="shapes",
    normalize="shapes",
    **TINY,
    translate=0,  # moved by 4 px alone, position and size alone would identify a shape
    crop_scale=(0.3, 1.0),
    color_jitter=(
        0.4,
        0.4,
        0.4,
        0.5,
    ),  # any hue, always, and half of the views gray: otherwise color would solve the task
    color_jitter_prob=1.0,
    grayscale=0.5,
    epochs=18,
    batch_size=64,  # scores grow with its square: at 64 they are a sixth of the step
    lr=2e-3,
    warmup_steps=200,
    milestones=(15, 17),
    knn_every=5,
    save_every=500,
)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "embedded pairs of shapes, 5 MMAC encoder: minutes on two cores, to see AMDIM learn",
        replace(SHAPES, data="pairs", normalize="pairs", epochs=10, milestones=(8, 9)),
    ),
    "shapes": ("embedded single shapes, 5 MMAC encoder: a task with easier answers than the shape", SHAPES),
    "smoke": (
        "a few seconds on a CPU: what the tests run",
        replace(
            SHAPES,
            ndf=8,
            n_rkhs=32,
            limit=256,
            epochs=4,
            warmup_steps=4,
            milestones=(3,),
            knn_every=0,
            log_every=2,
            save_every=4,
        ),
    ),
    "cifar10": ("CIFAR-10, the code's defaults for one GPU: 128 / 1024 / 3, batch 200, 300 epochs", CIFAR10),
    "cifar10-large": (
        "CIFAR-10, the large encoder 320 / 1280 / 10 as in bolts: 91.2 % linear (unverified)",
        replace(CIFAR10, ndf=320, n_rkhs=1280, n_depth=10),
    ),
    "cifar10-cpu": (
        "CIFAR-10 on one core in ten minutes: 5 MMAC encoder, 6 epochs",
        replace(
            CIFAR10,
            **TINY,
            epochs=6,
            batch_size=64,
            lr=2e-3,
            milestones=(5,),
            knn_every=3,
        ),
    ),
    "stl10": (
        "STL-10 at 64 px, train and unlabeled images, 192 / 1536 / 8, 300 epochs: 94.2 % linear (unverified)",
        Config(
            data="stl10",
            split="train+unlabeled",
            image_size=64,
            normalize="amdim-stl10",
            ndf=192,
            n_rkhs=1536,
            n_depth=8,
            translate=0,
        ),
    ),
    "imagenet-128": (
        "ImageNet at 128 px, the large encoder 320 / 2560 / 10, batch 480, 50 epochs: 68.1 % linear",
        Config(
            data="imagenet-1k",
            image_size=128,
            normalize="imagenet-1k",
            ndf=320,
            n_rkhs=2560,
            n_depth=10,
            translate=0,
            color_jitter=(0.4, 0.4, 0.4, 0.1),
            epochs=50,
            batch_size=480,
            milestones=(30, 45),
        ),
    ),
}


# What others report. Ours is always the last epoch, on features of the frozen network in eval mode.
PROTOCOL = "linear-augmented"
PUBLISHED: dict[str, list[dict]] = {
    "cifar10-large": [published(91.2, PROTOCOL, "arXiv:1906.00910 (unverified)", "large model; 93.1 with an MLP")],
    "stl10": [published(94.2, PROTOCOL, "arXiv:1906.00910 (unverified)", "large model; 94.5 with an MLP")],
    "imagenet-128": [
        published(68.1, PROTOCOL, "amdim-public README", "best run, learned augmentation; 68+ for this size")
    ],
}
