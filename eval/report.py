"""The report of one run: a single HTML file that needs no network, no script and no other file.

Images are inline PNG (JPEG when larger than an icon), charts are SVG written here so that they follow the page's
colours in dark mode. A content security policy in the file forbids every load from outside. All text that comes from
a card, a configuration or a data set is escaped; only `extra_sections` are taken as HTML, because methods write them.

The building blocks (`image_tag`, `line_chart`, `bar_chart`, `table`, `page`) are public: methods use them for their
own sections and `eval.compare` for its page.
"""

import base64
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import write_whole

PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#9c75d3", "#a0785a", "#e77fb3", "#8c8c8c", "#b3a125", "#33a9b8")
NOT_CURVES = {"step", "epoch", "kind", "seconds"}  # the x axes and the clock
PNG_UP_TO = 48  # px; larger thumbnails become JPEG, a third of the size and no different to the eye
THUMBNAIL = 96  # px; no image in the page has more pixels than this on its shorter side

# What a logged signal says. A curve is explained by the first entry whose key occurs in its name.
SIGNALS = {
    "rankme": ("Effective rank (RankMe)", "exp of the entropy of the normalised singular values: how many directions "
               "the features really use. Falling towards 1, or far below the feature width and still falling, is "
               "dimensional collapse: fewer and fewer directions carry everything."),
    "rank": ("Effective rank", "how many directions the features really use. Falling towards 1 is dimensional "
             "collapse: fewer and fewer directions carry everything."),
    "std": ("Feature standard deviation", "spread of each coordinate of the unit-length features, times sqrt(width). "
            "About 1 when they spread evenly; towards 0 all images get one feature, which is complete collapse."),
    "alpha": ("Spectrum decay (alpha-ReQ)", "slope of the covariance spectrum in log-log. Around 1 is a good balance; "
              "well above 1 a few directions dominate, well below 1 noise is kept as eagerly as content."),
    "align": ("Alignment", "mean squared distance between the views of one image (lower is closer). Near 0 together "
              "with a poor uniformity is collapse: all pairs agree because all images agree."),
    "uniform": ("Uniformity", "log of the mean Gaussian potential between different images (more negative is better "
                "spread). Climbing to 0 means that all images gather in one point."),
    "entropy": ("Entropy of targets", "near 0: one prototype takes everything; near ln K: all outputs are uniform and "
                "teach nothing. Health lies between the two, and moves slowly."),
    "prototype": ("Prototype use", "how many prototypes receive images. A falling count means that a few clusters "
                  "swallow the rest."),
    "grad_norm": ("Gradient norm", "sudden peaks go before divergence: lower the learning rate or warm up longer. "
                  "Towards 0 from the start means that nothing is learned."),
    "loss": ("Loss", "compare with its chance level (ln N for a contrastive loss over N candidates, ln K for K "
             "prototypes). A loss that stays there has not begun to learn. A low loss alone proves nothing: "
             "read it beside the kNN accuracy."),
}

STYLE = """
:root{color-scheme:light dark;--bg:#fafaf8;--card:#fff;--fg:#1e2429;--muted:#626b73;--line:#e1e3e4;--soft:#eef0f0;
--accent:#2a6a9c;--accent-soft:#cfe0ec;--bad:#b3372b;--good:#2f7d4f}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1b1f23;--fg:#e3e6e8;--muted:#9aa4ac;--line:#30363b;
--soft:#23282d;--accent:#7fb8e2;--accent-soft:#29455a;--bad:#f0877b;--good:#7cc79a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .6rem;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .6rem;font-weight:620}h3{font-size:1rem;margin:1.4rem 0 .5rem;font-weight:600}
p{margin:.5rem 0;max-width:46rem}small,.muted{color:var(--muted)}code{font:.88em ui-monospace,Menlo,Consolas,monospace}
.eyebrow{color:var(--muted);font-size:.85rem;margin:0}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1rem 0 0;font-size:.9rem}a{color:var(--accent)}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
section,.panel{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.1rem 1.2rem;
margin:1rem 0 0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.55rem 1.2rem;margin:0}
dl.facts dt{color:var(--muted);font-size:.8rem}dl.facts dd{margin:0;overflow-wrap:anywhere}
.headline{display:grid;grid-template-columns:minmax(11rem,1fr) 2fr;gap:1rem 2rem;align-items:center}
.headline .value{font-size:3rem;font-weight:650;line-height:1.05;letter-spacing:-.02em}
.headline .unit{font-size:1.3rem;font-weight:500;color:var(--muted)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.93rem}
caption{text-align:left;color:var(--muted);font-size:.88rem;padding-bottom:.4rem}
th,td{text-align:left;padding:.36rem .8rem .36rem 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--muted);font-weight:550;font-size:.82rem;white-space:nowrap}tbody th{font-weight:500}
th.number,td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-left:.8rem}
tr.protocol th{padding-top:1.1rem;font-weight:400;max-width:1px}tr.protocol b{font-weight:620}
td.ours{font-weight:650;white-space:nowrap}td summary{white-space:nowrap}section>svg{margin-top:1.1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17.5rem),1fr));gap:1.1rem 1.6rem}
.charts.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:0}figure.chart figcaption{font-size:.9rem;display:flex;justify-content:space-between;gap:1rem}
figure.chart figcaption b{font-weight:580;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--muted)}
svg text.name{fill:var(--fg);font-size:12px}svg text.amount{fill:var(--fg);font-size:12px;font-weight:600}
svg .grid{stroke:var(--line);stroke-width:1}svg .curve{fill:none;stroke:var(--accent);stroke-width:1.8;
stroke-linejoin:round;stroke-linecap:round}svg .dot,svg .bar{fill:var(--accent)}
svg .band{fill:var(--accent);opacity:.18}
svg .bar.weak{fill:var(--muted);opacity:.55}svg .track{fill:var(--soft)}svg .whisker{stroke:var(--fg);stroke-width:1.4}
svg .reference{stroke:var(--muted);stroke-dasharray:4 3}svg .mark{stroke:var(--fg);stroke-width:2}
svg .mark.m1{stroke:var(--bad);stroke-dasharray:2.5 2}
.samples{display:flex;flex-wrap:wrap;gap:.8rem 1.4rem}.sample{display:flex;gap:.3rem;align-items:center;flex-wrap:wrap}
img{display:block;border-radius:4px;max-width:100%}img.small{image-rendering:pixelated}
img.original{outline:2px solid var(--accent);outline-offset:1px;margin-right:.45rem}
.query{display:grid;grid-template-columns:5.4rem 1fr;gap:.3rem .9rem;padding:.6rem 0;border-top:1px solid var(--line)}
.query:first-of-type{border:0}.found{display:grid;grid-template-columns:repeat(auto-fill,4.2rem);gap:.45rem .55rem}
.query figure{width:4.2rem}.query>figure{width:5.2rem}.query figcaption{font-size:.74rem;line-height:1.25;
color:var(--muted);overflow-wrap:anywhere;margin-top:.2rem}.query>figure figcaption{color:var(--fg);font-weight:600}
.query img{width:4rem}.query>figure img{width:5rem}
.wrong img{outline:3px solid var(--bad);outline-offset:-1px}.query .wrong figcaption{color:var(--bad)}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.6rem 0;font-size:.88rem}
ul.legend i{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.4em}
details{margin:.6rem 0}
td details,th details{margin:0;font-size:.85rem}td details:not([open]){display:inline-block;margin-left:.6rem}
summary{cursor:pointer;color:var(--accent)}pre{white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.85rem}
.aside{border-left:3px solid var(--accent);padding:.1rem 0 .1rem 1rem;margin:1.2rem 0 0}
.notes{border-color:var(--bad)}.notes ul{margin:.3rem 0;padding-left:1.2rem}
footer{color:var(--muted);font-size:.85rem;margin-top:1.5rem}
@media(max-width:640px){.headline{grid-template-columns:1fr}h1{font-size:1.5rem}section,.panel{padding:1rem .9rem}
.query{grid-template-columns:4.2rem 1fr}.query>figure,.query>figure img{width:4rem}}
@media print{section,.panel{break-inside:avoid;border:0;padding-left:0}}
"""


# ---------------------------------------------------------------------------------------------------- text and numbers


def higher_is_better(metric: str) -> bool:
    """Whether a metric is an accuracy or an R2; the label-free ones have no simple direction."""
    return metric.lower().startswith(("top", "acc", "r2", "r²"))


def is_percent(metric: str) -> bool:
    """Accuracies are stored in percent, everything else as it is."""
    return metric.lower().startswith(("top", "acc"))


def number(value: object, metric: str = "") -> str:
    """A number as the tables print it: percentages and large values with two decimals, small ones with three."""
    if not _finite(value):
        return "–" if value is None else str(value)
    digits = 2 if is_percent(metric) or abs(value) >= 1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0 into 0


def duration(seconds: float) -> str:
    """Seconds in words, for example `2 h 05 min`."""
    if not _finite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def published_for(row: Mapping, card: Mapping) -> list[dict]:
    """The card's published numbers that may stand beside an evaluation row: those of the very same protocol.

    The metric must agree where the entry names one, and published numbers are about the labels, never about a factor.
    """
    if row["target"] not in ("label", card["data"].get("label_name")):
        return []
    return [p for p in card.get("published") or []
            if p.get("protocol") == row["protocol"] and p.get("metric", row["metric"]) == row["metric"]]


def headline_row(card: Mapping) -> dict | None:
    """The evaluation row that stands for the run: kNN (20, .07) on the labels, else the next best kind there is."""
    rows = [r for r in card.get("evaluations") or [] if higher_is_better(r["metric"])]
    labelled = [r for r in rows if r["target"] in ("label", card["data"].get("label_name"))]
    for start in ("knn-20-0.07", "knn", "linear", ""):
        for row in labelled or rows:
            if row["protocol"].startswith(start):
                return row
    return None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _spelt(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _settings(settings: Mapping) -> str:
    return ", ".join(f"{key} = {_spelt(value)}" for key, value in settings.items())


# ------------------------------------------------------------------------------------------------------ building blocks


def page(title: str, body: str) -> str:
    """A complete HTML document around `body`; `title` is escaped, `body` is not. Nothing outside it can be loaded."""
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; media-src data:; '
            f'style-src \'unsafe-inline\'"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
            f"<body><main>\n{body}\n</main></body></html>\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", numeric: Iterable[int] = (),
          bold: int | None = None) -> str:
    """A table of escaped cells whose first column heads its rows; `numeric` columns are aligned right."""
    numeric = set(numeric)

    def kind(i: int) -> str:
        names = [name for name, on in (("number", i in numeric), ("ours", i == bold)) if on]
        return f' class="{" ".join(names)}"' if names else ""

    lines = [f'<th scope="col"{kind(i)}>{escape(str(text))}</th>' for i, text in enumerate(head)]
    body = "".join("<tr>" + "".join(
        f'<th scope="row">{escape(str(cell))}</th>' if i == 0 else f"<td{kind(i)}>{escape(str(cell))}</td>"
        for i, cell in enumerate(row)) + "</tr>\n" for row in rows)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{"".join(lines)}</tr></thead>\n'
            f"<tbody>\n{body}</tbody></table></div>")


def image_tag(image: Tensor, alt: str, *, width: int | None = None, css: str = "") -> str:
    """An `<img>` that carries its pixels.

    image: uint8 [C, H, W] with C = 1 or 3. Shrunk to at most 96 px on the shorter side. width: displayed CSS pixels.
    Raises ValueError for another type or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image must be uint8 [1 or 3, H, W], not {image.dtype} {list(image.shape)}")
    image = _shrink(image[None])[0].expand(3, -1, -1)
    small = max(image.shape[1:]) <= PNG_UP_TO
    css = " ".join(filter(None, (css, "small" if small else "")))
    size = f' width="{width}"' if width else ""
    return f'<img src="{_data_uri(image, small)}" alt="{escape(alt, quote=True)}"{size} class="{escape(css)}">'


def line_chart(x: Sequence[float], y: Sequence[float], *, name: str, x_label: str = "step",
               reference: tuple[float, str] | None = None, x_end: float = 0.0, bins: int = 300) -> str:
    """A curve as a `<figure>`: non-finite values are left out, long series become bin means inside their min-max band.

    reference: a level and its name, drawn as a dashed line (a loss's chance level, for example). x_end: the axis
    reaches at least this far, so that several curves of one run can share it.
    """
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if _finite(a) and _finite(b)]
    dropped = len(x) - len(points)
    caption = f"<b>{escape(name)}</b>"
    if not points:
        return f'<figure class="chart"><figcaption>{caption}</figcaption><p class="muted">no finite value</p></figure>'
    last = points[-1][1]
    caption += f"<span>{last:.4g}</span>"
    size = math.ceil(len(points) / bins)
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    xs = [sum(p[0] for p in g) / len(g) for g in groups]
    means = [sum(p[1] for p in g) / len(g) for g in groups]
    lows, highs = [min(p[1] for p in g) for g in groups], [max(p[1] for p in g) for g in groups]

    bottom, top = min(lows), max(highs)
    if reference and _finite(reference[0]):
        bottom, top = min(bottom, reference[0]), max(top, reference[0])
    pad = (top - bottom) * 0.06 or abs(top) * 0.05 or 1.0
    bottom, top = bottom - pad, top + pad
    left, right = min(0.0, xs[0]), max(xs[-1], x_end, xs[0] + 1e-9)
    wide, high, x0, y0 = 340, 188, 46, 154  # the plot spans x0..wide-8 and 8..y0

    def px(a: float) -> str:
        return f"{x0 + (a - left) / (right - left) * (wide - 8 - x0):.1f}"

    def py(b: float) -> str:
        return f"{y0 - (b - bottom) / (top - bottom) * (y0 - 8):.1f}"

    parts = []
    for tick in _ticks(bottom, top, 4):
        parts.append(f'<line class="grid" x1="{x0}" x2="{wide - 8}" y1="{py(tick)}" y2="{py(tick)}"/>'
                     f'<text x="{x0 - 6}" y="{float(py(tick)) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(left, right, 5):
        parts.append(f'<text x="{px(tick)}" y="{y0 + 14}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{wide - 8}" y="{high - 5}" text-anchor="end">{escape(x_label)}</text>')
    if size > 1:
        band = [f"{px(a)},{py(b)}" for a, b in zip(xs, highs, strict=True)]
        band += [f"{px(a)},{py(b)}" for a, b in reversed(list(zip(xs, lows, strict=True)))]
        parts.append(f'<polygon class="band" points="{" ".join(band)}"/>')
    if reference and _finite(reference[0]):
        level = py(reference[0])
        parts.append(f'<line class="reference" x1="{x0}" x2="{wide - 8}" y1="{level}" y2="{level}"/>'
                     f'<text x="{wide - 10}" y="{float(level) - 4:.1f}" text-anchor="end">'
                     f"{escape(reference[1])}</text>")
    if len(xs) > 1:
        line = " ".join(f"{px(a)},{py(b)}" for a, b in zip(xs, means, strict=True))
        parts.append(f'<polyline class="curve" points="{line}"/>')
    parts.append(f'<circle class="dot" cx="{px(xs[-1])}" cy="{py(means[-1])}" r="3"/>')
    alt = (f"{name} against {x_label}: from {points[0][1]:.4g} to {last:.4g}, "
           f"lowest {min(lows):.4g}, highest {max(highs):.4g}")
    note = f'<small>{dropped} non-finite values left out</small>' if dropped else ""
    return (f'<figure class="chart"><figcaption>{caption}</figcaption><svg viewBox="0 0 {wide} {high}" role="img" '
            f'aria-label="{escape(alt, quote=True)}">{"".join(parts)}</svg>{note}</figure>')


def bar_chart(
    items: Sequence[Mapping], *, metric: str = "", alt: str, low: float = 0.0, high: float | None = None
) -> str:
    """Horizontal bars as an SVG, names above them so that they fit a phone.

    items: {"name", "value", optionally "std" (a whisker), "weak" (grey) and "marks" {name: value} (vertical ticks)}.
    """
    ends = [v for i in items for v in (i["value"], i["value"] + (i.get("std") or 0), *i.get("marks", {}).values())
            if _finite(v)]
    high = max([high if high is not None else 0.0, *ends, low + 1e-9])
    low = min([low, *ends])
    wide, row, end = 420, 36, 356  # bars span 0..end, the amounts stand to the right of it

    def px(value: float) -> float:
        return (min(max(value, low), high) - low) / (high - low) * end

    parts, zero = [], px(max(low, min(0.0, high)))
    for k, item in enumerate(items):
        value, y = item["value"], k * row
        parts.append(f'<text class="name" x="0" y="{y + 13}">{escape(str(item["name"]))}</text>'
                     f'<rect class="track" x="0" y="{y + 18}" width="{end}" height="11" rx="3"/>')
        if _finite(value):
            start, width = min(zero, px(value)), abs(px(value) - zero)
            weak = " weak" if item.get("weak") else ""
            parts.append(f'<rect class="bar{weak}" x="{start:.1f}" y="{y + 18}" width="{width:.1f}" height="11" '
                         'rx="3"/>')
            if item.get("std"):
                a, b = px(value - item["std"]), px(value + item["std"])
                parts.append(f'<path class="whisker" d="M{a:.1f} {y + 23.5}H{b:.1f}M{a:.1f} {y + 20}v7'
                             f'M{b:.1f} {y + 20}v7"/>')
        for j, (name, mark) in enumerate(item.get("marks", {}).items()):
            if _finite(mark):
                parts.append(f'<line class="mark m{j}" x1="{px(mark):.1f}" x2="{px(mark):.1f}" y1="{y + 15.5}" '
                             f'y2="{y + 31.5}"><title>{escape(f"{name}: {number(mark, metric)}")}</title></line>')
        parts.append(f'<text class="amount" x="{wide}" y="{y + 28}" text-anchor="end">{number(value, metric)}</text>')
    said = "; ".join(f"{i['name']} {number(i['value'], metric)}" for i in items)
    return (f'<svg viewBox="0 0 {wide} {max(1, len(items)) * row}" role="img" style="max-width:34rem" '
            f'aria-label="{escape(f"{alt}: {said}", quote=True)}">{"".join(parts)}</svg>')


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _shrink(images: Tensor, side: int = THUMBNAIL) -> Tensor:
    """uint8 [n, C, H, W], reduced to `side` px on the shorter side if it is larger."""
    height, width = images.shape[-2:]
    if min(height, width) <= side:
        return images
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    small = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8)


def _data_uri(image: Tensor, lossless: bool) -> str:
    """uint8 [3 or 4, H, W] -> a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------------- sections


def _headline(card: Mapping) -> str:
    row = headline_row(card)
    if row is None:
        return ('<div class="panel"><p>No accuracy was measured: the data has no labels, or evaluation was skipped.</p>'
                "</div>")
    metric, unit = row["metric"], "%" if is_percent(row["metric"]) else ""
    target = card["data"].get("label_name") if row["target"] == "label" else row["target"]
    items = [{"name": "this run", "value": row["value"]}]
    items += [{"name": name, "value": value, "weak": True} for name, value in row["baselines"].items()]
    gaps = []
    for name, value in row["baselines"].items():
        if _finite(value) and _finite(row["value"]):
            gap = row["value"] - value
            side = "above" if gap >= 0 else "below"
            gaps.append(f"{number(abs(gap), metric)} {'points ' if unit else ''}{side} {name}")
    compared = [f"published: {number(p.get('value'), metric)} ({_source(p)})" for p in published_for(row, card)]
    small = "".join(f"<p><small>{escape(text)}</small></p>" for text in compared)
    what = escape(f"{metric} on {target}, {row['protocol']}")
    said = ", ".join(gaps) + "." if gaps else "No baseline was measured."
    chart = bar_chart(items, metric=metric, high=100.0 if unit else None,
                      alt=f"{metric} on {target} beside the baselines")
    return (f'<div class="panel headline"><div><div class="value">{number(row["value"], metric)}'
            f'<span class="unit"> {unit}</span></div><div>{what}</div><p class="muted">{escape(said)}</p>{small}</div>'
            f"<div>{chart}</div></div>")


def _facts(card: Mapping) -> str:
    data = card["data"]
    memory = card.get("peak_memory_bytes")
    facts = {
        "method": card["method"], "preset": card["preset"],
        "data": f"{data['name']}, {data['train_images']} train, {data['test_images']} test",
        "data fingerprint": str(data["fingerprint"])[:12],
        "image size": f"{data['image_size']} px", "labels": data.get("label_name") or "none",
        "backbone": _spelt(card["backbone"]),
        "parameters": f"{card['parameters']:,}" if _finite(card.get("parameters")) else "–",
        "epochs, steps": f"{card['epochs']:g}, {card['steps']}", "batch size": card["batch_size"], "seed": card["seed"],
        "commit": card["git_commit"], "device": card["device"], "precision": card["precision"],
        "time": duration(card["wall_time_s"]), "images/s": number(card["images_per_second"]),
        "peak memory": f"{memory / 2**30:.2f} GiB" if _finite(memory) else "–",
    }
    pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f'<div class="panel"><dl class="facts">{pairs}</dl></div>'


def _curves(metrics: Sequence[Mapping], card: Mapping, references: Mapping[str, tuple[float, str]]) -> list[tuple]:
    """(name, x, y, x label, reference) of every logged number: loss, lr, online evaluations, then the rest."""
    per_step = card["epochs"] / card["steps"] if card.get("steps") and card.get("epochs") else None
    series: dict[tuple[str, str], tuple[list, list]] = {}
    for line in metrics:
        kind = str(line.get("kind") or "train")
        for key, value in line.items():
            if key in NOT_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            xs, ys = series.setdefault((kind, key), ([], []))
            xs.append(line.get("step", len(xs)))
            ys.append(value)

    def order(item: tuple[str, str]) -> tuple:
        kind, key = item
        return (0 if item == ("train", "loss") else 1 if item == ("train", "lr") else 2 if kind != "train" else 3)

    curves = []
    for kind, key in sorted(series, key=order):  # stable: otherwise as logged
        xs, ys = series[kind, key]
        name = key if kind == "train" else kind.replace("_", " ") + ("" if key == "value" else f": {key}")
        if per_step:
            xs = [step * per_step for step in xs]
        curves.append((name, xs, ys, "epoch" if per_step else "step", references.get(key)))
    return curves


def _training(curves: list[tuple]) -> str:
    if not curves:
        return "<p>No metrics were logged.</p>"
    end = max(x[-1] for _, x, *_ in curves)
    charts = [line_chart(x, y, name=name, x_label=label, reference=ref, x_end=end) for name, x, y, label, ref in curves]
    return ('<p class="muted">Beside each name stands its last value. Where many steps share a pixel the line is their '
            f'mean and the band their range.</p><div class="charts">{"".join(charts)}</div>')


def _evaluation(card: Mapping) -> str:
    rows = card.get("evaluations") or []
    if not rows:
        return "<p>This run was not evaluated.</p>"
    names = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    anchored = any(published_for(row, card) for row in rows)
    head = ["target", "metric", "this run", *names, *(["published"] if anchored else [])]
    cells = "".join(f'<th scope="col"{" class=number" if i >= 2 else ""}>{escape(h)}</th>' for i, h in enumerate(head))
    blocks: list[list[Mapping]] = []
    for row in rows:  # neighbouring rows of one protocol share its description
        if blocks and blocks[-1][0]["protocol"] == row["protocol"]:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    body, notes = [], []
    for block in blocks:
        first = block[0]
        shared = all(_spell(r) == _spell(first) for r in block)
        said = f". {escape(first['text'])}" if shared else ""
        said = f"<b>{escape(first['protocol'])}</b>{said}" + (_folded(first, with_text=False) if shared else "")
        body.append(f'<tr class="protocol"><th scope="rowgroup" colspan="{len(head)}">{said}</th></tr>')
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
            body.append(f'<tr><th scope="row">{escape(str(target))}</th><td>{escape(metric)}{own}</td>'
                        f"{''.join(values)}</tr>")
    html = ('<p class="muted">Unless a row says that the network was trained, the backbone is frozen and in eval mode; '
            "weights are those of the last step, nothing was chosen on the test set. Accuracies are percentages. Each "
            "row has the same protocol applied to the baselines.</p>"
            f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody>'
            "</table></div>")
    if notes:
        lines = "<br>".join(f"[{i + 1}] {escape(_source(p))}" for i, p in enumerate(notes))
        html += f"<p><small>{lines}</small></p>"
    shown = [id(p) for p in notes]
    others = [p for p in card.get("published") or [] if id(p) not in shown]
    if others:
        html += "<h3>Published numbers under other protocols</h3>"
        html += table(("value", "metric", "protocol", "source"),
                      [(number(p.get("value"), str(p.get("metric", ""))), p.get("metric", "–"), p.get("protocol", "–"),
                        _source(p)) for p in others],
                      caption="Not comparable with the rows above: same words, another protocol.")
    return html


def _spell(row: Mapping) -> tuple:
    return row["text"], row["settings"], row.get("chosen")


def _folded(row: Mapping, *, with_text: bool) -> str:
    """What defines a row, behind a click: a table of sixty numbers stays readable, and nothing is left out."""
    lines = [row["text"]] if with_text else []
    lines += ["Settings: " + _settings(row["settings"])] if row["settings"] else []
    lines += ["Chosen on training data: " + _settings(row["chosen"])] if row.get("chosen") else []
    if not lines:
        return ""
    return f"<details><summary>{'protocol' if with_text else 'settings'}</summary>" + "".join(
        f"<p><small>{escape(line)}</small></p>" for line in lines) + "</details>"


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
    said = "Framed: the original. Beside it: its views, as the network receives them." if originals is not None else \
        "Each group shows the views of one image, as the network receives them."
    sizes = Counter(int(view.shape[-1]) for view in per_view)
    said += " " + ", ".join(f"{n} of {size} px" for size, n in sorted(sizes.items(), reverse=True)) + "."
    more = f"<details><summary>How the views are drawn</summary><pre>{escape(text)}</pre></details>" if text else ""
    return f'<p class="muted">{escape(said)}</p><div class="samples">{"".join(rows)}</div>{more}'


def _label(labels: Tensor | None, names: Sequence[str] | None, i: int) -> str:
    if labels is None:
        return ""
    k = int(labels[i])
    if k < 0:
        return "unlabelled"
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


def _neighbours(images: Tensor, features: Tensor, labels: Tensor | None, names: Sequence[str] | None, k: int = 8,
                queries: int = 10) -> str:
    k = min(k, len(features) - 1)
    if k < 1:
        return "<p>Too few test images for neighbours.</p>"
    if labels is None:
        chosen = torch.linspace(0, len(features) - 1, min(queries, len(features))).long()
        said = "The queries are evenly spaced over the test set, not picked by hand."
    else:  # not picked by hand: the first image of each of the first classes
        kinds = labels[labels >= 0].unique()[:queries]
        chosen = torch.stack([(labels == kind).nonzero()[0, 0] for kind in kinds])
        said = "The query of each class is its first test image, not picked by hand."
    similarity, found = nearest(features, chosen, k)
    rows = []
    for q, query in enumerate(chosen.tolist()):
        name = _label(labels, names, query)
        tags = []
        for score, i in zip(similarity[q].tolist(), found[q].tolist(), strict=True):
            other = _label(labels, names, i)
            wrong = labels is not None and 0 <= int(labels[i]) != int(labels[query])  # a query always has a label
            tag = image_tag(images[i], f"neighbour of {name or f'image {query}'}: {other or f'image {i}'}"
                            + (", another class" if wrong else ""))
            tags.append(f'<figure{" class=wrong" if wrong else ""}>{tag}<figcaption>{"✗ " if wrong else ""}'
                        f"{escape(other)} {score:.2f}</figcaption></figure>")
        tag = image_tag(images[query], f"query {name or query}", css="")
        rows.append(f'<div class="query"><figure>{tag}<figcaption>{escape(name or f"image {query}")}</figcaption>'
                    f'</figure><div class="found">{"".join(tags)}</div></div>')
    said = f"The test images whose features are nearest to a query, with their cosine similarity. {said}"
    if labels is not None:
        said += " Neighbours of another class are framed and marked ✗."
    return f'<p class="muted">{escape(said)}</p>{"".join(rows)}{_confusions(features, labels, names, k)}'


def _confusions(features: Tensor, labels: Tensor | None, names: Sequence[str] | None, k: int, limit: int = 2000) -> str:
    """Which classes are mistaken for which among the nearest neighbours of up to `limit` test images."""
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
    text = f"Of {len(chosen)} test images, {100 * right:.1f} % of the {k} nearest neighbours have the same class. "
    if worst:
        def name(c: int) -> str:
            return str(names[c]) if names is not None and 0 <= c < len(names) else f"class {c}"
        text += "Most often mistaken: " + ", ".join(
            f"{name(a)} → {name(b)} ({100 * n / (k * totals[a]):.0f} %)" for (a, b), n in worst) + "."
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


def _scatter(
    points: Tensor, labels: Tensor | None, colours: Mapping[int, str], alt: str, names: tuple[str, str]
) -> str:
    """points: float [N, 2]. One path per class of zero-length round strokes: ten bytes a point."""
    wide, high, edge = 460, 380, 14
    low, top = points.min(0).values, points.max(0).values
    span = (top - low).clamp_min(1e-9)
    xy = (points - low) / span * torch.tensor([wide - 2 * edge, high - 2 * edge]) + edge
    xy[:, 1] = high - xy[:, 1]
    groups = {-1: torch.arange(len(points))} if labels is None else \
        {int(k): (labels == k).nonzero()[:, 0] for k in labels.unique()}
    parts = []
    for k, index in groups.items():
        d = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in xy[index].tolist())
        parts.append(f'<path d="{d}" stroke="{colours.get(k, "var(--muted)")}" stroke-width="5" stroke-linecap="round" '
                     'opacity=".72" fill="none"/>')
    return (f'<figure class="chart"><figcaption><span>{escape(names[1])}</span><span>{escape(names[0])}</span>'
            f'</figcaption><svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(alt, quote=True)}">'
            f'{"".join(parts)}</svg></figure>')


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
        small = F.interpolate(images[i:i + 1].float(), size=(side, side), mode="bilinear", antialias=True,
                              align_corners=False)[0].round().clamp(0, 255).to(torch.uint8)
        canvas[:3, y * side:(y + 1) * side, x * side:(x + 1) * side] = small
        canvas[3, y * side:(y + 1) * side, x * side:(x + 1) * side] = 255
    return (f'<h3>The same map with images</h3><img src="{_data_uri(canvas, True)}" style="width:100%" '
            'alt="Thumbnails of test images at their place in the first two principal components">')


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
    colours = {k: PALETTE[j] if len(kinds) <= len(PALETTE) else f"hsl({j * 137.5 % 360:.0f} 55% {45 + 15 * (j % 2)}%)"
               for j, k in enumerate(kinds)}
    panels = []
    for a, b in ((0, 1), (2, 3)):
        if share[b] > 0:
            axes = tuple(f"component {c + 1} ({100 * share[c]:.0f} %)" for c in (a, b))
            panels.append(_scatter(components[:, [a, b]], mine, colours, f"Test features on {axes[0]} and {axes[1]}",
                                   (f"→ {axes[0]}", f"↑ {axes[1]}")))
    legend = ""
    if kinds:
        first = {k: int((labels == k).nonzero()[0, 0]) for k in kinds[:30]}
        legend = '<ul class="legend">' + "".join(
            f'<li><i style="background:{colours[k]}"></i>{escape(_label(labels, names, i))}</li>'
            for k, i in first.items()) + (f"<li>and {len(kinds) - 30} more</li>" if len(kinds) > 30 else "") + "</ul>"
    said = (f"Principal components of {len(chosen)} test features (unit length), with their share of the variance. "
            f"Classes that overlap here may still "
            f"be apart in the other {max(0, features.shape[1] - 4)} dimensions: the accuracies above are the measure, "
            "this is the picture.")
    shown = _thumbnail_map(components[:, :2], images[chosen]) if share[1] > 0 else ""
    return f'<p class="muted">{escape(said)}</p>{legend}<div class="charts wide">{"".join(panels)}</div>{shown}'


def _tick_names(baselines: Iterable[Mapping]) -> str:
    """The legend of `bar_chart`'s marks, empty where there are none."""
    names = list(dict.fromkeys(name for marks in baselines for name in marks))[:2]
    return "; ".join(f"{'dashed red' if j else 'Black or white'} tick: {name}" for j, name in enumerate(names)) + \
        ("." if names else "")


def _invariance(card: Mapping, invariance: Mapping[str, float] | None, text: str, pairs: bool) -> str:
    shapes = str(card["data"]["name"]).startswith("shapes")
    rows, parts = [r for r in card.get("evaluations") or [] if r["protocol"] == "invariance"], []
    marks = {r["target"]: r["baselines"] for r in rows}
    if invariance is None:
        invariance = {r["target"]: r["value"] for r in rows}
    if invariance:
        text = text or ("Each bar says how far the features move when this factor alone is changed: 0 means not at all "
                        "(the network has become invariant to the factor), 1 as far as between two random images. A "
                        "good profile is long at what the labels are about and short at what the augmentations change.")
        items = [{"name": name, "value": value, "marks": marks.get(name, {})} for name, value in invariance.items()]
        ticks = _tick_names(marks.values())
        chart = bar_chart(items, high=1.0, alt="Movement of the features by factor")
        parts.append(f"<p>{escape(text)} {escape(ticks)}</p>{chart}")
    elif shapes:
        parts.append("<p>The invariance profile was not measured in this run.</p>")
    else:
        parts.append(f"<p>Only data with known factors (<code>shapes</code>) has an invariance profile; "
                     f"{escape(str(card['data']['name']))} has none.</p>")
    probes: dict[str, list[Mapping]] = {}
    for row in card.get("evaluations") or []:
        if row["protocol"] == "factor-linear":
            probes.setdefault(row["metric"], []).append(row)
    if probes:
        ticks = _tick_names(row["baselines"] for rows in probes.values() for row in rows)
        parts.append("<h3>What a linear probe can still read</h3><p>The reverse question: how well each factor is "
                     "predicted from the frozen features. A factor may be kept in a few directions and yet hardly move "
                     f"the features, so read both charts. {escape(ticks)}</p>")
        charts = []
        for metric, rows in probes.items():
            items = [{"name": r["target"], "value": r["value"], "marks": r["baselines"]} for r in rows]
            charts.append(f'<figure class="chart"><figcaption><b>{escape(metric)}</b></figcaption>'
                          + bar_chart(items, metric=metric, high=100.0 if is_percent(metric) else 1.0,
                                      alt=f"Factor probes, {metric}") + "</figure>")
        parts.append(f'<div class="charts wide">{"".join(charts)}</div>')
    if shapes and pairs:  # what two views share: a method of one view has no such shortcut
        textured = card["data"]["name"] != "shapes"
        told = ("This run has it: its images carry strong background stripes that both views share." if textured else
                "The backgrounds of this run are plain. Give every image strong background stripes "
                "(<code>--data shapes-textured</code>) and train the same run again: its loss is lower, and so is its "
                "accuracy on shape.")
        parts.append('<div class="aside"><h3 style="margin-top:0">Feature suppression</h3><p>' + told +
                     " Two views of one image show the same stripes, so matching the texture goes a long way, and "
                     "little asks the network to look at the shape. A lower loss says that the task is solved better, "
                     "not that the features are more useful. The cure is in the views, not in the loss: "
                     "change in them what must not be used.</p></div>")
    return "".join(parts)


def _collapse(curves: list[tuple], rows: Sequence[Mapping], own: Mapping[str, str]) -> str:
    logged = [name for name, *_ in curves] + [r["metric"] for r in rows if r["protocol"] == "label-free"]
    said: dict[str, tuple[str, list[str]]] = {}
    for name in logged:
        low = name.lower().replace("-", "_").replace(" ", "_")
        key = next((k for k in own if k == name), None)
        if key is not None:
            said.setdefault(f"own {key}", (own[key], []))[1].append(name)
            continue
        key = next((k for k in SIGNALS if k in low), None)
        if key is not None:
            said.setdefault(key, (": ".join(SIGNALS[key]), []))[1].append(name)
    for key in ("std", "rankme", "loss"):  # the three that everybody should know, logged or not
        if any(key in name.lower() for name in logged):
            continue
        said.setdefault(key, (": ".join(SIGNALS[key]), ["not logged"]))
    body = [(", ".join(dict.fromkeys(names)), text) for text, names in said.values()]
    return ("<p>A collapsed network gives every image nearly the same feature, or features in very few directions. "
            "The loss can look fine while it happens; these numbers do not.</p>"
            + table(("logged as", "what it says"), body))


def _settings_section(card: Mapping) -> str:
    config, environment = card.get("config") or {}, card.get("environment") or {}
    parts = []
    for title, values in (("Configuration", config), ("Environment", environment)):
        parts.append(f"<details><summary>{title} ({len(values)} values)</summary>"
                     + table(("name", "value"), [(k, _spelt(v)) for k, v in values.items()]) + "</details>")
    return "".join(parts)


# ----------------------------------------------------------------------------------------------------------- the report


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
    invariance: Mapping[str, float] | None = None,
    invariance_text: str = "",
    signals: Mapping[str, str] | None = None,
    references: Mapping[str, tuple[float, str]] | None = None,
    extra_sections: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` into `run_dir` (aside, then renamed) and return its path.

    card: the result card. metrics: the lines of metrics.jsonl; each number becomes a curve over "step"; lines with a
        "kind" other than "train" (for example "online_knn") are curves of their own.
    test_images: uint8 [M, 3, H, W]; test_features: [M, D], the same rows; test_labels: long [M] or None,
        negative where an image has none.
    views: uint8 [n, V, 3, s, s], or for multi-crop one uint8 [n, 3, s_v, s_v] per view; originals: uint8 [n, 3, H, W],
        the images the views were made of. view_text: what the recipe does, in words (`ViewRecipe.describe()`).
    invariance: factor -> how far features move with it, as `eval.probes.invariance_profile` returns it (0 invariant, 1
        as between random images); None takes the card's "invariance" rows, with their baselines, if it has them.
        invariance_text replaces the sentence that explains it.
    signals: logged name -> what the method says it means. references: logged name -> (level, its name), a dashed line.
    extra_sections: (title, HTML) of the method; the HTML is used as it is, so escape what goes into it.
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
    curves = _curves(metrics, card, references or {})
    rows = card.get("evaluations") or []
    pairs = views is None or (views.shape[1] if isinstance(views, Tensor) else len(views)) > 1
    sections = [
        ("Training", _training(curves)),
        ("Evaluation", _evaluation(card)),
        ("What the model sees", _views(views, originals, view_text)),
        ("Nearest neighbours", _neighbours(test_images, features, labels, class_names)),
        ("Map of the features", _map(test_images, features, labels, class_names)),
        ("Invariance", _invariance(card, invariance, invariance_text, pairs)),
        *extra_sections,
        ("Signs of collapse", _collapse(curves, rows, signals or {})),
        ("Settings", _settings_section(card)),
    ]
    title = f"{card['method']} · {card['preset']}"
    parts = [f'<header><p class="eyebrow">Self-supervised pretraining, report of one run</p><h1>{escape(title)}</h1>']
    if notes:
        parts.append('<div class="aside notes"><b>Notes</b><ul>'
                     + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul></div>")
    parts += [_headline(card), _facts(card), "<nav>"]
    parts += [f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections)]
    parts.append("</nav></header>")
    parts += [f'<section id="s{i}"><h2>{escape(name)}</h2>\n{html}</section>'
              for i, (name, html) in enumerate(sections)]
    parts.append("<footer>Self-contained: this page loads nothing from anywhere. Data behind it: result.json and "
                 "metrics.jsonl in the same directory.</footer>")
    path = Path(run_dir) / "report.html"
    write_whole(path, page(title, "\n".join(parts)))
    return path
