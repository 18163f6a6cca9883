"""One evaluation for all methods: the same code and the same constants, the two baselines in the same table.

`evaluate` runs the requested protocols on frozen features of the backbone, of raw pixels and of the same network with
random weights; fine-tuning trains copies of the backbone and of that network. What is chosen (learning rates,
penalties) is chosen on a part of the training set; test is read once.
A new protocol is a function (EvalSetup, Candidate) -> rows beside its implementation, and a line in `PROTOCOLS`.
"""

import difflib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from common.data import Images
from common.errors import UserError
from common.html import duration, is_percent
from common.progress import part
from common.sources import some
from eval import knn, linear, metrics, mlp, probes, rotation
from eval.card import merge_rows, row_key
from eval.features import RawPixels, extract_features, pooled, pooling
from eval.finetune import protocol as finetune
from eval.finetune.recipe import DEFAULTS, Recipe, check
from eval.finetune.subset import label_counts
from eval.setup import RANDOM, RAW, Candidate, EvalSetup, Row, labels_of

DEFAULT = ("knn", "linear", "metrics", "factors")
FEWEST = {
    **dict.fromkeys(("linear", "linear-augmented", "mlp"), 2 * linear.VALIDATION),
    "rotation": linear.VALIDATION,
}
"""Training images that a protocol needs, with labels where it needs labels."""
MANY_CLASSES = 1000  # from here on, classes of less than two images are taken for names of images


@dataclass(frozen=True)
class Protocol:
    """A name on the command line: what it computes and what the data must have ("labels", "factors" or nothing)."""

    run: Callable[[EvalSetup, Candidate], list[Row]]
    needs: str | None
    about: str
    frozen: bool = True
    """Reads frozen features; otherwise it trains the network itself, and raw pixels are no baseline."""


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(knn.protocol, "labels", "weighted kNN at (k, T) = (20, 0.07) and (200, 0.1)"),
    "linear": Protocol(
        linear.protocol, "labels", "linear probe on cached features, learning rate chosen on a training split"
    ),
    "linear-augmented": Protocol(
        linear.augmented_protocol, "labels", "linear probe on augmented inputs, 100 epochs (slow)"
    ),
    "mlp": Protocol(
        mlp.protocol, "labels", "classifier with a hidden layer of 512, learning rate chosen as for linear"
    ),
    "metrics": Protocol(metrics.protocol, None, "RankMe, rank, alpha-ReQ, feature std, uniformity, alignment"),
    "factors": Protocol(
        probes.protocol, "factors", "a probe per known factor and the invariance profile (drawn images only)"
    ),
    "rotation": Protocol(
        rotation.protocol, None, "linear probe of the turn by 0, 90, 180 or 270 degrees: needs no labels"
    ),
    "finetune": Protocol(
        finetune.finetune_protocol, "labels", "the whole network trained with all labels (slow)", frozen=False
    ),
    "lowshot": Protocol(
        finetune.lowshot_protocol, "labels", "the whole network trained with few labels (slow)", frozen=False
    ),
}


def check_names(protocols: Iterable[str]) -> None:
    """Raise UserError for an unknown protocol, naming the near and the valid ones."""
    for name in protocols:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown evaluation protocol {name!r}: {hint}protocols are {', '.join(PROTOCOLS)}.")


def protocols_of(published: Iterable[Mapping]) -> list[str]:
    """The protocols under which `published` numbers were measured, as far as they are ours: a number's "protocol" is a
    name, or a name with its settings (knn-20-0.07)."""
    asked = (entry["protocol"] for entry in published)
    named = (name if name in PROTOCOLS else name.split("-")[0] for name in asked)
    return [name for name in dict.fromkeys(named) if name in PROTOCOLS]


def cannot_run(protocols: Iterable[str], train: Images, test: Images, recipe: Recipe = DEFAULTS) -> dict[str, str]:
    """Which of `protocols` these data cannot serve, and the reason of each. Raises UserError for an unknown name."""
    protocols = list(protocols)
    check_names(protocols)
    reasons = {}
    for name in protocols:
        for split, store in (("training", train), ("test", test)):
            if PROTOCOLS[name].needs == "labels" and (store.labels is None or not bool((store.labels >= 0).any())):
                reasons[name] = (
                    f"the {split} images of {store.name!r} have no labels, which {name} needs: name their "
                    "column with --label-column, or ask for metrics, which needs none"
                )
            elif PROTOCOLS[name].needs == "factors" and not store.factors:
                reasons[name] = f"the factors behind {store.name!r} are not known; only those of drawn images are"
        if name not in reasons and PROTOCOLS[name].needs == "labels" and (reason := _unfit_labels(train, test)):
            reasons[name] = reason
        if name not in reasons and name in FEWEST:
            labeled = PROTOCOLS[name].needs == "labels"
            there = int((labels_of(train) >= 0).sum()) if labeled else len(train)
            if there < FEWEST[name]:
                reasons[name] = (
                    f"{name} needs at least {FEWEST[name]} {'labeled ' if labeled else ''}training images to choose "
                    f"its learning rate on a tenth of them, but there are {there}"
                )
    if "lowshot" in protocols and "lowshot" not in reasons:
        try:
            label_counts(recipe.labels, labels_of(train))
        except UserError as error:
            reasons["lowshot"] = str(error)
    return reasons


def _unfit_labels(train: Images, test: Images) -> str:
    """Why the labels of `train` and `test`, of which both have some, allow no accuracy; empty if they do."""
    if train.class_names != test.class_names:
        sizes = " and ".join(str(len(store.class_names or [])) for store in (train, test))
        return (
            f"training and test images of {train.name!r} have different lists of classes ({sizes}), so their labels do "
            "not match"
        )
    train_y, test_y = (labels[labels >= 0] for labels in (labels_of(train), labels_of(test)))
    known, asked = train_y.unique(), test_y.unique()
    for what, store, classes in (("training", train, known), ("test", test, asked)):
        if len(classes) < 2:
            name = "" if store.class_names is None else f", {store.class_names[int(classes[0])]!r}"
            return f"the labeled {what} images of {store.name!r} are all of one class{name}: any guess would be right"
    if not bool(torch.isin(asked, known).any()):
        return f"no class of the test images of {test.name!r} is among those of the training images"
    if len(known) > max(MANY_CLASSES, len(train_y) // 2):
        return (
            f"the labels of {train.name!r} have {len(known):,} values for {len(train_y):,} training images: they name "
            "images and not classes. Name another column with --label-column"
        )
    return ""


def unseen_classes(train: Images, test: Images) -> str:
    """How many labeled test images are of classes without a training image, in a sentence; empty if none is."""
    if train.labels is None or test.labels is None:
        return ""
    unseen = (test.labels >= 0) & ~torch.isin(test.labels, train.labels)
    if not bool(unseen.any()):
        return ""
    names = [test.class_names[c] if test.class_names else str(c) for c in test.labels[unseen].unique().tolist()]
    return (
        f"{int(unseen.sum()):,} of the {len(test):,} test images of {test.name!r} are of classes without a training "
        f"image ({some(names)}), and always count as wrong"
    )


def check_protocols(protocols: Iterable[str], train: Images, test: Images, recipe: Recipe = DEFAULTS) -> None:
    """Raise UserError for an unknown protocol, or one that these data cannot serve. Call it before the training."""
    for reason in cannot_run(protocols, train, test, recipe).values():
        raise UserError(f"{reason}.")


# ---- running them ----------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """The rows (see `evaluate`), the backbone's features [N, D] on the CPU, and what could not be run and why.

    done: the protocols that were run so far, by the candidate: "backbone" or a baseline.
    """

    rows: list[Row]
    train_features: Tensor
    test_features: Tensor
    skipped: dict[str, str] = field(default_factory=dict)
    done: dict[str, list[str]] = field(default_factory=dict)


Features = dict[str, tuple[Tensor, Tensor]]
"""Of the training and test images, [N, D] and [M, D] on the CPU, by the name of what computed them."""


def subjects(
    backbone: nn.Module, random_init: nn.Module | None, *, raw: bool = True, pool: str = "auto"
) -> dict[str, nn.Module]:
    """What is scored, by name: the backbone and the baselines."""
    modules = {"backbone": pooled(backbone, pool)}
    if raw:
        modules[RAW] = RawPixels()
    if random_init is not None:
        modules[RANDOM] = pooled(random_init, pool)
    return modules


def evaluate(
    backbone: nn.Module,
    train: Images,
    test: Images,
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
    recipe: Recipe = DEFAULTS,
    baselines: bool = True,
    features: Features | None = None,
    top5: bool = False,
    rows: Iterable[Row] = (),
    done: Mapping[str, Collection[str]] = MappingProxyType({}),
    save: Callable[[Evaluation], None] = lambda evaluation: None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Run `protocols` on `backbone` and on the baselines; modules are moved to `device`.

    A row is {"protocol", "target", "metric", "value", "settings", "text", "baselines", and where something was chosen
    "chosen"}: accuracies in percent, `settings` everything that defines the protocol, `text` one sentence, `baselines`
    {"raw pixels": value, "random init": value}; fine-tuning has random weights trained for as many and for three times
    the epochs, and as "details" what no comparison depends on.
    `pool`: which tokens of a ViT are its features (`eval.features.Pooled`); `recipe`: for fine-tuning; `baselines`:
    False scores the backbone alone, which is a fifth of the work, for runs whose baselines are already known; `top5`:
    measure it for few classes too (`eval.setup.accuracy_rows`); `features`: those that are known already, which are
    taken out one by one, to free their memory.
    `save` gets what there is after each protocol of each candidate. Given `rows` and `done` of an evaluation that was
    broken off, what is done is not measured again; then `.train_features` may be empty.
    Protocols that the data cannot serve, and those that raise a UserError, are skipped, logged, and listed with their
    reason in `.skipped`; to stop instead, call `check_protocols` first. A value that is not defined (NaN) leaves its
    row or baseline out.
    Raises UserError for an unknown protocol, an empty store or features that are not finite.
    """
    skipped = cannot_run(protocols, train, test, recipe)
    for name, reason in skipped.items():
        log(f"evaluation: {name} is skipped: {reason}.")
    if any(PROTOCOLS[name].needs == "labels" for name in protocols) and (text := unseen_classes(train, test)):
        log(f"evaluation: {text}.")
    asked = {name: PROTOCOLS[name] for name in dict.fromkeys(protocols) if name not in skipped}
    if not all(protocol.frozen for protocol in asked.values()):
        check(recipe, backbone, image_size=image_size, pool=pool)  # its errors now, not after hours
    if "knn" in asked:
        knn.warn_of_few_images(train, log)
    raw = baselines and any(protocol.frozen for protocol in asked.values())
    modules = subjects(backbone, random_init if baselines else None, raw=raw, pool=pool)
    computed = {} if features is None else features
    setup = EvalSetup(
        train=train,
        test=test,
        image_size=image_size,
        mean=mean,
        std=std,
        device=device,
        seed=seed,
        batch_size=batch_size,
        augmented_epochs=augmented_epochs,
        workers=workers,
        pooling=pooling(modules["backbone"]),
        pool=pool,
        recipe=recipe,
        log=log,
        top5=top5,
    )
    started = {name: list(done.get(name, ())) for name in modules}
    evaluation = Evaluation(list(rows), torch.empty(0), torch.empty(0), skipped, started)
    remaining = list(modules)
    seconds: dict[str, float] = {}
    for name, module in modules.items():
        remaining.remove(name)
        start = time.perf_counter()
        with part(name):
            known = computed.pop(name, None)
            width = _score(evaluation, setup, name, module.to(device), asked, seconds, save, known)
        if width:
            left = _left(remaining, evaluation, setup, asked, seconds)
            log(f"evaluation: {name}, {width} features, {time.perf_counter() - start:.1f} s{left}")
    return evaluation


def _score(
    evaluation: Evaluation,
    setup: EvalSetup,
    name: str,
    module: nn.Module,
    asked: dict[str, Protocol],
    seconds: dict[str, float],
    save: Callable[[Evaluation], None],
    known: tuple[Tensor, Tensor] | None,
) -> int:
    """Add what `evaluation` lacks of the candidate `name`, and to `seconds` how long each part of it took if it is the
    backbone. `known`: its features, if they are. Returns their width, 0 if nothing was lacking."""
    todo = {key: protocol for key, protocol in asked.items() if key not in evaluation.done[name]}
    is_backbone, start = name == "backbone", time.perf_counter()
    if not todo and not is_backbone:
        return 0
    stores = [setup.train, setup.test] if todo else [setup.test]
    *train_x, test_x = known or (
        extract_features(
            module,
            store,
            image_size=setup.image_size,
            mean=setup.mean,
            std=setup.std,
            device=setup.device,
            batch_size=setup.batch_size,
        )
        for store in stores
    )
    candidate = Candidate(name, module, train_x[0] if train_x else test_x[:0], test_x)
    if is_backbone:
        evaluation.train_features, evaluation.test_features = candidate.train_x, candidate.test_x
        seconds["features"] = time.perf_counter() - start
    for key, protocol in todo.items():
        start = time.perf_counter()
        try:
            with part(key):
                found = protocol.run(setup, candidate)
        except UserError as error:  # the others' rows are not lost
            setup.log(f"evaluation: {key} of {name} is skipped: {error}")
            if is_backbone:
                evaluation.skipped[key] = str(error).rstrip(".")
                del asked[key]
            continue
        if is_backbone:
            seconds[key] = time.perf_counter() - start
            evaluation.rows = merge_rows(evaluation.rows, _backbone_rows(found, setup.log))
        else:
            _add_baseline(evaluation.rows, name, found, setup.image_size)
        evaluation.done[name].append(key)
        save(evaluation)
    return test_x.shape[1] if todo else 0


def _left(
    remaining: Collection[str],
    evaluation: Evaluation,
    setup: EvalSetup,
    asked: Mapping[str, Protocol],
    seconds: Mapping[str, float],
) -> str:
    """How long the `remaining` candidates will take, in words, judged by the backbone; empty where it cannot be.

    Random weights take as long. Of raw pixels, probes take longer at most by the number of features.
    """
    if not remaining or seconds.keys() != {"features", *asked}:
        return ""
    total, width = 0.0, evaluation.test_features.shape[1]
    raw_width = 3 * min(setup.image_size, RawPixels().largest) ** 2
    if 2 * len(setup.train) <= raw_width:
        raw_width = len(setup.train)  # `linear.project_to_row_space`
    for name in remaining:
        total += seconds["features"]
        for key in set(asked) - set(evaluation.done[name]):
            if asked[key].frozen:
                wider = name == RAW and key in ("knn", "linear", "factors")
                total += seconds[key] * (max(1.0, raw_width / width) if wider else 1)
            elif name != RAW:
                total += seconds[key] * sum(dict.fromkeys(setup.recipe.scratch))
    return f"; {' and '.join(remaining)} will take at most about {duration(total)}"


def _backbone_rows(rows: Iterable[Row], log: Callable[[str], None]) -> list[Row]:
    """The rows whose value is defined, with room for baselines. Logs the others, and choices at the edge of a sweep."""
    defined = []
    for row in rows:
        if math.isnan(row["value"]):
            log(f"evaluation: {row['metric']} of {row['target']} is not defined on these images and left out.")
        else:
            defined.append({**{key: row[key] for key in row if key != "baseline"}, "baselines": {}})
        if row.get("chosen", {}).get("at_edge_of_sweep"):
            rate = row["chosen"].get("learning_rate", row["chosen"].get("base_learning_rate"))
            log(
                f"evaluation: {row['protocol']} of {row['target']} chose learning rate {rate:g}, the edge of "
                "its sweep: a better one may lie outside."
            )
    return defined


def _add_baseline(rows: Iterable[Row], name: str, baseline_rows: Iterable[Row], image_size: int) -> None:
    """Add the values of a baseline to the backbone's `rows`. A row's own "baseline" is a name that replaces `name`."""
    by_key = {row_key(row): row for row in rows}
    shrunk = f" Raw pixels: the image shrunk to {RawPixels().largest} px."
    for row in baseline_rows:
        target = by_key.get(row_key(row))
        if target is None or math.isnan(row["value"]):
            continue
        target["baselines"][row.get("baseline", name)] = row["value"]
        if name == RAW and image_size > RawPixels().largest and not target["text"].endswith(shrunk):
            target["text"] += shrunk
        if "chosen" in row and "baseline" in row:  # what random weights are fine-tuned with
            target["chosen"][f"by {row['baseline']}"] = row["chosen"]["base_learning_rate"]


def results_table(rows: Iterable[Row], title: str | None = None) -> Table:
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
        form = "{:.1f} %" if is_percent(row["metric"]) else "{:.2f}"
        values = [row["value"], *(row["baselines"].get(name) for name in baselines)]
        cells = ["" if value is None else form.format(value) for value in values]
        table.add_row(row["protocol"], row["target"], row["metric"], *cells)
    return table
