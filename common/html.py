"""Pages without a network: HTML and SVG building blocks for reports, studies and comparisons.

`page` makes a complete document that needs no script and no other file: images carry their pixels (PNG, or JPEG when
larger than an icon), charts are SVG written here so that they follow the page's colors in dark mode, and a content
security policy forbids every load from outside. All text is escaped; only `page` takes HTML, from the functions here.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TypeGuard

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#9c75d3", "#a0785a", "#e77fb3", "#8c8c8c", "#b3a125", "#33a9b8")
STYLE = Path(__file__).with_name("html.css")
PNG_UP_TO = 48  # px; larger thumbnails become JPEG, a third of the size and no different to the eye
THUMBNAIL = 96  # px; no image in the page has more pixels than this on its shorter side


# ---- text and numbers ------------------------------------------------------------------------------------------------


def is_finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that can be printed and drawn: no bool, NaN or infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_percent(metric: str) -> bool:
    """Accuracies are stored in percent, everything else as it is."""
    return metric.lower().startswith(("top", "acc"))


def number(value: object, metric: str = "") -> str:
    """A number as the tables print it: percentages and large values with two decimals, small ones with three."""
    if not is_finite(value):
        return "–" if value is None else str(value)
    digits = 2 if is_percent(metric) or abs(value) >= 1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0 into 0


def duration(seconds: float) -> str:
    """Seconds in words, for example `2 h 05 min`."""
    if not is_finite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---- building blocks -------------------------------------------------------------------------------------------------


def page(title: str, body: str) -> str:
    """A complete HTML document around `body`; `title` is escaped, `body` is not. Nothing outside it can be loaded."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; media-src data:; '
        f"style-src 'unsafe-inline'\"><title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    numeric: Iterable[int] = (),
    bold: int | None = None,
) -> str:
    """A table of escaped cells whose first column heads its rows; `numeric` columns are aligned right."""
    numeric = set(numeric)

    def kind(i: int) -> str:
        names = [name for name, on in (("number", i in numeric), ("ours", i == bold)) if on]
        return f' class="{" ".join(names)}"' if names else ""

    lines = [f'<th scope="col"{kind(i)}>{escape(str(text))}</th>' for i, text in enumerate(head)]
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(str(cell))}</th>' if i == 0 else f"<td{kind(i)}>{escape(str(cell))}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{"".join(lines)}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


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
    return f'<img src="{data_uri(image, small)}" alt="{escape(alt, quote=True)}"{size} class="{escape(css)}">'


def line_chart(
    x: Sequence[float],
    y: Sequence[float],
    *,
    name: str,
    x_label: str = "step",
    reference: tuple[float, str] | None = None,
    x_end: float = 0.0,
    bins: int = 300,
) -> str:
    """A curve as a `<figure>`: non-finite values are left out, long series become bin means inside their min-max band.

    reference: a level and its name, drawn as a dashed line (a loss's chance level, for example). x_end: the axis
    reaches at least this far, so that several curves of one run can share it.
    """
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if is_finite(a) and is_finite(b)]
    dropped = len(x) - len(points)
    caption = f"<b>{escape(name)}</b>"
    if not points:
        return f'<figure class="chart"><figcaption>{caption}</figcaption><p class="muted">no finite value</p></figure>'
    last = points[-1][1]
    caption += f"<span>{last:.4g}</span>"
    size = math.ceil(len(points) / bins)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    xs = [sum(p[0] for p in g) / len(g) for g in groups]
    means = [sum(p[1] for p in g) / len(g) for g in groups]
    lows, highs = [min(p[1] for p in g) for g in groups], [max(p[1] for p in g) for g in groups]

    bottom, top = min(lows), max(highs)
    if reference and is_finite(reference[0]):
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
        parts.append(
            f'<line class="grid" x1="{x0}" x2="{wide - 8}" y1="{py(tick)}" y2="{py(tick)}"/>'
            f'<text x="{x0 - 6}" y="{float(py(tick)) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for tick in _ticks(left, right, 5):
        parts.append(f'<text x="{px(tick)}" y="{y0 + 14}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{wide - 8}" y="{high - 5}" text-anchor="end">{escape(x_label)}</text>')
    if size > 1:
        band = [f"{px(a)},{py(b)}" for a, b in zip(xs, highs, strict=True)]
        band += [f"{px(a)},{py(b)}" for a, b in reversed(list(zip(xs, lows, strict=True)))]
        parts.append(f'<polygon class="band" points="{" ".join(band)}"/>')
    if reference and is_finite(reference[0]):
        level = py(reference[0])
        parts.append(
            f'<line class="reference" x1="{x0}" x2="{wide - 8}" y1="{level}" y2="{level}"/>'
            f'<text x="{wide - 10}" y="{float(level) - 4:.1f}" text-anchor="end">'
            f"{escape(reference[1])}</text>"
        )
    if len(xs) > 1:
        line = " ".join(f"{px(a)},{py(b)}" for a, b in zip(xs, means, strict=True))
        parts.append(f'<polyline class="curve" points="{line}"/>')
    parts.append(f'<circle class="dot" cx="{px(xs[-1])}" cy="{py(means[-1])}" r="3"/>')
    alt = (
        f"{name} against {x_label}: from {points[0][1]:.4g} to {last:.4g}, "
        f"lowest {min(lows):.4g}, highest {max(highs):.4g}"
    )
    note = f"<small>{dropped} non-finite values left out</small>" if dropped else ""
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption><svg viewBox="0 0 {wide} {high}" role="img" '
        f'aria-label="{escape(alt, quote=True)}">{"".join(parts)}</svg>{note}</figure>'
    )


def bar_chart(
    items: Sequence[Mapping], *, metric: str = "", alt: str, low: float = 0.0, high: float | None = None
) -> str:
    """Horizontal bars as an SVG, names above them so that they fit a phone.

    items: {"name", "value", optionally "std" (a whisker), "weak" (gray) and "marks" {name: value} (vertical ticks)}.
    """
    ends = [
        v
        for i in items
        for v in (i["value"], i["value"] + (i.get("std") or 0), *i.get("marks", {}).values())
        if is_finite(v)
    ]
    high = max([high if high is not None else 0.0, *ends, low + 1e-9])
    low = min([low, *ends])
    wide, row, end = 420, 36, 356  # bars span 0..end, the amounts stand to the right of it

    def px(value: float) -> float:
        return (min(max(value, low), high) - low) / (high - low) * end

    parts, zero = [], px(max(low, min(0.0, high)))
    for k, item in enumerate(items):
        value, y = item["value"], k * row
        parts.append(
            f'<text class="name" x="0" y="{y + 13}">{escape(str(item["name"]))}</text>'
            f'<rect class="track" x="0" y="{y + 18}" width="{end}" height="11" rx="3"/>'
        )
        if is_finite(value):
            start, width = min(zero, px(value)), abs(px(value) - zero)
            weak = " weak" if item.get("weak") else ""
            parts.append(
                f'<rect class="bar{weak}" x="{start:.1f}" y="{y + 18}" width="{width:.1f}" height="11" rx="3"/>'
            )
            if item.get("std"):
                a, b = px(value - item["std"]), px(value + item["std"])
                parts.append(
                    f'<path class="whisker" d="M{a:.1f} {y + 23.5}H{b:.1f}M{a:.1f} {y + 20}v7M{b:.1f} {y + 20}v7"/>'
                )
        for j, (name, mark) in enumerate(item.get("marks", {}).items()):
            if is_finite(mark):
                parts.append(
                    f'<line class="mark m{j}" x1="{px(mark):.1f}" x2="{px(mark):.1f}" y1="{y + 15.5}" '
                    f'y2="{y + 31.5}"><title>{escape(f"{name}: {number(mark, metric)}")}</title></line>'
                )
        parts.append(f'<text class="amount" x="{wide}" y="{y + 28}" text-anchor="end">{number(value, metric)}</text>')
    said = "; ".join(f"{i['name']} {number(i['value'], metric)}" for i in items)
    return (
        f'<svg viewBox="0 0 {wide} {max(1, len(items)) * row}" role="img" style="max-width:34rem" '
        f'aria-label="{escape(f"{alt}: {said}", quote=True)}">{"".join(parts)}</svg>'
    )


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


def data_uri(image: Tensor, lossless: bool) -> str:
    """uint8 [3 or 4, H, W] -> a data URI."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
