"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, arXiv:1805.01978, section 3.4).

With L2-normalised features, s_i = cosine(x, x_i) and the k most similar training images,
    score(c) = sum over the k neighbours of exp(s_i / T) [y_i = c],   prediction = argmax_c score(c).
Published numbers use different (k, T): DINO and solo-learn (20, 0.07), lightly and MoCo's CIFAR demo (200, 0.1), and
on ImageNet k = 20 beats 200. So both are computed, from one similarity pass, and no number is quoted without its pair.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data import Images
from common.progress import track
from eval.linear import ranked
from eval.setup import Candidate, EvalSetup, Row, accuracy_rows, labels_of, top1

SETTINGS = ((20, 0.07), (200, 0.1))
BLOCK = 1 << 26  # similarities held at once (256 MiB in float32), whatever the size of the data
BANK = 1 << 16  # training images compared at once


def knn_rank(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    settings: Sequence[tuple[int, float]] = SETTINGS,
    *,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    chunk: int | None = None,
    bank: int = BANK,
) -> dict[tuple[int, float], Tensor]:
    """Classes in the order of their scores, int64 [M, at most 5] on the CPU, of `test_x` [M, D] for every (k, T) of
    `settings`, given `train_x` [N, D] with classes `train_y` [N]; -1 for a class that no neighbor has.

    `chunk` queries (default: as many as `BLOCK` allows) are compared with `bank` training images at once, which come to
    the device one bank after the other: the features need no memory there, and no normalized copy. A k larger than the
    training set means all of it. Images at exactly equal similarity are taken as `torch.topk` orders them.
    """
    labels = train_y.to(device)
    num_classes = int(num_classes if num_classes is not None else labels.max() + 1)
    chunk = chunk or max(1, min(BLOCK // min(bank, len(train_x)), 4096))
    most = min(max(k for k, _ in settings), len(train_x))
    starts = range(0, len(test_x), chunk)
    found: list[tuple[Tensor, Tensor]] = []  # of each chunk: similarity and index of its `most` nearest so far
    pairs = [(first, i) for first in range(0, len(train_x), bank) for i in range(len(starts))]
    for first, i in track(pairs, f"neighbors among {len(train_x):,} images", len(pairs)):
        if i == 0:
            part = F.normalize(train_x[first : first + bank].to(device, torch.float32), dim=1)
        queries = F.normalize(test_x[starts[i] : starts[i] + chunk].to(device, torch.float32), dim=1)
        similarity, index = (queries @ part.T).topk(min(most, len(part)), dim=1)  # sorted: a smaller k is a prefix
        if first == 0:
            found.append((similarity, index))
        else:
            similarity, index = torch.cat([found[i][0], similarity], 1), torch.cat([found[i][1], index + first], 1)
            similarity, best = similarity.topk(min(most, similarity.shape[1]), dim=1)
            found[i] = similarity, index.gather(1, best)
    ranking: dict[tuple[int, float], list[Tensor]] = {setting: [] for setting in settings}
    for similarity, index in found:
        neighbors = labels[index]  # [B, most]
        for k, temperature in settings:
            # Dividing all scores of a query by exp(s_1 / T) keeps their order and cannot overflow at small T.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            scores = weights.new_zeros(len(index), num_classes).scatter_add_(1, neighbors[:, :k], weights)
            best = ranked(scores)
            ranking[k, temperature].append(best.masked_fill(scores.gather(1, best) <= 0, -1).cpu())
    return {setting: torch.cat(parts) for setting, parts in ranking.items()}


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    settings: Sequence[tuple[int, float]] = SETTINGS,
    *,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    chunk: int | None = None,
    bank: int = BANK,
) -> dict[tuple[int, float], Tensor]:
    """Predicted classes, int64 [M] on the CPU; arguments as in `knn_rank`."""
    ranking = knn_rank(
        train_x, train_y, test_x, settings, num_classes=num_classes, device=device, chunk=chunk, bank=bank
    )
    return {setting: best[:, 0] for setting, best in ranking.items()}


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    settings: Sequence[tuple[int, float]] = SETTINGS,
    *,
    device: torch.device | str = "cpu",
    chunk: int | None = None,
) -> dict[tuple[int, float], float]:
    """Top-1 accuracy in percent for every (k, T), arguments as in `knn_predict`; `test_y` [M].

    The number of classes comes from training and test labels together, so a class that one of them lacks is no error.
    """
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    predicted = knn_predict(train_x, train_y, test_x, settings, num_classes=num_classes, device=device, chunk=chunk)
    return {setting: top1(p, test_y) for setting, p in predicted.items()}


def protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """Top-1 at every (k, T) of `SETTINGS`; where there are fewer than k training images, k is their number."""
    data = setup.labeled(candidate)
    n, test_n = len(data.train_y), len(data.test_y)
    settings = tuple(dict.fromkeys((min(k, n), t) for k, t in SETTINGS))  # the k that is used is the one named
    ranking = knn_rank(
        data.train_x, data.train_y, data.test_x, settings, num_classes=setup.num_classes, device=setup.device
    )
    return [
        row
        for (k, t), best in ranking.items()
        for row in accuracy_rows(
            setup,
            f"knn-{k}-{t:g}",
            best,
            data.test_y,
            setup.settings(k=k, temperature=t, similarity="cosine", weights="exp(s / T)", labelled_train_images=n),
            f"Weighted kNN (Wu et al. 2018) with k = {k}, T = {t:g}: cosine similarity of L2-normalised backbone "
            f"features, {setup.geometry}, no augmentation; {n:,} labelled training images, tested on {test_n:,}.",
        )
    ]


def warn_of_few_images(train: Images, log: Callable[[str], None]) -> None:
    """Log which k of `SETTINGS` are more than the labelled training images."""
    n = int((labels_of(train) >= 0).sum())
    for k, t in SETTINGS:
        if k > n:
            log(f"evaluation: kNN with k = {k}, T = {t:g} has only {n} training images: k is {n}, and named so.")
