"""The protocols that train the whole network: with all labels (`finetune_protocol`) or few (`lowshot_protocol`)."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from eval.features import Pooled, pooled, pooling
from eval.finetune.recipe import ResolvedRecipe, resolve
from eval.finetune.subset import label_counts, label_subset, subset_hash
from eval.finetune.train import Finetuned, choose_rate, finetune
from eval.setup import RANDOM, RAW, Candidate, EvalSetup, Row, labels_of, make_row


def finetune_protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    images = (labels_of(setup.train) >= 0).nonzero().flatten()
    return _rows(setup, candidate, "finetune", images, "all labelled images", {})


def lowshot_protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    labels, seed = labels_of(setup.train), setup.recipe.subset_seed
    rows = []
    for name, count in label_counts(setup.recipe.labels, labels).items():
        images = label_subset(labels, count, seed)
        text = f"{count:,} labelled images, equally many of every class, the same in every run (subset seed {seed})"
        settings = {
            "subset": "equally many of every class, in the order of one random permutation of the images",
            "subset_seed": seed,
            "subset_hash": subset_hash(images),
        }
        rows += _rows(setup, candidate, f"lowshot-{name}", images, text, settings)
    return rows


def _rows(
    setup: EvalSetup, candidate: Candidate, protocol: str, images: Tensor, images_text: str, subset_settings: Row
) -> list[Row]:
    """The row of the backbone; of random weights a row for each baseline, which it names; of raw pixels none."""
    if candidate.name == RAW:
        return []
    backbone = candidate.module.backbone if isinstance(candidate.module, Pooled) else candidate.module
    recipe = resolve(setup.recipe, backbone, image_size=setup.image_size, images=len(images), pool=setup.pool)
    settings = setup.settings(
        **recipe.settings(),
        **subset_settings,
        labelled_train_images=len(images),
        lr_scaling="linear",
        schedule="cosine",
        selection="none: the network of the last step",
    )
    if setup.recipe.rates:
        settings["base_lr"] = f"{_rates_text(setup)}, chosen on a fifth of the labelled training images"
    settings["features"] = "backbone, trained together with a linear head"
    if setup.pooling is not None:  # the head's, which need not be that of the frozen features
        settings["pooling"] = pooling(pooled(backbone, recipe.pool))
    trainings = {candidate.name: recipe}
    if candidate.name == RANDOM:  # one rate for all layers: a lower one below is for pretrained weights
        trainings = {
            RANDOM if times == 1 else f"{RANDOM}, {times}x epochs": replace(
                recipe, epochs=times * recipe.epochs, layer_decay=1.0
            )
            for times in dict.fromkeys(setup.recipe.scratch)
        }
    rows = []
    for name, training in trainings.items():
        chosen, result = _train(setup, backbone, images, training, log=partial(_log, setup, f"{protocol}, {name}"))
        text = _sentence(setup, recipe, images_text)
        row = make_row(protocol, "label", "top-1", result.accuracy, settings, text, chosen)
        rows.append({**row, "details": result.details, "baseline": name})
    return rows


def _train(
    setup: EvalSetup, backbone: nn.Module, images: Tensor, recipe: ResolvedRecipe, log: Callable[[str], None]
) -> tuple[Row | None, Finetuned]:
    """(what was chosen, the result) of a copy of the backbone on these images, with the best of the recipe's rates."""
    train, chosen = setup.train.subset(images), None
    if setup.recipe.rates:
        rate, tried = choose_rate(
            backbone,
            train,
            recipe,
            setup.recipe.rates,
            image_size=setup.image_size,
            mean=setup.mean,
            std=setup.std,
            num_classes=setup.num_classes,
            seed=setup.seed,
            device=setup.device,
            batch_size=setup.batch_size,
            workers=setup.workers,
            log=log,
        )
        recipe = replace(recipe, base_lr=rate)
        chosen = {
            "base_learning_rate": rate,
            "at_edge_of_sweep": rate in (min(tried), max(tried)),
            "validation_top1": {f"{value:g}": accuracy for value, accuracy in tried.items()},
        }
    result = finetune(
        copy.deepcopy(backbone),
        train,
        setup.test,
        recipe,
        image_size=setup.image_size,
        mean=setup.mean,
        std=setup.std,
        num_classes=setup.num_classes,
        seed=setup.seed,
        device=setup.device,
        batch_size=setup.batch_size,
        workers=setup.workers,
        log=log,
    )
    return chosen, result


def _log(setup: EvalSetup, training: str, line: str) -> None:
    setup.log(f"evaluation: {training}: {line}")


def _rates_text(setup: EvalSetup) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(set(setup.recipe.rates)))


def _sentence(setup: EvalSetup, r: ResolvedRecipe, images_text: str) -> str:
    parts = [f"crop of {100 * r.crop:g} to 100 % of the area and flip"]
    if r.rand_augment != "none":
        parts.append(f"RandAugment {r.rand_augment}")
    for name, value in (
        ("random erasing", r.erase),
        ("mixup", r.mixup),
        ("cutmix", r.cutmix),
        ("label smoothing", r.smoothing),
        ("drop path", r.drop_path),
    ):
        if value:
            parts.append(f"{name} {value:g}")
    optimizer = {"adamw": "AdamW", "sgd": "SGD with Nesterov momentum 0.9"}[r.optimizer]
    rate = f"rate {r.base_lr:g}"
    if setup.recipe.rates:
        rates = _rates_text(setup)
        rate = f"for each network the rate out of {rates} that does best on a fifth of these images, held out,"
    decay = f", each layer {r.layer_decay:g} times the one above" if r.layer_decay < 1 else ""
    return (
        f"The whole network trained with a new linear head on {images_text}: {optimizer}, {rate} times batch "
        f"/ 256{decay}, weight decay {r.weight_decay:g}, batch {r.batch_size}, {r.epochs} epochs, "
        f"{r.warmup_epochs:g} of them warm-up, cosine; {', '.join(parts)}; the last step's network tested once on "
        f"{int((labels_of(setup.test) >= 0).sum()):,} images ({setup.geometry}). Random init: the same from random "
        "weights, with one rate for all layers."
    )
