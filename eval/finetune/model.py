"""The network that is fine-tuned: a backbone with a new linear head, learning rates per layer, stochastic depth."""

import re
from typing import Any

from timm.layers import DropPath
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.optim import decay_groups
from common.rng import generator
from common.vit import layer_groups, split_by_depth
from eval.features import forward_features, pooled


class Classifier(nn.Module):
    """A backbone and a linear head, the only parameters that are new: [B, 3, H, W] -> [B, num_classes].

    The head starts as MAE's (main_finetune.py): weights from a normal distribution of width 2e-5, biases 0.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, pool: str, seed: int):
        super().__init__()
        self.backbone = backbone
        features = pooled(backbone, pool)
        self.features = [features]  # in a list: the same parameters must not have two names
        self.head = nn.utils.skip_init(nn.Linear, features.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=generator(seed, "fine-tuning head"))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(forward_features(self.features[0], images))


def parameter_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with the rate's `lr_scale` = layer_decay^(L + 1 - l), as MAE's lr_decay.py.

    ViT of L blocks (`common.vit.layer_groups`): l = 0 patches, positions, tokens; i + 1 block i; L + 1 final norm and
    head. ResNet of L = 4 stages: l = 0 stem, i stage i, 5 head. Without weight decay: vectors, and what the network
    names itself (`no_weight_decay`: positions and class token of a ViT).
    """
    exempt = {f"backbone.{name}" for name in getattr(model.backbone, "no_weight_decay", set)()}
    groups = []
    for group in decay_groups(model, weight_decay):
        params = dict(zip(group["names"], group["params"], strict=True))
        for decay, names in (
            (group["weight_decay"], [n for n in params if n not in exempt]),
            (0.0, [n for n in params if n in exempt]),
        ):
            if names:
                groups.append(
                    {**group, "weight_decay": decay, "names": names, "params": [params[name] for name in names]}
                )
    if layer_decay == 1:
        return groups
    if isinstance(model.backbone, VisionTransformer):
        return layer_groups(groups, model.backbone, layer_decay)
    return _stage_groups(groups, layer_decay)


def _stage_groups(groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    def stage(name: str) -> int:
        found = re.match(r"backbone\.layer(\d)\.", name)
        if found:
            return int(found[1])
        return 0 if name.startswith("backbone.") else 5

    return split_by_depth(groups, stage, 5, decay)


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Stochastic depth of a ViT or ResNet by timm's layers and rule: `rate` at the last block, linearly from 0.

    What the backbone was pretrained with is replaced; other networks keep what they have.
    """
    attributes: tuple[str, ...]
    if isinstance(backbone, VisionTransformer):
        blocks, attributes = list(backbone.blocks), ("drop_path1", "drop_path2")
    elif isinstance(backbone, ResNet):
        blocks = [block for i in range(1, 5) for block in getattr(backbone, f"layer{i}")]
        attributes = ("drop_path",)
    else:
        return
    for i, block in enumerate(blocks):
        share = rate * i / max(len(blocks) - 1, 1)
        for attribute in attributes:
            setattr(block, attribute, DropPath(share).train(block.training) if share > 0 else nn.Identity())
