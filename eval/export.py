"""A trained backbone as a folder that timm loads, in the layout of the Hugging Face hub, with a model card.

python -m eval.export runs/simclr-imagenette-r18 exported

    timm.create_model("local-dir:exported", pretrained=True, num_classes=0)      # or num_classes=10, to fine-tune

`hf upload org/name exported` publishes it; "hf-hub:org/name" loads it from there, in timm and as --init-from.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import tyro

from common.backbones import WEIGHTS, BackboneSpec, timm_spec
from common.cli import run_cli
from common.errors import UserError
from common.files import write_atomic
from common.html import number
from eval.card import FILE, Card, read_card
from eval.load import load


@dataclass
class Arguments:
    """What to export, and where."""

    run: tyro.conf.Positional[str]
    """Run directory, or a .safetensors file with its .json next to it."""
    out: tyro.conf.Positional[Path]
    """Folder that does not exist yet, or is empty."""


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog="python -m eval.export", description=__doc__)
    if not Path(args.run).exists():
        raise UserError(f"{args.run} does not exist: give a run directory or a .safetensors file")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} exists and is not an empty folder: choose another")
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    card = read_card(folder / FILE) if (folder / FILE).exists() else None
    export(args.run, args.out, card)
    print(
        f'written to {args.out}; load it with timm.create_model("local-dir:{args.out}", pretrained=True, num_classes=0)'
    )
    if card is None:
        print(f"without scores: {folder / FILE} does not exist")


def export(run: str, out: Path, card: Card | None) -> None:
    """Write model.safetensors, config.json and README.md. Raises UserError for a network that timm cannot build."""
    model, spec = load(run)
    refuse_unbuildable(spec, run)
    base = timm_spec(spec.name)
    origin: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    model.pretrained_cfg = {  # type: ignore[assignment]  # these weights', not those that timm has of the network
        "architecture": spec.name.split(".")[0],
        "input_size": (3, spec.image_size, spec.image_size),
        "fixed_input_size": bool(origin.get("fixed_input_size")) and spec.image_size == base.image_size,
        "interpolation": "bilinear",
        "crop_pct": 0.875 if spec.image_size >= 160 else 1.0,
        "mean": spec.mean,
        "std": spec.std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": origin.get("first_conv"),
        "classifier": origin.get("classifier"),
    }
    arguments: dict[str, Any] = dict(spec.arguments)
    arguments |= {name: list(value) for name in ("layers", "channels") if (value := getattr(spec, name))}
    timm.models.save_for_hf(model, str(out), model_args=arguments, safe_serialization=True)
    write_atomic(out / "README.md", model_card(spec, card))


def refuse_unbuildable(spec: BackboneSpec, run: str) -> None:
    """Raise UserError where no arguments of `timm.create_model` give the network."""
    if ":" in spec.name:
        raise UserError(
            f"{run}: timm does not have {spec.name.split(':')[1]}, the encoder of this run; it is loaded with this "
            "repository, eval.load.load(path)"
        )
    special = [f"a {spec.stem} stem"] if spec.stem != "timm" else []
    special += ["GroupNorm of 8 groups"] if spec.norm != "batch" else []
    if special:
        raise UserError(
            f"{run}: timm.create_model has no argument for {' and '.join(special)}, so no folder can describe this "
            f'network to it; "rebuild" in the .json beside {WEIGHTS} has the few lines that build it'
        )


def model_card(spec: BackboneSpec, card: Card | None) -> str:
    """README.md: how to load it, how it was trained, its scores with baselines and protocols."""
    tags = ["timm", "image-feature-extraction", "self-supervised"]
    name = f"{card['method']} {card['preset']}" if card else spec.name
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\ntags:\n"
        + "".join(f"- {tag}\n" for tag in tags)
        + "---",
        f"# {name}",
        "Features of images, trained without labels. Put this folder's path after `local-dir:`, or `hf-hub:org/name`.",
        "```python\nimport timm\n\n"
        'model = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "features = model(transform(image)[None])  # image: a PIL image in RGB\n```",
    ]
    facts = {"network": spec.name, "image size": f"{spec.image_size} px", "mean": spec.mean, "std": spec.std}
    if card:
        data, initial = card["data"], card.get("initial_weights")
        facts |= {
            "method": card["method"],
            "network": card["backbone"],
            "training data": f"{data['name']}, {data['train_images']:,} images (content {data['fingerprint']})",
            "epochs": f"{card['epochs']:g} of batch {card['batch_size']}, {card['images_seen']:,} images seen",
            "started from": f"{initial['name']} (sha256 {initial['sha256']})" if initial else "random weights",
            "seed": card["seed"],
            "commit": card["git_commit"],
        }
    parts.append(_table(("", ""), [(key, str(value)) for key, value in facts.items()]))
    if card and card["evaluations"]:
        baselines = list(dict.fromkeys(name for row in card["evaluations"] for name in row.get("baselines", {})))
        rows = [
            (
                row["protocol"],
                row["target"],
                row["metric"],
                number(row["value"], row["metric"]),
                *(number(row.get("baselines", {}).get(name), row["metric"]) for name in baselines),
            )
            for row in card["evaluations"]
        ]
        parts += ["## Scores", "Of the last epoch; the network is frozen unless a protocol says otherwise."]
        parts.append(_table(("protocol", "target", "metric", "value", *baselines), rows))
        texts = {row["protocol"]: row["text"] for row in card["evaluations"] if row.get("text")}
        parts += [f"{_plain(protocol)}: {_plain(text)}" for protocol, text in texts.items()]
    else:
        parts.append("It has not been evaluated.")
    if card:
        parts += ["## Settings", f"```json\n{json.dumps(card['config'], indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text of a card for Markdown: on one line, no HTML and no column of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    run_cli(main)
