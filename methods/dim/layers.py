"""What the paper reports besides one accuracy: a probe on each of the encoder's layers (Tables 1 and 2), and whether
summaries find their parts on images that were not trained on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.backbones import BackboneSpec
from common.html import table
from common.rng import generator
from common.run import Run
from eval.card import FILE, merge_rows, read_card, save_card, with_comparison
from eval.features import extract_features, frozen, normalizer
from eval.finish import print_comparison
from eval.linear import linear_probe
from eval.load import load, random_init
from eval.protocols import RANDOM, RAW, cannot_run
from eval.report import rewrite_report
from eval.setup import labels_of, top1

from .loss import retrieval, scores
from .model import DIM, OUTPUTS

HELD_OUT = 2000  # test images of the retrieval
HIDDEN, DROPOUT, MLP_LR, MLP_BATCH, MILESTONES = 200, 0.1, 1e-4, 64, (50, 100)  # code, classification_eval.py


@torch.no_grad()
def held_out_retrieval(
    model: DIM, store, spec: BackboneSpec, batch: int, device: torch.device
) -> tuple[dict[str, float], int]:
    """({term: retrieval as in training, percent}, batch) on test images, in eval mode, in whole batches of `batch`."""
    count = min(HELD_OUT, len(store))
    batch = min(batch, count)
    sums, batches = {}, count // batch
    own, normalize = torch.arange(batch, device=device), normalizer(spec.mean, spec.std, device)
    with frozen(model):
        for start in range(0, batches * batch, batch):
            images = normalize(store.eval_images(start, start + batch, spec.image_size))
            for name, (summaries, parts) in model(images)[1].items():
                u = scores(summaries.float(), parts.float())
                sums[name] = sums.get(name, 0.0) + float(retrieval(u, own))
    return {name: 100 * value / batches for name, value in sums.items()}, batch


def mlp_probe(
    x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, *, classes: int, epochs: int, seed: int, device: torch.device
) -> float:
    """Top-1 in percent of the paper's classifier, one hidden layer of 200, on features [N, D]; after the last epoch.

    BatchNorm and dropout 0.1; Adam 1e-4, a tenth of it from epoch 50 and again from 100, batch 64 (the paper: the mean
    of the last 100 epochs).
    """
    x, y = x.to(device), y.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        hidden = [nn.Linear(x.shape[1], HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT)]
        net = nn.Sequential(*hidden, nn.Linear(HIDDEN, classes)).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=MLP_LR)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(MILESTONES))
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=generator(seed, "mlp order", epoch)).to(device)
            for rows in order.split(MLP_BATCH):
                if len(rows) > 1:  # BatchNorm has no variance of one row
                    optimizer.zero_grad(set_to_none=True)
                    nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                    optimizer.step()
            schedule.step()
        with frozen(net):
            predictions = torch.cat([net(part.to(device)).argmax(1).cpu() for part in test_x.split(8192)])
    return top1(predictions, test_y)


@dataclass
class LayerReport:
    """Rows of the result card and a section of the report. `measure`, then `sections`; `add_to_card` after `finish`."""

    run: Run
    spec: BackboneSpec
    train: object
    test: object
    mlp_epochs: int = 0
    rows: list[dict] = field(default_factory=list)

    def measure(self, model: DIM, batch: int) -> None:
        """Fill `rows` from the trained model, the exported encoder and random weights."""
        device = self.run.accelerator.device
        found, batch = held_out_retrieval(model, self.test, self.spec, batch, device)
        for name, value in found.items():
            text = (
                f"Of {batch} test images' parts at one place, the own one scores highest with the summary ({name} "
                f"term, eval mode); chance {100 / batch:.2f} %."
            )
            settings = {"batch": batch, "chance": 100 / batch, "test_images": min(HELD_OUT, len(self.test))}
            self._row("held-out-retrieval", f"{name} parts", value, settings, text, {})
        if not cannot_run(["linear"], self.train, self.test):
            keeps = [labels_of(store) >= 0 for store in (self.train, self.test)]
            for output in OUTPUTS:
                self._probe(output, keeps, device)

    def _probe(self, output: str, keeps: list[Tensor], device: torch.device) -> None:
        """The rows of one layer: linear, unless it is the exported one, which `finish` probes; with `mlp_epochs` the
        paper's classifier."""
        exported = output == self.spec.arguments["output"]
        if exported and not self.mlp_epochs:
            return
        about = dict(image_size=self.spec.image_size, mean=self.spec.mean, std=self.spec.std, device=device)
        labels = [store.labels[keep] for store, keep in zip((self.train, self.test), keeps, strict=True)]
        values, seed = {}, self.run.seed
        for name, encoder in (("", load(self.run.directory)[0]), (RANDOM, random_init(self.spec, seed))):
            encoder.to(device).output = output
            x, test_x = (
                extract_features(encoder, store, **about)[keep]
                for store, keep in zip((self.train, self.test), keeps, strict=True)
            )
            classes = 1 + int(max(part.max() for part in labels))
            data = (x, labels[0], test_x, labels[1])
            probes = {}
            if not exported:
                probes["linear"] = linear_probe(*data, num_classes=classes, seed=seed, device=device).accuracy
            if self.mlp_epochs:
                probes["mlp"] = mlp_probe(*data, classes=classes, epochs=self.mlp_epochs, seed=seed, device=device)
            values[name] = probes
        for probe, value in values[""].items():
            how = "as the protocol linear" if probe == "linear" else f"200 hidden units, {self.mlp_epochs} epochs"
            settings = {"layer": output, "features": x.shape[1], "probe": how, "labelled_train_images": len(x)}
            text = f"Probe on the encoder's layer {output}, {x.shape[1]} numbers: {probe}, {how}."
            self._row(f"{output}-{probe}", "label", value, settings, text, {RANDOM: values[RANDOM][probe]})

    def _row(self, protocol: str, target: str, value: float, settings: dict, text: str, baselines: dict) -> None:
        self.rows.append(
            {
                "protocol": protocol,
                "target": target,
                "metric": "top-1",
                "value": value,
                "settings": settings,
                "text": text,
                "baselines": baselines,
            }
        )

    def sections(self) -> list[tuple[str, str]]:
        """(title, HTML) of the report."""
        cells = [
            (
                r["protocol"],
                r["target"],
                f"{r['value']:.1f} %",
                f"{r['baselines'].get(RANDOM, r['settings'].get('chance', 0)):.1f} %",
                r["text"],
            )
            for r in self.rows
        ]
        head = ("protocol", "target", "value", "random init or chance", "what it is")
        note = f"The layer {self.spec.arguments['output']} is the exported one: its linear probe stands above."
        body = table(head, cells, caption=note, numeric=(2, 3))
        return [("Layers, and parts found on held-out images", body)]

    def add_to_card(self) -> None:
        """Append the rows to result.json and the report: the exported layer's linear probe under its layer's name too,
        and the raw pixels of that probe beside the other layers'."""
        path = self.run.directory / FILE
        card = read_card(path)
        exported = self.spec.arguments["output"]
        for row in [r for r in card["evaluations"] if r["protocol"] == "linear"]:
            raw = {RAW: row["baselines"][RAW]} if RAW in row["baselines"] else {}
            for other in self.rows:
                if other["protocol"].endswith("-linear"):
                    other["baselines"] = {**raw, **other["baselines"]}
            self.rows.append({**row, "protocol": f"{exported}-linear"})
        card["evaluations"] = merge_rows(card["evaluations"], self.rows)
        card = with_comparison(card)
        save_card(path, card)
        rewrite_report(self.run.directory, card, self.test.class_names)
        for row in self.rows:
            self.run.print(f"{row['protocol']}, {row['target']}: {row['value']:.1f} %")
        print_comparison(self.run, card)
