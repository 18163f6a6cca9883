"""What every method does with a backbone: online kNN during training, then evaluation, result card and report."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common import rng
from common.backbones import WEIGHTS, BackboneSpec, multiply_adds
from common.data import Images
from common.environment import peak_memory
from common.files import sha256
from common.html import duration
from common.progress import Display
from common.run import Run
from common.views.recipe import ViewRecipe
from eval.card import (
    FILE,
    Card,
    describe_data,
    earlier_card,
    keep_earlier_rows,
    make_card,
    measured_before,
    save_card,
    unfinished,
    with_comparison,
)
from eval.features import extract_features
from eval.finetune.recipe import DEFAULTS, Recipe
from eval.knn import knn_accuracy
from eval.load import load, random_init
from eval.protocols import DEFAULT, Evaluation, Features, cannot_run, evaluate, results_table, subjects
from eval.report import write_report
from eval.rotation import sample
from eval.setup import labels_of

REPORT_IMAGES = 2000


def online_knn(run: Run, step: int, backbone: torch.nn.Module, spec: BackboneSpec, train: Images, test: Images) -> None:
    """Weighted kNN (k = 20, T = 0.07) of the backbone after `step`, logged to metrics.jsonl. All processes call it and
    share the images.

    The same function as the final evaluation; nothing where that cannot score these data. For monitoring only: choosing
    a checkpoint by it is choosing on test.
    """
    if cannot_run(["knn"], train, test):
        return
    parts: list[Tensor] = []
    for store in (train, test):
        labeled = store.subset((labels_of(store) >= 0).nonzero().flatten())
        parts += [_extract(run, backbone, spec, labeled), labels_of(labeled)]
    if not run.main:
        return
    train_x, train_y, test_x, test_y = parts
    scores = knn_accuracy(train_x, train_y, test_x, test_y, settings=((20, 0.07),), device=run.accelerator.device)
    run.event(step, "online_knn", accuracy=next(iter(scores.values())))


def _extract(run: Run, module: torch.nn.Module, spec: BackboneSpec, store: Images) -> Tensor:
    return extract_features(
        module,
        store,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        device=run.accelerator.device,
        shared=True,
    )


def shared_features(run: Run, train: Images, test: Images) -> Features:
    """The features that `finish` will need of the exported backbone and its baselines, for the first process.

    All processes call it once the backbone was exported, and share the images.
    """
    backbone, spec = load(run.directory)
    modules = subjects(backbone, random_init(spec, run.seed) if run.cfg.eval_baselines else None)
    found: Features = {}
    for name, module in modules.items():
        module.to(run.accelerator.device)
        found[name] = _extract(run, module, spec, train), _extract(run, module, spec, test)
    return found


def finish(
    run: Run,
    *,
    train: Images,
    test: Images,
    pretrained_on: Images | None = None,
    recipe: ViewRecipe,
    published: Sequence[Mapping] = (),
    signals: Mapping[str, str] | None = None,
    references: Mapping[str, tuple[float, str]] | None = None,
    extra_sections: Sequence[tuple[str, str]] = (),
    extra_rows: Sequence[dict] = (),
    protocols: Sequence[str] = DEFAULT,
    finetuning: Recipe = DEFAULTS,
    features: Features | None = None,
) -> dict:
    """Score the exported backbone of `run.directory`, write `result.json` and `report.html`, print the table.

    What is scored is the exported file, loaded as anybody would load it. The card is written after every protocol of
    the backbone and of each baseline; one that is unfinished is continued. `train` and `test`: what it is judged on;
    `pretrained_on`: the training images, if they are others than `train`. `signals`: logged name -> its meaning;
    `references`: logged name -> (level, name), e.g. a chance level. `extra_rows`: what the method itself measured on
    test images, as rows of `evaluate`. `protocols`: the method's, for which --eval-protocols may name others; `pool`:
    tokens of a ViT for the frozen ones; `finetuning`: of finetune and lowshot. `features`: of `shared_features`, if
    the processes have computed them. Returns the result card.
    """
    device, seed, path = run.accelerator.device, run.seed, run.directory / FILE
    protocols = run.cfg.eval_protocols or protocols
    backbone, spec = load(run.directory)
    empty = make_card(
        run,
        data=describe_data(
            train,
            test,
            label_name=train.label_name,
            image_size=spec.image_size,
            name=run.cfg.data_name,
            pretrained_on=pretrained_on,
        ),
        backbone=describe_backbone(spec, backbone),
        parameters=sum(p.numel() for p in backbone.parameters()),
        evaluations=[],
        published=published,
    )
    before, weights = earlier_card(empty, path), sha256(run.directory / WEIGHTS)
    rows, done = measured_before(before, empty, weights)
    if done:
        run.print(f"evaluation: continuing what {path} has of it")

    def card_of(evaluation: Evaluation) -> dict:
        rows = [*evaluation.rows, *extra_rows]
        card = {**empty, "peak_memory_bytes": peak_memory(device), "evaluations": rows}
        return with_comparison(keep_earlier_rows(card, before))

    with Display(run.console, prefix="evaluation: "):
        evaluation = evaluate(
            backbone,
            train,
            test,
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            protocols=protocols,
            random_init=random_init(spec, seed),
            device=device,
            seed=seed,
            workers=run.cfg.workers,
            recipe=finetuning,
            baselines=run.cfg.eval_baselines,
            rows=rows,
            done=done,
            features=features,
            save=lambda so_far: save_card(path, unfinished(card_of(so_far), so_far.done, weights)),
            log=run.print,
        )
    card = card_of(evaluation)
    save_card(path, card)

    views, originals = example_views(pretrained_on or train, recipe, seed, spec)
    shown, indices = sample(test, REPORT_IMAGES)  # data sorted by class would begin with a few of them
    report = write_report(
        run.directory,
        card=card,
        metrics=run.history(),
        test_images=shown.eval_images(0, len(shown), spec.image_size).cpu(),
        test_features=evaluation.test_features[indices],
        test_labels=shown.labels,
        class_names=test.class_names,
        views=views,
        originals=originals,
        view_text=recipe.describe(),
        signals=signals,
        references=references,
        extra_sections=extra_sections,
        notes=[
            f"{name} was not run: {reason}."
            for name, reason in evaluation.skipped.items()
            if name in protocols and name != "factors"
        ],
    )
    run.console.print(
        results_table(card["evaluations"], title=f"{card['method']} {card['preset']} on {card['data']['name']}")
    )
    run.print(f"result card {path}\nreport      {report}")
    print_comparison(run, card)
    return card


def print_comparison(run: Run, card: Card) -> None:
    """Print the published numbers that the card is compared with, and what the run cost; nothing without them."""
    if lines := card.get("compared"):
        lines = [*lines, f"cost: {card['epochs']:g} epochs in {duration(card['wall_time_s'])} on {card['device']}"]
        run.print("\n".join(lines))


def describe_backbone(spec: BackboneSpec, backbone: torch.nn.Module) -> str:
    """One line: timm name, what was changed, multiply-adds at the training size."""
    changes = [f"{spec.stem} stem"] if spec.stem != "timm" else []
    changes += [
        f"{name} {tuple(value)}" for name, value in (("layers", spec.layers), ("channels", spec.channels)) if value
    ]
    changes += [f"stem width {spec.stem_width}"] if spec.stem_width != 64 else []
    changes += [f"{spec.norm} norm"] if spec.norm != "batch" else []
    sizes = ("img_size", "dynamic_img_size")
    changes += [f"{name} {value}" for name, value in spec.arguments.items() if name not in sizes]
    cost = f"{multiply_adds(backbone, spec.image_size) / 1e6:.4g} MMAC at {spec.image_size} px"
    return ", ".join([spec.name, *changes, cost])


def example_views(
    train: Images, recipe: ViewRecipe, seed: int, spec: BackboneSpec, count: int = 8
) -> tuple[list[Tensor], Tensor]:
    """(views, originals): uint8 [n, 3, s, s] for each view of the recipe, and the images they were made of."""
    count = min(count, len(train))
    originals = train.eval_images(0, count, spec.image_size)
    params = recipe.sample(count, rng.generator(seed, "report"))
    views = recipe(originals, params)
    mean, std = (torch.tensor(v, device=originals.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    shown = [((view * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu() for view in views]
    return shown, originals.cpu()
