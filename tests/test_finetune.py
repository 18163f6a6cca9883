"""Fine-tuning: rates, targets and subsets against slow versions, exact repetition, what is new, and every mistake."""

import copy
import dataclasses
import json
import math
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import nn
from torch.nn import functional as F

from common.backbones import BackboneSpec, create_backbone, export_backbone
from common.data import ImageStore, ImageStream, ViewLoader, open_data
from common.errors import UserError
from common.rng import generator
from common.sources import Files
from common.views.recipe import ViewRecipe
from eval.__main__ import main
from eval.card import load_cards
from eval.compare import comparable, differences, select
from eval.features import Pooled, extract_features, pooled, pooling
from eval.finetune import protocol
from eval.finetune import train as training
from eval.finetune.batches import Batches, RandAugment, keep_random_states, seed_all
from eval.finetune.model import Classifier, parameter_groups, set_drop_path
from eval.finetune.recipe import Recipe, check, resolve
from eval.finetune.subset import label_counts, label_subset, subset_hash
from eval.finetune.train import finetune
from eval.linear import cosine, evaluation_view, linear_probe_augmented
from eval.load import random_init
from eval.protocols import PROTOCOLS, check_protocols, evaluate, results_table
from tests.processes import run_command, run_ranks

STATISTICS = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
VIT_ARGUMENTS = {"img_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
VIT = BackboneSpec(
    "vit_tiny_patch16_224", arguments=VIT_ARGUMENTS, image_size=16, mean=STATISTICS["mean"], std=STATISTICS["std"]
)
RESNET = BackboneSpec(
    "resnet18",
    stem="cifar",
    layers=(1, 1, 1, 1),
    channels=(8, 8, 16, 16),
    stem_width=8,
    image_size=16,
    mean=STATISTICS["mean"],
    std=STATISTICS["std"],
)
QUIET = {"log": lambda line: None}


def vit(seed=0, **arguments):
    return random_init(dataclasses.replace(VIT, arguments={**VIT_ARGUMENTS, **arguments}), seed)


def resnet(seed=0):
    return random_init(RESNET, seed)


def small(backbone, count=64, **given):
    return resolve(Recipe(**given), backbone, image_size=16, images=count)


def images(n=6, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def stripes(n, seed, classes=4, labels=None):
    """A store of small images whose class is the orientation of stripes of random phase, colour and noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes if labels is None else labels
    angle = labels.double() * math.pi / classes
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = torch.cos(
        1.5 * (x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None])
        + 2 * math.pi * torch.rand(n, 1, 1, generator=g)
    )
    colour = torch.rand(n, 3, 1, 1, generator=g) * 80 - 40
    pixels = 128 + 50 * wave[:, None] + colour + 30 * torch.randn(n, 3, 16, 16, generator=g)
    return ImageStore(
        name="stripes",
        fingerprint="0",
        labels=labels,
        class_names=None,
        label_name="angle",
        images=pixels.clamp(0, 255).to(torch.uint8),
    )


@pytest.fixture(scope="module")
def data():
    return stripes(64, 0), stripes(200, 1)


def run(backbone, data, seed=0, **given):
    recipe = small(backbone, **{"epochs": 2, "batch_size": 16, **given})
    return finetune(copy.deepcopy(backbone), *data, recipe, num_classes=4, seed=seed, **STATISTICS)


# ---- rates per layer -------------------------------------------------------------------------------------------------


def rates(model, weight_decay=0.1, decay=0.5):
    groups = parameter_groups(model, weight_decay, decay)
    found = {name: (group.get("lr_scale", 1.0), group["weight_decay"]) for group in groups for name in group["names"]}
    named = dict(model.named_parameters())
    assert sum(len(group["names"]) for group in groups) == len(found) and found.keys() == named.keys()
    for group in groups:
        assert all(p is named[n] for n, p in zip(group["names"], group["params"], strict=True))
    return found


def test_layer_decay_of_a_vit_equals_the_closed_form():
    model = Classifier(vit(), 10, "mean", seed=0)
    for name, (scale, decay) in rates(model).items():
        if name.startswith(("backbone.patch_embed", "backbone.pos_embed", "backbone.cls_token")):
            assert scale == 0.5**4, name
        elif name.startswith("backbone.blocks."):
            assert scale == 0.5 ** (3 - int(name.split(".")[2])), name
        else:
            assert scale == 1 and name.startswith(("backbone.norm.", "head.")), name
        tokens = name in ("backbone.pos_embed", "backbone.cls_token")
        assert decay == (
            0 if name.endswith((".bias", "norm1.weight", "norm2.weight", "norm.weight")) or tokens else 0.1
        ), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_layer_decay_of_a_resnet_equals_the_closed_form(name):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
    model = Classifier.__new__(Classifier)
    nn.Module.__init__(model)
    model.backbone, model.head = backbone, nn.Linear(2, 2)
    seen = set()
    for parameter, (scale, decay) in rates(model).items():
        place = parameter.removeprefix("backbone.").split(".")[0]
        depth = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "head": 5}[place]
        assert scale == 0.5 ** (5 - depth), parameter
        shape = dict(model.named_parameters())[parameter].shape
        assert decay == (0.1 if len(shape) > 1 else 0), parameter
        seen.add(depth)
    assert seen == set(range(6))


def test_without_layer_decay_all_rates_are_one():
    for backbone in (vit(), resnet(), timm.create_model("test_efficientnet", num_classes=0)):
        model = Classifier(backbone, 10, "auto", seed=0)
        assert {scale for scale, _ in rates(model, decay=1).values()} == {1.0}


def test_the_first_step_moves_each_layer_by_its_rate(data):
    """Adam's first step is the rate itself: what is moved shows the rates that were used, warm-up and scaling too."""
    backbone = vit()
    result = run(
        backbone,
        data,
        epochs=1,
        batch_size=64,
        warmup_epochs=0,
        weight_decay=0,
        layer_decay=0.5,
        base_lr=1e-3,
        drop_path=0,
    )
    before, after = backbone.state_dict(), result.model.backbone.state_dict()
    peak = 1e-3 * 64 / 256
    for name, scale in (("patch_embed.proj.weight", 1 / 16), ("blocks.0.mlp.fc1.bias", 1 / 8), ("norm.weight", 1.0)):
        moved = (after[name] - before[name]).abs().median()
        assert float(moved) == pytest.approx(peak * scale, rel=0.1), name  # Adam's eps beside small gradients
    assert result.details["peak_lr"] == peak and result.details["steps"] == 1


# ---- mixing, smoothing, erasing, RandAugment, drop path --------------------------------------------------------------


def batches(data, seed=3, **given):
    recipe = small(vit(), len(data[0]), **{"batch_size": 8, "crop": 1.0, **given})
    return Batches(data[0], recipe, num_classes=4, seed=seed, device="cpu", workers=2, **STATISTICS)


def drawn(made, step):
    seed_all(5, "test", step)
    return made(step)


@pytest.mark.parametrize("given", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_images_and_targets_equal_a_slow_version(data, given):
    smoothing = 0.1
    kinds = set()
    with keep_random_states("cpu"):
        for step in range(8):
            plain, _ = drawn(batches(data), step)
            x, y = drawn(batches(data, smoothing=smoothing, **given), step)
            labels = batches(data).loader(step).labels
            off = smoothing / 4
            smooth = torch.stack(
                [torch.tensor([1 - smoothing + off if c == int(k) else off for c in range(4)]) for k in labels]
            )
            # What fraction of each image is its own: from the pixels alone.
            partner = plain.flip(0)
            differ = (plain != partner).any(1)
            share = ((x - partner) / (plain - partner)).where(plain != partner, torch.nan)
            own = share.nanmean((1, 2, 3))
            whole = torch.isclose(x, plain, atol=1e-5) | torch.isclose(x, partner, atol=1e-5)
            if bool(whole.all()):
                kinds.add("cut")
                taken = torch.isclose(x, partner, atol=1e-5).all(1) & differ
                lam = 1 - max(float(rectangle(t)) for t in taken) / 256
                assert all(is_rectangle(t) for t in taken)
            else:
                kinds.add("mix")
                lam = float(own.mean())
                torch.testing.assert_close(x, lam * plain + (1 - lam) * partner, rtol=0, atol=2e-4)
            expected = torch.stack([lam * a + (1 - lam) * b for a, b in zip(smooth, smooth.flip(0), strict=True)])
            torch.testing.assert_close(y, expected, rtol=0, atol=2e-4)
            torch.testing.assert_close(y.sum(1), torch.ones(8))
            assert (y >= off - 1e-6).all()
    assert kinds == {"mix", "cut"} if len(given) == 2 else len(kinds) == 1


def bounds(mask):
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return (0, 0, 0, 0) if len(rows) == 0 else (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def rectangle(mask):
    top, bottom, left, right = bounds(mask)
    return (bottom - top) * (right - left)


def is_rectangle(mask):
    return int(mask.sum()) >= 0.97 * rectangle(mask)  # a pixel may be equal in both images


def test_targets_without_mixing_are_torchs_label_smoothing(data):
    made = batches(data, smoothing=0.2)
    x, y = made(0)
    labels = made.loader(0).labels
    logits = torch.randn(8, 4)
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(logits, labels, label_smoothing=0.2))
    torch.testing.assert_close(y.sum(1), torch.ones(8))
    assert torch.equal(batches(data)(0)[1], F.one_hot(labels, 4).float()) is (small(vit()).smoothing == 0)


def test_erased_rectangles_hold_noise(data):
    with keep_random_states("cpu"):
        plain, _ = drawn(batches(data), 0)
        x, _ = drawn(batches(data, erase=1.0), 0)
    for before, after in zip(plain, x, strict=True):
        changed = (before != after).all(0)
        assert 0.015 < rectangle(changed) / 256 < 0.36 and is_rectangle(changed)
        assert after[:, changed].std() > 0.5
    assert torch.equal(batches(data, erase=0.0)(0)[0], plain)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_rand_augment_equals_timm_image_by_image(interpolation):
    pixels = stripes(24, 3).images
    config, mean = "rand-m9-mstd0.5-inc1", (0.2, 0.5, 0.7)
    ours = RandAugment(config, mean, interpolation, workers=3)
    with keep_random_states("cpu"):
        seed_all("a", 1)
        result = ours(pixels)
        seed_all("a", 1)
        theirs = rand_augment_transform(
            config, {"img_mean": (51, 128, 178), "interpolation": getattr(Image.Resampling, interpolation.upper())}
        )
        expected = [np.asarray(theirs(Image.fromarray(p.permute(1, 2, 0).numpy()))) for p in pixels]
    assert torch.equal(result, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
    assert (result != pixels).flatten(1).any(1).sum() > 8  # with n2, p0.5 about three quarters change
    ours.close()


def test_rand_augment_at_its_highest_level_is_black_where_pillow_refuses():
    ours = RandAugment("rand-m10-inc1-p1-n3", (0.5,) * 3, "bilinear", workers=1)
    with keep_random_states("cpu"):
        seed_all("a", 1)
        result = ours(stripes(96, 3).images)
    assert 0 < (result == 0).flatten(1).all(1).sum() < 20  # 0 bits, and nothing after it that brightens
    ours.close()


def test_rand_augment_stands_between_crop_and_normalisation(data):
    with keep_random_states("cpu"):
        made = batches(data, rand_augment="rand-m9-p1")
        x, _ = drawn(made, 2)
        seed_all(5, "test", 2)
        plain = made.loader(2).views[0]  # in [0, 1], not normalised
        levels = (plain * 255).round().to(torch.uint8)
        expected = (made.augment(levels).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(x, expected)
    assert plain.min() >= 0 and plain.max() <= 1 and not torch.allclose(x, (plain - 0.5) / 0.25, atol=0.1)
    made.close()


def test_drop_path_follows_timms_rule_and_only_in_training():
    for backbone, reference in (
        (vit(), timm.create_model(VIT.name, num_classes=0, drop_path_rate=0.4, **VIT_ARGUMENTS)),
        (resnet(), timm.create_model("resnet18", num_classes=0, drop_path_rate=0.4, layers=(1, 1, 1, 1))),
    ):
        x = images()
        before = backbone(x)
        set_drop_path(backbone, 0.4)
        found, expected = (
            {name: m.drop_prob for name, m in net.named_modules() if hasattr(m, "drop_prob")}
            for net in (backbone, reference)
        )
        assert found == pytest.approx(expected) and found
        assert torch.equal(backbone(x), before)
        if backbone is not None and isinstance(backbone, timm.models.VisionTransformer):
            assert not torch.equal(backbone.train()(x), before)
        set_drop_path(backbone, 0.0)
        assert not any(hasattr(m, "drop_prob") for m in backbone.modules())


# ---- few labels ------------------------------------------------------------------------------------------------------


def uneven():
    return torch.tensor([0] * 30 + [1] * 50 + [2] * 40 + [-1] * 10)[
        torch.randperm(130, generator=torch.Generator().manual_seed(1))
    ]


def test_subsets_are_balanced_nested_and_hold_labelled_images_only():
    labels = uneven()
    large = label_subset(labels, 60, seed=4)
    assert labels[large].bincount().tolist() == [20, 20, 20] and (labels[large] >= 0).all()
    assert torch.equal(large, large.unique()) and len(large) == 60
    small_one = label_subset(labels, 9, seed=4)
    assert set(small_one.tolist()) < set(large.tolist()) and labels[small_one].bincount().tolist() == [3, 3, 3]
    assert not torch.equal(label_subset(labels, 60, seed=5), large)
    order = torch.randperm(130, generator=generator("low-shot", 4, 130)).tolist()  # slow and obvious
    chosen = [[i for i in order if labels[i] == c][:20] for c in range(3)]
    assert large.tolist() == sorted(sum(chosen, []))


def test_subsets_are_the_same_in_every_process_and_on_every_machine():
    labels = torch.arange(5000) % 10
    assert label_subset(labels, 10).tolist() == PINNED
    assert subset_hash(label_subset(labels, 500)) == PINNED_HASH
    assert run_ranks(subset_elsewhere, 2) == [PINNED, PINNED]


def subset_elsewhere():
    torch.manual_seed(9)  # nothing global matters
    return label_subset(torch.arange(5000) % 10, 10).tolist()


PINNED = [636, 1328, 1620, 1791, 3123, 3619, 3947, 3972, 4255, 4964]
PINNED_HASH = "411d9ad8abde"


def test_shares_and_numbers():
    labels = uneven()
    assert label_counts(("10%", "12", "50%"), labels) == {"10%": 12, "12": 12, "50%": 60}
    assert label_counts(("1%", "2.5%", "5000"), torch.arange(50_000) % 10) == {"1%": 500, "2.5%": 1250, "5000": 5000}
    for spec, message in (
        ("0%", "above 0 %"),
        ("101%", "at most 100 %"),
        ("1%", "1 of the 120 labelled.*2.5% or 3"),
        ("2", "fewer than one for each of the 3 classes"),
        ("10", "take 9 or 12"),
        ("a", "neither"),
        ("", "neither"),
        ("0", "neither"),
        ("-5", "neither"),
        ("50%,12", "neither"),
        ("93", "smallest class has 30 images; take at most 90"),
        ("100%", "take at most 90"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            label_counts(("50%", spec), labels)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="at least one"):
        label_counts((), labels)


def test_subset_of_a_stream_reads_the_same_images(tmp_path):
    store = stripes(12, 0)
    names = []
    for i, image in enumerate(store.images):
        names.append(f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / names[-1])
    stream = ImageStream(
        name="s",
        fingerprint="0",
        labels=store.labels,
        source=Files(tmp_path, names, "train"),
        side=16,
        rows=torch.arange(12),
        device=torch.device("cpu"),
    )
    chosen = torch.tensor([1, 4, 11])
    for part in (store.subset(chosen), stream.subset(chosen)):
        assert len(part) == 3 and torch.equal(part.labels, store.labels[chosen])
        assert torch.equal(part.eval_images(0, 3, 16), store.images[chosen])
    assert store.subset(torch.arange(12)) is store and stream.subset(torch.arange(12)) is stream


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_defaults_are_maes_and_simclrs():
    def of(name, size=224, **arguments):
        with torch.device("meta"):
            backbone = timm.create_model(name, num_classes=0, **arguments)
        return resolve(Recipe(), backbone, image_size=size, images=1_281_167)

    base, large, huge = (of(f"vit_{n}") for n in ("base_patch16_224", "large_patch16_224", "huge_patch14_224"))
    tiny = of("vit_tiny_patch16_224")
    for recipe in (base, large, huge, tiny):
        assert (recipe.optimizer, recipe.weight_decay, recipe.batch_size, recipe.min_lr) == ("adamw", 0.05, 1024, 1e-6)
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erase) == (0.8, 1.0, 0.1, 0.25)
        assert (recipe.rand_augment, recipe.pool, recipe.crop) == ("rand-m9-mstd0.5-inc1", "mean", 0.08)
        assert recipe.warmup_epochs == 5
    table = {"b": base, "l": large, "h": huge, "t": tiny}
    assert {k: r.layer_decay for k, r in table.items()} == {"b": 0.65, "l": 0.75, "h": 0.75, "t": 0.75}
    assert {k: r.base_lr for k, r in table.items()} == {"b": 5e-4, "l": 1e-3, "h": 1e-3, "t": 5e-4}
    assert {k: r.epochs for k, r in table.items()} == {"b": 100, "l": 50, "h": 50, "t": 100}
    assert {k: r.drop_path for k, r in table.items()} == {"b": 0.1, "l": 0.2, "h": 0.3, "t": 0.1}
    resnet50 = of("resnet50")
    assert (resnet50.optimizer, resnet50.base_lr, resnet50.weight_decay, resnet50.epochs) == ("sgd", 0.05, 0.0, 30)
    assert (resnet50.layer_decay, resnet50.mixup, resnet50.smoothing, resnet50.pool) == (1.0, 0.0, 0.0, "auto")
    assert of("test_efficientnet").optimizer == "sgd"
    little = resolve(Recipe(), resnet(), image_size=32, images=50_000)
    assert (little.optimizer, little.base_lr, little.warmup_epochs) == ("adamw", 4e-3, 3)
    little = of("vit_tiny_patch16_224", 32, img_size=32, patch_size=4)
    assert (little.batch_size, little.base_lr, little.layer_decay, little.crop) == (128, 1e-3, 0.75, 0.5)


def test_few_images_get_enough_steps_unless_epochs_are_given():
    assert small(resnet(), 500).epochs == 334 and small(resnet(), 50_000).epochs == 30
    assert small(resnet(), 500, epochs=7).epochs == 7
    assert small(resnet(), 500, epochs=7, min_steps=90).epochs == 30
    assert small(resnet(), 31).batch_size == 30  # mixup pairs images
    assert small(resnet(), 500, epochs=7).for_images(20).epochs == 7
    assert small(resnet(), 500).for_images(400).epochs == 334 and small(resnet(), 500).for_images(100).epochs == 1000


def test_warm_up_is_five_epochs_at_most_a_tenth_of_all():
    assert small(vit(), epochs=100).warmup_epochs == 5 and small(vit(), epochs=30).warmup_epochs == 3
    assert small(vit(), 500).warmup_epochs == 5 and small(vit(), epochs=30, warmup_epochs=12.0).warmup_epochs == 12


@pytest.mark.parametrize(
    "given, message",
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 7}, "even number"),
        ({"optimizer": "adam"}, "adamw or sgd, not adam"),
        ({"optimizer": "sgd"}, "sgd needs its own base_lr"),
        ({"base_lr": 0.0}, "base_lr must be positive"),
        ({"min_lr": -1.0}, "min_lr"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "below the 3 epochs"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"layer_decay": 1.5}, "at most 1"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"crop": 0.0}, "share of the image's area"),
        ({"interpolation": "nearest"}, "bilinear or bicubic"),
        ({"erase": 2.0}, "erase is a probability"),
        ({"mixup": -1.0}, "mixup must not"),
        ({"cutmix": -1.0}, "cutmix must not"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"precision": "fp16"}, "auto, no or bf16"),
        ({"rand_augment": "auto-m9"}, "like rand-m9-mstd0.5-inc1"),
        ({"rand_augment": "rand-x9"}, "like rand-m9-mstd0.5-inc1"),
        ({"rates": (0.1, 0.0)}, "positive numbers, as 1e-3 4e-3, not 0.1 0"),
        ({"rates": (math.nan,)}, "positive numbers"),
        ({"rates": (0.1,), "base_lr": 0.1}, "not both"),
        ({"scratch": (1, 0)}, "multiples of the epochs"),
        ({"pool": "max"}, "choose auto, cls, mean or last-N"),
        ({"pool": "last-9"}, "needs 9 blocks"),
    ],
)
def test_impossible_values_are_one_sentence(given, message):
    with pytest.raises(UserError, match=message) as caught:
        small(vit(), **given)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):  # before any image is counted
        check(Recipe(**given), vit(), image_size=16)


def test_other_networks_have_no_layers_to_decay():
    other = timm.create_model("test_efficientnet", num_classes=0)
    for given in ({"layer_decay": 0.9}, {"drop_path": 0.1}):
        with pytest.raises(UserError, match="is for timm's ViTs and ResNets; EfficientNet is neither"):
            small(other, **given)
    with pytest.raises(UserError, match="choice for ViTs"):
        small(resnet(), pool="mean")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [vit(), resnet()], ids=["vit", "resnet"])
def test_a_run_repeats_exactly_and_leaves_no_trace(data, backbone):
    everything = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1", "drop_path": 0.3}
    state, weights = backbone.state_dict(), copy.deepcopy(backbone.state_dict())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = run(backbone, data, **everything)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == before
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # the world outside does not matter
    again = run(backbone, data, **everything)
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert first.accuracy == again.accuracy and first.details["last_loss"] == again.details["last_loss"]
    other = run(backbone, data, seed=1, **everything)
    assert not torch.equal(other.model.head.weight, first.model.head.weight)
    assert all(torch.equal(state[name], value) for name, value in weights.items())  # the backbone passed is untouched
    for name in everything:  # each of them does something
        without = run(backbone, data, **{**everything, name: "none" if name == "rand_augment" else 0.0})
        assert not torch.equal(without.model.head.weight, first.model.head.weight), name


def test_the_head_is_the_only_new_parameter():
    for backbone, pool in (
        (vit(), "mean"),
        (vit(), "cls"),
        (vit(), "last-2"),
        (resnet(), "auto"),
        (vit(global_pool="avg"), "mean"),
    ):
        names = [name for name, _ in backbone.named_parameters()]
        model = Classifier(backbone, 4, pool, seed=0)
        assert [n for n, _ in model.named_parameters()] == [f"backbone.{n}" for n in names] + [
            "head.weight",
            "head.bias",
        ]
        assert model.head.in_features == backbone.num_features * (2 if pool == "last-2" else 1)
        assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.2)
        model(images()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())  # nothing idle


def test_all_of_the_network_is_trained_even_what_was_frozen(data):
    backbone = vit()
    backbone.pos_embed.requires_grad_(False)
    result = run(backbone, data, epochs=1)
    after = result.model.backbone.state_dict()
    assert not [name for name, value in backbone.state_dict().items() if torch.equal(value, after[name])]


def test_the_test_set_is_read_once_and_changes_nothing(data):
    train, test = data

    class Counting(ImageStore):
        def eval_images(self, start, stop, size):
            reads.append((start, stop))
            return super().eval_images(start, stop, size)

    reads: list[tuple[int, int]] = []
    fields = {f.name: getattr(test, f.name) for f in dataclasses.fields(test)}
    one = run(resnet(), (train, Counting(**fields)))
    assert reads == [(0, 200)]
    labels = test.labels.roll(1)
    labels[::2] = -1
    two = run(resnet(), (train, Counting(**{**fields, "labels": labels})))
    assert torch.equal(one.model.head.weight, two.model.head.weight)
    assert torch.equal(one.predictions[1::2], two.predictions)
    assert two.accuracy == pytest.approx(100 * (one.predictions[1::2] == labels[1::2]).float().mean().item())


def test_images_without_a_label_are_not_trained_on(data):
    train, test = data
    labels = train.labels.clone()
    labels[20:] = -1
    part = dataclasses.replace(train, labels=labels)
    alone = train.subset(torch.arange(20))
    a, b = (run(resnet(), (store, test), batch_size=10) for store in (part, alone))
    assert torch.equal(a.model.head.weight, b.model.head.weight) and a.details["steps"] == 4
    with pytest.raises(UserError, match="at least two labelled"):
        run(resnet(), (dataclasses.replace(train, labels=torch.full((64,), -1)), test))


def test_a_diverged_run_has_no_accuracy(data):
    lines = []
    result = finetune(
        resnet(),
        *data,
        small(resnet(), epochs=4, optimizer="sgd", base_lr=1e8),
        num_classes=4,
        log=lines.append,
        **STATISTICS,
    )
    assert math.isnan(result.accuracy) and "diverged" in lines[-1] and "base_lr" in lines[-1]


@pytest.fixture(scope="module", params=["vit", "resnet"])
def pretrained(request):
    """A network that was trained, with labels, to tell apart eight orientations it is not asked for later."""
    backbone, rate, optimizer = (vit(), 2e-2, "adamw") if request.param == "vit" else (resnet(), 0.4, "sgd")
    labels = 1 + 2 * (torch.arange(1600) % 4)  # of eight: the four between those of `data`
    store = stripes(1600, 7, classes=8, labels=labels)
    store.labels = labels // 2
    recipe = small(
        backbone, len(store), epochs=14, batch_size=64, base_lr=rate, optimizer=optimizer, layer_decay=1.0, crop=0.9
    )
    return finetune(backbone, store, store, recipe, num_classes=4, **STATISTICS).model.backbone.eval(), request.param


def test_a_pretrained_network_beats_random_weights(pretrained, data):
    backbone, kind = pretrained
    spec = VIT if kind == "vit" else RESNET
    own = {"base_lr": 5e-3} if kind == "vit" else {"base_lr": 0.1, "optimizer": "sgd"}
    given = Recipe(epochs=10, batch_size=16, crop=0.9, labels=("32",), **own)
    result = evaluate(
        backbone,
        *data,
        protocols=["finetune", "lowshot"],
        random_init=random_init(spec, 1),
        recipe=given,
        **STATISTICS,
        **QUIET,
    )
    assert [row["protocol"] for row in result.rows] == ["finetune", "lowshot-32"]
    for row in result.rows:
        assert list(row["baselines"]) == ["random init", "random init, 3x epochs"]
        assert row["value"] > max(row["baselines"].values()) + 3, row


# ---- pooling ---------------------------------------------------------------------------------------------------------


def test_pooling_equals_the_tokens_of_timm():
    x = images()
    with torch.no_grad():
        for backbone in (vit(), vit(global_pool="avg"), vit(reg_tokens=2)):
            full = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
            kept = []
            for block in backbone.blocks:
                full = block(full)
                kept.append(full)
            prefix = backbone.num_prefix_tokens
            norm = backbone.fc_norm if backbone.global_pool == "avg" else backbone.norm
            torch.testing.assert_close(Pooled(backbone, "cls")(x), norm(kept[-1][:, 0]))
            torch.testing.assert_close(Pooled(backbone, "mean")(x), norm(kept[-1][:, prefix:].mean(1)))
            torch.testing.assert_close(
                Pooled(backbone, "last-2")(x), torch.cat([norm(kept[1][:, 0]), norm(kept[2][:, 0])], 1)
            )
            own = "mean" if backbone.global_pool == "avg" else "cls"
            torch.testing.assert_close(Pooled(backbone, own)(x), backbone(x))
            assert pooling(backbone) == own and pooled(backbone, "auto") is backbone
        headless = vit(class_token=False, global_pool="avg")
        torch.testing.assert_close(Pooled(headless, "mean")(x), headless(x))
        with pytest.raises(UserError, match="class token"):
            Pooled(headless, "cls")
    assert pooling(resnet()) is None and pooling(Pooled(vit(), "last-3")) == "last-3"
    for name in ("last-0", "last-", "first", ""):
        with pytest.raises(UserError, match="unknown pooling"):
            Pooled(vit(), name)


def test_frozen_protocols_name_the_pooling_they_used(data):
    def rows(backbone, pool):
        found = evaluate(
            backbone, *data, protocols=["knn", "metrics"], pool=pool, random_init=None, **STATISTICS, **QUIET
        )
        return {row["metric"]: row for row in found.rows}, found.test_features

    for pool, name, width in (("auto", "cls", 48), ("cls", "cls", 48), ("mean", "mean", 48), ("last-3", "last-3", 144)):
        found, features = rows(vit(), pool)
        assert features.shape == (200, width) and found["RankMe"]["settings"]["dimensions"] == width
        assert all(row["settings"]["pooling"] == name for row in found.values())
    assert all("pooling" not in row["settings"] for row in rows(resnet(), "auto")[0].values())
    with pytest.raises(UserError, match="choice for ViTs"):
        rows(resnet(), "cls")


def test_the_augmented_probe_of_a_vit_has_a_batch_norm(data):
    def probe(backbone):
        return evaluate(
            backbone, *data, protocols=["linear-augmented"], augmented_epochs=2, **STATISTICS, **QUIET
        ).rows[0]

    row = probe(vit())
    assert "BatchNorm without scale and shift" in row["settings"]["head"] and "MAE" in row["text"]
    assert "head" not in probe(resnet())["settings"]


def test_augmented_probe_with_batch_norm_equals_torch(data):
    train, test = data
    backbone, rate, epochs = vit(), 0.3, 3
    x = [extract_features(backbone, store, **STATISTICS) for store in data]
    ours = linear_probe_augmented(
        backbone,
        train,
        x[0],
        train.labels,
        x[1],
        test.labels,
        rates=(rate,),
        epochs=epochs,
        batch_size=16,
        batch_norm=True,
        **STATISTICS,
    )
    norm, head = nn.BatchNorm1d(48, eps=1e-6, affine=False), nn.Linear(48, 4)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    view = evaluation_view(16, STATISTICS["mean"], STATISTICS["std"], smallest_area=0.08)
    loader = ViewLoader(train, ViewRecipe([view]), batch_size=16, seed=0)
    for step in range(4 * epochs):
        batch = loader(step)
        optimizer.param_groups[0]["lr"] = rate * 16 / 256 * cosine(step, 4 * epochs)
        optimizer.zero_grad()
        F.cross_entropy(head(norm(backbone(batch.views[0]).detach())), batch.labels).backward()
        optimizer.step()
    expected = head(norm.eval()(x[1])).argmax(1)
    assert (ours.predictions == expected).float().mean() > 0.99 and len(expected.unique()) > 1
    plain = linear_probe_augmented(
        backbone,
        train,
        x[0],
        train.labels,
        x[1],
        test.labels,
        rates=(rate,),
        epochs=epochs,
        batch_size=16,
        **STATISTICS,
    )
    assert not torch.equal(plain.predictions, ours.predictions)


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_rows_hold_all_that_compare_must_not_mix(data, tmp_path):
    base = {"epochs": 1, "batch_size": 16, "labels": ("8",), "scratch": ()}

    def rows(backbone=None, **given):
        return evaluate(
            backbone or vit(),
            *data,
            protocols=["finetune", "lowshot"],
            recipe=Recipe(**{**base, **given}),
            **STATISTICS,
            **QUIET,
        ).rows

    def card(name, found):
        content = {
            "format": 1,
            "method": "m",
            "preset": name,
            "git_commit": "0",
            "seed": 0,
            "backbone": "b",
            "data": {
                "name": "d",
                "label_name": "l",
                "fingerprint": "0",
                "train_images": 64,
                "test_images": 200,
                "image_size": 16,
            },
            "epochs": 1,
            "batch_size": 16,
            "images_seen": 64,
            "images_per_second": 1.0,
            "device": "cpu",
            "evaluations": found,
            "config": {},
        }
        (tmp_path / name).write_text(json.dumps(content, allow_nan=False))
        return tmp_path / name

    plain = rows()
    assert [row["protocol"] for row in plain] == ["finetune", "lowshot-8"]
    for row in plain:
        assert row["baselines"] == {} and row["text"].endswith(".") and "baseline" not in row
        assert row["settings"]["features"] == "backbone, trained together with a linear head"
        assert row["settings"]["pooling"] == "mean"
    assert plain[1]["settings"]["labelled_train_images"] == 8
    assert plain[1]["settings"]["subset_hash"] == subset_hash(label_subset(data[0].labels, 8))
    paths = [card("plain", plain), card("again", rows(precision="no"))]
    assert not differences(select(load_cards(paths), ["finetune"]))
    others = {
        "epochs": 2,
        "batch_size": 8,
        "base_lr": 2e-3,
        "layer_decay": 0.9,
        "drop_path": 0.2,
        "mixup": 0.5,
        "cutmix": 0.5,
        "smoothing": 0.2,
        "erase": 0.1,
        "rand_augment": "rand-m3",
        "crop": 0.9,
        "weight_decay": 0.1,
        "warmup_epochs": 0.5,
        "min_lr": 1e-5,
        "interpolation": "bicubic",
    }
    for name, value in others.items():
        results = select(load_cards([paths[0], card("other", rows(**{name: value}))]), ["finetune"])
        assert f"settings.{name}" in differences(results) and len(comparable(results)) == 2, name
    results = select(load_cards([paths[0], card("other", rows(pool="cls"))]), ["finetune"])
    assert "settings.pooling" in differences(results)
    results = select(load_cards([paths[0], card("other", rows(subset_seed=1))]), ["lowshot-8"])
    assert {"settings.subset_seed", "settings.subset_hash"} == set(differences(results))
    assert not differences(select(load_cards([paths[0], tmp_path / "other"]), ["finetune"]))
    assert results_table(plain).row_count == 2


def test_scratch_has_one_rate_for_all_layers_and_its_epochs(data, monkeypatch):
    seen = []

    def watched(backbone, train, test, recipe, **more):
        seen.append((len(train), recipe.epochs, recipe.layer_decay))
        return finetune(backbone, train, test, recipe, **more)

    monkeypatch.setattr(protocol, "finetune", watched)
    monkeypatch.setattr(training, "finetune", watched)
    recipe = Recipe(epochs=2, batch_size=16, labels=("8", "16"), scratch=(1, 2, 4))
    rows = evaluate(
        vit(), *data, protocols=["finetune", "lowshot"], random_init=vit(3), recipe=recipe, **STATISTICS, **QUIET
    ).rows
    mine, scratch = 0.75, 1.0
    assert seen == [(64, 2, mine), (8, 2, mine), (16, 2, mine)] + [
        (n, epochs, scratch) for n in (64, 8, 16) for epochs in (2, 4, 8)
    ]
    assert [row["protocol"] for row in rows] == ["finetune", "lowshot-8", "lowshot-16"]
    for row in rows:
        assert list(row["baselines"]) == ["random init", "random init, 2x epochs", "random init, 4x epochs"]
        assert row["settings"]["epochs"] == 2 and row["settings"]["layer_decay"] == 0.75
    alone = finetune(
        vit(3),
        *data,
        dataclasses.replace(small(vit(), epochs=2, batch_size=16), epochs=4, layer_decay=1.0),
        num_classes=4,
        **STATISTICS,
    )
    assert rows[0]["baselines"]["random init, 2x epochs"] == alone.accuracy


def test_each_network_chooses_its_rate_on_labelled_training_images_alone(data, monkeypatch):
    train, test = data
    seen = []

    def watched(backbone, train, test, recipe, **more):
        result = finetune(backbone, train, test, recipe, **more)
        seen.append((train, test, recipe, result.accuracy))
        return result

    monkeypatch.setattr(protocol, "finetune", watched)
    monkeypatch.setattr(training, "finetune", watched)
    recipe = Recipe(epochs=2, batch_size=16, rates=(2e-2, 1e-8), scratch=(1,))
    networks = dict(random_init=resnet(3), protocols=["finetune"], recipe=recipe)
    row, log = None, []
    for labels in (test.labels, test.labels.roll(1)):
        seen.clear()
        found = evaluate(
            resnet(), train, dataclasses.replace(test, labels=labels), log=log.append, **networks, **STATISTICS
        )
        (row,) = found.rows
        assert [r.base_lr for *_, r, _ in seen] == [1e-8, 2e-2, row["chosen"]["base_learning_rate"]] + [
            1e-8,
            2e-2,
            row["chosen"]["by random init"],
        ]
    for mine in (seen[:3], seen[3:]):
        for fit, held, *_ in mine[:2]:
            assert (len(fit), len(held)) == (52, 12)
            both = torch.cat([fit.images, held.images]).flatten(1)
            assert (both.unique(dim=0) == train.images.flatten(1).unique(dim=0)).all()  # a split of the training images
        assert len(mine[2][0]) == 64 and len(mine[2][1]) == len(test)
        accuracies = [accuracy for *_, accuracy in mine[:2]]
        assert mine[2][2].base_lr == (1e-8, 2e-2)[accuracies[1] > accuracies[0]]
    assert row["chosen"]["validation_top1"] == {"1e-08": seen[0][3], "0.02": seen[1][3]}
    assert row["value"] == seen[2][3] and row["baselines"]["random init"] == seen[5][3]
    assert row["settings"]["base_lr"].startswith("1e-08, 0.02, chosen on a fifth")
    assert "out of 1e-08, 0.02 that does best on a fifth" in row["text"]
    assert any("base_lr" in line and "out of" in line for line in log)
    few = dataclasses.replace(recipe, labels=("8",))
    found = evaluate(resnet(), *data, protocols=["lowshot"], recipe=few, **STATISTICS)
    assert found.rows == [] and "a fifth of the labelled images, and there are 8" in found.skipped["lowshot"]


def test_what_the_data_cannot_serve_is_said_before(data):
    train, test = data
    nothing = dataclasses.replace(train, labels=None)
    for name in ("finetune", "lowshot"):
        with pytest.raises(UserError, match=f"no labels, which {name}"):
            check_protocols([name], nothing, nothing)
    with pytest.raises(UserError, match="labels 1%: 0 of the 64.*6.25% or 4"):
        check_protocols(["lowshot"], train, test)
    check_protocols(["lowshot"], train, test, Recipe(labels=("8",)))
    lines = []
    result = evaluate(resnet(), train, test, protocols=["lowshot"], log=lines.append, **STATISTICS)
    assert result.rows == [] and "lowshot is skipped" in lines[0] and set(result.skipped) == {"lowshot"}
    with pytest.raises(UserError, match="epochs must be"):
        evaluate(resnet(), train, test, protocols=["finetune"], recipe=Recipe(epochs=0), **STATISTICS)
    assert not PROTOCOLS["finetune"].frozen and PROTOCOLS["knn"].frozen


def test_command_line_end_to_end_on_a_vit(tmp_path, capsys):
    directory = tmp_path / "run"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        export_backbone(directory, create_backbone(VIT), VIT)
    (directory / "config.json").write_text(json.dumps({"data": "shapes", "limit": 60, "seed": 3}))
    (directory / "result.json").write_text(json.dumps({"format": 1, "seed": 3, "evaluations": []}))
    common = [str(directory), "--device", "cpu", "--limit", "60"]
    flags = [
        "--protocols",
        "knn,finetune,lowshot",
        "--pool",
        "last-2",
        "--finetune.epochs",
        "1",
        "--finetune.labels",
        "10",
        "--finetune.mixup",
        "0.8",
        "--finetune.scratch",
        "1",
        "--out",
        str(tmp_path / "scores.json"),
    ]
    main([*common, *flags])
    printed = capsys.readouterr().out
    assert "finetune, backbone: epoch 1/1" in printed and "lowshot-10" in printed
    rows = {row["protocol"]: row for row in json.loads((tmp_path / "scores.json").read_text())["evaluations"]}
    assert rows["knn-20-0.07"]["settings"]["pooling"] == "last-2" == rows["finetune"]["settings"]["pooling"]
    assert rows["finetune"]["settings"]["mixup"] == 0.8 and list(rows["lowshot-10"]["baselines"]) == ["random init"]
    for more, message in (
        (["--protocols", "lowshot"], "labels 1%: 0 of the 60"),
        (["--protocols", "lowshot", "--finetune.labels", "15"], "take 10 or 20"),
        (["--protocols", "finetune", "--finetune.base-lr", "-1"], "base_lr must be positive"),
        (["--protocols", "knn", "--pool", "max"], "unknown pooling"),
        (["--protocols", "finetun"], "did you mean finetune"),
    ):
        with pytest.raises(UserError, match=message):
            main([*common, *more])
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--finetune.epoch", "7"])
    assert stopped.value.code == 2 and "--finetune.epochs" in capsys.readouterr().err


def test_command_line_end_to_end_on_a_method(tmp_path):
    """`methods/simclr`'s smoke run is fine-tuned on its own data by what it exported."""
    code, text = run_command(
        "methods.simclr.train", "smoke", "--out", tmp_path, "--max-steps", 2, "--no-eval", log=tmp_path / "log"
    )
    assert code == 0, text
    code, text = run_command(
        "eval.__main__",
        tmp_path / "simclr-smoke",
        "--protocols",
        "finetune,lowshot",
        "--finetune.epochs",
        1,
        "--finetune.labels",
        "20",
        "--finetune.scratch",
        1,
        2,
        "--out",
        tmp_path / "scores.json",
        log=tmp_path / "log",
    )
    assert code == 0 and "random init, 2x epochs: epoch 2/2" in text, text
    rows = json.loads((tmp_path / "scores.json").read_text())["evaluations"]
    assert [row["protocol"] for row in rows] == ["finetune", "lowshot-20"]
    for row in rows:
        assert list(row["baselines"]) == ["random init", "random init, 2x epochs"]
        assert row["settings"]["optimizer"] == "adamw" and "pooling" not in row["settings"]
    code, text = run_command("eval.__main__", tmp_path / "simclr-smoke", "--protocols", "lowshot", log=tmp_path / "log")
    assert code == 2 and text.strip().splitlines()[-1].startswith("error: labels 1%: 2 of the 256 labelled images")


def test_open_data_gives_the_stores_that_are_cut():
    store = open_data("shapes", limit=40, image_size=16)
    part = store.subset(label_subset(store.labels, 10))
    assert len(part) == 10 and part.labels.bincount().tolist() == [1] * 10
    assert torch.equal(part.factors["shape"], part.labels) and len(part.factors["hue"]) == 10
