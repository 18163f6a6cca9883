"""The building blocks of pages: charts keep their extremes, ticks are round, images are checked."""

import re

import pytest
import torch

from common import html


def test_long_curve_keeps_its_extremes():
    y = [1.0] * 10_000
    y[1234], y[7777] = 9.0, -4.0
    chart = html.line_chart(range(10_000), y, name="loss")
    assert len(chart) < 20_000 and "lowest -4, highest 9" in chart
    band = re.search(r'class="band" points="([^"]*)"', chart)[1]
    heights = [float(p.split(",")[1]) for p in band.split()]
    assert min(heights) < 25 and max(heights) > 130  # both spikes reach the ends of the plot, 8 to 154


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (-3.2, 7.9), (1e-6, 2e-6), (990, 1010), (0, 0.03)):
        ticks = html._ticks(low, high, 4)
        assert 2 <= len(ticks) <= 9 and low - 1e-12 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
        assert len({f"{b - a:.6g}" for a, b in zip(ticks, ticks[1:], strict=False)}) == 1


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        html.image_tag(torch.zeros(3, 8, 8), "x")
    with pytest.raises(ValueError, match="uint8"):
        html.image_tag(torch.zeros(2, 8, 8, dtype=torch.uint8), "x")
