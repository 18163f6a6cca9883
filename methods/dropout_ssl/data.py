"""Records of one kind for all arms, images that fit in memory or rows of a table; and the order of their visits."""

import csv
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.data import ImageStore, open_data
from common.errors import UserError
from common.rng import generator
from common.transfer import to_device
from common.views.recipe import ViewRecipe

TABLES = ("table", "diamonds")


@dataclass(kw_only=True, eq=False)
class Records:
    """`inputs`: uint8 [N, 3, H, W] images or standardized float32 [N, F] rows, with labels [N], on the device."""

    inputs: Tensor
    labels: Tensor
    classes: int
    name: str
    fingerprint: str
    label_name: str
    store: ImageStore | None = None  # what the common evaluation reads; None for a table

    def __len__(self) -> int:
        return len(self.inputs)


def open_records(
    spec: str, split: str, *, device: torch.device, limit: int = 0, log: Callable[[str], None] = print, **source
) -> Records:
    """The records of `spec`: "table", "diamonds" or any spec of `common.data.open_data` (to which `source` is passed).

    Raises UserError where the data has no labels, or images that are not of one size or do not fit in memory.
    """
    if spec in TABLES:
        rows, labels, classes, fingerprint = (_drawn if spec == "table" else _diamonds)(split)
        if limit and split == "train":
            rows, labels = rows[:limit], labels[:limit]
        name = "cut" if spec == "diamonds" else "class"
        return Records(
            inputs=rows.to(device),
            labels=labels.to(device),
            classes=classes,
            name=spec,
            fingerprint=fingerprint,
            label_name=name,
        )
    store = open_data(spec, split, limit=limit or None if split == "train" else None, device=device, log=log, **source)
    if not isinstance(store, ImageStore):
        raise UserError(f"--data {spec}: this study needs images of one size that fit in memory; resize them first")
    if store.labels is None or bool((store.labels < 0).any()):
        raise UserError(f"--data {spec}: every {split} image needs a label here; name their column with --label-column")
    classes = max(len(store.class_names or []), int(store.labels.max()) + 1)
    return Records(
        inputs=store.images,
        labels=store.labels.to(device),
        classes=classes,
        name=store.name,
        store=store,
        fingerprint=store.fingerprint,
        label_name=store.label_name or "label",
    )


def _drawn(split: str) -> tuple[Tensor, Tensor, int, str]:
    """10,000 + 2,000 rows of 16 columns that share 6 hidden causes, so that a masked column can be guessed from others.

    Classes: the largest of 5 random two-layer functions of the causes. The same for every seed of a run.
    """
    causes, columns, classes, rows = 6, 16, 5, 12_000
    g = generator("dropout table", 1)
    z = torch.randn(rows, causes, generator=g)
    mix, bend = (torch.randn(causes, columns, generator=g) for _ in range(2))
    x = z @ mix + (z @ bend).tanh() + 0.3 * torch.randn(rows, columns, generator=g)
    hidden = (z @ torch.randn(causes, 32, generator=g)).tanh()
    scores = hidden @ torch.randn(32, classes, generator=g)
    labels = ((scores - scores.mean(0)) / scores.std(0)).argmax(1)
    return _split(x, labels, split, test=2_000, g=None, classes=classes)


def _diamonds(split: str) -> tuple[Tensor, Tensor, int, str]:
    """53,940 diamonds: 7 measures, color and clarity as one-hot columns; the label is the cut, 5 grades.

    Read from the file in plotnine's package, which is not imported. A fixed random fifth is the test set.
    """
    found = importlib.util.find_spec("plotnine")
    if found is None:
        raise UserError(
            "--data diamonds is the table that plotnine ships: pip install --no-deps plotnine, or use "
            "--data table, which needs nothing"
        )
    path = Path(found.submodule_search_locations[0]) / "data" / "diamonds.csv"
    if not path.exists():
        raise UserError("the installed plotnine has no data/diamonds.csv: install plotnine 0.15, or use --data table")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measures = [[float(row[c]) for c in ("carat", "depth", "table", "price", "x", "y", "z")] for row in rows]
    x = [torch.tensor(measures, dtype=torch.float64)]
    x[0][:, [0, 3]] = x[0][:, [0, 3]].log()  # weight and price span three orders of magnitude
    for column in ("color", "clarity"):
        names = sorted({row[column] for row in rows})
        index = torch.tensor([names.index(row[column]) for row in rows])
        x.append(torch.nn.functional.one_hot(index, len(names)).double())
    grades = ["Fair", "Good", "Very Good", "Premium", "Ideal"]
    labels = torch.tensor([grades.index(row["cut"]) for row in rows])
    g = generator("diamonds split")
    return _split(torch.cat(x, 1), labels, split, test=len(rows) // 5, g=g, classes=len(grades))


def _split(x: Tensor, y: Tensor, split: str, *, test: int, g: torch.Generator | None, classes: int):
    order = torch.arange(len(x)) if g is None else torch.randperm(len(x), generator=g)
    train = order[: len(x) - test]
    x = (x - x[train].mean(0)) / x[train].std(0)  # statistics of the training rows alone
    rows = train if split == "train" else order[len(x) - test :]
    x, y = x[rows].float(), y[rows]
    digest = hashlib.blake2b(x.mul(1e3).round().to(torch.int32).numpy().tobytes() + y.numpy().tobytes(), digest_size=16)
    return x, y, classes, digest.hexdigest()


def labeled_rows(n: int, budget: int, seed: int) -> Tensor:
    """long [budget]: the labeled records of a seed (0: all), the first of one permutation: budgets are nested."""
    if not 0 <= budget <= n:
        raise UserError(f"--labels {budget}: the data has {n} training records")
    return torch.randperm(n, generator=generator(seed, "labelled"))[: budget or n]


def random_labels(n: int, classes: int, seed: int) -> Tensor:
    """long [n]: A9's label of every record, sampled once and fixed in all epochs."""
    return torch.randint(classes, (n,), generator=generator(seed, "random labels"))


class Order:
    """Which records a step visits: `rows` in a new permutation every epoch, one epoch after another without a gap.

    No record is left out at the end of an epoch, and a step may span two of them; so after e * n records each one was
    seen e times exactly, and its epoch is well defined however the batch and the budget divide.
    """

    def __init__(self, rows: Tensor, per_step: int, seed: int):
        self.rows, self.per_step, self.seed = rows, per_step, seed
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """(rows, epochs), long [per_step] each: of the global batch, on the CPU."""
        places = torch.arange(step * self.per_step, (step + 1) * self.per_step)
        epochs = places // len(self.rows)
        wanted = range(int(epochs[0]), int(epochs[-1]) + 1)
        known = self._permutations
        self._permutations = {e: known.get(e) if e in known else self._permutation(e) for e in wanted}
        table = torch.stack([self._permutations[e] for e in wanted])
        return self.rows[table[epochs - wanted[0], places % len(self.rows)]], epochs

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.rows), generator=generator(self.seed, "order", epoch))


class Inputs:
    """Float inputs [n, ...] of records: rows of a table as they are, images by `recipe` with the step's numbers."""

    def __init__(self, records: Records, recipe: ViewRecipe | None, seed: int):
        self.records, self.recipe, self.seed = records, recipe, seed

    def __call__(self, rows: Tensor, step: int = 0, part: slice = slice(None)) -> Tensor:
        """Rows `part` of the global batch's `rows`; random numbers are sampled for all rows."""
        chosen = to_device(rows[part], self.records.inputs.device)
        if self.recipe is None:
            return self.records.inputs[chosen]
        params = self.recipe.sample(len(rows), generator(self.seed, "views", step))[part]
        x = self.recipe(self.records.inputs[chosen], params.to(chosen.device))[0]
        return x.contiguous(memory_format=torch.channels_last)
