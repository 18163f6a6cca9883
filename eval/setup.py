"""What the protocols of one evaluation share: the data, the settings, and the form of a row.

A protocol is a function (EvalSetup, Candidate) -> rows, and is listed in `eval.protocols.PROTOCOLS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.data import Images
from common.errors import UserError
from eval.finetune.recipe import Recipe

if TYPE_CHECKING:
    from eval.linear import ProbeResult

RAW, RANDOM = "raw pixels", "random init"  # the baselines
MOST_RANKS = 5
TOP5_CLASSES = 50  # from which on top-5 is measured unasked: its chance level is then at most 10 %
CONFUSION_CLASSES = 20  # up to which a card holds the confusion matrix
Row = dict[str, Any]


class Labeled(NamedTuple):
    """Features [N, D], [M, D] and classes [N], [M] of the training and test images that have a label."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Candidate:
    """The backbone or a baseline, with its features of all training and test images, [N, D] and [M, D] on the CPU."""

    name: str
    module: nn.Module
    train_x: Tensor
    test_x: Tensor
    label_probe: "ProbeResult | None" = None  # from "linear", for a factor that is the label


@dataclass(kw_only=True)
class EvalSetup:
    """The data and settings of an evaluation, the same for all candidates."""

    train: Images
    test: Images
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device | str
    seed: int
    batch_size: int
    augmented_epochs: int
    workers: int
    pooling: str | None  # of a ViT's tokens, None for other networks
    pool: str  # as asked for: "auto" is the network's own pooling
    recipe: Recipe
    log: Callable[[str], None]
    top5: bool = False

    def labeled(self, candidate: Candidate) -> Labeled:
        """The candidate's features of the images that have a label (a negative one means none)."""
        train, test = (
            _labeled(labels_of(store), x)
            for store, x in ((self.train, candidate.train_x), (self.test, candidate.test_x))
        )
        return Labeled(*train, *test)

    @property
    def geometry(self) -> str:
        """How an image becomes an input, in words."""
        if self.image_size >= 160:  # `eval_images`
            return f"shorter side resized to {round(self.image_size / 0.875)}, centre crop of {self.image_size} px"
        return f"whole image at {self.image_size} px (centre square)"

    @property
    def num_classes(self) -> int:
        largest = max(int(labels_of(store).max()) for store in (self.train, self.test))
        return 1 + max(largest, len(self.train.class_names or ()) - 1)

    def settings(self, **more: Any) -> Row:
        """A row's settings: what all protocols share, then the protocol's."""
        tokens = {} if self.pooling is None else {"pooling": self.pooling}
        return {
            "image_size": self.image_size,
            "geometry": self.geometry,
            "features": "backbone, eval mode, frozen",
            "train_images": len(self.train),
            "test_images": len(self.test),
            **tokens,
            **more,
        }


def make_row(
    protocol: str, target: str, metric: str, value: float, settings: Row, text: str, chosen: Row | None = None
) -> Row:
    """A row of results: `settings` define the protocol, `text` says the same in a sentence, `chosen` is what was
    selected on training images. Not a setting: two seeds of one protocol may choose differently and still be compared.
    """
    row = {
        "protocol": protocol,
        "target": target,
        "metric": metric,
        "value": float(value),
        "settings": settings,
        "text": text,
    }
    return row if chosen is None else {**row, "chosen": chosen}


def accuracy_rows(
    setup: EvalSetup,
    protocol: str,
    ranking: Tensor,
    labels: Tensor,
    settings: Row,
    text: str,
    chosen: Row | None = None,
) -> list[Row]:
    """The rows of a classifier of the label: top-1, and top-5 from `TOP5_CLASSES` classes on or where it was asked for.

    ranking: int64 [M, n], the most likely classes of each test image, the most likely first, negative where there is
    none; labels [M]. Up to `CONFUSION_CLASSES`, top-1 has the detail "confusion": a row of counts for each class, in
    the order of the classes.
    """
    classes, row = (
        setup.num_classes,
        make_row(protocol, "label", "top-1", top1(ranking[:, 0], labels), settings, text, chosen),
    )
    if classes <= CONFUSION_CLASSES:
        row["details"] = {"confusion": confusion(ranking[:, 0], labels, classes).tolist()}
    rows = [row]
    if classes > MOST_RANKS and (setup.top5 or classes >= TOP5_CLASSES):
        hits = (ranking[:, :MOST_RANKS].cpu() == labels.cpu().unsqueeze(1)).any(1)
        rows.append(make_row(protocol, "label", "top-5", 100.0 * int(hits.sum()) / len(labels), settings, text, chosen))
    return rows


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts, int64 [classes, classes]: row i, column j is how many images of class i were taken for class j."""
    pairs = labels.cpu() * classes + predictions.cpu()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def top1(predictions: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of classes [N] against labels [N]."""
    return 100.0 * int((predictions.cpu() == labels.cpu()).sum()) / len(labels)


def labels_of(store: Images) -> Tensor:
    """The labels of the images, long [N]. Raises UserError where there are none."""
    if store.labels is None:
        raise UserError(f"the images of {store.name!r} have no labels")
    return store.labels


def factors_of(store: Images) -> dict[str, Tensor]:
    """The factors that the images were drawn from, [N] each. Raises UserError where they are not known."""
    if store.factors is None:
        raise UserError(f"the factors behind {store.name!r} are not known")
    return store.factors


def _labeled(labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    keep = labels >= 0
    if bool(keep.all()):  # no copy of large features where it is not needed
        return x, labels
    return x[keep], labels[keep]
