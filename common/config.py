"""Settings that many methods share and no paper decides, each typed once.

A method's `Config` inherits what it needs and repeats a field only for another default, or to cite its paper:

    class Config(ResNetConfig, ImageConfig):     # a timm ResNet on images; ViTConfig for a ViT
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:  # torch and timm are imported where they are used: listing presets needs neither
    from common.backbones import BackboneSpec

Stem = Literal["timm", "cifar", "stride2"]


@dataclass(kw_only=True)
class RunConfig:
    """Fields that cannot change the result of a run; a resumed run may change them."""

    out: str = "runs"
    """Folder of all run directories."""
    name: str = ""
    """Name of the run directory; default METHOD-PRESET, with -seedN for seeds other than 0."""
    data_name: str = ""
    """Name of the data in the result card, e.g. "CIFAR-10 (JPEG)"; default: that of the hub or the folder."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues the newest good checkpoint of the same run; never starts a new directory NAME-2, NAME-3 ..."""
    extend: bool = False
    """Lengthen the run in this directory to more --epochs (or --steps): it goes on from its newest checkpoint under the
    schedules of the new length, so its learning rate rises again; the result card tells it."""
    accept_changed_data: bool = False
    """Continue a run although its data have changed since its first steps; the result card tells what changed."""
    eval: bool = True
    """Evaluate at the end and write result.json and report.html."""
    eval_protocols: tuple[
        Literal["knn", "linear", "linear-augmented", "mlp", "metrics", "factors", "rotation", "finetune", "lowshot"],
        ...,
    ] = ()
    """What to evaluate, as in python -m eval; default: the method's list and, where the run is its preset's own, the
    protocols of the numbers published for it."""
    eval_baselines: bool = True
    """Also score raw pixels and random weights. Disable to make evaluation 5x faster when the baselines are known."""
    plan: Literal["", "short", "full"] = ""
    """Print the run's size, cost and evaluation and exit without writing; of known data sets without opening them.
    --plan alone is short; full: every setting with its source too, and a few timed steps."""
    max_steps: int = 0
    """Stop training after this many steps (0: train to the end); the schedule is unchanged."""
    log_every: int = 20
    """Steps averaged into one line of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; one is also saved on SIGTERM and after the last step."""
    keep: int = 2
    """Checkpoints kept."""
    workers: int = 2
    """Threads that decode images if the data does not fit in memory."""


RESUMABLE_FIELDS = frozenset(f.name for f in dataclasses.fields(RunConfig))


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """Every method: batch, precision, randomness."""

    zero_is_off: ClassVar[frozenset[str]] = frozenset()
    """Fields of this method alone that may be 0 although `common/bounds.py` has them above 0."""

    batch_size: int = 256
    """Global batch size, over all processes."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs (fp16 on those without it), float32 on CPUs. The loss is always float32."""
    deterministic: bool = False
    """Deterministic GPU kernels, slower: a resumed run is then bit-identical (CPU runs are anyway)."""
    seed: int = 0
    """Seed for initialization, data order, views and probes."""
    init_from: str = ""
    """Weights that the backbone starts from: an earlier run, a .safetensors or .pth file (MAE, DINO, MoCo, SwAV ...;
    FILE::student for one of several networks in it), a timm name, or hf-hub:org/name. Default: random ones."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # the command line and JSON give lists
            if isinstance(value := getattr(self, field.name), list):
                setattr(self, field.name, tuple(value))

    def record(self) -> dict[str, Any]:
        """The config as config.json and the result card hold it: --init-from without its path, only if given."""
        from common.weights import weights_name

        fields = dataclasses.asdict(self)
        source = fields.pop("init_from")
        return {**fields, "init_from": weights_name(source)} if source else fields

    def network_options(self) -> dict[str, Any]:
        """What another backbone than the preset's leaves out unless it is given: settings, and their values then."""
        return {}

    def settle(self, preset: "TrainingConfig", given: Collection[str]) -> str:
        """Where the command line chose another backbone, leave out what the preset had chosen for its own one.

        preset: the config before the flags; given: the fields that are flags, which stay. Options that the new network
        does not have go, and so do numbers of blocks and widths; the stem and the patch size, which belong to the size
        of the images, stay among ResNets and among ViTs. Returns a sentence about what was left out, or nothing.
        """
        before, now = (getattr(config, "backbone", "") for config in (preset, self))
        if before == now:
            return ""
        left = {n: v for n, v in self.network_options().items() if n not in given and getattr(self, n, v) != v}
        for name, value in left.items():
            setattr(self, name, value)
        names = ", ".join(name.replace("_", "-") for name in left)
        return f"--backbone {now} leaves out what the preset set for {before}: {names}" if left else ""


@dataclass(kw_only=True)
class ImageDataConfig(TrainingConfig):
    """Where images come from."""

    data: str = "shapes"
    """shapes, a hub name (cifar10, stl10, imagenet-1k, org/name ...), an image folder or a folder of parquet files."""
    image_column: str = ""
    """Column with the images; default: found from the features."""
    label_column: str = ""
    """Column with the labels; default: found from the features. Pretraining needs none."""
    limit: int = 0
    """Use only this many training images (0: all), a fixed random subset."""
    image_size: int = 32
    """Side of a view in pixels."""
    normalize: str = "none"
    """Mean and std of the inputs: none (inputs in [0, 1]) or those of shapes, cifar10, imagenet-1k ..."""

    @property
    def mean(self) -> tuple[float, float, float]:
        from common.data import mean_std

        return mean_std(self.normalize)[0]

    @property
    def std(self) -> tuple[float, float, float]:
        from common.data import mean_std

        return mean_std(self.normalize)[1]


@dataclass(kw_only=True)
class ImageConfig(ImageDataConfig):
    """A method that trains on images for a number of epochs."""

    epochs: int = 100
    """Passes over the training images."""
    compile: bool = False
    """torch.compile for the networks and the color operations."""
    knn_every: int = 0
    """Epochs between online kNN evaluations (0: none)."""
    eval_data: str = ""
    """Other data to judge on, as --data: probes and kNN see its training images and are scored on its test images."""
    eval_image_column: str = ""
    """Column with the images of eval_data; default: found from the features."""
    eval_label_column: str = ""
    """Column with the labels of eval_data; default: found from the features."""


@dataclass(kw_only=True)
class ResNetConfig(ImageDataConfig):
    """A timm ResNet, unmodified or narrower."""

    backbone: str = "resnet18"
    """timm name."""
    stem: Stem = "timm"
    """cifar: 3x3 convolution, stride 1, no max-pool; stride2: the same with stride 2."""
    layers: tuple[int, ...] = ()
    """Blocks per stage of a ResNet; default: timm's."""
    channels: tuple[int, ...] = ()
    """Width per stage of a ResNet; default: timm's."""
    stem_width: int = 64
    """Channels of the 3x3 stem; must equal the first of `channels` where narrower than 64."""
    sync_bn: bool = True
    """BatchNorm statistics over all processes."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: the same gradient, BatchNorm included, in less memory."""

    def network_options(self) -> dict[str, Any]:
        from common.backbones import RESNET_OPTIONS, is_resnet

        sizes = ("layers", "channels", "stem_width")
        names = sizes if is_resnet(self.backbone) else tuple(RESNET_OPTIONS)
        return {**super().network_options(), **{name: RESNET_OPTIONS[name] for name in names}}

    def resnet_spec(
        self,
        *,
        norm: str = "batch",
        zero_init_last: bool = True,
        arguments: dict[str, Any] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> "BackboneSpec":
        """The backbone that these settings describe, for views of `sizes` pixels (default: image_size alone).

        `arguments` are further ones of `timm.create_model`. Raises UserError for a size that the network cannot have.
        """
        from common.backbones import BackboneSpec, fit_sizes

        spec = BackboneSpec(
            self.backbone,
            stem=self.stem,
            layers=self.layers,
            channels=self.channels,
            stem_width=self.stem_width,
            norm=norm,
            zero_init_last=zero_init_last,
            arguments=arguments or {},
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
        )
        return fit_sizes(spec, sizes or (self.image_size,))


@dataclass(kw_only=True)
class ViTConfig(ImageDataConfig):
    """A timm ViT, unmodified or smaller."""

    backbone: str = "vit_tiny_patch16_224"
    """timm name."""
    patch_size: int = 0
    """Side of a ViT's patch in pixels; 0: model default."""
    width: int = 0
    """ViT embedding dimension; 0: model default."""
    depth: int = 0
    """ViT blocks; 0: model default."""
    heads: int = 0
    """ViT attention heads; 0: model default."""

    def network_options(self) -> dict[str, Any]:
        from common.vit import VIT_OPTIONS, is_vit

        names = ("width", "depth", "heads") if is_vit(self.backbone) else tuple(VIT_OPTIONS)
        return {**super().network_options(), **{name: VIT_OPTIONS[name] for name in names}}

    def vit_arguments(
        self, sizes: tuple[int, ...] = (), *, layer_scale: float = 0.0, qk_norm: bool = False
    ) -> dict[str, Any]:
        """Arguments of `timm.create_model` for views of `sizes` pixels (default: image_size alone)."""
        from common.vit import vit_arguments

        return vit_arguments(
            self.backbone,
            sizes=sizes or (self.image_size,),
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            layer_scale=layer_scale,
            qk_norm=qk_norm,
        )

    def vit_spec(self, **arguments: Any) -> "BackboneSpec":
        """The backbone that these settings describe; `arguments` are further ones of `timm.create_model`."""
        from common.backbones import BackboneSpec

        return BackboneSpec(
            self.backbone,
            arguments={**self.vit_arguments(), **arguments},
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
        )


def published(value: float, protocol: str, source: str, note: str = "") -> dict[str, Any]:
    """A published number, shown next to ours under the same protocol id."""
    return {"value": value, "metric": "top-1", "protocol": protocol, "source": source, "note": note}
