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

import dataclasses

import torch
from torch import Tensor, nn

from common.data import ImageStream
from common.errors import UserError
from common.rng import generator
from common.sources import spread
from eval import linear
from eval.features import extract_features, forward_features

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


def sample(store, count: int) -> tuple[object, Tensor]:
    """(a store of up to `count` images of `store`, evenly spaced and without their labels, their indices [n])."""
    index = torch.tensor(spread(len(store), count))
    about = {"labels": None, "factors": None}
    if isinstance(store, ImageStream):
        return dataclasses.replace(store, rows=store.rows[index], **about), index
    return dataclasses.replace(store, images=store.images[index.to(store.images.device)], **about), index


def turned_features(backbone: nn.Module, store, upright: Tensor, count: int, **options) -> Tensor:
    """[n, 4, D]: features of up to `count` images of `store`, each at its four turns.

    `upright` [N, D]: those of all images as they are, which are not computed again; `options`: of `extract_features`.
    """
    part, index = sample(store, count)
    others = extract_features(Turned(backbone), part, **options)
    return torch.cat([upright[index], others], 1).unflatten(1, (TURNS, -1))


def arranged(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """(image, turn) [4 * images] of every training row, such that `linear_probe` splits images and not turns.

    The learning rate is chosen on a tenth of the rows, and which these are depends on the rows' classes and the seed
    alone. Four turns of one image are as good as copies of it, so rows are given out such that all four land on one
    side. That needs equally many rows of every class on both sides: `images` must be a multiple of ten.
    """
    turns = torch.arange(TURNS).repeat(images)
    held_out = torch.zeros(len(turns), dtype=torch.bool)
    held_out[linear.validation_split(turns, seed)[1]] = True
    shuffled = torch.randperm(images, generator=generator(seed, "rotation images"))
    rows = torch.empty_like(turns)
    for turn in range(TURNS):
        slots = (turns == turn).nonzero().flatten()
        rows[slots[held_out[slots].int().argsort(stable=True)]] = shuffled  # the last tenth of them is held out
    return rows, turns


def rotation_probe(train: Tensor, test: Tensor, *, seed: int = 0, device: torch.device | str = "cpu"):
    """The `linear.ProbeResult` of predicting the turn, from features [n, 4, D] of training and of test images.

    Uses the first multiple of ten of the training images. Raises UserError for fewer than ten.
    """
    images = len(train) - len(train) % linear.VALIDATION
    if not images:
        raise UserError(f"rotation needs at least {linear.VALIDATION} training images, but there are {len(train)}.")
    rows, turns = arranged(images, seed)
    test_turns = torch.arange(TURNS).repeat(len(test))
    return linear.linear_probe(train[rows, turns], turns, test.flatten(0, 1), test_turns, num_classes=TURNS, seed=seed,
                               device=device)
