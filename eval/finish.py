"""What every method does with a trained backbone: online kNN on the way, and at the end evaluation, card and report."""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common import rng
from common.augment import ViewRecipe
from common.backbones import BackboneSpec, multiply_adds
from common.files import write_whole
from common.run import Run
from eval.features import extract_features
from eval.finetune import NOTHING, Recipe
from eval.knn import knn_accuracy
from eval.load import load, random_init
from eval.protocols import DEFAULT, evaluate, results_table
from eval.report import write_report

REPORT_IMAGES = 2000


def online_knn(run: Run, step: int, backbone: torch.nn.Module, spec: BackboneSpec, train, test) -> None:
    """Weighted kNN (k = 20, T = 0.07) of the backbone as it is after `step`, on rank 0, as a line of metrics.jsonl.

    The same function as the final evaluation. Watch it; choosing a checkpoint by it would be choosing on test.
    """
    if not run.main or train.labels is None or test.labels is None:
        return
    x = [
        extract_features(
            backbone, s, image_size=spec.image_size, mean=spec.mean, std=spec.std, device=run.accelerator.device
        )
        for s in (train, test)
    ]
    scores = knn_accuracy(x[0], train.labels, x[1], test.labels, settings=((20, 0.07),), device=run.accelerator.device)
    run.event(step, "online_knn", accuracy=next(iter(scores.values())))


def finish(
    run: Run,
    *,
    train,
    test,
    recipe: ViewRecipe,
    published: Sequence[Mapping] = (),
    signals: Mapping[str, str] | None = None,
    references: Mapping[str, tuple[float, str]] | None = None,
    extra_sections: Sequence[tuple[str, str]] = (),
    extra_rows: Sequence[dict] = (),
    protocols: Sequence[str] = DEFAULT,
    pool: str = "auto",
    finetuning: Recipe = NOTHING,
) -> dict:
    """Score the exported backbone of `run.directory`, write `result.json` and `report.html`, print the table.

    What is scored is the exported file, loaded as anybody would load it. `signals`: logged name -> its meaning;
    `references`: logged name -> (level, name), e.g. a chance level. `extra_rows`: what the method itself measured on
    test images, as rows of `evaluate`. `protocols`: the method's, for which --eval-protocols may name others; `pool`:
    tokens of a ViT for the frozen ones; `finetuning`: of finetune and lowshot. Returns the result card.
    """
    device, seed = run.accelerator.device, run.seed
    protocols = run.cfg.eval_protocols or protocols
    backbone, spec = load(run.directory)
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
        pool=pool,
        recipe=finetuning,
        baselines=run.cfg.eval_baselines,
        log=run.say,
    )
    card = {
        "format": 1,
        **run.facts(),
        "data": {
            "name": run.cfg.data_name or train.name,
            "label_name": train.label_name,
            "fingerprint": train.fingerprint,
            "train_images": len(train),
            "test_images": len(test),
            "image_size": spec.image_size,
        },
        "backbone": describe_backbone(spec, backbone),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "evaluations": [*evaluation.rows, *extra_rows],
        "published": list(published),
    }
    card["config"]["data"] = card["data"]["name"]  # a path says nothing elsewhere
    write_whole(run.directory / "result.json", json.dumps(card, indent=1) + "\n")

    views, originals = example_views(train, recipe, seed, spec)
    shown = min(len(test), REPORT_IMAGES)
    report = write_report(
        run.directory,
        card=card,
        metrics=run.history(),
        test_images=test.eval_images(0, shown, spec.image_size).cpu(),
        test_features=evaluation.test_features[:shown],
        test_labels=None if test.labels is None else test.labels[:shown],
        class_names=test.class_names,
        views=views,
        originals=originals,
        view_text=recipe.describe(),
        invariance={r["target"]: r["value"] for r in evaluation.rows if r["protocol"] == "invariance"} or None,
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
    run.say(f"result card {run.directory / 'result.json'}\nreport      {report}")
    return card


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
    train, recipe: ViewRecipe, seed: int, spec: BackboneSpec, count: int = 8
) -> tuple[list[Tensor], Tensor]:
    """(views, originals): uint8 [n, 3, s, s] for each view of the recipe, and the images they were made of."""
    count = min(count, len(train))
    originals = train.eval_images(0, count, spec.image_size)
    params = recipe.sample(count, rng.generator(seed, "report"))
    views = recipe(originals, params)
    mean, std = (torch.tensor(v, device=originals.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    shown = [((view * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu() for view in views]
    return shown, originals.cpu()
