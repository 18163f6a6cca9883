"""Six methods made of lightly's losses, heads and transforms, for `benchmarks.peer`. Written for lightly 1.6.

Networks and order of operations are those of the examples in lightly's documentation (examples/pytorch), two-layer
heads those of its CIFAR-10 benchmark. All numbers come from the config of our method. Optimizer and schedules, which
lightly leaves to its user, are not here: `benchmarks.peer` takes them from our run.
"""

import copy
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    SimCLRTransform,
    SimSiamTransform,
    SwaVTransform,
)
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.errors import UserError
from common.optim import decay_groups
from common.schedules import cosine_schedule
from methods.dino.train import clip_each


class Peer(nn.Module, ABC):
    """A method of lightly with the settings of our method's `cfg`; `total_steps` is the length of the run.

    Raises UserError where the config asks for what is not written here (`EXPECTS`).
    """

    EXPECTS: dict[str, Any] = {}

    def __init__(self, backbone: nn.Module, cfg: Any, total_steps: int):
        super().__init__()
        for name, value in {"interpolation": "bilinear", **self.EXPECTS}.items():
            if getattr(cfg, name) != value:
                raise UserError(f"{name} is {getattr(cfg, name)!r}: lightly's side is written for {value!r} only")
        self.backbone, self.cfg, self.total_steps = backbone, cfg, total_steps
        self.statistics = {"mean": list(cfg.mean), "std": list(cfg.std)}
        self.build(backbone.num_features)

    @abstractmethod
    def build(self, width: int) -> None:
        """Make heads and loss; width: of the features."""

    @abstractmethod
    def transform(self) -> MultiViewTransform:
        """From a PIL image to its views."""

    @abstractmethod
    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        """views: [B, 3, S, S] each."""

    def groups(self) -> list[dict]:
        """Parameters in the order of the groups of our optimizer."""
        return decay_groups(self, 0.0)

    def after_backward(self, epoch: int) -> None:
        """Change the gradients."""

    def scored(self) -> nn.Module:
        """The backbone to evaluate: of the same network (online, teacher) as ours."""
        return self.backbone


class SimCLR(Peer):
    EXPECTS = {"decoupled": False, "projector_layers": 2, "norm": "batch", "micro_batch": 0, "clip": 0.0}

    def build(self, width: int) -> None:
        self.projection_head = SimCLRProjectionHead(width, width, self.cfg.projector_dim)
        self.criterion = NTXentLoss(self.cfg.temperature)

    def transform(self) -> MultiViewTransform:
        strength = self.cfg.color_strength
        return SimCLRTransform(
            input_size=self.cfg.image_size,
            cj_bright=0.8 * strength,
            cj_contrast=0.8 * strength,
            cj_sat=0.8 * strength,
            cj_hue=self.cfg.hue,
            min_scale=self.cfg.crop_scale[0],
            random_gray_scale=self.cfg.grayscale,
            gaussian_blur=self.cfg.blur,
            normalize=self.statistics,
        )

    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(view)) for view in views)
        return self.cfg.loss_weight * self.criterion(z0, z1)


class BarlowTwins(Peer):
    def build(self, width: int) -> None:
        self.projection_head = mlp((width, *self.cfg.projector), last_norm=None)
        self.criterion = BarlowTwinsLoss(self.cfg.lambd)

    def transform(self) -> MultiViewTransform:
        return byol_transform(self.cfg, self.statistics)

    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(view)) for view in views)
        return self.cfg.loss_weight * self.criterion(z0, z1)


class BYOL(Peer):
    EXPECTS = {"predictor": True, "projector_layers": 2}

    def build(self, width: int) -> None:
        dim, hidden = self.cfg.projector_dim, self.cfg.hidden_dim
        self.projection_head = BYOLProjectionHead(width, hidden, dim)
        self.prediction_head = BYOLPredictionHead(dim, hidden, dim)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def transform(self) -> MultiViewTransform:
        return byol_transform(self.cfg, self.statistics)

    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        momentum = cosine_schedule(step, base=self.cfg.ema_momentum, final=1.0, total=self.total_steps)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        p0, p1 = (self.prediction_head(self.projection_head(self.backbone(view))) for view in views)
        z0, z1 = (self.projection_head_momentum(self.backbone_momentum(view)).detach() for view in views)
        cosines = self.criterion(p0, z1) + self.criterion(p1, z0)  # the paper's loss, ours, is 4 + 2 * this
        return self.cfg.loss_weight * 2 * cosines


class SimSiam(Peer):
    EXPECTS = {"predictor": True, "stop_gradient": True}

    def build(self, width: int) -> None:
        dim = self.cfg.projector[-1]
        self.projection_head = mlp((width, *self.cfg.projector), last_norm=nn.BatchNorm1d(dim, affine=False))
        self.prediction_head = SimSiamPredictionHead(dim, self.cfg.predictor_hidden, dim)
        self.criterion = NegativeCosineSimilarity()

    def groups(self) -> list[dict]:
        encoder = nn.ModuleList([self.backbone, self.projection_head])
        return decay_groups(encoder, 0.0) + decay_groups(self.prediction_head, 0.0)

    def transform(self) -> MultiViewTransform:
        brightness, contrast, saturation, hue = self.cfg.color_jitter
        return SimSiamTransform(
            input_size=self.cfg.image_size,
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            min_scale=self.cfg.crop_scale[0],
            random_gray_scale=self.cfg.grayscale,
            gaussian_blur=self.cfg.blur,
            normalize=self.statistics,
        )

    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        z0, z1 = (self.projection_head(self.backbone(view)) for view in views)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        return 0.5 * (self.criterion(z0.detach(), p1) + self.criterion(z1.detach(), p0))


class SwAV(Peer):
    EXPECTS = {"queue_length": 0}

    def build(self, width: int) -> None:
        dim = self.cfg.projector_dim
        self.projection_head = SwaVProjectionHead(width, self.cfg.hidden_dim, dim)
        self.prototypes = SwaVPrototypes(dim, self.cfg.prototypes, self.cfg.freeze_prototypes)
        self.criterion = SwaVLoss(self.cfg.temperature, self.cfg.sinkhorn_iterations, self.cfg.epsilon)

    def groups(self) -> list[dict]:
        return [{"params": list(self.parameters())}]

    def transform(self) -> MultiViewTransform:
        brightness, contrast, saturation, hue = self.cfg.color_jitter
        return SwaVTransform(
            crop_sizes=(self.cfg.image_size, self.cfg.local_size),
            crop_counts=(2, self.cfg.local_views),
            crop_min_scales=(self.cfg.crop_scale[0], self.cfg.local_scale[0]),
            crop_max_scales=(self.cfg.crop_scale[1], self.cfg.local_scale[1]),
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            random_gray_scale=self.cfg.grayscale,
            gaussian_blur=self.cfg.blur,
            normalize=self.statistics,
        )

    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        self.prototypes.normalize()
        z = [normalize(self.projection_head(self.backbone(view)), dim=1, p=2) for view in views]
        scores = [self.prototypes(projections, step) for projections in z]
        return self.criterion(scores[:2], scores[2:])


class DINO(Peer):
    EXPECTS = {"head_layers": 3, "centering": "mean", "drop_path": 0.0, "layer_decay": 1.0, "interpolation": "bicubic"}

    def build(self, width: int) -> None:
        self.student_head, self.teacher_head = self.head(width), self.head(width)
        self.teacher_backbone = copy.deepcopy(self.backbone)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(
            output_dim=self.cfg.out_dim,
            warmup_teacher_temp=self.cfg.warmup_teacher_temperature,
            teacher_temp=self.cfg.teacher_temperature,
            warmup_teacher_temp_epochs=self.cfg.warmup_teacher_epochs,
            student_temp=self.cfg.student_temperature,
            center_momentum=self.cfg.center_momentum,
        )

    def head(self, width: int) -> DINOProjectionHead:
        return DINOProjectionHead(
            width,
            self.cfg.hidden_dim,
            self.cfg.bottleneck_dim,
            self.cfg.out_dim,
            batch_norm=self.cfg.head_bn,
            freeze_last_layer=self.cfg.freeze_last_layer,
            norm_last_layer=self.cfg.norm_last_layer,
        )

    def transform(self) -> MultiViewTransform:
        brightness, contrast, saturation, hue = self.cfg.color_jitter
        strength = 0.5  # the default; another value would not reach the second view (lightly 1.6.0)
        return DINOTransform(
            global_crop_size=self.cfg.image_size,
            global_crop_scale=self.cfg.global_crop_scale,
            local_crop_size=self.cfg.local_size,
            local_crop_scale=self.cfg.local_crop_scale,
            n_local_views=self.cfg.local_views,
            cj_strength=strength,
            cj_bright=brightness / strength,
            cj_contrast=contrast / strength,
            cj_sat=saturation / strength,
            cj_hue=hue / strength,
            random_gray_scale=self.cfg.grayscale,
            gaussian_blur=self.cfg.blur,
            solarization_prob=self.cfg.solarize,
            normalize=self.statistics,
        )

    def loss(self, views: list[Tensor], step: int, epoch: int) -> Tensor:
        momentum = cosine_schedule(step, base=self.cfg.ema_momentum, final=1.0, total=self.total_steps)
        update_momentum(self.backbone, self.teacher_backbone, m=momentum)
        update_momentum(self.student_head, self.teacher_head, m=momentum)
        with torch.no_grad():
            targets = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        outputs = [self.student_head(self.backbone(view)) for view in views]
        return self.criterion(targets, outputs, epoch=epoch)

    def after_backward(self, epoch: int) -> None:
        if self.cfg.clip:
            clip_each(self.parameters(), self.cfg.clip)
        self.student_head.cancel_last_layer_gradients(current_epoch=epoch)

    def scored(self) -> nn.Module:
        return self.teacher_backbone


def mlp(widths: tuple[int, ...], *, last_norm: nn.Module | None) -> ProjectionHead:
    """lightly's building block of heads, which its CIFAR-10 benchmark uses where a paper's head is shallower."""
    *hidden, last = pairwise(widths)
    blocks = [(inputs, outputs, nn.BatchNorm1d(outputs), nn.ReLU()) for inputs, outputs in hidden]
    return ProjectionHead([*blocks, (*last, last_norm, None)])


def byol_transform(cfg: Any, statistics: dict[str, list[float]]) -> MultiViewTransform:
    """Two views with blur and solarization of their own, for BYOL and Barlow Twins."""
    brightness, contrast, saturation, hue = cfg.color_jitter
    first, second = (
        view(
            input_size=cfg.image_size,
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            min_scale=cfg.crop_scale[0],
            random_gray_scale=cfg.grayscale,
            gaussian_blur=blur,
            solarization_prob=solarize,
            normalize=statistics,
        )
        for view, blur, solarize in zip((BYOLView1Transform, BYOLView2Transform), cfg.blur, cfg.solarize, strict=True)
    )
    return BYOLTransform(first, second)


METHODS: dict[str, type[Peer]] = {
    "simclr": SimCLR,
    "barlow": BarlowTwins,
    "byol": BYOL,
    "simsiam": SimSiam,
    "swav": SwAV,
    "dino": DINO,
}
