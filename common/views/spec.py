"""What one random view of an image is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.errors import UserError

PROBABILITIES = ("flip", "color_jitter_prob", "grayscale", "blur", "solarize", "translated")


class Augmentation(Protocol):
    """A further operation of a view, such as `common.views.erasing.RandomErasing`: a frozen dataclass of its settings.

    It must treat every sample alone and read no value on the host, so that blocks of a batch, torch.compile and
    accelerators can use it.
    """

    @property
    def columns(self) -> int:
        """Random numbers per sample."""

    def describe(self) -> str:
        """A few plain words, such as "random erasing p 0.25"."""

    def __call__(self, x: Tensor, uniform: Tensor) -> Tensor:
        """x float [n, 3, s, s] in [0, 1], not to be overwritten; uniform [n, columns] in [0, 1). Returns the new x."""


@dataclass(frozen=True)
class View:
    """One view. Probabilities are per sample; strengths are torchvision's.

    size              side of the square output in pixels
    scale, ratio      area of the crop as a share of the image, width / height; both as (low, high)
    interpolation     "bilinear" or "bicubic", always antialiased
    translate         if positive, the whole image is moved instead of cropped, with probability `translated`: by up to
                      this many whole pixels along each axis, with reflected borders (the border pixel is not repeated)
    flip              probability of a left-right flip
    color_jitter_prob probability that brightness, contrast, saturation and hue are all changed, in random order:
                      the first three by factors U(max(0, 1 - v), 1 + v), the hue by U(-hue, hue) in turns of the
                      color circle
    grayscale         probability of a grayscale image
    blur              probability of a Gaussian blur with sigma ~ U(blur_sigma) pixels and `blur_kernel` taps (odd;
                      0: a tenth of the side, made odd)
    solarize          probability that values >= 0.5 are inverted
    extra             further operations, made in this order between solarize and normalization
    mean, std         normalization (x - mean) / std of each channel, in [0, 1] units; the default leaves x unchanged

    Raises UserError for values that no image can satisfy.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    translate: int = 0
    translated: float = 1.0
    flip: float = 0.5
    color_jitter_prob: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 0
    solarize: float = 0.0
    extra: tuple[Augmentation, ...] = ()
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.blur_kernel == 0:
            object.__setattr__(self, "blur_kernel", self.size // 10 | 1)
        self._check("size", self.size >= 1, "a positive number of pixels")
        self._check("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "0 < low <= high <= 1")
        self._check("ratio", 0 < self.ratio[0] <= self.ratio[1], "0 < low <= high")
        self._check("interpolation", self.interpolation in ("bilinear", "bicubic"), "bilinear or bicubic")
        self._check("translate", self.translate >= 0, "0 or a positive number of pixels")
        for name in PROBABILITIES:
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability between 0 and 1")
        for name in ("brightness", "contrast", "saturation"):
            self._check(name, getattr(self, name) >= 0, "0 or positive")
        self._check("hue", 0 <= self.hue <= 0.5, "between 0 and 0.5")
        self._check("blur_sigma", 0 < self.blur_sigma[0] <= self.blur_sigma[1], "0 < low <= high")
        self._check("std", all(s > 0 for s in self.std), "positive")
        if self.blur > 0:
            fits = self.blur_kernel % 2 == 1 and 1 <= self.blur_kernel < 2 * self.size
            self._check("blur_kernel", fits, f"odd and less than twice the size of {self.size} px")

    def _check(self, name: str, valid: bool, requirement: str) -> None:
        if not valid:
            raise UserError(f"View: {name} must be {requirement}, not {getattr(self, name)}.")

    @property
    def normalizes(self) -> bool:
        return (self.mean, self.std) != ((0.0,) * 3, (1.0,) * 3)

    def describe(self) -> str:
        """One line in plain words."""
        parts = [f"{self.size} px"]
        if self.translate:
            parts.append(f"moved by up to {self.translate} px, p {self.translated:g}, borders reflected")
        else:
            parts.append(f"crop of {self.scale[0]:.3g}-{self.scale[1]:.3g} of the area, {self.interpolation}")
            if self.ratio != (3 / 4, 4 / 3):
                parts.append(f"aspect {self.ratio[0]:.3g}-{self.ratio[1]:.3g}")
        if self.flip > 0:
            parts.append(f"flip p {self.flip:g}")
        if self.color_jitter_prob > 0:
            strengths = f"{self.brightness:g}/{self.contrast:g}/{self.saturation:g}/{self.hue:g}"
            parts.append(f"color jitter p {self.color_jitter_prob:g} ({strengths})")
        if self.grayscale > 0:
            parts.append(f"grayscale p {self.grayscale:g}")
        if self.blur > 0:
            sigma = f"sigma {self.blur_sigma[0]:g}-{self.blur_sigma[1]:g} px, {self.blur_kernel} taps"
            parts.append(f"blur p {self.blur:g} ({sigma})")
        if self.solarize > 0:
            parts.append(f"solarize p {self.solarize:g}")
        parts += [augmentation.describe() for augmentation in self.extra]
        if self.normalizes:
            mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
            parts.append(f"normalized by mean {mean}, std {std}")
        else:
            parts.append("values in [0, 1]")
        return ", ".join(parts)
