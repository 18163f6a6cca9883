"""Evaluate any backbone by the common protocol of this repository.

python -m eval runs/simclr-quickstart          on the run's own data, merged into its result.json and report.html
python -m eval exported/backbone.safetensors --data cifar10 --out scores.json
python -m eval resnet18 --pretrained --data imagenette --protocols knn,metrics
python -m eval --model vit_small_patch16_224 --weights dino_deitsmall16_pretrain.pth --data cifar10
python -m eval runs/mine --protocols finetune,lowshot --finetune.epochs 30 --finetune.labels 1% 5000
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from common.cli import run_cli
from common.data import Images, open_data
from common.errors import UserError
from common.progress import Display
from common.run import data_differences, data_record
from common.sources import once
from common.weights import weights_name
from eval.card import (
    FILE,
    Card,
    card_problems,
    describe_data,
    make_scores,
    merge_rows,
    read_card,
    save_card,
    with_comparison,
)
from eval.features import pooled
from eval.finetune.recipe import Recipe, check
from eval.finish import describe_backbone
from eval.load import device_of, load_asked, random_init, run_record
from eval.protocols import DEFAULT, PROTOCOLS, Evaluation, check_names, check_protocols, evaluate, results_table
from eval.report import rewrite_report
from eval.session import PROBED, TEST

NO_REPORT = "there is no report.html, or one of an earlier version, which stays as it is"


@dataclass
class Arguments:
    """What to score, on which data, by which protocols."""

    run: tyro.conf.Positional[str] = ""
    """Run directory, .safetensors file (with its .json next to it) or timm model name."""
    model: str = ""
    """timm model name, for --weights."""
    weights: str = ""
    """Weights for --model: .safetensors or .pth (MAE, DINO, MoCo, SwAV ...; FILE::student for one of several networks
    in it), or hf-hub:org/name. All of the network must be in it."""
    normalize: str | None = None
    """For --weights: mean and std of the inputs, as in training. Default: those beside the file, or ImageNet's."""
    protocols: str | None = None
    """Comma-separated, out of knn, linear, linear-augmented, mlp, metrics, factors, rotation, finetune, lowshot.
    Default: knn, linear, metrics and factors, as far as the data supports them. What the run's card has already is
    measured again, and its rows are replaced."""
    data: str | None = None
    """shapes, a hub name, or a path. Default for a run directory: the data it was trained on, or its --eval-data."""
    image_column: str | None = None
    """Column of the images, where it cannot be inferred from the features."""
    label_column: str | None = None
    """Column of the labels, where it cannot be inferred from the features."""
    limit: int | None = None
    """Use only N images of each split."""
    data_name: str | None = None
    """Name of the data in the card of --out; default: that of the hub or the folder."""
    image_size: int | None = None
    """Image size in pixels. Default: the size the backbone was trained at."""
    pretrained: bool = False
    """For a timm name: its published weights instead of random ones."""
    pool: str = "auto"
    """Which ViT tokens the frozen protocols use: cls, mean (of the patch tokens), last-N (class tokens of N blocks).
    auto: the network's default."""
    top5: bool = False
    """Top-5 accuracy for few classes too; from 50 classes on it is always measured."""
    augmented_epochs: int = 100
    """Epochs of linear-augmented."""
    batch_size: int = 512
    """Images per forward pass; affects only speed and memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ... auto: the GPU if there is one."""
    seed: int | None = None
    """Seed of the probes and of the random weights. Default: the run's seed, otherwise 0."""
    out: Path | None = None
    """File for the result as a card, which eval.compare takes. Default for a run directory on its own data: merged into
    its result.json and report.html."""
    finetune: Recipe = field(default_factory=Recipe)
    """Settings for finetune and lowshot. Unset values depend on the network and image size."""


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog="python -m eval", description=__doc__)
    protocols = DEFAULT if args.protocols is None else tuple(p.strip() for p in args.protocols.split(",") if p.strip())
    check_names(protocols)  # before any image is read
    if not protocols:
        raise UserError(f"--protocols is empty: choose from {', '.join(PROTOCOLS)}.")
    device = device_of(args.device)
    if bool(args.run) == bool(args.model) or bool(args.model) != bool(args.weights):
        raise UserError("give what to score: a run directory, file or timm name, or --model NAME with --weights FILE")
    directory = Path(args.run) if args.run and Path(args.run).is_dir() else None
    record = run_record(directory) if directory else {}
    config = record.get("config", {})
    name = args.run or f"{args.model} with {weights_name(args.weights)}"
    backbone, spec, foreign = load_asked(
        args.run or args.model,
        weights=args.weights,
        normalize=args.normalize,
        pretrained=args.pretrained,
        image_size=args.image_size,
    )
    pooled(backbone, args.pool)  # mistakes in the options: before any image is read
    if {"finetune", "lowshot"} & set(protocols):
        check(args.finetune, backbone, image_size=args.image_size or spec.image_size, pool=args.pool)
    image_size, seed = args.image_size or spec.image_size, config.get("seed", 0) if args.seed is None else args.seed

    judged = "eval_" if config.get("eval_data") else ""  # a run says which data it is judged on
    data = args.data or config.get(f"{judged}data")
    if data is None:
        raise UserError(f"say which data to score {name} on: --data shapes, a hub name such as cifar10, or a path")
    own_data = args.data is None and args.limit is None and args.image_column is None and args.label_column is None
    image_column, label_column, limit = args.image_column, args.label_column, args.limit
    if args.data is None:  # as the run was trained, whose --limit was for the training images alone
        image_column = image_column or config.get(f"{judged}image_column") or None
        label_column = label_column or config.get(f"{judged}label_column") or None
        if not judged and config.get("split", "train") == "train":
            limit = limit or config.get("limit") or None
    card = (directory / FILE) if directory and own_data and args.image_size is None else None
    content = read_card(card) if card is not None and card.exists() else None  # a damaged one: before any image is read
    console = Console(soft_wrap=True, highlight=False, markup=False)
    notice = once(console.print)
    train = open_data(
        data,
        split="train",
        image_size=image_size,
        image_column=image_column,
        label_column=label_column,
        limit=limit,
        log=notice,
    )
    test = open_data(
        data,
        split="test",
        image_size=image_size,
        image_column=image_column,
        label_column=label_column,
        limit=args.limit,
        log=notice,
    )
    if directory is not None and card is not None:
        refuse_changed_data(directory, record, data, {PROBED: train, TEST: test})
    if args.protocols is not None:  # asked for by name: an error instead of a note
        check_protocols(protocols, train, test, args.finetune)

    described = describe_backbone(spec, backbone)
    report: Path | None = None

    def save(so_far: Evaluation) -> None:
        nonlocal report
        if card is not None and content is not None:
            rows = merge_rows(content["evaluations"], so_far.rows)
            merged = with_comparison({**content, "evaluations": rows})
            save_card(card, merged)
            report = rewrite_report(card.parent, merged, test.class_names)
        if args.out is not None:
            scores = make_scores(
                scored_name(args, name),
                trained_by(directory),
                data=describe_data(
                    train, test, label_name=train.label_name, image_size=image_size, name=args.data_name or ""
                ),
                backbone=described,
                parameters=sum(p.numel() for p in backbone.parameters()),
                seed=seed,
                device=str(device),
                evaluations=so_far.rows,
                initial_weights=foreign.record() if foreign else None,
            )
            save_card(args.out, scores)

    with Display(console, prefix="evaluation: "):
        result = evaluate(
            backbone,
            train,
            test,
            image_size=image_size,
            mean=spec.mean,
            std=spec.std,
            protocols=protocols,
            random_init=random_init(spec, seed, image_size),
            device=device,
            seed=seed,
            batch_size=args.batch_size,
            augmented_epochs=args.augmented_epochs,
            pool=args.pool,
            recipe=args.finetune,
            top5=args.top5,
            save=save,
            log=lambda line: console.print(line),
        )
    console.print(
        results_table(
            result.rows,
            title=f"{name} on {train.name}: {len(train):,} training images, {len(test):,} test images, {image_size} px",
        )
    )
    save(result)
    if card is not None and content is not None:
        console.print(f"merged into {card}" + (f" and {report}" if report else f"; {NO_REPORT}"))
    elif args.out is None:
        console.print(
            "not saved: --out FILE writes it as JSON"
            + ("" if card is None else f" ({card} does not exist: the run has not ended yet)")
        )
    if args.out is not None:
        console.print(f"written to {args.out}")
    if args.protocols is not None and result.skipped:  # asked for by name
        raise UserError("; ".join(f"{name} was not run: {reason}" for name, reason in result.skipped.items()))


def scored_name(args: Arguments, name: str) -> str:
    """What tables call the backbone `name`: the file or directory, the timm model and whose weights it has."""
    if args.model:
        return name
    if Path(name).exists():
        return Path(name).resolve().name
    return f"{name}, {'pretrained' if args.pretrained else 'random weights'}"


def trained_by(directory: Path | None) -> Card | None:
    """The card of the run in `directory`, where there is a whole one."""
    try:
        run = read_card(Path() if directory is None else directory / FILE)
    except UserError:
        return None
    return None if card_problems(run, complete=True) or "scored" in run else run


def refuse_changed_data(directory: Path, record: dict, spec: str, opened: dict[str, Images]) -> None:
    """Raise UserError where the run in `directory` has recorded other images than those that were opened now."""
    if changed := data_differences(record.get("data", {}), data_record(opened)):
        raise UserError(
            f"the data have changed since {directory} was trained: {'; '.join(changed)}. Restore them, or score it on "
            f"what is there now, beside its card: --data {spec} --out FILE"
        )


def command() -> None:
    run_cli(main)


if __name__ == "__main__":
    command()
