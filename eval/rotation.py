"""How well the turn of an image can be read off frozen features: an evaluation that needs no labels.

Every image is turned by 0, 90, 180 and 270 degrees, and a linear classifier predicts which of the four it was from the
features of the frozen backbone (chance: 25 %). Predicting turns is the pretext task of Gidaris et al. 2018
(arXiv:1803.07728); as an evaluation it is from Reed et al. 2021 (SelfAugment, arXiv:2009.07724), who found a rank
correlation above 0.94 with supervised evaluations of the same networks, over augmentation policies, training settings
and architectures.

Where it misleads:
- If turns were among the augmentations, a good network has become invariant to them and scores near chance.
- It ranks by what an upright photograph gives away: sky above, feet below. Images without an upright (satellites,
  tissue) leave little to predict. `shapes` are upright to 30 degrees either way: triangle, heart, half-disc and arrow
  tell their turn, disc, ring, square and cross never, and plain backgrounds look alike from all sides. So a turn is
  read from the shape, which is what the labels are too (studies/, label-free).
- Raw pixels show how much of the answer is lighting and layout: read the number beside that baseline.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.data import Images
from common.errors import UserError
from common.rng import generator
from common.sources import spread
from eval.features import extract_features, forward_features
from eval.linear import (
    VALIDATION,
    ProbeResult,
    chosen_rate,
    linear_probe,
    probe_sentence,
    probe_settings,
    validation_split,
)
from eval.setup import Candidate, EvalSetup, Row, make_row

TURNS = 4
CHANCE = 100 / TURNS
TRAIN_IMAGES = TEST_IMAGES = 2_500  # of which each is seen four times


class Turned(nn.Module):
    """The features of images turned by 90, 180 and 270 degrees, side by side: [B, 3, S, S] -> [B, 3 * D].

    Evaluation images are centre squares, so that a turn moves pixels and loses or invents none.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        turned = (torch.rot90(images, turn, (2, 3)).contiguous() for turn in range(1, TURNS))
        return torch.cat([forward_features(self.backbone, x) for x in turned], 1)


def sample(store: Images, count: int) -> tuple[Images, Tensor]:
    """(up to `count` images of `store`, evenly spaced; their indices, long [n])."""
    index = torch.tensor(spread(len(store), count))
    return store.subset(index), index


def turned_features(
    backbone: nn.Module,
    store: Images,
    upright: Tensor,
    count: int,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> Tensor:
    """[n, 4, D]: features of up to `count` images of `store`, each at its four turns.

    `upright` [N, D]: those of all images as they are, which are not computed again. Other arguments as in
    `extract_features`.
    """
    part, index = sample(store, count)
    others = extract_features(
        Turned(backbone), part, image_size=image_size, mean=mean, std=std, device=device, batch_size=batch_size
    )
    return torch.cat([upright[index], others], 1).unflatten(1, (TURNS, -1))


def arranged(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """(image, turn) [4 * images] of every training row, such that `linear_probe` splits images and not turns.

    The learning rate is chosen on a tenth of the rows, and which these are depends on the rows' classes and the seed
    alone. Four turns of one image are as good as copies of it, so rows are given out such that all four land on one
    side. That needs equally many rows of every class on both sides: `images` must be a multiple of ten.
    """
    turns = torch.arange(TURNS).repeat(images)
    held_out = torch.zeros(len(turns), dtype=torch.bool)
    held_out[validation_split(turns, seed)[1]] = True
    shuffled = torch.randperm(images, generator=generator(seed, "rotation images"))
    rows = torch.empty_like(turns)
    for turn in range(TURNS):
        slots = (turns == turn).nonzero().flatten()
        rows[slots[held_out[slots].int().argsort(stable=True)]] = shuffled  # the last tenth of them is held out
    return rows, turns


def rotation_probe(train: Tensor, test: Tensor, *, seed: int = 0, device: torch.device | str = "cpu") -> ProbeResult:
    """The result of predicting the turn, from features [n, 4, D] of training and of test images.

    Uses the first multiple of ten of the training images. Raises UserError for fewer than ten.
    """
    images = len(train) - len(train) % VALIDATION
    if not images:
        raise UserError(f"rotation needs at least {VALIDATION} training images, but there are {len(train)}.")
    rows, turns = arranged(images, seed)
    test_turns = torch.arange(TURNS).repeat(len(test))
    return linear_probe(
        train[rows, turns], turns, test.flatten(0, 1), test_turns, num_classes=TURNS, seed=seed, device=device
    )


# ---- protocol --------------------------------------------------------------------------------------------------------


def protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """The probe of up to `TRAIN_IMAGES` and `TEST_IMAGES` images."""
    train, test = (
        turned_features(
            candidate.module,
            store,
            x,
            count,
            image_size=setup.image_size,
            mean=setup.mean,
            std=setup.std,
            device=setup.device,
            batch_size=setup.batch_size,
        )
        for store, x, count in (
            (setup.train, candidate.train_x, TRAIN_IMAGES),
            (setup.test, candidate.test_x, TEST_IMAGES),
        )
    )
    result = rotation_probe(train, test, seed=setup.seed, device=setup.device)
    n, m = len(train) - len(train) % VALIDATION, len(test)
    settings = probe_settings(setup, TURNS * n) | {
        "images": [n, m],
        "degrees": [0, 90, 180, 270],
        "chance": CHANCE,
        "selection": "top-1 on a tenth of the training images with their four turns, then trained on all",
    }
    del settings["labelled_train_images"]
    text = (
        f"Which way an image is turned (0, 90, 180 or 270 degrees; chance {CHANCE:g} %), after Reed et "
        f"al. 2021: {n:,} training and {m:,} test images at all four turns, none of the labels. "
        f"{probe_sentence(setup, TURNS * n, TURNS * m)} Misleading where turns were among "
        "the augmentations, or where images have no upright."
    )
    chosen = chosen_rate("learning_rate", result)
    return [make_row("rotation", "rotation", "top-1", result.accuracy, settings, text, chosen)]
