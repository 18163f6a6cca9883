"""Procedural images with known factors: one flat shape, or a pair of one kind, on a plain background.

Everything is a formula, so the data set needs no file, exists at any resolution, and a probe per factor can show what a
method keeps and what it has become invariant to. Hue, size, position and rotation change every pixel and none of them
changes the class: raw pixels are a poor representation of the shape.

A single shape is a harder task than it seems for methods without negatives: two crops of one image share its position,
its size and the difference of the two hues, and these are learned first. In a pair each shape has different ones, and
what the crops share most easily is the kind of shape.

`sample_factors` and `sample_pair_factors` sample factors from a seed; `render` turns factors into pixels and uses no
random numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.rng import generator

VERSION = 1  # part of every fingerprint: raise it when a factor's distribution or a pixel changes

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring", "heart", "half-disc", "arrow", "hourglass")


@dataclass(frozen=True)
class Factor:
    """Type and range of a factor, which determine its probe.

    kind: "categorical" (long, 0 to n - 1), "continuous" (float between low and high) or "circular" (float, low equals
    high on a circle). `text` names the unit.
    """

    kind: str
    text: str
    low: float = 0.0
    high: float = 1.0
    names: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of categories; 0 where the factor is not categorical."""
        return len(self.names)


FACTORS: dict[str, Factor] = {
    "shape": Factor("categorical", "the kind of shape", names=SHAPES),
    "hue": Factor("circular", "hue of the shape, in turns"),
    "background_hue": Factor("circular", "hue of the background, in turns; a sixth of a turn or more from the shape"),
    "size": Factor("continuous", "diameter of the shape's circumscribed circle, as a share of the image", 0.35, 0.75),
    "x": Factor("continuous", "center from the left edge, as a share of the image", 0.175, 0.825),
    "y": Factor("continuous", "center from the top edge, as a share of the image", 0.175, 0.825),
    "rotation": Factor("continuous", "degrees, counter-clockwise", -30.0, 30.0),
    # Only with texture=True. A plain background has no texture to describe.
    "texture_angle": Factor("circular", "direction across the stripes, in half turns"),
    "texture_frequency": Factor("continuous", "stripes per image side", 3.0, 8.0),
    "texture_phase": Factor("circular", "offset of the stripes, in periods"),
}

OVERLAP = 0.03  # of the image side: how far the circles of a pair may reach into each other

# Shape 1 is the upper one: an order that crops and horizontal flips leave alone, so that a probe has a fixed target.
PAIR_FACTORS: dict[str, Factor] = {
    "shape": Factor("categorical", "the kind of both shapes", names=SHAPES),
    "background_hue": Factor("circular", "hue of the background, in turns; a sixth of a turn or more from each shape"),
    "hue1": Factor("circular", "hue of the upper shape, in turns"),
    "hue2": Factor("circular", "hue of the lower shape, in turns"),
    "size1": Factor("continuous", "diameter of the upper shape's circle, as a share of the image", 0.38, 0.46),
    "size2": Factor("continuous", "diameter of the lower shape's circle, as a share of the image", 0.38, 0.46),
    "x1": Factor("continuous", "center of the upper shape from the left edge, as a share of the image", 0.19, 0.81),
    "y1": Factor("continuous", "center of the upper shape from the top edge, as a share of the image", 0.19, 0.81),
    "x2": Factor("continuous", "center of the lower shape from the left edge, as a share of the image", 0.19, 0.81),
    "y2": Factor("continuous", "center of the lower shape from the top edge, as a share of the image", 0.19, 0.81),
    "rotation1": Factor("circular", "degrees of the upper shape, counter-clockwise", 0.0, 360.0),
    "rotation2": Factor("circular", "degrees of the lower shape, counter-clockwise", 0.0, 360.0),
}


def sample_factors(n: int, seed: int, *, texture: bool = False) -> dict[str, Tensor]:
    """Factors of n images: long [n] for "shape", float32 [n] for the others, in the units of `FACTORS`.

    All are uniform and independent but for two: the background's hue keeps a distance from the shape's (so that the
    shape can be seen; alone it is uniform), and the center's range shrinks with the size (so that none is cut off).
    The first factors are the same with and without texture.
    """
    draws = torch.rand(n, 10, generator=generator(seed, "shapes"), dtype=torch.float64).unbind(1)
    size = _between(draws[3], FACTORS["size"])
    factors = {
        "shape": (draws[0] * len(SHAPES)).long(),
        "hue": draws[1],
        "background_hue": (draws[1] + 1 / 6 + draws[2] * 4 / 6) % 1.0,
        "size": size,
        "x": size / 2 + draws[4] * (1 - size),
        "y": size / 2 + draws[5] * (1 - size),
        "rotation": _between(draws[6], FACTORS["rotation"]),
    }
    if texture:
        factors["texture_angle"] = draws[7]
        factors["texture_frequency"] = _between(draws[8], FACTORS["texture_frequency"])
        factors["texture_phase"] = draws[9]
    return {name: value if value.dtype == torch.long else value.float() for name, value in factors.items()}


def sample_pair_factors(n: int, seed: int) -> dict[str, Tensor]:
    """Factors of n images with two shapes of one kind: long [n] for "shape", float32 [n] for the others, in the units
    of `PAIR_FACTORS`.

    The two shapes' hues, sizes and rotations are independent. Each hue is a sixth of a turn or more from the
    background's. The positions are uniform among those where neither shape is cut off and their circles overlap by
    `OVERLAP` at most.
    """
    rng = generator(seed, "pairs")
    draws = torch.rand(n, 8, generator=rng, dtype=torch.float64)
    background, sizes = draws[:, 1], _between(draws[:, 2:4], PAIR_FACTORS["size1"])
    hues = (background.unsqueeze(1) + 1 / 6 + draws[:, 4:6] * 4 / 6) % 1.0
    centers = torch.empty(n, 2, 2, dtype=torch.float64)  # shape, then (x, y)
    open_rows = torch.arange(n)
    while len(open_rows):
        half = sizes[open_rows].unsqueeze(2) / 2
        tried = half + torch.rand(len(open_rows), 2, 2, generator=rng, dtype=torch.float64) * (1 - 2 * half)
        centers[open_rows] = tried
        distance = (tried[:, 0] - tried[:, 1]).square().sum(1).sqrt()
        open_rows = open_rows[distance < half.sum((1, 2)) - OVERLAP]
    order = centers[:, :, 1].argsort(1)  # the upper one first
    sizes, centers = sizes.gather(1, order), centers.gather(1, order.unsqueeze(2).expand(n, 2, 2))
    factors = {
        "shape": (draws[:, 0] * len(SHAPES)).long(),
        "background_hue": background,
        "hue1": hues[:, 0],
        "hue2": hues[:, 1],
        "size1": sizes[:, 0],
        "size2": sizes[:, 1],
        "x1": centers[:, 0, 0],
        "y1": centers[:, 0, 1],
        "x2": centers[:, 1, 0],
        "y2": centers[:, 1, 1],
        "rotation1": draws[:, 6] * 360,
        "rotation2": draws[:, 7] * 360,
    }
    return {name: value if value.dtype == torch.long else value.float() for name, value in factors.items()}


def render(factors: dict[str, Tensor], size: int) -> Tensor:
    """Pixels of the images that `factors` describe: uint8 [n, 3, size, size]. A pure function, image by image.

    `factors` are those of `FACTORS`, or those of `PAIR_FACTORS` for two shapes. Edges are antialiased over one pixel.
    Where the texture_* factors are given, the background has strong stripes of its hue: two crops of one image share
    them, so they distinguish images more easily than the shape does, and a contrastive method then drops the shape
    (feature suppression: Chen et al. 2021, arXiv:2011.02803).
    """
    n = len(factors["shape"])
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    draw = _render_pairs if "hue1" in factors else _render_single
    chunk = max(1, 2**18 // size**2)  # the temporaries of a chunk stay in the cache
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many short operations: 0.5 s for 10,000 images, and two threads take longer, not less
    try:
        for start in range(0, n, chunk):
            part = {name: value[start : start + chunk] for name, value in factors.items()}
            images[start : start + chunk] = draw(part, size)
    finally:
        torch.set_num_threads(threads)
    return images


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _render_single(factors: dict[str, Tensor], size: int) -> Tensor:
    cover = _cover(factors["shape"], factors["x"], factors["y"], factors["size"], factors["rotation"], size)
    # Equal saturation and value: hue alone separates shape and background. A shape that is always brighter than its
    # background lifts raw-pixel kNN from 35 to 41 %.
    shape = _hsv_to_rgb(factors["hue"], 0.8, 0.9)
    background = _hsv_to_rgb(factors["background_hue"], 0.8, 0.9)
    if "texture_angle" in factors:
        background = background * _stripes(factors, _pixel_centers(size)).unsqueeze(1)
    return torch.lerp(background, shape, cover).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _render_pairs(factors: dict[str, Tensor], size: int) -> Tensor:
    """The shapes are brighter than the background, equally in all images: a brightness that varied from image to image
    would be shared by its crops and learned in place of the shape."""
    images = _hsv_to_rgb(factors["background_hue"], 0.8, 0.35).expand(-1, 3, size, size)
    for i in ("1", "2"):
        place = factors["x" + i], factors["y" + i], factors["size" + i], factors["rotation" + i]
        images = torch.lerp(images, _hsv_to_rgb(factors["hue" + i], 0.5, 0.95), _cover(factors["shape"], *place, size))
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _pixel_centers(size: int) -> Tensor:
    return (torch.arange(size, dtype=torch.float32) + 0.5) / size  # share of the image


def _cover(shape: Tensor, x: Tensor, y: Tensor, diameter: Tensor, rotation: Tensor, size: int) -> Tensor:
    """Share of each pixel that the shape covers, [n, 1, S, S], from the factors [n] of a shape."""
    centers = _pixel_centers(size)
    radius = (diameter / 2).view(-1, 1, 1)
    right = (centers.view(1, 1, -1) - x.view(-1, 1, 1)) / radius  # [n, 1, S], in radii
    up = (y.view(-1, 1, 1) - centers.view(1, -1, 1)) / radius  # [n, S, 1]; the image's y points down
    cos, sin = _cos_sin(rotation.double() / 360)
    u, v = right * cos + up * sin, up * cos - right * sin  # [n, S, S], upright in the shape's own frame

    distance = torch.empty_like(u)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero().squeeze(1)
        if len(rows):
            distance[rows] = _DISTANCE[name](u[rows], v[rows])
    return (0.5 - distance * (radius * size)).clamp_(0, 1).unsqueeze(1)


def _stripes(factors: dict[str, Tensor], centers: Tensor) -> Tensor:
    """Brightness of the background, [n, S, S]: bars of 0.1 and 1.1 with soft edges."""
    cos, sin = _cos_sin(factors["texture_angle"].double() / 2)
    place = centers.view(1, 1, -1) * cos + centers.view(1, -1, 1) * sin
    turns = place * factors["texture_frequency"].view(-1, 1, 1) + factors["texture_phase"].view(-1, 1, 1)
    wave = (turns - turns.floor() - 0.5).abs() * 4 - 1  # triangle, -1 to 1; no cosine: exact on every machine
    return 0.6 + 0.5 * (wave * 2).clamp_(-1, 1)


def _hsv_to_rgb(hue: Tensor, saturation: float, value: float) -> Tensor:
    """[n, 3, 1, 1]; channel = v - v s clamp(min(k, 4 - k), 0, 1) with k = (n + 6 h) mod 6 and n = 5, 3, 1."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue.unsqueeze(1)) % 6
    return (value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)).view(-1, 3, 1, 1)


def _cos_sin(turns: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, 1, 1] each, taken in float64, so that the last bit cannot depend on how the work was split."""
    angle = (turns * (2 * math.pi)).view(-1, 1, 1)
    return angle.cos().float(), angle.sin().float()


def _between(draw: Tensor, factor: Factor) -> Tensor:
    return factor.low + draw * (factor.high - factor.low)


# ---- shapes: signed distance to the edge, negative inside, in units of the circumscribed circle's radius -------------


def _outline(*points: tuple[float, float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Distance to a polygon that is its own mirror image in the vertical axis, given its right half from top to bottom.

    Distance: the nearest of the half's edges. Sign: a ray to the right crosses them an odd number of times from inside.
    """
    reach = max(math.hypot(*point) for point in points)
    scaled = [(x / reach, y / reach) for x, y in points]  # touches the circle

    def distance(u: Tensor, v: Tensor) -> Tensor:
        u = u.abs()
        nearest = torch.full_like(u, math.inf)
        inside = torch.zeros_like(u, dtype=torch.bool)
        for (x0, y0), (x1, y1) in zip(scaled, scaled[1:], strict=False):
            ex, ey = x1 - x0, y1 - y0
            du, dv = u - x0, v - y0
            along = ((du * ex + dv * ey) / (ex * ex + ey * ey)).clamp_(0, 1)
            nearest = torch.minimum(nearest, (du - along * ex).square_().add_((dv - along * ey).square_()))
            if ey:
                inside ^= ((v >= y0) != (v >= y1)) & (du < dv * (ex / ey))
        return torch.where(inside, -nearest.sqrt(), nearest.sqrt())

    return distance


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v).sqrt_() - 1.0


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return ((u * u + v * v).sqrt_() - 0.78).abs_() - 0.22


def _half_disc(u: Tensor, v: Tensor) -> Tensor:
    lifted = v + 0.3  # its flat side lies below the center, so that the shape sits in the circle
    return torch.maximum((u * u + lifted * lifted).sqrt_() - 0.95, -lifted)


def _star_points() -> list[tuple[float, float]]:
    radii = [1.0 if i % 2 == 0 else 0.42 for i in range(6)]
    return [(r * math.sin(math.pi * i / 5), r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart_points(segments: int = 24) -> list[tuple[float, float]]:
    """x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, moved to the middle of its own height."""
    ts = [math.pi * i / segments for i in range(segments + 1)]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    middle = (max(ys) + min(ys)) / 2
    return [(16 * math.sin(t) ** 3, y - middle) for t, y in zip(ts, ys, strict=True)]


_DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "square": _outline((0, 1), (1, 1), (1, -1), (0, -1)),
    "triangle": _outline((0, 1), (math.sqrt(3) / 2, -0.5), (0, -0.5)),
    "star": _outline(*_star_points()),
    "cross": _outline((0, 1), (0.3, 1), (0.3, 0.3), (1, 0.3), (1, -0.3), (0.3, -0.3), (0.3, -1), (0, -1)),
    "ring": _ring,
    "heart": _outline(*_heart_points()),
    "half-disc": _half_disc,
    "arrow": _outline((0, 1), (0.8, 0.1), (0.28, 0.1), (0.28, -1), (0, -1)),
    "hourglass": _outline((0, 1), (0.8, 1), (0.12, 0), (0.8, -1), (0, -1)),
}
