"""Few labels: how many images, and which, the same for all runs."""

import hashlib
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import UserError
from common.rng import generator


def label_counts(shares: Sequence[str], labels: Tensor) -> dict[str, int]:
    """("1%", "5000") -> {"1%": a hundredth of the labelled images, "5000": 5000}, rounded down to equally many per
    class.

    labels: long [N], negative where an image has none. Raises UserError for what cannot be: no number, a share outside
    0 and 100 %, fewer images than classes, a number that the classes do not divide, or more of a class than there are.
    """
    if not shares:
        raise UserError("labels: give at least one share, as 1%, or number of images, as 500")
    sizes = labels[labels >= 0].bincount()
    sizes = sizes[sizes > 0]
    total, classes, smallest = int(sizes.sum()), len(sizes), int(sizes.min())
    counts = {}
    for text in shares:
        if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            if not 0 < float(share[1]) <= 100:
                raise UserError(f"labels {text}: a share must be above 0 % and at most 100 %")
            count = math.floor(total * float(share[1]) / 100 + 1e-9)
        elif re.fullmatch(r"[1-9]\d*", text):
            count = int(text)
        else:
            raise UserError(
                f"labels {text!r}: neither a share, as 1%, nor a number of images, as 500 (several: 1% 500)"
            )
        if count < classes:
            least = f"{math.ceil(1e4 * classes / total) / 100:g}%"
            raise UserError(
                f"labels {text}: {count} of the {total:,} labelled images are fewer than one for each of "
                f"the {classes} classes; take at least {least} or {classes}"
            )
        if share is None and count % classes:
            raise UserError(
                f"labels {text}: {classes} classes cannot have equally many; take {count - count % classes}"
                f" or {count - count % classes + classes}"
            )
        if count // classes > smallest:
            raise UserError(
                f"labels {text}: {count // classes} of every class are needed, but the smallest class has "
                f"{smallest} images; take at most {smallest * classes}"
            )
        counts[text] = count // classes * classes
    return counts


def label_subset(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Ascending indices of `count` labelled images, equally many of every class: long [count].

    A function of the labels and the seed alone: every class is taken in the order of one random permutation of all
    images (CPU, key ("low-shot", seed, N)), so a smaller subset is part of every larger one.
    """
    order = torch.randperm(len(labels), generator=generator("low-shot", seed, len(labels)))
    classes = labels[labels >= 0].unique()
    each = count // len(classes)
    mixed = labels.cpu()[order]
    return torch.cat([order[mixed == c][:each] for c in classes]).sort().values


def subset_hash(indices: Tensor) -> str:
    """Twelve hexadecimal digits that identify a subset."""
    return hashlib.blake2b(indices.numpy().astype("<i8").tobytes(), digest_size=6).hexdigest()
