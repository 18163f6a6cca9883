"""The light decoder of an autoencoder."""

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Latent [N, r] -> image [N, 3, s, s]: a linear layer to a small grid, then doublings with one convolution each.

    The grid is the side halved while it is even and above 4. Widths start at `width` and halve with each doubling, not
    below 8, so that every stage costs about the same.
    """

    def __init__(self, latent: int, size: int, width: int):
        super().__init__()
        side, doublings = size, 0
        while side > 4 and side % 2 == 0:
            side, doublings = side // 2, doublings + 1
        self.shape = (width, side, side)
        self.grid = nn.Linear(latent, width * side * side)
        stages: list[nn.Module] = [nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(doublings):
            narrow = max(width // 2, 8)
            stages += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrow, 3, padding=1, bias=False)]
            stages += [nn.BatchNorm2d(narrow), nn.ReLU()]
            width = narrow
        self.stages = nn.Sequential(*stages, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latent: Tensor) -> Tensor:
        return self.stages(self.grid(latent).unflatten(1, self.shape))


def map_size(backbone: nn.Module, size: int) -> int:
    """Numbers in the last feature map of one image."""
    parameter = next(backbone.parameters())
    training = backbone.training
    with torch.no_grad():
        images = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        count = backbone.eval().forward_features(images).numel()
    backbone.train(training)
    return count
