"""The report of one run: a single HTML file that needs no network, no script and no other file.

All text that comes from a card, a configuration or a data set is escaped; only `extra_sections` are taken as HTML,
because methods write them, with the building blocks of `common.html`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import write_atomic
from common.html import (
    PALETTE,
    bar_chart,
    data_uri,
    duration,
    image_tag,
    is_finite,
    is_percent,
    line_chart,
    number,
    page,
    table,
)
from eval.card import compared, headline_row, published_for

REPORT = "report.html"
NOT_CURVES = {"step", "epoch", "kind", "seconds"}  # the x axes and the clock
UNEXPLAINED = "not explained: add it to the method's SIGNALS"
LOGGED = {
    "loss": "what is minimized. Compare it with its chance level (ln N for a contrastive loss over N candidates, ln K "
    "for K prototypes): a loss that stays there has not begun to learn. A low loss alone proves nothing: read it "
    "together with the kNN accuracy.",
    "lr": "learning rate of the step",
    "images_per_second": "training images per second over all processes, evaluation not counted",
    "online_knn": "kNN accuracy (k = 20, T = 0.07) of the backbone during training; the last one counts, not the best",
}
"""Logged name, or kind of a line of metrics.jsonl -> its explanation, for names that all methods log."""
LABEL_FREE = {
    "RankMe": "smooth rank: exp of the entropy of the normalized singular values, how many directions the features "
    "use. Towards 1, or far below the feature width, is dimensional collapse: few directions carry everything.",
    "rank": "numerical rank: singular values above float32 rounding.",
    "alpha-ReQ": "slope of the covariance spectrum in log-log. Around 1 is a good balance; well above 1 a few "
    "directions dominate, well below 1 noise is kept as eagerly as content.",
    "feature std": "spread of each coordinate of the unit-length features, times sqrt(width). About 1 when they "
    "spread evenly; towards 0 all images get one feature, which is complete collapse.",
    "alignment": "mean squared distance between the views of one image (lower is closer). Near 0 together with a "
    "poor uniformity is collapse: all pairs agree because all images agree.",
    "uniformity": "log of the mean Gaussian potential between different images (more negative is better spread). "
    "Near 0 all images gather in one point.",
}
"""Metric of the protocol label-free -> its explanation."""


def _formatted(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _settings(settings: Mapping) -> str:
    return ", ".join(f"{key} = {_formatted(value)}" for key, value in settings.items())


# ---- sections --------------------------------------------------------------------------------------------------------


def _headline(card: Mapping) -> str:
    row = headline_row(card)
    if row is None:
        return (
            '<div class="panel"><p>No accuracy was measured: the data has no labels, or evaluation was skipped.</p>'
            "</div>"
        )
    metric, unit = row["metric"], "%" if is_percent(row["metric"]) else ""
    target = card["data"].get("label_name") if row["target"] == "label" else row["target"]
    items = [{"name": "this run", "value": row["value"]}]
    items += [{"name": name, "value": value, "weak": True} for name, value in row["baselines"].items()]
    gaps = []
    for name, value in row["baselines"].items():
        if is_finite(value) and is_finite(row["value"]):
            gap = row["value"] - value
            side = "above" if gap >= 0 else "below"
            gaps.append(f"{number(abs(gap), metric)} {'points ' if unit else ''}{side} {name}")
    anchors = "".join(f"<p>{escape(line)}</p>" for line in compared(card))
    what = escape(f"{metric} on {target}, {row['protocol']}")
    text = ", ".join(gaps) + "." if gaps else "No baseline was measured."
    chart = bar_chart(items, metric=metric, high=100.0 if unit else None, alt=f"{metric} on {target} and the baselines")
    return (
        f'<div class="panel headline"><div><div class="value">{number(row["value"], metric)}'
        f'<span class="unit"> {unit}</span></div><div>{what}</div><p class="muted">{escape(text)}</p>{anchors}</div>'
        f"<div>{chart}</div></div>"
    )


def data_text(data: Mapping) -> str:
    """The data of a card, and what the backbone was judged on, in a phrase."""
    judged = data.get("judged_on")
    if judged is None:
        return f"{data['name']}, {data['train_images']} train, {data['test_images']} test"
    return (
        f"{data['name']}, {data['train_images']} train; judged on {judged['name']}, {judged['train_images']} train, "
        f"{data['test_images']} test"
    )


def _facts(card: Mapping) -> str:
    data = card["data"]
    memory = card.get("peak_memory_bytes")
    facts = {
        "method": card["method"],
        "preset": card["preset"],
        "data": data_text(data),
        "data fingerprint": str(data["fingerprint"])[:12],
        "image size": f"{data['image_size']} px",
        "labels": data.get("label_name") or "none",
        "backbone": _formatted(card["backbone"]),
        "parameters": f"{card['parameters']:,}" if is_finite(card.get("parameters")) else "–",
        "epochs, steps": f"{card['epochs']:g}, {card['steps']}",
        **({"extended": "; ".join(card["extended"])} if "extended" in card else {}),
        "batch size": card["batch_size"],
        **({"started from": card["initial_weights"]["name"]} if "initial_weights" in card else {}),
        "seed": card["seed"],
        "commit": card["git_commit"],
        "device": card["device"],
        "precision": card["precision"],
        "time": duration(card["wall_time_s"]),
        "images/s": number(card["images_per_second"]),
        "peak memory": f"{memory / 2**30:.2f} GiB" if is_finite(memory) else "–",
    }
    pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f'<div class="panel"><dl class="facts">{pairs}</dl></div>'


class Curve(NamedTuple):
    """A logged number over training. `signal`: the name in SIGNALS that explains it."""

    name: str
    signal: str
    x: list[float]
    y: list[float]
    x_label: str
    reference: tuple[float, str] | None


def _curves(metrics: Sequence[Mapping], card: Mapping, references: Mapping[str, tuple[float, str]]) -> list[Curve]:
    """Every logged number: loss, lr, online evaluations, then the rest."""
    per_step = card["epochs"] / card["steps"] if card.get("steps") and card.get("epochs") else None
    series: dict[tuple[str, str], tuple[list, list]] = {}
    for line in metrics:
        kind = str(line.get("kind", ""))
        for key, value in line.items():
            if key in NOT_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            xs, ys = series.setdefault((kind, key), ([], []))
            xs.append(line.get("step", len(xs)))
            ys.append(value)

    def order(item: tuple[str, str]) -> int:
        kind, key = item
        return 0 if item == ("", "loss") else 1 if item == ("", "lr") else 2 if kind else 3

    curves = []
    for kind, key in sorted(series, key=order):  # stable: otherwise as logged
        xs, ys = series[kind, key]
        name = f"{kind.replace('_', ' ')}: {key}" if kind else key
        if per_step:
            xs = [step * per_step for step in xs]
        x_label = "epoch" if per_step else "step"
        curves.append(Curve(name, kind or key, xs, ys, x_label, references.get(key)))
    return curves


def _training(curves: Sequence[Curve]) -> str:
    if not curves:
        return "<p>No metrics were logged.</p>"
    end = max(curve.x[-1] for curve in curves)
    charts = [line_chart(c.x, c.y, name=c.name, x_label=c.x_label, reference=c.reference, x_end=end) for c in curves]
    return (
        '<p class="muted">The number next to each name is its last value. Where many steps share a pixel, the '
        f'line is their mean and the band their range.</p><div class="charts">{"".join(charts)}</div>'
    )


def _evaluation(card: Mapping) -> str:
    rows = card.get("evaluations") or []
    if not rows:
        return "<p>This run was not evaluated.</p>"
    names = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    anchored = any(published_for(row, card) for row in rows)
    head = ["target", "metric", "this run", *names, *(["published"] if anchored else [])]
    cells = "".join(f'<th scope="col"{" class=number" if i >= 2 else ""}>{escape(h)}</th>' for i, h in enumerate(head))
    blocks: list[list[Mapping]] = []
    for row in rows:  # neighboring rows of one protocol share its description
        if blocks and blocks[-1][0]["protocol"] == row["protocol"]:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    body, notes = [], []
    for block in blocks:
        first = block[0]
        shared = all(_spell(r) == _spell(first) for r in block)
        text = f". {escape(first['text'])}" if shared else ""
        text = f"<b>{escape(first['protocol'])}</b>{text}" + (_folded(first, with_text=False) if shared else "")
        body.append(f'<tr class="protocol"><th scope="rowgroup" colspan="{len(head)}">{text}</th></tr>')
        for row in block:
            metric = row["metric"]
            own = "" if shared else _folded(row, with_text=True)
            target = row["target"]
            if target == "label" and card["data"].get("label_name") not in (None, "label"):
                target = f"label ({card['data']['label_name']})"
            values = [f'<td class="number ours">{number(row["value"], metric)}</td>']
            values += [f'<td class="number">{number(row["baselines"].get(name), metric)}</td>' for name in names]
            if anchored:
                found = published_for(row, card)
                texts = []
                for entry in found:
                    notes.append(entry)
                    texts.append(f"{number(entry.get('value'), metric)} [{len(notes)}]")
                values.append(f'<td class="number">{escape(", ".join(texts))}</td>')
            body.append(
                f'<tr><th scope="row">{escape(str(target))}</th><td>{escape(metric)}{own}</td>{"".join(values)}</tr>'
            )
    html = (
        '<p class="muted">Unless a row states that the network was trained, the backbone is frozen and in eval mode; '
        "weights are those of the last step, nothing was selected on the test set. Accuracies are percentages. Each "
        "row has the same protocol applied to the baselines.</p>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )
    if notes:
        lines = "<br>".join(f"[{i + 1}] {escape(_source(p))}" for i, p in enumerate(notes))
        html += f"<p><small>{lines}</small></p>"
    shown = [id(p) for p in notes]
    others = [p for p in card.get("published") or [] if id(p) not in shown]
    if others:
        html += "<h3>Published numbers, not compared</h3>"
        html += table(
            ("value", "metric", "protocol", "source", "why not"),
            [
                (
                    number(p.get("value"), str(p.get("metric", ""))),
                    p.get("metric", "–"),
                    p.get("protocol", "–"),
                    _source(p),
                    p.get("not_compared") or "no row of this protocol",
                )
                for p in others
            ],
            caption="A published number is compared where data, budget and protocol agree.",
        )
    return html


def _confusion(card: Mapping, names: Sequence[str] | None) -> str:
    """The confusion matrix of the linear probe, or of kNN where that was not run; empty where no row has one."""
    rows = [row for row in card.get("evaluations") or [] if "confusion" in row.get("details", {})]
    row = next((row for row in rows if row["protocol"] == "linear"), rows[0] if rows else None)
    if row is None:
        return ""
    counts = torch.tensor(row["details"]["confusion"])
    classes = [names[k] if names and k < len(names) else f"class {k}" for k in range(len(counts))]
    share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    off = share.clone().fill_diagonal_(0)
    worst = [divmod(int(k), len(counts)) for k in off.flatten().argsort(descending=True, stable=True)[:3]]
    said = [f"{classes[i]} for {classes[j]} ({share[i, j]:.0f} %)" for i, j in worst if off[i, j] > 0]
    text = f"Percent of the images of a class (row) that {row['protocol']} takes for another (column). "
    text += f"Most often: {', '.join(said)}." if said else "None is taken for another."
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in classes)
    body = ""
    for i, name in enumerate(classes):
        cells = ""
        for j, value in enumerate(share[i].tolist()):
            kind, shown = " class=right" if i == j else "", f"{value:.0f}" if value >= 0.5 else ""
            cells += f'<td{kind} style="--p:{value:.0f}%">{shown}</td>'
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (
        f'<h3>What is taken for what</h3><div class="scroll" tabindex="0"><table class="confusion">'
        f"<caption>{escape(text)}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _spell(row: Mapping) -> tuple:
    return row["text"], row["settings"], row.get("chosen")


def _folded(row: Mapping, *, with_text: bool) -> str:
    """The definition of a row, collapsed: a table of sixty numbers stays readable, and nothing is left out."""
    lines = [row["text"]] if with_text else []
    lines += ["Settings: " + _settings(row["settings"])] if row["settings"] else []
    lines += ["Chosen on training data: " + _settings(row["chosen"])] if row.get("chosen") else []
    if not lines:
        return ""
    return (
        f"<details><summary>{'protocol' if with_text else 'settings'}</summary>"
        + "".join(f"<p><small>{escape(line)}</small></p>" for line in lines)
        + "</details>"
    )


def _source(entry: Mapping) -> str:
    return str(entry.get("source", "no source given")) + (f"; {entry['note']}" if entry.get("note") else "")


def _views(views: Tensor | Sequence[Tensor] | None, originals: Tensor | None, text: str, count: int = 8) -> str:
    if views is None or len(views) == 0:
        return "<p>This method was given no augmented views to show.</p>"
    per_view = list(views.unbind(1)) if isinstance(views, Tensor) else list(views)
    count = min(count, len(per_view[0]))
    largest = max(view.shape[-1] for view in per_view)
    rows = []
    for i in range(count):
        tags = []
        if originals is not None:
            tags.append(image_tag(originals[i], f"image {i + 1}, original", width=76, css="original"))
        for v, view in enumerate(per_view):
            width = max(36, 76 * view.shape[-1] // largest)
            tags.append(image_tag(view[i], f"image {i + 1}, view {v + 1}", width=width))
        rows.append(f'<div class="sample">{"".join(tags)}</div>')
    note = (
        "Framed: the original, then its views, as the network receives them."
        if originals is not None
        else "Each group shows the views of one image, as the network receives them."
    )
    sizes = Counter(int(view.shape[-1]) for view in per_view)
    note += " " + ", ".join(f"{n} of {size} px" for size, n in sorted(sizes.items(), reverse=True)) + "."
    more = f"<details><summary>How the views are made</summary><pre>{escape(text)}</pre></details>" if text else ""
    return f'<p class="muted">{escape(note)}</p><div class="samples">{"".join(rows)}</div>{more}'


def _label(labels: Tensor | None, names: Sequence[str] | None, i: int) -> str:
    if labels is None:
        return ""
    k = int(labels[i])
    if k < 0:
        return "unlabeled"
    return str(names[k]) if names is not None and k < len(names) else f"class {k}"


def nearest(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity and index of the k nearest other rows.

    features: [N, D]; queries: long [Q], rows of `features`, each left out of its own result.
    Returns float [Q, k] and long [Q, k], nearest first.
    """
    unit = F.normalize(features.float(), dim=1)
    values, indices = [], []
    for chunk in queries.split(512):
        similarity = unit[chunk] @ unit.T
        similarity[torch.arange(len(chunk)), chunk] = -torch.inf
        best = similarity.topk(k, dim=1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)


def _neighbors(
    images: Tensor, features: Tensor, labels: Tensor | None, names: Sequence[str] | None, k: int = 8, queries: int = 10
) -> str:
    k = min(k, len(features) - 1)
    if k < 1:
        return "<p>Too few test images for neighbors.</p>"
    if labels is None:
        chosen = torch.linspace(0, len(features) - 1, min(queries, len(features))).long()
        text = "The queries are evenly spaced over the test set, not hand-picked."
    else:  # not hand-picked: the first image of each of the first classes
        kinds = labels[labels >= 0].unique()[:queries]
        chosen = torch.stack([(labels == kind).nonzero()[0, 0] for kind in kinds])
        text = "The query of each class is its first test image, not hand-picked."
    similarity, found = nearest(features, chosen, k)
    rows = []
    for q, query in enumerate(chosen.tolist()):
        name = _label(labels, names, query)
        tags = []
        for score, i in zip(similarity[q].tolist(), found[q].tolist(), strict=True):
            other = _label(labels, names, i)
            wrong = labels is not None and 0 <= int(labels[i]) != int(labels[query])  # a query always has a label
            tag = image_tag(
                images[i],
                f"neighbor of {name or f'image {query}'}: {other or f'image {i}'}"
                + (", another class" if wrong else ""),
            )
            tags.append(
                f"<figure{' class=wrong' if wrong else ''}>{tag}<figcaption>{'✗ ' if wrong else ''}"
                f"{escape(other)} {score:.2f}</figcaption></figure>"
            )
        tag = image_tag(images[query], f"query {name or query}", css="")
        rows.append(
            f'<div class="query"><figure>{tag}<figcaption>{escape(name or f"image {query}")}</figcaption>'
            f'</figure><div class="found">{"".join(tags)}</div></div>'
        )
    text = f"The test images whose features are nearest to a query, with their cosine similarity. {text}"
    if labels is not None:
        text += " Neighbors of another class are framed and marked ✗."
    return f'<p class="muted">{escape(text)}</p>{"".join(rows)}{_confusions(features, labels, names, k)}'


def _confusions(features: Tensor, labels: Tensor | None, names: Sequence[str] | None, k: int, limit: int = 2000) -> str:
    """Which classes are mistaken for which among the nearest neighbors of up to `limit` test images."""
    if labels is None or int((labels >= 0).sum()) <= k:
        return ""
    features, labels = features[labels >= 0], labels[labels >= 0]
    chosen = torch.linspace(0, len(features) - 1, min(limit, len(features))).long()
    _, found = nearest(features, chosen, k)
    mine, theirs = labels[chosen], labels[found]
    right = (theirs == mine[:, None]).float().mean().item()
    counts = Counter((int(a), int(b)) for a, row in zip(mine, theirs, strict=True) for b in row if int(a) != int(b))
    totals = Counter(mine.tolist())
    worst = sorted(counts.items(), key=lambda c: (-c[1] / (k * totals[c[0][0]]), c[0]))[:6]
    text = f"Of {len(chosen)} test images, {100 * right:.1f} % of the {k} nearest neighbors have the same class. "
    if worst:

        def name(c: int) -> str:
            return str(names[c]) if names is not None and 0 <= c < len(names) else f"class {c}"

        text += (
            "Most often mistaken: "
            + ", ".join(f"{name(a)} → {name(b)} ({100 * n / (k * totals[a]):.0f} %)" for (a, b), n in worst)
            + "."
        )
    return f"<p>{escape(text)}</p>"


def principal_components(features: Tensor, k: int = 4) -> tuple[Tensor, Tensor]:
    """The first k principal components of unit-length features, and each one's share of the variance.

    features: [N, D]. Returns float [N, k] and [k] (zeros where there is no variance, or fewer than k directions). The
    sign is fixed (the largest absolute value is positive) and torch's global generator is left as it was.
    """
    x = F.normalize(features.float(), dim=1)
    x = x - x.mean(0)
    total = x.square().sum().item()
    out, share = torch.zeros(len(x), k), torch.zeros(k)
    rank = min(k, *x.shape)
    if total <= 1e-12 * len(x):
        return out, share
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, v = torch.pca_lowrank(x, q=min(rank + 6, *x.shape), center=False, niter=4)
    scores = x @ v[:, :rank]
    scores = scores * scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    out[:, :rank], share[:rank] = scores, singular[:rank].square() / total
    return out, share


def _scatter(points: Tensor, labels: Tensor | None, colors: Mapping[int, str], alt: str, names: tuple[str, str]) -> str:
    """points: float [N, 2]. One path per class of zero-length round strokes: ten bytes a point."""
    wide, high, edge = 460, 380, 14
    low, top = points.min(0).values, points.max(0).values
    span = (top - low).clamp_min(1e-9)
    xy = (points - low) / span * torch.tensor([wide - 2 * edge, high - 2 * edge]) + edge
    xy[:, 1] = high - xy[:, 1]
    groups = (
        {-1: torch.arange(len(points))}
        if labels is None
        else {int(k): (labels == k).nonzero()[:, 0] for k in labels.unique()}
    )
    parts = []
    for k, index in groups.items():
        d = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in xy[index].tolist())
        parts.append(
            f'<path d="{d}" stroke="{colors.get(k, "var(--muted)")}" stroke-width="5" stroke-linecap="round" '
            'opacity=".72" fill="none"/>'
        )
    return (
        f'<figure class="chart"><figcaption><span>{escape(names[1])}</span><span>{escape(names[0])}</span>'
        f'</figcaption><svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(alt, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _thumbnail_map(points: Tensor, images: Tensor, columns: int = 26, rows: int = 15, side: int = 24) -> str:
    """The map with images for points: each cell of a grid shows the image nearest to its middle, if there is one."""
    low, top = points.min(0).values, points.max(0).values
    cell = (points - low) / (top - low).clamp_min(1e-9) * torch.tensor([columns - 1e-3, rows - 1e-3])
    cell[:, 1] = rows - 1e-3 - cell[:, 1]
    place = cell.floor().clamp_min(0).long()
    off = (cell - place - 0.5).square().sum(1)
    canvas = torch.zeros(4, rows * side, columns * side, dtype=torch.uint8)
    best: dict[tuple[int, int], int] = {}
    for i in off.argsort().tolist():
        best.setdefault((int(place[i, 0]), int(place[i, 1])), i)
    for (x, y), i in best.items():
        small = (
            F.interpolate(
                images[i : i + 1].float(), size=(side, side), mode="bilinear", antialias=True, align_corners=False
            )[0]
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
        canvas[:3, y * side : (y + 1) * side, x * side : (x + 1) * side] = small
        canvas[3, y * side : (y + 1) * side, x * side : (x + 1) * side] = 255
    return (
        f'<h3>The same map with images</h3><img src="{data_uri(canvas, True)}" style="width:100%" '
        'alt="Thumbnails of test images at their position in the first two principal components">'
    )


def _map(
    images: Tensor, features: Tensor, labels: Tensor | None, names: Sequence[str] | None, limit: int = 2000
) -> str:
    if len(features) < 3:
        return "<p>Too few test images for a map.</p>"
    chosen = torch.linspace(0, len(features) - 1, min(limit, len(features))).long()
    components, share = principal_components(features[chosen])
    if not share[0] > 0:
        return "<p>All test images have the same feature, so there is no map: the representation has collapsed.</p>"
    mine = None if labels is None else labels[chosen]
    kinds = [] if mine is None else [int(k) for k in mine.unique()]
    colors = {
        k: PALETTE[j] if len(kinds) <= len(PALETTE) else f"hsl({j * 137.5 % 360:.0f} 55% {45 + 15 * (j % 2)}%)"
        for j, k in enumerate(kinds)
    }
    panels = []
    for a, b in ((0, 1), (2, 3)):
        if share[b] > 0:
            axes = tuple(f"component {c + 1} ({100 * share[c]:.0f} %)" for c in (a, b))
            panels.append(
                _scatter(
                    components[:, [a, b]],
                    mine,
                    colors,
                    f"Test features on {axes[0]} and {axes[1]}",
                    (f"→ {axes[0]}", f"↑ {axes[1]}"),
                )
            )
    legend = ""
    if labels is not None and kinds:
        first = {k: int((labels == k).nonzero()[0, 0]) for k in kinds[:30]}
        legend = (
            '<ul class="legend">'
            + "".join(
                f'<li><i style="background:{colors[k]}"></i>{escape(_label(labels, names, i))}</li>'
                for k, i in first.items()
            )
            + (f"<li>and {len(kinds) - 30} more</li>" if len(kinds) > 30 else "")
            + "</ul>"
        )
    text = (
        f"Principal components of {len(chosen)} test features (unit length), with their share of the variance. "
        f"Classes that overlap here may still "
        f"be apart in the other {max(0, features.shape[1] - 4)} dimensions: the accuracies above are the measure, "
        "this is the picture."
    )
    shown = _thumbnail_map(components[:, :2], images[chosen]) if share[1] > 0 else ""
    return f'<p class="muted">{escape(text)}</p>{legend}<div class="charts wide">{"".join(panels)}</div>{shown}'


def _tick_names(baselines: Iterable[Mapping]) -> str:
    """The legend of `bar_chart`'s marks, empty where there are none."""
    names = list(dict.fromkeys(name for marks in baselines for name in marks))[:2]
    return "; ".join(f"{'dashed red' if j else 'Black or white'} tick: {name}" for j, name in enumerate(names)) + (
        "." if names else ""
    )


def _invariance(card: Mapping) -> str:
    drawn = _on_shapes(card) or card["data"]["name"] == "pairs"
    rows, parts = [r for r in card.get("evaluations") or [] if r["protocol"] == "invariance"], []
    if rows:
        text = (
            "Each bar shows how far the features move when only this factor changes: 0 means not at all "
            "(the network is invariant to the factor), 1 as far as between two random images. A good profile "
            "has long bars for what the labels describe and short ones for what the augmentations change."
        )
        items = [{"name": r["target"], "value": r["value"], "marks": r["baselines"]} for r in rows]
        ticks = _tick_names(r["baselines"] for r in rows)
        chart = bar_chart(items, high=1.0, alt="Movement of the features by factor")
        parts.append(f"<p>{text} {escape(ticks)}</p>{chart}")
    elif drawn:
        parts.append("<p>The invariance profile was not measured in this run.</p>")
    else:
        parts.append(
            f"<p>Only rendered images (<code>pairs</code>, <code>shapes</code>) have an invariance profile; "
            f"{escape(str(card['data']['name']))} has none.</p>"
        )
    probes: dict[str, list[Mapping]] = {}
    for row in card.get("evaluations") or []:
        if row["protocol"] == "factor-linear":
            probes.setdefault(row["metric"], []).append(row)
    if probes:
        ticks = _tick_names(row["baselines"] for rows in probes.values() for row in rows)
        parts.append(
            "<h3>What a linear probe can still read</h3><p>The reverse question: how well each factor is "
            "predicted from the frozen features. A factor may be encoded in a few directions and yet barely move "
            f"the features, so read both charts. {escape(ticks)}</p>"
        )
        charts = []
        for metric, rows in probes.items():
            items = [{"name": r["target"], "value": r["value"], "marks": r["baselines"]} for r in rows]
            charts.append(
                f'<figure class="chart"><figcaption><b>{escape(metric)}</b></figcaption>'
                + bar_chart(
                    items, metric=metric, high=100.0 if is_percent(metric) else 1.0, alt=f"Factor probes, {metric}"
                )
                + "</figure>"
            )
        parts.append(f'<div class="charts wide">{"".join(charts)}</div>')
    return "".join(parts)


def _on_shapes(card: Mapping) -> bool:
    return str(card["data"]["name"]).startswith("shapes")


def _suppression(card: Mapping) -> str:
    """On single shapes: what two views share. A method of one view has no such shortcut."""
    sharing = (
        "This run has it: its images carry strong background stripes that both views share."
        if card["data"]["name"] != "shapes"
        else "The backgrounds of this run are plain. Give every image strong background stripes "
        "(<code>--data shapes-textured</code>) and train the same run again: its loss is lower, and so is its "
        "accuracy on shape."
    )
    return (
        '<div class="aside"><h3 style="margin-top:0">Feature suppression</h3><p>'
        + sharing
        + " Two views of one image show the same stripes, so matching the texture solves much of the task, and "
        "little requires the network to encode the shape. A lower loss means that the task is solved better, "
        "not that the features are more useful. The remedy is in the views, not in the loss: "
        "vary in them what must not be used.</p></div>"
    )


def _collapse(curves: Sequence[Curve], signals: Mapping[str, str]) -> str:
    return (
        "<p>A collapsed network gives every image nearly the same feature, or features in very few directions. "
        "The loss can look fine while it happens; these numbers do not.</p>"
        + explanations({curve.name: curve.signal for curve in curves}, signals)
    )


def _label_free(card: Mapping) -> str:
    names = [row["metric"] for row in card.get("evaluations") or [] if row["protocol"] == "label-free"]
    return explanations(names, LABEL_FREE, head="measured at the end") if names else ""


def explanations(logged: Iterable[str] | Mapping[str, str], signals: Mapping[str, str], head: str = "logged as") -> str:
    """A table that explains each logged name: from the method's `signals`, otherwise from `LOGGED`.

    `logged`: names, or the names shown -> the names they are explained under.
    """
    shown = logged if isinstance(logged, Mapping) else {name: name for name in logged}
    rows = [(name, signals.get(signal) or LOGGED.get(signal) or UNEXPLAINED) for name, signal in shown.items()]
    return table((head, "meaning"), rows)


def _settings_section(card: Mapping) -> str:
    config, environment = card.get("config") or {}, card.get("environment") or {}
    parts = []
    for title, values in (("Configuration", config), ("Environment", environment)):
        parts.append(
            f"<details><summary>{title} ({len(values)} values)</summary>"
            + table(("name", "value"), [(k, _formatted(v)) for k, v in values.items()])
            + "</details>"
        )
    return "".join(parts)


# ---- the card's parts ------------------------------------------------------------------------------------------------


def _card_parts(card: Mapping, class_names: Sequence[str] | None) -> dict[str, str]:
    """The HTML that is made of the card's evaluations, by name, each between two comments that `rewrite_report` finds:
    no text has any, as it is escaped."""
    parts = {
        "headline": _headline(card),
        "evaluation": _evaluation(card) + _confusion(card, class_names),
        "invariance": _invariance(card),
        "label-free": _label_free(card),
    }
    return {name: html.join(_marks(name)) for name, html in parts.items()}


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} of the card -->", f"<!-- end of {name} -->"


def rewrite_report(run_dir: str | os.PathLike, card: Mapping, class_names: Sequence[str] | None = None) -> Path | None:
    """Bring the `report.html` in `run_dir` up to date with the card, whose evaluations have changed; returns its path.

    The rest stays as training wrote it: curves, images, neighbors, the method's sections. None, and nothing is written,
    where there is no report, or one of a version that did not mark what it made of the card.
    """
    path = Path(run_dir) / REPORT
    if not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace")
    for name, html in _card_parts(card, class_names).items():
        start, end = _marks(name)
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            return None
        text = before + html + after
    write_atomic(path, text)
    return path


# ---- the report ------------------------------------------------------------------------------------------------------


def write_report(
    run_dir: str | os.PathLike,
    *,
    card: Mapping,
    metrics: Sequence[Mapping],
    test_images: Tensor,
    test_features: Tensor,
    test_labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    views: Tensor | Sequence[Tensor] | None = None,
    originals: Tensor | None = None,
    view_text: str = "",
    signals: Mapping[str, str] | None = None,
    references: Mapping[str, tuple[float, str]] | None = None,
    extra_sections: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` into `run_dir` (atomically) and return its path.

    card: the result card. metrics: the lines of metrics.jsonl; each number becomes a curve over "step"; lines with a
        "kind" (for example "online_knn") are separate curves.
    test_images: uint8 [M, 3, H, W]; test_features: [M, D], the same rows; test_labels: long [M] or None,
        negative where an image has none.
    views: uint8 [n, V, 3, s, s], or for multi-crop one uint8 [n, 3, s_v, s_v] per view; originals: uint8 [n, 3, H, W],
        the images the views were made of. view_text: what the recipe does, in words (`ViewRecipe.describe()`).
    signals: logged name, or kind of a line, -> the method's explanation.
    references: logged name -> (level, its name), a dashed line.
    extra_sections: (title, HTML) of the method; the HTML is used verbatim, so escape what goes into it.
    notes: what a reader must see first, shown at the top after the card's own "warnings".
    Raises ValueError when features, images and labels disagree in length.
    """
    lengths = {len(test_images), len(test_features)} | ({len(test_labels)} if test_labels is not None else set())
    if len(lengths) != 1:
        raise ValueError(f"test images, features and labels have different lengths: {sorted(lengths)}")
    features = test_features.detach().float().cpu()
    labels = None if test_labels is None or not bool((test_labels >= 0).any()) else test_labels.cpu()
    notes = [*(card.get("warnings") or []), *notes]
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        notes.append(f"{bad} of {len(features)} test features are not finite; they are shown as zero.")
        features = features.nan_to_num(0.0, 0.0, 0.0)
    curves, of_card = _curves(metrics, card, references or {}), _card_parts(card, class_names)
    pairs = views is None or (views.shape[1] if isinstance(views, Tensor) else len(views)) > 1
    sections = [
        ("Training", _training(curves)),
        ("Evaluation", of_card["evaluation"]),
        ("What the model sees", _views(views, originals, view_text)),
        ("Nearest neighbors", _neighbors(test_images, features, labels, class_names)),
        ("Map of the features", _map(test_images, features, labels, class_names)),
        ("Invariance", of_card["invariance"] + (_suppression(card) if _on_shapes(card) and pairs else "")),
        *extra_sections,
        ("Signs of collapse", _collapse(curves, signals or {}) + of_card["label-free"]),
        ("Settings", _settings_section(card)),
    ]
    title = f"{card['method']} · {card['preset']}"
    parts = [f'<header><p class="eyebrow">Self-supervised pretraining, report of one run</p><h1>{escape(title)}</h1>']
    if notes:
        parts.append(
            '<div class="aside notes"><b>Notes</b><ul>'
            + "".join(f"<li>{escape(note)}</li>" for note in notes)
            + "</ul></div>"
        )
    parts += [of_card["headline"], _facts(card), "<nav>"]
    parts += [f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections)]
    parts.append("</nav></header>")
    parts += [
        f'<section id="s{i}"><h2>{escape(name)}</h2>\n{html}</section>' for i, (name, html) in enumerate(sections)
    ]
    parts.append(
        "<footer>Self-contained: this page loads nothing from anywhere. Data behind it: result.json and "
        "metrics.jsonl in the same directory.</footer>"
    )
    path = Path(run_dir) / REPORT
    write_atomic(path, page(title, "\n".join(parts)))
    return path
