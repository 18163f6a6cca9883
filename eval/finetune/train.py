"""Training of the whole network with labels.

    recipe = resolve(Recipe(epochs=30), backbone, image_size=32, images=len(train))
    result = finetune(backbone, train, test, recipe, image_size=32, mean=mean, std=std, num_classes=10)

Nothing is selected, unless `choose_rate` is asked; it uses training images alone. The last step's network reads the
test set once. A run repeats exactly (on a GPU up to the order of its sums), see `eval.finetune.batches`.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data import Images
from common.environment import has_bf16
from common.errors import UserError
from common.optim import set_lr
from common.rng import generator
from common.schedules import cosine_schedule, scaled_lr
from eval.features import normalizer
from eval.finetune.batches import Batches, keep_random_states, seed_all
from eval.finetune.model import Classifier, parameter_groups, set_drop_path
from eval.finetune.recipe import ResolvedRecipe
from eval.setup import labels_of, top1


@dataclass
class Finetuned:
    """`accuracy` is the test top-1 in percent, NaN where the training diverged."""

    accuracy: float
    predictions: Tensor  # int64 [N_test labelled]
    recipe: ResolvedRecipe  # as it was run
    details: dict[str, Any]  # steps, peak rate, last training loss, seconds: what no comparison depends on
    model: Classifier


def finetune(
    backbone: nn.Module,
    train: Images,
    test: Images,
    recipe: ResolvedRecipe,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    workers: int = 2,
    log: Callable[[str], None] = lambda line: None,
) -> Finetuned:
    """Train all of `backbone` and a new head on the labelled images of `train`, then read `test` once.

    A negative label means none. `batch_size` is that of the test. The backbone itself is changed: pass a copy.
    Deterministic in `seed`. Raises UserError for fewer than two labelled images, or images smaller than `image_size`.
    """
    labeled = (labels_of(train) >= 0).nonzero().flatten()
    recipe = recipe.for_images(len(labeled))
    set_drop_path(backbone, recipe.drop_path)
    model = Classifier(backbone, num_classes, recipe.pool, seed).requires_grad_(True)
    model = model.to(device).to(memory_format=torch.channels_last)
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    bf16 = _bf16(recipe.precision, device)
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=bf16)

    batches = Batches(
        train.subset(labeled),
        recipe,
        num_classes=num_classes,
        image_size=image_size,
        mean=mean,
        std=std,
        seed=seed,
        device=device,
        workers=workers,
    )
    per_epoch = batches.loader.steps_per_epoch
    steps, warmup = recipe.epochs * per_epoch, int(recipe.warmup_epochs * per_epoch)
    peak, start = scaled_lr(recipe.base_lr, recipe.batch_size, "linear"), time.perf_counter()
    log_every = math.ceil(recipe.epochs / 4) * per_epoch
    last_loss = math.nan
    model.train()
    with keep_random_states(device):
        for step in range(steps):
            seed_all(seed, "fine-tuning", step)
            set_lr(optimizer, cosine_schedule(step, base=peak, total=steps, warmup=warmup, final=recipe.min_lr))
            images, targets = batches(step)
            with autocast():
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % log_every == 0 or step + 1 == steps:
                last_loss, seconds = loss.item(), time.perf_counter() - start
                log(
                    f"epoch {(step + 1) / per_epoch:.0f}/{recipe.epochs}, loss {last_loss:.3f}, "
                    f"{(step + 1) * recipe.batch_size / seconds:.0f} images/s"
                )
                if not math.isfinite(last_loss):
                    break
    batches.close()
    details = {
        "steps": steps,
        "peak_lr": peak,
        "last_loss": last_loss,
        "seconds": round(time.perf_counter() - start, 1),
        "precision": "bf16" if bf16 else "float32",
    }

    test_labels = labels_of(test)
    keep = test_labels >= 0
    predictions = _predict(model, test, image_size, mean, std, device, batch_size, autocast)[keep]
    accuracy = top1(predictions, test_labels[keep])
    if not math.isfinite(last_loss):
        log(f"the loss is {last_loss} at step {step + 1}: training diverged, no accuracy; lower the base_lr")
        accuracy = math.nan
    return Finetuned(accuracy, predictions, recipe, details, model)


def choose_rate(
    backbone: nn.Module,
    train: Images,
    recipe: ResolvedRecipe,
    rates: Sequence[float],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    workers: int = 2,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[float, dict[float, float]]:
    """(best base_lr, accuracy of each of `rates`): the one that does best on a fifth of the labelled images of `train`,
    held out, for a copy of the backbone trained on the others; of equals the lowest. Other arguments as `finetune`.

    Raises UserError for fewer than ten labelled images.
    """
    labeled = (labels_of(train) >= 0).nonzero().flatten()
    if len(labeled) < 10:
        raise UserError(f"choosing a rate holds out a fifth of the labelled images, and there are {len(labeled)}.")
    order = labeled[torch.randperm(len(labeled), generator=generator(seed, "fine-tuning holdout"))]
    held_out, fit = (train.subset(part.sort().values) for part in order.tensor_split([len(order) // 5]))
    found = {}
    for rate in sorted(set(rates)):
        result = finetune(
            copy.deepcopy(backbone),
            fit,
            held_out,
            replace(recipe, base_lr=rate),
            image_size=image_size,
            mean=mean,
            std=std,
            num_classes=num_classes,
            seed=seed,
            device=device,
            batch_size=batch_size,
            workers=workers,
            log=partial(_log_trial, log, rate),
        )
        found[rate] = result.accuracy
    best = max(found, key=lambda rate: -math.inf if math.isnan(found[rate]) else found[rate])
    log(f"base_lr {best:g} out of {', '.join(f'{rate:g} ({value:.1f} %)' for rate, value in found.items())}")
    return best, found


def _log_trial(log: Callable[[str], None], rate: float, line: str) -> None:
    log(f"trying {rate:g}: {line}")


@torch.no_grad()
def _predict(
    model: Classifier,
    store: Images,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """Classes of all images, int64 [N] on the CPU, in store order."""
    normalize, found = normalizer(mean, std, device), []
    model.eval()
    for start in range(0, len(store), batch_size):
        images = normalize(store.eval_images(start, min(start + batch_size, len(store)), image_size))
        with autocast():
            found.append(model(images).argmax(1).cpu())
    return torch.cat(found)


def _bf16(precision: str, device: torch.device | str) -> bool:
    if precision == "auto":
        return torch.device(device).type == "cuda" and has_bf16()
    return precision == "bf16"
