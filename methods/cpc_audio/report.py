"""The end of a run on sound: probes next to the baselines, result card, report."""

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from common.backbones import BackboneSpec
from common.files import write_atomic
from common.html import bar_chart, duration, image_tag, line_chart, number, page, table
from common.progress import Display
from common.run import Run
from eval.card import FILE, describe_data, make_card, save_card
from eval.load import load, random_init
from eval.protocols import results_table
from eval.report import NOT_CURVES, explanations

from .audio import AudioStore, log_mel
from .config import Config
from .health import SIGNALS
from .model import CPC, AudioEncoder
from .probes import LOG_MEL, RANDOM, Frames, compact_labels, contexts, extract, mel, probe_all, retrieval


def finish(
    run: Run, model: CPC, cfg: Config, *, train: AudioStore, test: AudioStore, published: Sequence[Mapping]
) -> dict:
    """Score the exported encoder, write `result.json` and `report.html`, print the table. Returns the card.

    Frames are scored from the exported file, loaded as anybody would; retrieval needs the predictors, which are part of
    the training and not exported, and so takes `model`.
    """
    device = run.accelerator.device
    encoder, spec = load(run.directory)
    hop = encoder.hop / train.rate
    sources = {"c": contexts(encoder.to(device)), LOG_MEL: mel(train.rate, hop)}
    sources[RANDOM] = contexts(random_init(spec, run.seed).to(device))
    subjects = {name: (extract(train, source), extract(test, source)) for name, source in sources.items()}
    labels = {name: compact_labels(train.labels[name], test.labels[name]) for name in cfg.labels}
    about = (
        f"c_t of the whole recording, zero state at its start, every {1000 * hop:g} ms; log-mel: 40 bands, 25 ms Hann "
        "window, same hop; random init: the same encoder and GRU with fresh weights"
    )
    speakers = test.labels[cfg.speaker_column] if cfg.negatives.startswith("same-speaker") else None
    found, per_step, anchors = retrieval(model, test, cfg, speakers)
    chance = 100 / (1 + cfg.negative_count)
    retrieved = {
        "protocol": "retrieval",
        "target": "frame ahead",
        "metric": "top-1",
        "value": found,
        "settings": {"negatives": cfg.negatives, "count": cfg.negative_count, "steps": cfg.steps},
        "text": f"Held-out recordings: share of frames 1 to {cfg.steps} steps ahead that score highest among 1 + "
        f"{cfg.negative_count} candidates ({cfg.negatives} negatives), mean over the steps.",
        "baselines": {"chance": chance},
    }
    label_name = cfg.labels[0] if cfg.labels else None
    data = describe_data(train, test, label_name=label_name, image_size=None, name=cfg.data_name)
    data |= {"sample_rate": train.rate, "train_hours": train.seconds / 3600, "window_samples": cfg.window}

    def write(rows: list[dict]) -> dict:
        card = make_card(
            run,
            data=data,
            backbone=describe(spec, encoder),
            parameters=sum(p.numel() for p in encoder.parameters()),
            evaluations=[*rows, retrieved],
            published=published,
        )
        card["retrieval_per_step"] = per_step
        save_card(run.directory / FILE, card)
        return card

    write([])  # what is measured is kept, whatever comes after it
    options = dict(draws=cfg.draws, seed=run.seed, device=device, about=about, log=run.print, save=write)
    with Display(run.console, prefix="evaluation: "):
        rows, said = probe_all(subjects, labels, **options) if labels else ([], {})
    card = write(rows)
    sections = [
        ("Training", _curves(run.history(), cfg)),
        ("Evaluation", _evaluation(card)),
        ("How far ahead", _steps(per_step, anchors, chance, 1000 * hop)),
        ("As the word unfolds", _unfolding(subjects, labels, said, 1000 * hop)),
        ("Listen", _listen(test, labels)),
        ("Settings", _settings(card)),
    ]
    write_atomic(run.directory / "report.html", _page(card, sections))
    title = f"{card['method']} {card['preset']} on {card['data']['name']}"
    run.console.print(results_table(card["evaluations"], title=title))
    run.print(f"result card {run.directory / FILE}\nreport      {run.directory / 'report.html'}")
    return card


def describe(spec: BackboneSpec, encoder: AudioEncoder) -> str:
    """One line: widths, strides, hop, norm."""
    a = spec.arguments
    strides = "-".join(str(s) for s in a["strides"])
    return (
        f"{len(a['strides'])} convolutions of {a['channels']}, strides {strides} (hop {encoder.hop}), "
        f"{a['norm']} norm, GRU {a['context']}"
    )


# ---- the report ------------------------------------------------------------------------------------------------------


def _page(card: Mapping, sections: Sequence[tuple[str, str]]) -> str:
    data = card["data"]
    facts = {
        "method": card["method"],
        "preset": card["preset"],
        "data": f"{data['name']}, {data['train_images']} train, {data['test_images']} test",
        "training sound": f"{data['train_hours']:.2f} h",
        "sample rate": f"{data['sample_rate']} Hz",
        "window": f"{data['window_samples']} samples",
        "encoder": card["backbone"],
        "parameters": f"{card['parameters']:,}",
        "epochs, steps": f"{card['epochs']:g}, {card['steps']}",
        "batch size": card["batch_size"],
        "seed": card["seed"],
        "commit": card["git_commit"],
        "device": card["device"],
        "time": duration(card["wall_time_s"]),
        "windows/s": number(card["images_per_second"]),
    }
    pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    title = f"{card['method']} · {card['preset']}"
    parts = [f'<header><p class="eyebrow">Self-supervised pretraining, report of one run</p><h1>{escape(title)}</h1>']
    if card["warnings"]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in card["warnings"])
        parts.append(f'<div class="aside notes"><b>Notes</b><ul>{notes}</ul></div>')
    parts.append(f'<div class="panel"><dl class="facts">{pairs}</dl></div></header>')
    parts += [f"<section><h2>{escape(name)}</h2>\n{html}</section>" for name, html in sections]
    parts.append(
        "<footer>Self-contained: this page loads nothing from anywhere. Data behind it: result.json and "
        "metrics.jsonl in the same directory.</footer>"
    )
    return page(title, "\n".join(parts))


def _curves(history: Sequence[Mapping], cfg: Config) -> str:
    lines = [line for line in history if "loss" in line]
    if not lines:
        return "<p>No metrics were logged.</p>"
    marks = {"loss": (torch.log(torch.tensor(1.0 + cfg.negative_count)).item(), "chance, ln(1 + N)")}
    marks["retrieval"] = (1 / (1 + cfg.negative_count), "chance")
    x = [line["epoch"] for line in lines]
    charts = [
        line_chart(x, [line[name] for line in lines], name=name, x_label="epoch", reference=marks.get(name))
        for name in ("loss", "retrieval", "context_std", "lr")
    ]
    logged = [name for name in lines[0] if name not in NOT_CURVES]
    return f'<div class="charts">{"".join(charts)}</div>' + explanations(logged, SIGNALS)


def _evaluation(card: Mapping) -> str:
    rows = card["evaluations"]
    names = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    head = ["protocol", "target", "this run", *names]
    body = [
        [row["protocol"], row["target"], number(row["value"], row["metric"])]
        + [number(row["baselines"][name], row["metric"]) if name in row["baselines"] else "" for name in names]
        for row in rows
    ]
    texts = {row["protocol"]: row["text"] for row in rows}
    said = "".join(f"<p><small><b>{escape(name)}</b>: {escape(text)}</small></p>" for name, text in texts.items())
    html = table(head, body, numeric=range(2, len(head)), bold=2, caption="Accuracy in percent, frozen encoder.")
    for row in rows[:1]:
        html += f"<p><small>Features: {escape(row['settings'].get('features', ''))}.</small></p>"
    if card["published"]:
        lines = [(p["target"], number(p["value"], p["metric"]), p["source"], p["note"]) for p in card["published"]]
        html += "<h3>Published</h3>" + table(("target", "top-1", "source", "note"), lines, numeric=[1])
    return html + said


def _steps(per_step: Sequence[float], anchors: Sequence[int], chance: float, hop: float) -> str:
    items = [
        {"name": f"{k} ({k * hop:g} ms): {count:,} anchors", "value": value, "marks": {"chance": chance}}
        for k, (value, count) in enumerate(zip(per_step, anchors, strict=True), 1)
    ]
    return (
        "<p>Share of held-out frames that are found among their candidates, by how far ahead they lie. The first two "
        "steps share samples with the last frame that the context has seen.</p>"
        + bar_chart(items, metric="top-1", high=100.0, alt="Retrieval by steps ahead")
    )


def _unfolding(
    subjects: Mapping[str, tuple[Frames, Frames]],
    labels: Mapping[str, tuple[Tensor, Tensor]],
    said: Mapping[str, Mapping[str, Tensor]],
    hop: float,
) -> str:
    """Accuracy of the frame probe by the frame's position in its recording, for each label and subject."""
    charts = []
    for target, predictions in said.items():
        for subject, classes in predictions.items():
            test = subjects[subject][1]
            right = (classes == test.spread(labels[target][1])).float()
            place = torch.cat([torch.arange(int(n)) for n in test.counts])
            count = torch.bincount(place)
            usable = int(
                (count >= max(5, len(test.counts) // 10)).sum()
            )  # a position that few recordings reach is unreliable
            share = 100 * torch.bincount(place, right)[:usable] / count[:usable]
            x = [hop * t for t in range(usable)]
            name = f"{target}, {'c_t' if subject == 'c' else subject}"
            charts.append(line_chart(x, share.tolist(), name=name, x_label="ms from the start"))
    return (
        "<p>Accuracy of the frame probe by the frame's position in the recording. A single frame covers 20 to 60 "
        f'ms; a context also covers what came before.</p><div class="charts">{"".join(charts)}</div>'
    )


def _listen(test: AudioStore, labels: Mapping[str, tuple[Tensor, Tensor]], count: int = 6) -> str:
    parts = []
    for i in torch.linspace(0, len(test) - 1, min(count, len(test))).long().tolist():
        samples = test.read(i)[: 4 * test.rate]
        features, _ = log_mel(samples[None].float() / 32768, torch.tensor([len(samples)]), test.rate, hop=0.01)
        picture = features[0].T.flip(0)
        low, high = picture.min(), picture.max()
        picture = ((picture - low) / (high - low).clamp_min(1e-6) * 255).to(torch.uint8)[None]
        name = ", ".join(f"{target} {int(test.labels[target][i])}" for target in labels)
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(test.rate)
            file.writeframes(samples.numpy().astype("<i2").tobytes())
        sound = base64.b64encode(buffer.getvalue()).decode()
        tag = image_tag(picture, f"log-mel spectrogram of recording {i}", width=3 * picture.shape[2])
        parts.append(
            f"<figure>{tag}<figcaption>{escape(name)}</figcaption>"
            f'<audio controls src="data:audio/wav;base64,{sound}"></audio></figure>'
        )
    return (
        '<p class="muted">Test recordings, evenly spaced, not hand-picked; pictures are log-mel, 10 ms per column.</p>'
        f'<div class="samples">{"".join(parts)}</div>'
    )


def _settings(card: Mapping) -> str:
    parts = []
    for title, values in (("Configuration", card["config"]), ("Environment", card["environment"])):
        body = table(("name", "value"), [(k, str(v)) for k, v in values.items()])
        parts.append(f"<details><summary>{title} ({len(values)} values)</summary>{body}</details>")
    return "".join(parts)
