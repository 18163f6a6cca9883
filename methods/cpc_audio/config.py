"""CPC's recipes for sound. Defaults are the paper's LibriSpeech recipe; every other recipe is a preset.

"paper" is arXiv:1807.03748v2, section 3.1; "CPC_audio" is facebookresearch/CPC_audio; "GIM" is loeweX/Greedy_InfoMax.
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import TrainingConfig, published


@dataclass(kw_only=True)
class Config(TrainingConfig):
    # ---- data
    data: str = "openslr/librispeech_asr:clean"
    """tones (synthetic), org/name or org/name:configuration of the hub, or a directory of parquet files. Paper: the 100
    hours of LibriSpeech."""
    train_split: str = "train.100"
    """Split to train on. Paper: train-clean-100."""
    test_split: str = "train.100"
    """Split to test on; the same as the training split: a tenth of it, chosen by a fixed seed, is held out (the
    speakers of LibriSpeech's test split are not those of its training split)."""
    labels: tuple[str, ...] = ("speaker_id",)
    """Label columns for the probes. With two, the first is also probed on held-out values of the second."""
    speaker_column: str = "speaker_id"
    """Column with the speaker, for --negatives same-speaker."""
    audio_column: str = ""
    """Column with the recordings; default: found from the features."""
    sample_rate: int = 16000
    """Sample rate in Hz of all recordings: nothing is resampled. Paper: 16 kHz."""
    limit: int = 0
    """Use only this many training recordings (0: all), a fixed random subset."""
    window: int = 20480
    """Samples of a training window: longer recordings are cropped, shorter ones padded. Paper: 20480, 1.28 s."""

    # ---- network
    channels: int = 512
    """Width of the convolutions. Paper: 512."""
    context: int = 256
    """Width of the GRU. Paper: 256."""
    kernels: tuple[int, ...] = (10, 8, 4, 4, 4)
    """Kernels of the convolutions. Paper."""
    strides: tuple[int, ...] = (5, 4, 2, 2, 2)
    """Strides of the convolutions. Paper: their product, 160 samples, is the hop: 10 ms at 16 kHz, 20 ms at 8 kHz."""
    paddings: tuple[int, ...] = (3, 2, 1, 1, 1)
    """Paddings of the convolutions. Not in the paper; CPC_audio, with which a window has exactly 128 frames."""
    norm: Literal["none", "channel", "batch"] = "none"
    """Norm of the convolutions. Not in the paper; GIM: none. channel: per frame, CPC_audio's default. batch: its
    "as in Oord" command; statistics over all frames of the global batch, padding included."""

    # ---- objective
    steps: int = 12
    """Number of future frames to predict. Paper Table 2: 12 is best, 2 loses 36 points."""
    negatives: Literal["mixed", "mixed-excl", "same-speaker", "same-speaker-excl", "own"] = "mixed"
    """Where negatives come from: the rows of the paper's Table 2. Its default is mixed; -excl excludes the anchor's
    window, which costs 7 points there."""
    negative_count: int = 128
    """Negatives per window, shared by its anchors and steps. Not in the paper; CPC_audio: 128, GIM: 10."""
    complete_anchors: bool = True
    """Only anchors with all targets inside the recording (CPC_audio: 116 of 128 frames)."""
    group_size: int = 8
    """Recordings of one speaker grouped in a batch with --negatives same-speaker. Paper: 8 per GPU."""

    # ---- optimization
    epochs: int = 674
    """Passes over the recordings: 674 x 445 steps of 64 windows are the paper's 300,000 updates."""
    batch_size: int = 64
    """Global batch size in windows, over all processes. Paper: 8 GPUs x 8 windows."""
    base_lr: float = 2e-4
    """Learning rate of Adam. Paper: 2e-4."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Schedule after the warm-up. Paper: none stated."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0. Not in the paper."""
    weight_decay: float = 0.0
    """Decoupled weight decay, not on vectors. Paper: none stated."""

    # ---- evaluation
    draws: int = 20
    """Random subsets over which the probes with 1 and 5 labels per class are averaged."""
    compile: bool = False
    """torch.compile for the convolutions."""


LIBRISPEECH = Config()

# Spoken digits: 8 kHz, so the paper's strides are a hop of 20 ms and its 12 steps 240 ms; recordings of 0.14 to 2.3 s,
# half of them below 0.42 s, so a window of 0.51 s (25 frames) holds most of them whole.
FSDD = Config(
    data="fsdd",
    train_split="train",
    test_split="test",
    labels=("digit", "speaker"),
    speaker_column="speaker",
    sample_rate=8000,
    window=4096,
    norm="channel",
    complete_anchors=False,
    epochs=400,
    batch_size=64,
    base_lr=5e-4,
    schedule="cosine",
    warmup_epochs=5,
)

TONES = replace(FSDD, data="tones", labels=("glide", "timbre"), speaker_column="timbre", window=4000, base_lr=2e-3)

PRESETS: dict[str, tuple[str, Config]] = {
    "quickstart": (
        "synthetic tones, 64 channels: minutes on two cores, to see CPC find future frames",
        replace(TONES, channels=64, context=64, negative_count=32, epochs=20, warmup_epochs=1, draws=5),
    ),
    "smoke": (
        "256 synthetic tones, seconds on a CPU: what the tests run",
        replace(
            TONES,
            limit=256,
            channels=16,
            context=24,
            negative_count=16,
            epochs=4,
            batch_size=32,
            warmup_epochs=1,
            draws=2,
            log_every=2,
            save_every=8,
        ),
    ),
    "fsdd-cpu": (
        "spoken digits (--data DIRECTORY), 128 channels: at most 20 CPU minutes",
        replace(FSDD, channels=128, context=128, negative_count=64, epochs=30, base_lr=1e-3, save_every=1000),
    ),
    "fsdd": ("spoken digits (--data DIRECTORY), the paper's widths", FSDD),
    "librispeech": (
        "LibriSpeech 100 h, batch 64, 300,000 steps: the paper, 97.4 % speaker (and 64.6 % phones) per frame",
        LIBRISPEECH,
    ),
}


TABLE_1 = "arXiv:1807.03748v2 Table 1"

PUBLISHED: dict[str, list[dict]] = {
    "librispeech": [
        {
            **published(97.4, "frame-linear", TABLE_1, "251 speakers, their own split; MFCC 17.6, random init 1.87"),
            "target": "speaker_id",
        },
        {
            **published(64.6, "frame-linear", TABLE_1, "41 phones, aligned by the authors; MFCC 39.7, init 27.6"),
            "target": "phone",
        },
    ],
}
