"""One evaluation for all methods: the same code and the same constants, the two baselines in the same table.

`evaluate` runs the asked protocols on frozen features of the backbone, of raw pixels and of the same network with
random weights; fine-tuning trains copies of the backbone and of that network. What is chosen (learning rates,
penalties) is chosen on a part of the training set; test is read once.
A new protocol is a function (Context, Subject) -> rows and a line in `PROTOCOLS`.
"""

import copy
import dataclasses
import difflib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from common.augment import ViewRecipe
from common.data import ViewLoader
from common.errors import UserError
from common.shapes import FACTORS, render
from eval import finetune, knn, linear, metrics, probes, rotation
from eval.features import Pooled, RawPixels, extract_features, forward_features, frozen, normaliser, pooled, pooling
from eval.finetune import NOTHING, Recipe

DEFAULT = ("knn", "linear", "metrics", "factors")
LABEL_FREE_IMAGES = 10_000  # spectra of more rows cost more and say the same
ALIGNMENT_IMAGES = 2_048
PROFILE_IMAGES = 512
RAW, RANDOM = "raw pixels", "random init"


@dataclass
class Subject:
    """What is scored: the backbone or a baseline, with its features of all training and test images [N, D] (CPU)."""

    name: str
    module: nn.Module
    train_x: Tensor
    test_x: Tensor
    label_probe: linear.ProbeResult | None = None  # of "linear", for a factor that is the label


@dataclass
class Context:
    """What the protocols of one evaluation share."""

    train: object
    test: object
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device | str
    seed: int
    batch_size: int
    augmented_epochs: int
    workers: int
    pooling: str | None  # of a ViT's tokens, None for other networks
    pool: str
    recipe: Recipe
    log: Callable[[str], None]

    def labelled(self, subject: Subject) -> dict[str, Tensor]:
        """train_x, train_y, test_x, test_y of the images that have a label (a negative one means none)."""
        arguments = {}
        for split, store, x in (("train", self.train, subject.train_x), ("test", self.test, subject.test_x)):
            keep, y = store.labels >= 0, store.labels
            if not bool(keep.all()):  # no copy of large features where it is not needed
                x, y = x[keep], y[keep]
            arguments |= {f"{split}_x": x, f"{split}_y": y}
        return arguments

    @property
    def geometry(self) -> str:
        """How an image becomes an input, in words."""
        if self.image_size >= 160:  # `eval_images`
            return f"shorter side resized to {round(self.image_size / 0.875)}, centre crop of {self.image_size} px"
        return f"whole image at {self.image_size} px (centre square)"

    @property
    def classes(self) -> int:
        return 1 + max(int(self.train.labels.max()), int(self.test.labels.max()), len(self.train.class_names or ()) - 1)

    def settings(self, **own) -> dict:
        """A row's settings: what all protocols share, then its own."""
        tokens = {} if self.pooling is None else {"pooling": self.pooling}
        return {"image_size": self.image_size, "geometry": self.geometry, "features": "backbone, eval mode, frozen",
                "train_images": len(self.train), "test_images": len(self.test), **tokens, **own}


@dataclass
class Evaluation:
    """The rows (see `evaluate`), the backbone's features [N, D] on the CPU, and what could not be run and why."""

    rows: list[dict]
    train_features: Tensor
    test_features: Tensor
    skipped: dict[str, str] = field(default_factory=dict)


def _row(protocol: str, target: str, metric: str, value: float, settings: dict, text: str, **more) -> dict:
    return {"protocol": protocol, "target": target, "metric": metric, "value": float(value), "settings": settings,
            "text": text, **more}


def _chosen(name: str, result: linear.ProbeResult) -> dict:
    # Not among the settings: two seeds of one protocol may choose differently and still be compared.
    return {name: result.learning_rate, "at_edge_of_sweep": result.at_edge,
            "validation_top1": {f"{rate:g}": value for rate, value in result.validation.items()}}


# ---- protocols -------------------------------------------------------------------------------------------------------


def _knn(context: Context, subject: Subject) -> list[dict]:
    data = context.labelled(subject)
    n, test_n = len(data["train_y"]), len(data["test_y"])
    settings = tuple(dict.fromkeys((min(k, n), t) for k, t in knn.SETTINGS))  # the k that is used is the one named
    scores = knn.knn_accuracy(**data, settings=settings, device=context.device)
    return [
        _row(f"knn-{k}-{t:g}", "label", "top-1", value,
             context.settings(k=k, temperature=t, similarity="cosine", weights="exp(s / T)", labelled_train_images=n),
             f"Weighted kNN (Wu et al. 2018) with k = {k}, T = {t:g}: cosine similarity of L2-normalised backbone "
             f"features, {context.geometry}, no augmentation; {n:,} labelled training images, tested on {test_n:,}.")
        for (k, t), value in scores.items()
    ]


def _linear_settings(context: Context, n: int, **own) -> dict:
    return context.settings(optimizer="SGD, Nesterov 0.9", schedule="cosine", weight_decay=0.0, labelled_train_images=n,
                            selection="top-1 on a stratified tenth of the training images, then trained on all", **own)


def _cached_settings(context: Context, n: int) -> dict:
    return _linear_settings(context, n, standardised=True, batch_size=256, epochs=linear.EPOCHS,
                            min_steps=linear.MIN_STEPS, learning_rates=list(linear.LEARNING_RATES))


def _linear_sentence(context: Context, n: int, test_n: int) -> str:
    return (f"Linear classifier on cached features ({context.geometry}, no augmentation), standardised by training "
            f"statistics; SGD with Nesterov momentum 0.9, cosine, no weight decay, batch 256, {linear.EPOCHS} epochs "
            f"(at least {linear.MIN_STEPS} steps); learning rate out of {len(linear.LEARNING_RATES)} from "
            f"{min(linear.LEARNING_RATES):g} to {max(linear.LEARNING_RATES):g}, chosen on a tenth of the {n:,} "
            f"training images, then trained on all of them; tested once on {test_n:,}.")


def _linear(context: Context, subject: Subject) -> list[dict]:
    data = context.labelled(subject)
    result = linear.linear_probe(**data, num_classes=context.classes, seed=context.seed, device=context.device)
    subject.label_probe = result
    n, test_n = len(data["train_y"]), len(data["test_y"])
    return [_row("linear", "label", "top-1", result.accuracy, _cached_settings(context, n),
                 _linear_sentence(context, n, test_n), chosen=_chosen("learning_rate", result))]


def _linear_augmented(context: Context, subject: Subject) -> list[dict]:
    data = context.labelled(subject)
    result = linear.linear_probe_augmented(
        subject.module, context.train, subject.train_x, context.train.labels, data["test_x"], data["test_y"],
        image_size=context.image_size, mean=context.mean, std=context.std, epochs=context.augmented_epochs,
        seed=context.seed, device=context.device, workers=context.workers, batch_norm=context.pooling is not None)
    n, epochs, rates = len(data["train_y"]), context.augmented_epochs, linear.BASE_LEARNING_RATES
    settings = _linear_settings(context, n, standardised=False, batch_size=256, epochs=epochs,
                                base_learning_rates=list(rates),
                                augmentation="random resized crop (area 0.08 to 1, bilinear) and flip")
    norm = ""
    if context.pooling is not None:
        settings["head"] = "BatchNorm without scale and shift (eps 1e-6), linear"
        norm = ", behind a BatchNorm without scale and shift as MAE's"
    text = (f"Linear classifier{norm} on the frozen backbone as in SimCLR's App. B.6: every epoch a new random resized "
            f"crop (8 to 100 % of the area) and flip of each of the {n:,} training images; SGD with Nesterov momentum "
            f"0.9, cosine, no weight decay, batch 256, {epochs} epochs; base learning rate (times batch / 256) out of "
            f"{len(rates)} from {min(rates):g} to {max(rates):g}, chosen on a tenth of the training images; tested "
            f"once on {len(data['test_y']):,} images ({context.geometry}).")
    return [_row("linear-augmented", "label", "top-1", result.accuracy, settings, text,
                 chosen=_chosen("base_learning_rate", result))]


def _label_free(context: Context, subject: Subject) -> list[dict]:
    x = subject.test_x
    if len(x) > LABEL_FREE_IMAGES:
        x = x[torch.linspace(0, len(x) - 1, LABEL_FREE_IMAGES).long()]
    x = x.to(context.device)
    sigma = metrics.singular_values(x)
    n, d = x.shape
    where = f"of the features of {n:,} test images ({context.geometry})"
    rows = [
        ("RankMe", metrics.rankme_of_spectrum(sigma), f"RankMe (Garrido et al. 2023, eps 1e-7) {where}, not centred.",
         {"eps": 1e-7}),
        ("rank", metrics.rank_of_spectrum(sigma, max(n, d)),
         f"Numerical rank {where}: singular values above max(N, D) * eps(float32) * the largest.", {}),
        ("alpha-ReQ", metrics.alpha_req(x), f"alpha-ReQ (Agrawal et al. 2022) {where}: power-law exponent of the "
         "covariance spectrum, ranks 4 to 100, weights 1/j.", {"ranks": [4, 100]}),
        ("feature std", metrics.feature_std(x), f"SimSiam's collapse signal {where}: standard deviation of the "
         "L2-normalised features, averaged over dimensions, times sqrt(D); 1 = spread evenly, 0 = collapsed.", {}),
        ("uniformity", metrics.uniformity(x) if n > 1 else math.nan,
         f"Uniformity (Wang & Isola 2020, t = 2) {where}; 0 = collapsed, -4 = even.", {"t": 2}),
        _alignment(context, subject),
    ]
    return [_row("label-free", "features", metric, value, context.settings(images=n, dimensions=d, **own), text)
            for metric, value, text, own in rows]


def _alignment(context: Context, subject: Subject) -> tuple[str, float, str, dict]:
    """(metric, value, text, settings) from two random crops and flips of some test images, alike for every method."""
    if len(context.test) < 2 or context.test.side < context.image_size:  # no crop of that size without enlarging
        return "alignment", math.nan, "", {}
    view = linear.evaluation_view(context.image_size, context.mean, context.std, smallest_area=0.2)
    batch_size = min(context.batch_size, len(context.test), ALIGNMENT_IMAGES)
    loader = ViewLoader(context.test, ViewRecipe([view, view]), batch_size=batch_size, seed=context.seed,
                        device=context.device, workers=context.workers)
    steps = min(loader.steps_per_epoch, max(1, ALIGNMENT_IMAGES // batch_size))
    with frozen(subject.module):
        pairs = [[forward_features(subject.module, view) for view in loader(step).views] for step in range(steps)]
    value = metrics.alignment(*(torch.cat(part) for part in zip(*pairs, strict=True)))
    n = steps * batch_size
    text = (f"Alignment (Wang & Isola 2020, power 2) of two random resized crops (20 to 100 % of the area) and flips "
            f"of {n:,} test images; 0 = the same direction, 2 = unrelated.")
    return "alignment", value, text, {"views": "random resized crop (area 0.2 to 1), flip", "pairs": n}


def _factors(context: Context, subject: Subject) -> list[dict]:
    names = list(context.train.factors)
    n, test_n = len(context.train), len(context.test)
    options = {"seed": context.seed, "device": context.device}
    rows, train, test = {}, {}, {}
    for name in names:
        factor, values = FACTORS[name], (context.train.factors[name], context.test.factors[name])
        if factor.kind == "categorical":
            is_label = name == context.train.label_name and torch.equal(values[0], context.train.labels)
            if is_label and subject.label_probe is not None and torch.equal(values[1], context.test.labels):
                result = subject.label_probe  # the same images, the same targets: the same number
            else:
                result = linear.linear_probe(subject.train_x, values[0], subject.test_x, values[1],
                                             num_classes=factor.n, **options)
            rows[name] = _row("factor-linear", name, "top-1", result.accuracy, _cached_settings(context, n),
                              f"Factor {name!r} ({factor.text}): {_linear_sentence(context, n, test_n)}",
                              chosen=_chosen("learning_rate", result))
        else:
            if factor.kind == "circular":
                values = tuple(probes.circular_target(v, factor.high - factor.low) for v in values)
            train[name], test[name] = values
    for name, (value, penalty) in probes.ridge_probes(subject.train_x, train, subject.test_x, test, **options).items():
        what = f"{'the cosine and sine of ' * (FACTORS[name].kind == 'circular')}{name!r} ({FACTORS[name].text})"
        settings = context.settings(model="ridge regression, closed form", standardised=True, kind=FACTORS[name].kind,
                                    penalties=list(probes.PENALTIES),
                                    selection="R2 on a tenth of the training images, then solved on all")
        text = (f"Ridge regression of {what} from standardised backbone features; penalty chosen on a tenth of the "
                f"{n:,} training images; R2 on {test_n:,} test images (1 = exact, 0 = no better than the mean).")
        rows[name] = _row("factor-linear", name, "R2", value, settings, text, chosen={"penalty": penalty})
    return [rows[name] for name in names] + _invariance(context, subject)


def _invariance(context: Context, subject: Subject) -> list[dict]:
    factors = {name: value[:PROFILE_IMAGES] for name, value in context.test.factors.items()}
    n = len(next(iter(factors.values())))
    normalise = normaliser(context.mean, context.std, context.device)

    def features(images: Tensor) -> Tensor:
        parts = images.split(context.batch_size)
        return torch.cat([forward_features(subject.module, normalise(part)).cpu() for part in parts])

    with frozen(subject.module):
        profile = probes.invariance_profile(
            features, factors, lambda values: render(values, context.image_size), probes.drawable)
    return [_row("invariance", name, "relative distance", value, context.settings(images=n),
                 f"Mean cosine distance of centred features between test images that differ in {name!r} alone, divided "
                 f"by that between random images ({n} pairs): 0 = invariant, 1 = as different as two random images.")
            for name, value in profile.items()]


def _rotation(context: Context, subject: Subject) -> list[dict]:
    options = {"image_size": context.image_size, "mean": context.mean, "std": context.std, "device": context.device,
               "batch_size": context.batch_size}
    train, test = (rotation.turned_features(subject.module, store, x, count, **options) for store, x, count in (
        (context.train, subject.train_x, rotation.TRAIN_IMAGES), (context.test, subject.test_x, rotation.TEST_IMAGES)))
    result = rotation.rotation_probe(train, test, seed=context.seed, device=context.device)
    n, m = len(train) - len(train) % linear.VALIDATION, len(test)
    settings = _cached_settings(context, rotation.TURNS * n) | {
        "images": [n, m], "degrees": [0, 90, 180, 270], "chance": rotation.CHANCE,
        "selection": "top-1 on a tenth of the training images with their four turns, then trained on all"}
    del settings["labelled_train_images"]
    text = (f"Which way an image is turned (0, 90, 180 or 270 degrees; chance {rotation.CHANCE:g} %), after Reed et "
            f"al. 2021: {n:,} training and {m:,} test images at all four turns, none of the labels. "
            f"{_linear_sentence(context, rotation.TURNS * n, rotation.TURNS * m)} Misleading where turns were among "
            "the augmentations, or where images have no upright.")
    return [_row("rotation", "rotation", "top-1", result.accuracy, settings, text,
                 chosen=_chosen("learning_rate", result))]


def _finetune(context: Context, subject: Subject) -> list[dict]:
    labelled = (context.train.labels >= 0).nonzero().flatten()
    return _finetuned(context, subject, "finetune", labelled, "all labelled images", {})


def _lowshot(context: Context, subject: Subject) -> list[dict]:
    labels, seed, rows = context.train.labels, context.recipe.subset_seed, []
    for name, count in finetune.label_counts(context.recipe.labels, labels).items():
        images = finetune.label_subset(labels, count, seed)
        about = f"{count:,} labelled images, equally many of every class, the same in every run (subset seed {seed})"
        own = {"subset": "equally many of every class, in the order of one random permutation of the images",
               "subset_seed": seed, "subset_hash": finetune.subset_hash(images)}
        rows += _finetuned(context, subject, f"lowshot-{name}", images, about, own)
    return rows


def _finetuned(context: Context, subject: Subject, protocol: str, images: Tensor, about: str, own: dict) -> list[dict]:
    """The row of the backbone, or for random weights a row a baseline, under the baseline's own name."""
    if subject.name == RAW:
        return []
    backbone = subject.module.backbone if isinstance(subject.module, Pooled) else subject.module
    recipe = finetune.recipe_for(backbone, context.image_size, context.recipe, context.pool)
    recipe = finetune.planned(recipe, len(images))
    runs = {subject.name: recipe}
    if subject.name == RANDOM:  # one rate for all layers: a lower one below is for weights that were learnt
        runs = {RANDOM if times == 1 else f"{RANDOM}, {times}x epochs": dataclasses.replace(
            recipe, epochs=times * recipe.epochs, layer_decay=1.0) for times in finetune.multiples(recipe.scratch)}
    rows = []
    for name, chosen in runs.items():
        train, more = finetune.subset(context.train, images), {}
        options = dict(
            image_size=context.image_size, mean=context.mean, std=context.std, num_classes=context.classes,
            seed=context.seed, device=context.device, batch_size=context.batch_size, workers=context.workers,
            log=lambda line, name=name: context.log(f"evaluation: {protocol}, {name}: {line}"))
        if recipe.rates:
            rate, tried = finetune.choose_rate(backbone, train, chosen, **options)
            chosen = dataclasses.replace(chosen, base_lr=rate)
            more["chosen"] = {"base_learning_rate": rate, "at_edge_of_sweep": rate in (min(tried), max(tried)),
                              "validation_top1": {f"{value:g}": found for value, found in tried.items()}}
        result = finetune.finetune(copy.deepcopy(backbone), train, context.test, chosen, **options)
        settings = context.settings(**recipe.settings(), **own, labelled_train_images=len(images), lr_scaling="linear",
                                    schedule="cosine", selection="none: the network of the last step")
        if recipe.rates:
            settings["base_lr"] = f"{_rates(recipe)}, chosen on a fifth of the labelled training images"
        settings["features"] = "backbone, trained together with a linear head"
        if context.pooling is not None:  # the head's, which need not be that of the frozen features
            settings["pooling"] = pooling(pooled(backbone, recipe.pool))
        rows.append(_row(protocol, "label", "top-1", result.accuracy, settings, _finetune_sentence(
            context, recipe, about), details=result.details, baseline=name, **more))
    return rows


def _rates(recipe: Recipe) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(finetune.rates(recipe.rates)))


def _finetune_sentence(context: Context, r: Recipe, about: str) -> str:
    parts = [f"crop of {100 * r.crop:g} to 100 % of the area and flip"]
    parts += [f"RandAugment {r.rand_augment}"] * (r.rand_augment != "none")
    parts += [f"{name} {value:g}" for name, value in (("random erasing", r.erase), ("mixup", r.mixup), (
        "cutmix", r.cutmix), ("label smoothing", r.smoothing), ("drop path", r.drop_path)) if value]
    optimizer = {"adamw": "AdamW", "sgd": "SGD with Nesterov momentum 0.9"}[r.optimizer]
    rate = f"rate {r.base_lr:g}"
    if r.rates:
        rate = f"for each network the rate out of {_rates(r)} that does best on a fifth of these images, held out,"
    decay = f", each layer {r.layer_decay:g} times the one above" if r.layer_decay < 1 else ""
    return (f"The whole network trained with a new linear head on {about}: {optimizer}, {rate} times batch "
            f"/ 256{decay}, weight decay {r.weight_decay:g}, batch {r.batch_size}, {r.epochs} epochs, "
            f"{r.warmup_epochs:g} of them warm-up, cosine; {', '.join(parts)}; the last step's network tested once on "
            f"{int((context.test.labels >= 0).sum()):,} images ({context.geometry}). Random init: the same from random "
            "weights, with one rate for all layers.")


@dataclass(frozen=True)
class Protocol:
    """A name on the command line: what it computes and what the data must have ("labels", "factors" or nothing)."""

    run: Callable[[Context, Subject], list[dict]]
    needs: str | None
    about: str
    frozen: bool = True
    """Reads frozen features; otherwise it trains the network itself, and raw pixels are no baseline."""


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(_knn, "labels", "weighted kNN at (k, T) = (20, 0.07) and (200, 0.1)"),
    "linear": Protocol(_linear, "labels", "linear probe on cached features, learning rate chosen on a training split"),
    "linear-augmented": Protocol(_linear_augmented, "labels", "linear probe on augmented inputs, 100 epochs (slow)"),
    "metrics": Protocol(_label_free, None, "RankMe, rank, alpha-ReQ, feature std, uniformity, alignment"),
    "factors": Protocol(_factors, "factors", "a probe per known factor and the invariance profile (shapes only)"),
    "rotation": Protocol(_rotation, None, "linear probe of the turn by 0, 90, 180 or 270 degrees: needs no labels"),
    "finetune": Protocol(_finetune, "labels", "the whole network trained with all labels (slow)", frozen=False),
    "lowshot": Protocol(_lowshot, "labels", "the whole network trained with few labels (slow)", frozen=False),
}


# ---- running them ----------------------------------------------------------------------------------------------------


def check_names(protocols: Iterable[str]) -> None:
    """Raise UserError for an unknown protocol, naming the near and the valid ones."""
    for name in protocols:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown evaluation protocol {name!r}: {hint}protocols are {', '.join(PROTOCOLS)}.")


def cannot_run(protocols: Iterable[str], train, test, recipe: Recipe = NOTHING) -> dict[str, str]:
    """Which of `protocols` these data cannot serve, and the reason of each. Raises UserError for an unknown name."""
    protocols = list(protocols)
    check_names(protocols)
    reasons = {}
    for name in protocols:
        for split, store in (("training", train), ("test", test)):
            if PROTOCOLS[name].needs == "labels" and (store.labels is None or not bool((store.labels >= 0).any())):
                reasons[name] = (f"the {split} images of {store.name!r} have no labels, which {name} needs: name their "
                                 "column with --label-column, or ask for metrics, which needs none")
            elif PROTOCOLS[name].needs == "factors" and not store.factors:
                reasons[name] = f"the factors behind {store.name!r} are not known; only shapes has them"
        if name not in reasons and PROTOCOLS[name].needs == "labels" and train.class_names != test.class_names:
            sizes = " and ".join(str(len(store.class_names or [])) for store in (train, test))
            reasons[name] = (f"training and test images of {train.name!r} have different lists of classes ({sizes}), "
                             "so their labels do not match")
    if "lowshot" in protocols and "lowshot" not in reasons:
        try:
            finetune.label_counts(recipe.labels, train.labels)
        except UserError as error:
            reasons["lowshot"] = str(error)
    return reasons


def check_protocols(protocols: Iterable[str], train, test, recipe: Recipe = NOTHING) -> None:
    """Raise UserError for an unknown protocol, or one that these data cannot serve. Call it before the training."""
    for reason in cannot_run(protocols, train, test, recipe).values():
        raise UserError(f"{reason}.")


def evaluate(
    backbone: nn.Module,
    train,
    test,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    protocols: Sequence[str] = DEFAULT,
    random_init: nn.Module | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    batch_size: int = 512,
    augmented_epochs: int = 100,
    workers: int = 2,
    pool: str = "auto",
    recipe: Recipe = NOTHING,
    baselines: bool = True,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Run `protocols` on `backbone` and on the baselines; `train` and `test` are stores, modules are moved to `device`.

    A row is {"protocol", "target", "metric", "value", "settings", "text", "baselines", and where something was chosen
    "chosen"}: accuracies in percent, `settings` everything that defines the protocol, `text` one sentence, `baselines`
    {"raw pixels": value, "random init": value}; fine-tuning has random weights trained for as many and for three times
    the epochs, and as "details" what no comparison depends on.
    `pool`: which tokens of a ViT are its features (`eval.features.Pooled`); `recipe`: of fine-tuning; `baselines`: off
    scores the backbone alone, which is a fifth of the work, for runs whose baselines stand in other cards.
    Protocols that the data cannot serve are skipped, logged, and listed with their reason in `.skipped`; to stop
    instead, call `check_protocols` first. A value that is not defined (NaN) leaves its row or baseline out.
    Raises UserError for an unknown protocol, an empty store or features that are not finite.
    """
    protocols = list(dict.fromkeys(protocols))
    skipped = cannot_run(protocols, train, test, recipe)
    for name, reason in skipped.items():
        log(f"evaluation: {name} is skipped: {reason}.")
    asked = [PROTOCOLS[name] for name in protocols if name not in skipped]
    if not all(protocol.frozen for protocol in asked):  # its errors now, not after hours
        finetune.recipe_for(backbone, image_size, recipe, pool)
    subjects = {"backbone": pooled(backbone, pool)}
    if baselines and any(protocol.frozen for protocol in asked):
        subjects[RAW] = RawPixels()
    if baselines and random_init is not None:
        subjects[RANDOM] = pooled(random_init, pool)
    context = Context(train, test, image_size, mean, std, device, seed, batch_size, augmented_epochs, workers,
                      pooling(subjects["backbone"]), pool, recipe, log)
    evaluation = Evaluation([], torch.empty(0), torch.empty(0), skipped)
    if "knn" in protocols and "knn" not in skipped:
        n = int((train.labels >= 0).sum())
        for k, t in knn.SETTINGS:
            if k > n:
                log(f"evaluation: kNN with k = {k}, T = {t:g} has only {n} training images: k is {n}, and named so.")
    for name, module in subjects.items():
        start = time.perf_counter()
        module = module.to(device)
        extract = {"image_size": image_size, "mean": mean, "std": std, "device": device, "batch_size": batch_size}
        if name == "backbone" or any(protocol.frozen for protocol in asked):
            x = [extract_features(module, store, **extract) for store in (train, test)]
        subject = Subject(name, module, *x)
        rows = [row for protocol in asked for row in protocol.run(context, subject)]
        if name == "backbone":
            evaluation.train_features, evaluation.test_features = x
            evaluation.rows = [{**{key: row[key] for key in row if key != "baseline"}, "baselines": {}}
                               for row in rows if not math.isnan(row["value"])]
            for row in rows:
                if math.isnan(row["value"]):
                    log(f"evaluation: {row['metric']} of {row['target']} is not defined on these images and left out.")
                if row.get("chosen", {}).get("at_edge_of_sweep"):
                    rate = row["chosen"].get("learning_rate", row["chosen"].get("base_learning_rate"))
                    log(f"evaluation: {row['protocol']} of {row['target']} chose learning rate {rate:g}, the edge of "
                        "its sweep: a better one may lie outside.")
        else:
            own = {_key(row): row for row in evaluation.rows}
            for row in rows:
                if _key(row) in own and not math.isnan(row["value"]):
                    own[_key(row)]["baselines"][row.get("baseline", name)] = row["value"]
                    if "chosen" in row and "baseline" in row:  # what random weights are fine-tuned with
                        own[_key(row)]["chosen"][f"by {row['baseline']}"] = row["chosen"]["base_learning_rate"]
        log(f"evaluation: {name}, {x[0].shape[1]} features, {time.perf_counter() - start:.1f} s")
    if RAW in subjects and image_size > RawPixels().largest:
        for row in (row for row in evaluation.rows if RAW in row["baselines"]):
            row["text"] += f" Raw pixels: the image shrunk to {RawPixels().largest} px."
    return evaluation


def _key(row: dict) -> tuple[str, str, str]:
    return row["protocol"], row["target"], row["metric"]


def merge_rows(old: Iterable[dict], new: Iterable[dict]) -> list[dict]:
    """`old` with the rows of `new` in place of those of the same protocol, target and metric, others appended."""
    merged = {_key(row): row for row in old}
    merged.update({_key(row): row for row in new})
    return list(merged.values())


def results_table(rows: Iterable[dict], title: str | None = None) -> Table:
    """The rows as a rich table: value beside the baselines."""
    rows = list(rows)
    found = dict.fromkeys(name for row in rows for name in row["baselines"])
    baselines = sorted(found, key=lambda name: (RAW, RANDOM).index(name) if name in (RAW, RANDOM) else 2)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("protocol", "target", "metric"):
        table.add_column(header, no_wrap=True)
    for header in ("value", *baselines):
        table.add_column(header, justify="right")
    for row in rows:
        form = "{:.1f} %" if row["metric"] == "top-1" else "{:.2f}"
        values = [row["value"], *(row["baselines"].get(name) for name in baselines)]
        cells = ["" if value is None else form.format(value) for value in values]
        table.add_row(row["protocol"], row["target"], row["metric"], *cells)
    return table
