"""The end of a run: test accuracy, calibration, probes on the labeled records, and the card with its measurements."""

from html import escape

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_atomic
from common.html import number, page, table
from common.run import Run
from eval.card import FILE, describe_data, make_card, save_card
from eval.knn import knn_accuracy
from eval.linear import linear_probe

from .data import Inputs, Records
from .measure import clean_outputs
from .metrics import calibration_error
from .model import Network

KINDS = ("held-out", "train", "own")


def measurements(run: Run) -> list[dict]:
    """The run's lines of measurements, oldest first: {"step", "kind", "epoch", ...}."""
    return [line for line in run.history() if line.get("kind") in KINDS]


def study_rows(
    network: Network,
    train: Records,
    test: Records,
    rows: Tensor,
    inputs: tuple[Inputs, Inputs],
    *,
    seed: int,
    device: torch.device,
) -> list[dict]:
    """Evaluation rows of the card: the classifier on clean test records, and probes fitted to the labeled ones alone.

    `rows`: labeled training records; their true labels are used, also where the arm trained on random ones.
    """
    labeled = rows.to(train.labels.device)
    bank, _ = clean_outputs(network, lambda r: inputs[0](rows[r]), len(rows))
    y = train.labels[labeled].cpu()
    features, log_p = clean_outputs(network, inputs[1], len(test))
    truth = test.labels
    about = {"labelled_records": len(rows), "test_records": len(test), "inputs": "without noise or augmentation"}
    ends = f"{len(test):,} test records, without noise; the last step's network."

    def row(protocol: str, metric: str, value: float, text: str) -> dict:
        return {
            "protocol": protocol,
            "target": "label",
            "metric": metric,
            "value": value,
            "settings": about,
            "text": text,
            "baselines": {},
        }

    accuracy = 100 * float((log_p.argmax(1) == truth).double().mean())
    found = [
        row("supervised", "top-1", accuracy, f"The trained classifier on {ends}"),
        row("supervised", "calibration error", calibration_error(log_p, truth), f"15 equal bins, {ends}"),
    ]
    knn = knn_accuracy(bank, y, features, truth.cpu(), settings=((20, 0.07),), device=device)
    found.append(
        row(
            "study-knn-20-0.07",
            "top-1",
            next(iter(knn.values())),
            f"Weighted kNN, k = 20, T = 0.07, among the {len(rows):,} labeled records; {ends}",
        )
    )
    if len(rows) >= 20:
        try:
            probe = linear_probe(bank, y, features, truth.cpu(), num_classes=train.classes, seed=seed, device=device)
            text = f"Linear probe on the features of the {len(rows):,} labeled records; {ends}"
            found.append(row("study-linear", "top-1", probe.accuracy, text))
        except UserError as error:  # a class with too few labeled records
            found[0]["settings"] = {**about, "study-linear": f"not run: {error}"}
    return found


def write_card(run: Run, train: Records, test: Records, network: Network, rows: list[dict]) -> dict:
    """`result.json` and a short `report.html` of a run that the common evaluation does not score."""
    kind = type(network.backbone).__name__
    size = run.config["image_size"] if train.store else 0
    card = make_card(
        run,
        data=describe_data(train, test, label_name=train.label_name, image_size=size, name=run.cfg.data_name),
        backbone=run.config["backbone"]
        if train.store
        else f"{kind}, {train.inputs.shape[1]} columns, width {run.config['width']}",
        parameters=sum(p.numel() for p in network.backbone.parameters()),
        evaluations=rows,
    )
    card["measurements"] = measurements(run)
    save_card(run.directory / FILE, card)
    head = f'<header><p class="eyebrow">{escape(card["method"])} {escape(card["preset"])}</p><h1>Arm '
    head += f"{run.config['arm']}, seed {run.seed}, {escape(card['data']['name'])}</h1></header>"
    shown = [(r["protocol"], r["metric"], number(r["value"], r["metric"]), r["text"]) for r in rows]
    body = f"<section><h2>Accuracy</h2>{table(('protocol', 'metric', 'value', 'how'), shown, numeric=(2,))}</section>"
    write_atomic(run.directory / "report.html", page(run.directory.name, head + body + measured_section(run)[1]))
    return card


def add_to_card(run: Run, card: dict, rows: list[dict]) -> None:
    """Put `rows` and the measurements into the card of the common evaluation."""
    card["evaluations"] += rows
    card["measurements"] = measurements(run)
    save_card(run.directory / FILE, card)


def measured_section(run: Run) -> tuple[str, str]:
    """(title, HTML) of the measurements: a row a measured step, held-out records under the common noise."""
    lines = [line for line in measurements(run) if line["kind"] == "held-out"]
    names = (
        "V",
        "s_same",
        "g_inst",
        "g_cls",
        "alignment",
        "uniformity",
        "rank",
        "nt_xent_all_0.5",
        "nt_xent_same_0.5",
        "ce_geo",
        "consistency",
        "accuracy",
    )
    rows = [(line["step"], number(line["epoch"]), *(number(line.get(n)) for n in names)) for line in lines]
    title = "Under the noise, on held-out records"
    shown = table(("step", "epoch", *names), rows, numeric=range(len(names) + 2))
    return title, f"<section><h2>{title}</h2>{shown}</section>"
