"""DINO's network: backbone and head, the same for student and teacher (arXiv:2104.14294, section 3.1 and App. C)."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.vit import StochasticDepth


class NormalizedLinear(nn.Module):
    """Linear layer without bias whose rows are g * v / |v|: with unit inputs and g = 1 its outputs are cosines.

    v: [K, D], torch's default initialization; g: [K, 1], ones. `fixed` keeps g at 1 (code: norm_last_layer).
    """

    def __init__(self, width: int, outputs: int, fixed: bool):
        super().__init__()
        self.weight_v = nn.Linear(width, outputs, bias=False).weight
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=not fixed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 norm, weight-normalized linear layer: [N, width] -> [N, outputs]."""

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        hidden: int,
        bottleneck: int,
        layers: int,
        batch_norm: bool,
        norm_last_layer: bool,
    ):
        super().__init__()
        widths = [width, *[hidden] * (layers - 1)]
        mlp: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            mlp += [nn.Linear(before, after), *[nn.BatchNorm1d(after)] * batch_norm, nn.GELU()]
        self.mlp = nn.Sequential(*mlp, nn.Linear(widths[-1], bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = NormalizedLinear(bottleneck, outputs, fixed=norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features), dim=1))


class DINO(nn.Module):
    """Backbone and head: V views, each [n, 3, s, s], -> [V * n, K], view by view."""

    stochastic_depth: StochasticDepth | None = None  # the student's; set after the teacher was copied

    def __init__(self, backbone: nn.Module, head: DINOHead):
        super().__init__()
        self.backbone, self.head = backbone, head
        if hasattr(backbone, "cls_token"):
            nn.init.trunc_normal_(backbone.cls_token, std=0.02)  # as DINO's ViT; timm starts at 1e-6

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        features, first = [], 0
        # One pass per view size, so BatchNorm's statistics are per size; the head sees all views at once.
        for _, group in groupby(views, key=lambda view: view.shape[-1]):
            images = list(group)
            if self.stochastic_depth:
                self.stochastic_depth.select(first, len(images))
            first += len(images)
            features.append(self.backbone(torch.cat(images)))
        return self.head(torch.cat(features))
