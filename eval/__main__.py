"""Score any backbone by the one protocol of this repository.

    python -m eval runs/simclr-quickstart          on the run's own data, merged into its result.json
    python -m eval exported/backbone.safetensors --data cifar10 --out scores.json
    python -m eval resnet18 --pretrained --data imagenette --protocols knn,metrics
    python -m eval runs/mine --protocols finetune,lowshot --finetune.epochs 30 --finetune.labels 1%,5000
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.console import Console

from common.cli import guarded
from common.data import open_data
from common.errors import UserError
from common.files import write_whole
from eval.features import pooled
from eval.finetune import Recipe, recipe_for
from eval.load import load, random_init
from eval.protocols import DEFAULT, PROTOCOLS, check_names, check_protocols, evaluate, merge_rows, results_table


@dataclass
class Arguments:
    """What to score, on which data, by which protocols."""

    run: tyro.conf.Positional[str]
    """Run directory, .safetensors file (its .json beside it) or timm model name."""
    protocols: str | None = None
    """Comma-separated, out of knn, linear, linear-augmented, metrics, factors, rotation, finetune, lowshot. Default:
    all that the data can serve except linear-augmented, finetune and lowshot, which are slow, and rotation."""
    data: str | None = None
    """shapes, a hub name, or a path. Default for a run directory: the data it was trained on."""
    image_column: str | None = None
    """Column of the images, where it cannot be found from the features."""
    label_column: str | None = None
    """Column of the labels, where it cannot be found from the features."""
    limit: int | None = None
    """Use only N images of each split."""
    image_size: int | None = None
    """Pixels. Default: the size the backbone was trained at."""
    pretrained: bool = False
    """For a timm name: its published weights instead of random ones."""
    pool: str = "auto"
    """What of a ViT the frozen protocols read: cls, mean (of the patch tokens), last-N (class tokens of N blocks).
    auto: as the network itself does."""
    augmented_epochs: int = 100
    """Epochs of linear-augmented."""
    batch_size: int = 512
    """Images per forward pass; changes nothing but speed and memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ... auto: the GPU if there is one."""
    seed: int | None = None
    """Seed of the probes and of the random weights. Default: the run's, else 0."""
    out: Path | None = None
    """File for the result as JSON. Default for a run directory on its own data: merged into its result.json."""
    finetune: Recipe = field(default_factory=Recipe)
    """Of finetune and lowshot. What is None has a default that depends on the network and the image size."""


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog="python -m eval", description=__doc__)
    protocols = DEFAULT if args.protocols is None else tuple(p.strip() for p in args.protocols.split(",") if p.strip())
    check_names(protocols)  # before any image is read
    if not protocols:
        raise UserError(f"--protocols is empty: choose from {', '.join(PROTOCOLS)}.")
    device = device_of(args.device)
    directory = Path(args.run) if Path(args.run).is_dir() else None
    config = run_config(directory) if directory else {}
    backbone, spec = load(args.run, pretrained=args.pretrained)
    pooled(backbone, args.pool)  # mistakes in the options: before any image is read
    if {"finetune", "lowshot"} & set(protocols):
        recipe_for(backbone, args.image_size or spec.image_size, args.finetune, args.pool)
    image_size, seed = args.image_size or spec.image_size, config.get("seed", 0) if args.seed is None else args.seed

    data = args.data or config.get("data")
    if data is None:
        raise UserError(f"say which data to score {args.run} on: --data shapes, a hub name such as cifar10, or a path")
    own_data = args.data is None and args.limit is None and args.image_column is None and args.label_column is None
    options = {"image_column": args.image_column, "label_column": args.label_column, "limit": args.limit}
    if args.data is None:  # as the run was trained, whose --limit was for the training images alone
        options = {name: value or config.get(name) or None for name, value in options.items()}
    train = open_data(data, split="train", image_size=image_size, **options)
    test = open_data(data, split="test", image_size=image_size, **{**options, "limit": args.limit})
    if args.protocols is not None:  # asked for by name: an error instead of a note
        check_protocols(protocols, train, test, args.finetune)

    console = Console(soft_wrap=True, highlight=False)
    result = evaluate(backbone, train, test, image_size=image_size, mean=spec.mean, std=spec.std, protocols=protocols,
                      random_init=random_init(spec, seed), device=device, seed=seed, batch_size=args.batch_size,
                      augmented_epochs=args.augmented_epochs, pool=args.pool, recipe=args.finetune,
                      log=lambda line: console.print(line, markup=False))
    console.print(results_table(result.rows, title=f"{args.run} on {train.name}: {len(train):,} training images, "
                                                   f"{len(test):,} test images, {image_size} px"))
    card = (directory / "result.json") if directory and own_data and args.image_size is None else None
    if card is not None and card.exists():
        content = json.loads(card.read_text())
        content["evaluations"] = merge_rows(content.get("evaluations", []), result.rows)
        write_whole(card, json.dumps(content, indent=1) + "\n")
        console.print(f"merged into {card}")
    elif args.out is None:
        console.print("not saved: --out FILE writes it as JSON" + (
            "" if card is None else f" ({card} does not exist: the run has not ended yet)"))
    if args.out is not None:
        content = {
            "format": 1, "seed": seed, "backbone": spec.name, "pretrained": args.pretrained, "device": str(device),
            "data": {"name": train.name, "label_name": train.label_name, "fingerprint": train.fingerprint,
                     "train_images": len(train), "test_images": len(test), "image_size": image_size},
            "evaluations": result.rows}
        write_whole(args.out, json.dumps(content, indent=1) + "\n")
        console.print(f"written to {args.out}")


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from None
    return device


def run_config(directory: Path) -> dict:
    """The run's resolved settings, or {} where the directory holds an export without them."""
    path = directory / "config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): the run directory is damaged") from None
    return {**content, **content["config"]} if isinstance(content.get("config"), dict) else content


if __name__ == "__main__":
    guarded(main)
