"""Features of images as a table: one row an image, for whatever comes next (search, clustering, a classifier).

python -m eval.embed runs/simclr-quickstart path/to/images --out features.parquet
python -m eval.embed vit_small_patch16_224.dino path/to/images --pretrained --out features.npz --neighbors query.jpg
python -m eval.embed vit_small_patch16_224 cifar10 --weights dino_deitsmall16_pretrain.pth --out features.parquet

Columns: `file` (relative to the folder) or, for tables and the hub, `row`; `split`; `label`, a class's name or number,
if the data have labels; `features`, float32. Images are cropped and normalized as for every protocol of
`python -m eval`. What they depend on is in the metadata: network, weights, image size, data by content.
"""

import json
import os
import zipfile
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbones import WEIGHTS, BackboneSpec
from common.cli import run_cli
from common.data import ImageStore, ImageStream, decode, eval_geometry, open_data
from common.errors import UserError
from common.files import one_line, sha256, write_atomic
from common.html import image_tag, page
from common.sources import Files
from eval.features import extract_features, forward_features, frozen, normalizer, pooled, pooling
from eval.load import device_of, load_asked

NEIGHBORS = 24
SUFFIXES = (".parquet", ".npz")


@dataclass
class Arguments:
    """Which images, by which network, into which file."""

    run: tyro.conf.Positional[str]
    """Run directory, .safetensors file (with its .json next to it) or timm model name."""
    data: tyro.conf.Positional[str]
    """An image folder, a folder of parquet files, a hub name, shapes or pairs."""
    out: Path
    """File for the features: .parquet, or .npz for numpy."""
    weights: str = ""
    """For a timm name: a file of weights, as in python -m eval."""
    normalize: str | None = None
    """For --weights: mean and std of the inputs, as in training. Default: those beside the file, or ImageNet's."""
    pretrained: bool = False
    """For a timm name: its published weights."""
    splits: tuple[str, ...] = ("train", "test")
    """Splits to read. Data without splits is read as a whole."""
    image_column: str | None = None
    """Column of the images, where it cannot be inferred from the features."""
    label_column: str | None = None
    """Column of the labels, where it cannot be inferred from the features."""
    image_size: int | None = None
    """Image size in pixels. Default: the size the backbone was trained at."""
    pool: str = "auto"
    """Which ViT tokens are the features: cls, mean or last-N. auto: the network's default."""
    neighbors: str = ""
    """An image file, or the number of a row of the table: also write a page with its nearest neighbors."""
    batch_size: int = 512
    """Images per forward pass; affects only speed and memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ... auto: the GPU if there is one."""


@dataclass
class Table:
    """Rows in order; `stores` and `places` say where each row's image is."""

    split: list[str] = field(default_factory=list)
    file: list[str] = field(default_factory=list)
    """Empty where images are rows of a table."""
    row: list[int] = field(default_factory=list)
    label: list[Any] = field(default_factory=list)
    """Empty without labels; None, or "" among names, where one image has none."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """(store, position in it)."""


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=argv, prog="python -m eval.embed", description=__doc__)
    if args.out.suffix not in SUFFIXES:
        raise UserError(f"--out {args.out}: the name must end in {' or '.join(SUFFIXES)}")
    if args.weights and args.pretrained:
        raise UserError("--weights and --pretrained name two sets of weights: give one")
    device = device_of(args.device)
    about: dict[str, Any] = {"backbone": Path(args.run).name, "pretrained": args.pretrained}
    if not (args.weights or args.pretrained or Path(args.run).exists()):
        raise UserError(
            f"{args.run} is no file, and timm's network of that name has random weights: add --pretrained or "
            "--weights FILE"
        )
    backbone, spec, filled = load_asked(
        args.run,
        weights=args.weights,
        normalize=args.normalize,
        pretrained=args.pretrained,
        image_size=args.image_size,
    )
    if filled is not None:
        about["weights"] = filled.record()
    elif Path(args.run).exists():
        about["sha256"] = sha256(Path(args.run, WEIGHTS) if Path(args.run).is_dir() else Path(args.run))
    backbone = pooled(backbone, args.pool).to(device)
    size = args.image_size or spec.image_size

    stores = open_splits(args, size)
    table = rows_of(stores, args.data)
    query = query_image(args.neighbors, len(table.split))
    parts = [
        extract_features(
            backbone,
            store,
            image_size=size,
            mean=spec.mean,
            std=spec.std,
            device=device,
            batch_size=args.batch_size,
        )
        for _, store in stores
    ]
    starts = np.cumsum([0, *map(len, parts)])
    features = torch.cat(parts)[[int(starts[k]) + i for k, i in table.places]]
    about |= {
        "pool": pooling(backbone),
        "image_size": size,
        "mean": spec.mean,
        "std": spec.std,
        "data": {split: {"name": store.name, "fingerprint": store.fingerprint} for split, store in stores},
    }
    write_table(args.out, table, features, about)
    print(f"written to {args.out}: {len(features):,} rows of {features.shape[1]:,} features")
    if query is not None:
        path = args.out.with_suffix(".neighbors.html")
        write_atomic(path, neighbors_page(query, backbone, spec, size, features, table, [s for _, s in stores]))
        print(f"nearest neighbors in {path}")


def open_splits(args: Arguments, size: int) -> list[tuple[str, ImageStore | ImageStream]]:
    """(name, store) of each split. Images of files and tables stay encoded, so that a row knows where it is from."""
    opened = [
        open_data(
            args.data,
            split,
            image_size=size,
            image_column=args.image_column,
            label_column=args.label_column,
            memory_budget=0,
            log=lambda line: None,  # about a part held out as test, which is embedded as well
        )
        for split in dict.fromkeys(args.splits)
    ]
    return list(zip(dict.fromkeys(args.splits), opened, strict=True))


def rows_of(stores: list[tuple[str, ImageStore | ImageStream]], data: str) -> Table:
    """The table without features. Parts of one set of images, held out from each other, become one in its order."""
    entries = []
    homes = [_home(store) or split for split, store in stores]
    whole = len(set(homes)) == 1 and len(stores) > 1
    root = Path(data).expanduser().resolve()
    for k, (split, store) in enumerate(stores):
        rows = store.rows.tolist() if isinstance(store, ImageStream) else list(range(len(store)))
        labels = [-1] * len(rows) if store.labels is None else store.labels.tolist()
        source = store.source if isinstance(store, ImageStream) else None
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            file = ""
            if isinstance(source, Files):
                file = str((source.directory / source.paths[row]).relative_to(root))
            named: Any = None if label < 0 else store.class_names[label] if store.class_names else label
            entries.append(("all" if whole else split, file, row, named, (k, i)))
    if whole:
        entries.sort(key=lambda entry: entry[2])
    table = Table(*(list(column) for column in zip(*entries, strict=True)))
    if not any(table.file):
        table.file = []
    if all(label is None for label in table.label):
        table.label = []
    return table


def _home(store: ImageStore | ImageStream) -> str:
    """The split of the data that a stream's rows are of; empty for rendered images."""
    if not isinstance(store, ImageStream):
        return ""
    return store.source.split


# ---- the file --------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: Table, features: Tensor, about: dict[str, Any]) -> None:
    """Write rows and features [N, D], whole or not at all; `about` into the schema's metadata, or an array "about"."""
    names: dict[str, Any] = {"file": table.file} if table.file else {"row": table.row}
    names["split"] = table.split
    if table.label:
        names["label"] = table.label
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".writing-{path.name}")
    try:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(features.float().numpy().reshape(-1))
            columns = {**names, "features": pa.FixedSizeListArray.from_arrays(flat, features.shape[1])}
            made = pa.table(columns).replace_schema_metadata({"about": json.dumps(about)})
            pq.write_table(made, aside)
        else:
            if table.label:
                text = any(isinstance(label, str) for label in table.label)
                names["label"] = [("" if text else -1) if label is None else label for label in table.label]
            arrays = {name: np.array(values) for name, values in names.items()}
            arrays |= {"features": features.float().numpy(), "about": np.array(json.dumps(about))}
            with zipfile.ZipFile(aside, "w") as archive:  # numpy.savez has an argument "file" of its own
                for name, values in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, values, allow_pickle=False)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# ---- neighbors -------------------------------------------------------------------------------------------------------


def query_image(wanted: str, rows: int) -> Tensor | int | None:
    """The image uint8 [3, H, W] of a file, or the number of a row; None where none is wanted.

    Raises UserError for a file that is not there or no image, and a row that the table has not.
    """
    if not wanted:
        return None
    if wanted.isdigit() and not Path(wanted).exists():
        if int(wanted) >= rows:
            raise UserError(f"--neighbors {wanted}: the table has the rows 0 to {rows - 1}")
        return int(wanted)
    try:
        return decode(bytearray(Path(wanted).expanduser().read_bytes()))
    except Exception as error:  # of the file system, or of a decoder
        raise UserError(
            f"--neighbors {wanted} is neither the number of a row nor an image: {one_line(error)}"
        ) from error


def neighbors_page(
    query: Tensor | int,
    backbone: nn.Module,
    spec: BackboneSpec,
    size: int,
    features: Tensor,
    table: Table,
    stores: list[ImageStore | ImageStream],
) -> str:
    """A page with the images whose features [N, D] have the greatest cosine similarity to the query's."""

    def image(i: int) -> Tensor:
        k, place = table.places[i]
        return stores[k].eval_images(place, place + 1, size)[0].cpu()

    def caption(i: int) -> str:
        label = f" · {table.label[i]}" if table.label else ""
        return (table.file[i] if table.file else f"{table.split[i]} {table.row[i]}") + label

    if isinstance(query, int):
        shown, name, vector = image(query), caption(query), features[query]
    else:
        shown, name = eval_geometry(query[None], size)[0], "query"
        device = next(backbone.parameters()).device
        with frozen(backbone):
            vector = forward_features(backbone, normalizer(spec.mean, spec.std, device)(shown[None]))[0].cpu()
    similarity = F.normalize(features, dim=1) @ F.normalize(vector, dim=0)
    if isinstance(query, int):
        similarity[query] = -torch.inf
    best = similarity.topk(min(NEIGHBORS, len(features) - isinstance(query, int)))
    found = "".join(
        f"<figure>{image_tag(image(i), caption(i))}<figcaption>{escape(caption(i))} {score:.2f}</figcaption></figure>"
        for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return page(
        f"Nearest neighbors of {name}",
        f'<header><h1>Nearest neighbors of {escape(name)}</h1><p class="muted">By cosine similarity of the features of '
        f"{escape(spec.name)}, among {len(features):,} images.</p></header>"
        f'<div class="query"><figure>{image_tag(shown, name)}'
        f'<figcaption>{escape(name)}</figcaption></figure><div class="found">{found}</div></div>',
    )


if __name__ == "__main__":
    run_cli(main)
