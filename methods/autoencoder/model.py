"""A timm backbone, a bottleneck of chosen width, a light decoder. No connection passes the bottleneck by: a skip would
let the input through and make denoising and completion trivial."""

import torch
from torch import Tensor, nn

from common.errors import UserError


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


class Autoencoder(nn.Module):
    """Images [N, 3, s, s] -> (reconstructions [N, 3, s, s], features [N, backbone.num_features]).

    bottleneck: width of the latent l = E(x), a linear map of the whole last feature map or, `latent_from` "pooled", of
    the pooled features alone, which are what evaluation sees either way.
    """

    def __init__(self, backbone: nn.Module, bottleneck: int, latent_from: str, size: int, decoder_width: int):
        super().__init__()
        if bottleneck < 1:
            raise UserError(f"--bottleneck {bottleneck}: the latent needs at least one dimension")
        if decoder_width < 8:
            raise UserError(f"--decoder-width {decoder_width}: at least 8 channels are needed")
        self.backbone, self.latent_from = backbone, latent_from
        inputs = backbone.num_features if latent_from == "pooled" else _map_size(backbone, size)
        self.to_latent = nn.Linear(inputs, bottleneck)
        self.decoder = Decoder(bottleneck, size, decoder_width)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [N, r], features [N, num_features])."""
        maps = self.backbone.forward_features(images)
        features = self.backbone.forward_head(maps)
        return self.to_latent(features if self.latent_from == "pooled" else maps.flatten(1)), features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents, features = self.encode(images)
        return self.decoder(latents), features


def _map_size(backbone: nn.Module, size: int) -> int:
    """Numbers in the last feature map of one image."""
    parameter = next(backbone.parameters())
    training = backbone.training
    with torch.no_grad():
        images = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        count = backbone.eval().forward_features(images).numel()
    backbone.train(training)
    return count
