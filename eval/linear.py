"""Linear classification on frozen features: every learning rate of a sweep is trained in one pass.

The best learning rate of a linear probe spans three orders of magnitude between backbones, so it is searched, and it is
chosen on a tenth of the *training* images; the test set is read once, by the head that was chosen before.

A `HeadBank` is R linear heads side by side: one matrix product gives the logits of all of them, one gives all their
gradients (softmax regression has a closed-form gradient, so autograd is not needed), and each head moves as if it were
trained alone by `torch.optim.SGD(lr_r, momentum=0.9, nesterov=True)`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from common.data import Images, ViewLoader
from common.errors import UserError
from common.progress import track
from common.rng import generator
from common.views.recipe import ViewRecipe
from common.views.spec import View
from eval.features import Standardized, channels, forward_features, frozen, place, standardized
from eval.setup import MOST_RANKS, Candidate, EvalSetup, Row, accuracy_rows, labels_of, top1

LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
BASE_LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # times batch / 256; 0.1 is SimCLR's
MOMENTUM = 0.9
SGD = "SGD, Nesterov 0.9"
EPOCHS, MIN_STEPS = 30, 1000
VALIDATION = 10  # every tenth image of each class
Features = Tensor | Standardized


@dataclass
class ProbeResult:
    """What a linear probe found. `accuracy` is the test top-1 in percent."""

    accuracy: float
    learning_rate: float
    validation: dict[float, float]  # learning rate -> top-1 in percent on the validation part of the training set
    ranking: Tensor  # int64 [N_test, n]: the n most likely classes, the most likely first

    @property
    def predictions(self) -> Tensor:
        """int64 [N_test]"""
        return self.ranking[:, 0]

    @property
    def at_edge(self) -> bool:
        """The best learning rate is the first or the last of the sweep, so a better one may lie outside."""
        return self.learning_rate in (min(self.validation), max(self.validation))


class HeadBank:
    """R linear classifiers D -> C, zero-initialised, trained together by SGD with Nesterov momentum and no decay."""

    def __init__(self, num_features: int, num_classes: int, heads: int, device: torch.device | str = "cpu"):
        self.shape = (heads, num_classes)
        self.weight = torch.zeros(num_features, heads * num_classes, device=device)  # [D, R * C]: one matmul for all
        self.bias = torch.zeros(heads * num_classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, R, C]"""
        return torch.addmm(self.bias, x, self.weight).unflatten(1, self.shape)

    def step(self, x: Tensor, y: Tensor, rates: Tensor, keep: Tensor | None = None) -> None:
        """One SGD step of all heads on the mean cross-entropy of `x` [B, D], `y` [B]; head r uses `rates` [R].

        With `keep` (bool [B, R]) head r sees only its own part of the batch, and the mean is over that part.
        """
        grad = self.logits(x).softmax(2)  # dL/dlogits = (softmax - one-hot) / B
        grad.scatter_add_(
            2, y.view(-1, 1, 1).expand(-1, self.shape[0], 1), grad.new_tensor(-1.0).expand(len(y), self.shape[0], 1)
        )
        if keep is None:
            grad /= len(y)
        else:
            grad *= (keep / keep.sum(0).clamp_min(1)).unsqueeze(2)
        grad = grad.flatten(1)
        rates = rates.repeat_interleave(self.shape[1])  # [R * C]
        for value, velocity, g in zip((self.weight, self.bias), self.velocity, (x.T @ grad, grad.sum(0)), strict=True):
            velocity.mul_(MOMENTUM).add_(g)
            value.addcmul_(rates, g.add_(velocity, alpha=MOMENTUM), value=-1)

    def accuracies(self, x: Tensor | Standardized, y: Tensor, chunk: int = 8192) -> list[float]:
        """Top-1 in percent of every head; a head that has diverged counts as 0."""
        correct = sum(
            (self.logits(a).argmax(2) == b.unsqueeze(1)).sum(0)
            for a, b in zip(x.split(chunk), y.split(chunk), strict=True)
        )
        sound = torch.isfinite(self.weight.sum(0)).view(self.shape).all(1)
        return [100.0 * right / len(y) for right in (correct * sound).tolist()]

    def rank(self, x: Tensor | Standardized, head: int = 0, chunk: int = 8192) -> Tensor:
        """The `MOST_RANKS` most likely classes by one head, int64 [N, at most MOST_RANKS], the most likely first."""
        return torch.cat([ranked(self.logits(part)[:, head]) for part in x.split(chunk)])


def ranked(scores: Tensor) -> Tensor:
    """The classes with the highest `scores` [B, C], int64 [B, min(MOST_RANKS, C)]; of equal ones the first, as
    argmax."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :MOST_RANKS]


def cosine(step: int, steps: int) -> float:
    """The factor 1 -> 0 of a cosine schedule without warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def validation_split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(fit, validation) indices of a stratified, deterministic split: a tenth of every class's images, to within one.

    Sorted by class, in random order inside a class, every tenth image goes to validation.
    Raises UserError for fewer than 20 images.
    """
    if len(labels) < 2 * VALIDATION:
        raise UserError(
            f"a probe needs at least {2 * VALIDATION} labelled training images to choose its learning rate "
            f"on a tenth of them, but there are {len(labels)}."
        )
    order = torch.randperm(len(labels), generator=generator(seed, "probe split"))
    order = order[labels.cpu()[order].argsort(stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order[VALIDATION // 2 :: VALIDATION]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


@overload
def project_to_row_space(train_x: Tensor, *others: Tensor) -> tuple[Tensor, ...]: ...
@overload
def project_to_row_space(train_x: Standardized, *others: Standardized) -> tuple[Features, ...]: ...
def project_to_row_space(train_x: Features, *others: Features) -> tuple[Features, ...]:
    """The same tensors in an orthonormal basis of the rows of `train_x` [N, D] where N is well below D, else unchanged.

    Gradient descent from zero and ridge regression keep their weights in the span of the training rows, so the result
    is the same number at N / D of the cost.
    """
    if 2 * len(train_x) > train_x.shape[1]:
        return train_x, *others
    train_x, *rest = (x if isinstance(x, Tensor) else x.all() for x in (train_x, *others))
    basis = torch.linalg.qr(train_x.T)[0]  # [D, N]
    return tuple(x @ basis for x in (train_x, *rest))


def train_bank(
    x: Features, y: Tensor, rates: Sequence[float], *, num_classes: int, epochs: int, batch_size: int, seed: int
) -> HeadBank:
    """A bank with one head per learning rate, trained on `x` [N, D], `y` [N] (on their device) for `epochs`, or for
    more where these are fewer than `MIN_STEPS` steps (fewer than 9,000 images at batch 256).

    Cosine to 0, no warm-up, weight decay 0; the order is a function of (seed, epoch), a partial last batch is dropped.
    """
    bank = HeadBank(x.shape[1], num_classes, len(rates), x.device)
    lr = torch.tensor(list(rates), dtype=torch.float32, device=x.device)
    for rows, factor in probe_batches(len(x), epochs=epochs, batch_size=batch_size, seed=seed, device=x.device):
        bank.step(x[rows], y[rows], lr * factor)
    return bank


def probe_batches(
    n: int, *, epochs: int, batch_size: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, float]]:
    """(rows, factor of the learning rate) of each step of a probe on n images: `epochs`, or more where these are fewer
    than `MIN_STEPS` steps. Cosine to 0; the order is a function of (seed, epoch), a partial last batch is dropped."""
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size
    steps = max(epochs, math.ceil(MIN_STEPS / per_epoch)) * per_epoch
    for step in track(range(steps), f"probe on {n:,} images", steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = torch.randperm(n, generator=generator(seed, "probe order", epoch)).to(device)
        yield order[i * batch_size : (i + 1) * batch_size], cosine(step, steps)


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int | None = None,
    rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    split: tuple[Tensor, Tensor] | None = None,
) -> ProbeResult:
    """Linear probe on cached features: `train_x` [N, D], `train_y` [N], `test_x` [M, D], `test_y` [M].

    split: (fit, validation) rows of the training set, int64; default: `validation_split`, a tenth of each class.

    1. standardize by the statistics of the fit part (nine tenths of the training set) and train all `rates` at once;
    2. take the one with the best top-1 on the validation part (the smaller one on a tie);
    3. standardize by all training images, train that one again on them, and read the test set once.
    Deterministic in `seed` (CPU; on a GPU up to the order of its sums). Raises UserError for fewer than 20 images.
    """
    x, y = place(train_x, device), train_y.to(device)
    num_classes = num_classes or int(max(train_y.max(), test_y.max())) + 1
    options = {"num_classes": num_classes, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    fit, held_out = (part.to(device) for part in split or validation_split(train_y, seed))
    part = standardized(x, fit, device=device)
    fit_x, held_x = project_to_row_space(part, part.of(x, held_out))
    bank = train_bank(fit_x, y[fit], rates, **options)
    validation = dict(zip(rates, bank.accuracies(held_x, y[held_out]), strict=True))
    best = max(rates, key=lambda rate: (validation[rate], -rate))
    whole = standardized(x, device=device)
    all_x, tested_x = project_to_row_space(whole, whole.of(test_x))
    ranking = train_bank(all_x, y, [best], **options).rank(tested_x).cpu()
    return ProbeResult(top1(ranking[:, 0], test_y), best, validation, ranking)


def linear_probe_augmented(
    backbone: nn.Module,
    train: Images,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    rates: Sequence[float] = BASE_LEARNING_RATES,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 2,
    batch_norm: bool = False,
) -> ProbeResult:
    """SimCLR's probe (arXiv:2002.05709, App. B.6): the frozen backbone, in eval mode, reads a fresh random resized crop
    (8 to 100 % of the area) and flip of every training image in every epoch.

    SGD with Nesterov momentum 0.9, weight decay 0, cosine, learning rate = base * batch / 256, features as they are,
    head from zeros. The paper's base is 0.1; here all bases of `rates` are trained in the same pass, twice: a first set
    of heads that never sees a tenth of the training images and chooses the base on their centre crops, and a second set
    that sees all and is tested. So the backbone runs once per batch and nothing is chosen on test.

    `batch_norm`: MAE's head for ViTs (arXiv:2111.06377, App. A.1): a BatchNorm without scale and shift (eps 1e-6), then
    the linear layer. It normalises by the batch in training and by its running statistics afterwards, which are of
    all training images, those that choose the base included (their labels are not).

    `train` is the image store, `train_x`, `test_x` the features of its and the test set's centre crops in store order;
    labels below 0 mean none. Raises UserError for fewer than 20 labelled images.
    """
    labelled = (train_y >= 0).nonzero().flatten()
    fit, held_out = (labelled[part] for part in validation_split(train_y[labelled], seed))
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    fits, counts = torch.zeros(len(train_y), dtype=torch.bool), train_y >= 0
    fits[fit] = True
    batch_size = min(batch_size, len(train))
    recipe = ViewRecipe([evaluation_view(image_size, mean, std, smallest_area=0.08)])
    loader = ViewLoader(train, recipe, batch_size=batch_size, seed=seed, device=device, workers=workers)
    steps, heads = epochs * loader.steps_per_epoch, len(rates)
    bank = HeadBank(train_x.shape[1], num_classes, 2 * heads, device)
    lr = torch.tensor([*rates, *rates], dtype=torch.float32, device=device) * batch_size / 256
    norm = nn.BatchNorm1d(train_x.shape[1], eps=1e-6, affine=False) if batch_norm else nn.Identity()
    norm.to(device)
    fits, counts, labels = fits.to(device), counts.to(device), train_y.clamp_min(0).to(device)
    with frozen(backbone):
        for step in track(range(steps), "probe on augmented images", steps):
            batch = loader(step)
            index = batch.indices.to(device, non_blocking=True)
            keep = torch.cat([fits[index, None].expand(-1, heads), counts[index, None].expand(-1, heads)], 1)
            bank.step(
                norm(forward_features(backbone, batch.views[0])),
                labels[index],
                lr * cosine(step, steps),
                keep,
            )
    norm.eval()
    accuracies = bank.accuracies(norm(train_x[held_out].to(device)), train_y[held_out].to(device))
    validation = dict(zip(rates, accuracies[:heads], strict=True))
    best = max(rates, key=lambda rate: (validation[rate], -rate))
    ranking = bank.rank(norm(test_x.to(device)), heads + list(rates).index(best)).cpu()
    return ProbeResult(top1(ranking[:, 0], test_y), best, validation, ranking)


def evaluation_view(image_size: int, mean: Sequence[float], std: Sequence[float], smallest_area: float) -> View:
    """Random resized crop (bilinear) and flip, nothing else: the augmentation of linear evaluation."""
    return View(size=image_size, scale=(smallest_area, 1.0), flip=0.5, mean=channels(mean), std=channels(std))


# ---- protocols -------------------------------------------------------------------------------------------------------


def protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """`linear_probe` of the label. The result stays with the candidate, for a factor that is the label."""
    data = setup.labeled(candidate)
    result = linear_probe(*data, num_classes=setup.num_classes, seed=setup.seed, device=setup.device)
    candidate.label_probe = result
    n = len(data.train_y)
    text = probe_sentence(setup, n, len(data.test_y))
    settings = probe_settings(setup, n)
    chosen = chosen_rate("learning_rate", result)
    return accuracy_rows(setup, "linear", result.ranking, data.test_y, settings, text, chosen)


def augmented_protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """`linear_probe_augmented`; a BatchNorm before the head of a ViT."""
    data, is_vit, epochs = setup.labeled(candidate), setup.pooling is not None, setup.augmented_epochs
    result = linear_probe_augmented(
        candidate.module,
        setup.train,
        candidate.train_x,
        labels_of(setup.train),
        data.test_x,
        data.test_y,
        image_size=setup.image_size,
        mean=setup.mean,
        std=setup.std,
        epochs=epochs,
        seed=setup.seed,
        device=setup.device,
        workers=setup.workers,
        batch_norm=is_vit,
    )
    n, rates = len(data.train_y), BASE_LEARNING_RATES
    settings = trained_settings(
        setup,
        n,
        optimizer=SGD,
        standardised=False,
        batch_size=256,
        epochs=epochs,
        base_learning_rates=list(rates),
        augmentation="random resized crop (area 0.08 to 1, bilinear) and flip",
    )
    norm = ""
    if is_vit:
        settings["head"] = "BatchNorm without scale and shift (eps 1e-6), linear"
        norm = ", behind a BatchNorm without scale and shift as MAE's"
    text = (
        f"Linear classifier{norm} on the frozen backbone as in SimCLR's App. B.6: every epoch a new random resized "
        f"crop (8 to 100 % of the area) and flip of each of the {n:,} training images; SGD with Nesterov momentum "
        f"0.9, cosine, no weight decay, batch 256, {epochs} epochs; base learning rate (times batch / 256) out of "
        f"{len(rates)} from {min(rates):g} to {max(rates):g}, chosen on a tenth of the training images; tested "
        f"once on {len(data.test_y):,} images ({setup.geometry})."
    )
    chosen = chosen_rate("base_learning_rate", result)
    return accuracy_rows(setup, "linear-augmented", result.ranking, data.test_y, settings, text, chosen)


def probe_settings(setup: EvalSetup, n: int) -> Row:
    """The settings of `linear_probe` on n training images."""
    return trained_settings(
        setup,
        n,
        optimizer=SGD,
        standardised=True,
        batch_size=256,
        epochs=EPOCHS,
        min_steps=MIN_STEPS,
        learning_rates=list(LEARNING_RATES),
    )


def probe_sentence(setup: EvalSetup, n: int, test_n: int) -> str:
    """`linear_probe` in words."""
    return (
        f"Linear classifier on cached features ({setup.geometry}, no augmentation), standardised by training "
        f"statistics; SGD with Nesterov momentum 0.9, cosine, no weight decay, batch 256, {EPOCHS} epochs "
        f"(at least {MIN_STEPS} steps); learning rate out of {len(LEARNING_RATES)} from "
        f"{min(LEARNING_RATES):g} to {max(LEARNING_RATES):g}, chosen on a tenth of the {n:,} "
        f"training images, then trained on all of them; tested once on {test_n:,}."
    )


def chosen_rate(name: str, result: ProbeResult) -> Row:
    """What a probe chose, for its row; `name` is that of the learning rate."""
    return {
        name: result.learning_rate,
        "at_edge_of_sweep": result.at_edge,
        "validation_top1": {f"{rate:g}": value for rate, value in result.validation.items()},
    }


def trained_settings(setup: EvalSetup, n: int, *, optimizer: str, **more: object) -> Row:
    """The settings of a probe that was trained on n labeled images, its rate chosen on a tenth of them."""
    return setup.settings(
        optimizer=optimizer,
        schedule="cosine",
        weight_decay=0.0,
        labelled_train_images=n,
        selection="top-1 on a stratified tenth of the training images, then trained on all",
        **more,
    )
