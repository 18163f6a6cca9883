"""Views against torchvision's functional operations, sample by sample, with the same random numbers."""

import dataclasses
import math

import pytest
import torch
import torchvision.transforms.v2.functional as V
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from common.errors import UserError
from common.rng import generator
from common.views import fixed_shape, grouped
from common.views.crop import crop_boxes
from common.views.erasing import RandomErasing
from common.views.pixel_params import pixel_rows
from common.views.recipe import ViewRecipe
from common.views.sampling import ORDERS, Columns, ViewParams
from common.views.spec import View

LEVEL = 1 / 255
SINGLE = [name for name in Columns._fields if name not in ("area", "log_ratio", "extra")]
JITTER = dict(color_jitter_prob=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
CIFAR = View(32, **JITTER, grayscale=0.2, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are small: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photos(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth images with edges, noise, grays and saturated pixels, uint8 [n, 3, height, width]."""
    g = generator("photos", seed)
    coarse = torch.rand(n, 3, 6, 6, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    noise = 0.1 * torch.randn(n, 3, height, width, generator=g)
    x = (1.6 * smooth - 0.3 + noise).clamp(0, 1)
    x[:, :, : height // 4, : width // 4] = x[:, :1, : height // 4, : width // 4]  # exact grays
    x[:, :, -2:, :] = (x[:, :, -2:, :] > 0.5).float()  # pure colors, black and white
    return (x * 255).round().to(torch.uint8)


def replay(image: torch.Tensor, view: View, params: ViewParams, i: int, v: int, crop: torch.Tensor | None = None):
    """Sample i's view v through torchvision; `crop` float [3, s, s] skips the crop and the flip."""
    value = {name: getattr(params.columns, name)[i, v].item() for name in SINGLE}
    x = crop
    if crop is None:
        boxes = crop_boxes(params[i : i + 1], [view] * params.values.shape[1], *image.shape[1:])
        top, left, h, w = boxes[0, v].tolist()
        mode = InterpolationMode(view.interpolation)
        x = V.resized_crop(
            V.to_dtype(image, torch.float32, scale=True),
            int(top),
            int(left),
            int(h),
            int(w),
            [view.size] * 2,
            mode,
            antialias=True,
        ).clamp(0, 1)
        x = V.horizontal_flip(x) if value["flip"] else x
    if value["color_jitter_prob"]:
        operations = (
            lambda x: V.adjust_brightness(x, value["brightness"]),
            lambda x: V.adjust_contrast(x, value["contrast"]),
            lambda x: V.adjust_saturation(x, value["saturation"]),
            lambda x: V.adjust_hue(x, value["hue"]),
        )
        for operation in ORDERS[int(value["order"])]:
            x = operations[operation](x)
    if value["grayscale"]:
        x = V.rgb_to_grayscale(x, num_output_channels=3)
    if value["blur"]:
        x = V.gaussian_blur(x, [view.blur_kernel] * 2, [value["sigma"]] * 2)
    if value["solarize"]:
        x = V.solarize(x, 0.5)
    return V.normalize(x, list(view.mean), list(view.std))


def largest(recipe: ViewRecipe, images: torch.Tensor, params: ViewParams, made: list[torch.Tensor]) -> float:
    """Largest difference of `made` to torchvision in levels of 1/255, before normalization."""
    worst = 0.0
    for v, view in enumerate(recipe.views):
        assert made[v].dtype == torch.float32 and made[v].is_contiguous()
        assert made[v].shape == (len(images), 3, view.size, view.size)
        std = torch.tensor(view.std)[:, None, None]
        for i in range(len(images)):
            difference = (made[v][i] - replay(images[i], view, params, i, v)) * std
            # next to the threshold of solarize a rounding error inverts a pixel: compare what both give back inverted
            if view.solarize:
                mean = torch.tensor(view.mean)[:, None, None]
                near = (made[v][i] * std + mean - 0.5).abs() < 1e-5
                difference = difference.masked_fill(near, 0)
            worst = max(worst, difference.abs().max().item())
    return worst / LEVEL


# --- single operations ------------------------------------------------------------------------------------------------

FORMS = [dict(_form="cpu", _crop="rows"), dict(_form="accelerator")]
ids = ["grouped", "fixed-shape"]


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("brightness", dict(color_jitter_prob=1, brightness=0.8)),
        ("contrast", dict(color_jitter_prob=1, contrast=0.8)),
        ("saturation", dict(color_jitter_prob=1, saturation=0.8)),
        ("hue", dict(color_jitter_prob=1, hue=0.5)),
        ("grayscale", dict(grayscale=1)),
        ("blur", dict(blur=1, blur_kernel=9)),
        ("wide blur", dict(blur=1, blur_kernel=23, blur_sigma=(1.0, 6.0))),
        ("solarize", dict(solarize=1)),
    ],
)
def test_each_operation_equals_torchvision(name, view, form):
    """Whole images, no crop: scale and ratio of exactly 1, output of the input's size."""
    view = View(32, scale=(1, 1), ratio=(1, 1), flip=0, **view)
    images = photos(32, 32, 32)
    params = ViewRecipe([view]).sample(32, generator("operation", name))
    recipe = ViewRecipe([view], **form)
    made = recipe(images, params)
    assert (made[0] - images / 255).abs().max() > 0.1  # it does something
    assert largest(recipe, images, params, made) < 0.001


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 61, 24), (100, 80, 96), (96, 200, 33)])
def test_float_crop_equals_resized_crop(height, width, size, interpolation, form):
    """Enlarging and shrinking; wide and tall images; flips."""
    view = View(size, interpolation=interpolation)
    recipe = ViewRecipe([view, view], **form)
    images = photos(12, height, width)
    params = recipe.sample(12, generator("crop", height, size))
    made = recipe(images, params)
    assert largest(recipe, images, params, made) < (0.002 if max(height, width) <= 96 else 0.01)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_native_crop(interpolation):
    """Equal to torchvision on uint8; within a level of float, but for bicubic overshoot, which uint8 clips twice."""
    view = View(48, interpolation=interpolation)
    recipe = ViewRecipe([view, view])
    images = photos(12, 100, 80)  # above EXACT_CROP_PIXELS
    params = recipe.sample(12, generator("native"))
    made = recipe(images, params)
    boxes = crop_boxes(params, recipe.views, 100, 80).long()
    mode = InterpolationMode(interpolation)
    for v in range(2):
        for i in range(12):
            crop = V.resized_crop(images[i], *boxes[i, v].tolist(), [48, 48], mode, antialias=True)
            crop = V.horizontal_flip(crop) if params.columns.flip[i, v] else crop
            assert (made[v][i] - crop / 255).abs().max() < 1e-6
    exact = ViewRecipe(recipe.views, _crop="rows")(images, params)
    error = torch.stack([(a - b).abs() for a, b in zip(made, exact, strict=True)]) / LEVEL
    assert error.max() < (1.01 if interpolation == "bilinear" else 20) and 0.1 < error.mean() < 0.4


def test_hue_at_every_place_of_every_order():
    view = View(
        16,
        scale=(1, 1),
        ratio=(1, 1),
        flip=0,
        color_jitter_prob=1,
        brightness=0.5,
        contrast=0.5,
        saturation=0.5,
        hue=0.3,
    )
    images = photos(48, 16, 16)
    params = ViewRecipe([view]).sample(48, generator("orders"))
    params.columns.order.copy_((torch.arange(48) % 24)[:, None])
    for form in FORMS:
        recipe = ViewRecipe([view], **form)
        assert largest(recipe, images, params, recipe(images, params)) < 0.001


def test_hue_of_grays_and_pure_colors():
    colors = torch.tensor(
        [
            [0, 0, 0],
            [255, 255, 255],
            [77, 77, 77],
            [255, 0, 0],
            [0, 255, 0],
            [0, 0, 255],
            [255, 255, 0],
            [0, 255, 255],
            [255, 0, 255],
            [9, 9, 10],
            [200, 100, 100],
            [100, 200, 200],
        ]
    )
    images = colors.to(torch.uint8).T[None, :, None, :].expand(64, 3, 12, 12).contiguous()
    view = View(12, scale=(1, 1), ratio=(1, 1), flip=0, color_jitter_prob=1, hue=0.5)
    params = ViewRecipe([view]).sample(64, generator("colors"))
    params.columns.hue[:13] = torch.linspace(-0.5, 0.5, 13)[:, None]  # whole sextants
    for form in FORMS:
        recipe = ViewRecipe([view], **form)
        made = recipe(images, params)
        assert largest(recipe, images, params, made) < 0.001
        assert torch.allclose(made[0][..., :3], images[..., :3] / 255, atol=1e-6)


# --- whole pipelines --------------------------------------------------------------------------------------------------

BYOL = dict(
    color_jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale=0.2,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_pipeline_at_32_px_equals_torchvision(form):
    recipe = ViewRecipe([CIFAR, CIFAR], **form)
    images = photos(64, 32, 32)
    params = recipe.sample(64, generator("pipeline", 32))
    assert largest(recipe, images, params, recipe(images, params)) < 0.001


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_pipeline_with_blur_and_solarize_at_96_px_equals_torchvision(form):
    recipe = ViewRecipe([View(96, **BYOL, blur=1.0), View(96, **BYOL, blur=0.3, solarize=0.5)], **form)
    images = photos(16, 120, 110)
    params = recipe.sample(16, generator("pipeline", 96))
    assert largest(recipe, images, params, recipe(images, params)) < 0.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_native_crop_after_color_jitter(interpolation):
    """The documented distance of the 8-bit crop, and of the worker path, which is the same."""
    view = View(96, **(BYOL | dict(interpolation=interpolation)), blur=0.5)
    images = photos(24, 120, 110)
    recipe = ViewRecipe([view, view])
    params = recipe.sample(24, generator("worker"))
    made = recipe(images, params)
    exact = ViewRecipe([view, view], _crop="rows")(images, params)
    std = torch.tensor(view.std)[:, None, None]
    distance = torch.stack([(a - b).abs() * std / LEVEL for a, b in zip(made, exact, strict=True)])
    assert 0.1 < distance.mean() < 0.3 and (distance > 4).float().mean() < 0.001
    assert distance.max() < (8 if interpolation == "bilinear" else 60)
    crops = [recipe.crop_one(image, params, i) for i, image in enumerate(images)]
    assert all(c.dtype == torch.uint8 and c.shape == (3, 96, 96) and c.is_contiguous() for pair in crops for c in pair)
    batches = [torch.stack(view) for view in zip(*crops, strict=True)]
    for form in ("cpu", "accelerator"):
        for a, b in zip(ViewRecipe([view, view], _form=form).finish(batches, params), made, strict=True):
            assert (a - b).abs().max() < 3e-5


def test_multi_crop_sizes_and_probabilities():
    """DINO: two large views of different blur, small ones from small areas; each equals itself made alone."""
    common = dict(
        color_jitter_prob=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        interpolation="bicubic",
    )
    views = [View(64, scale=(0.4, 1), blur=1.0, **common), View(64, scale=(0.4, 1), blur=0.1, solarize=0.2, **common)]
    views += [View(24, scale=(0.05, 0.4), blur=0.5, **common)] * 3
    recipe = ViewRecipe(views)
    images = photos(40, 64, 64)
    params = recipe.sample(40, generator("dino"))
    made = recipe(images, params)
    assert [list(x.shape) for x in made] == [[40, 3, 64, 64]] * 2 + [[40, 3, 24, 24]] * 3
    assert params.columns.blur.mean(0)[0] == 1 and params.columns.blur.mean(0)[1] < 0.4
    assert params.columns.solarize.sum(0).gt(0).tolist() == [False, True, False, False, False]
    assert largest(recipe, images, params, made) < 0.01
    lines = recipe.describe().splitlines()
    assert len(lines) == 3 and lines[2].startswith("3 views: 24 px") and "solarize p 0.2" in lines[1]


def test_crop_and_flip_only():
    recipe = ViewRecipe([View(32, scale=(0.2, 1), interpolation="bicubic")])
    images = photos(20, 48, 40)
    params = recipe.sample(20, generator("mae"))
    assert largest(recipe, images, params, recipe(images, params)) < 0.001
    assert "jitter" not in recipe.describe() and "flip p 0.5" in recipe.describe()


def test_compiled_agrees():
    """One recipe with everything: the groups of a batch, all of different sizes, already make torch.compile compile
    again for any size."""
    images = photos(40, 32, 32)
    views = [CIFAR, dataclasses.replace(CIFAR, blur=0.5, solarize=0.3, extra=(RandomErasing(),))]
    eager, compiled = ViewRecipe(views), ViewRecipe(views, compile=True)
    params = eager.sample(40, generator("compile"))
    for view, a, b in zip(views, eager(images, params), compiled(images, params), strict=True):
        difference = (a - b).abs()
        inverted = (difference > 0.01).sum().item()  # values within rounding of the solarize threshold
        assert inverted <= (3 if view.solarize else 0)
        assert difference[difference <= 0.01].max() < 2e-5


def test_accelerator_path_is_one_static_graph():
    """fullgraph refuses graph breaks; meta tensors have no values, so reading one (a host synchronization) raises."""
    view = dataclasses.replace(CIFAR, blur=0.5, blur_kernel=5, solarize=0.2, extra=(RandomErasing(),))
    recipe = ViewRecipe([view, view], _form="accelerator")
    images = photos(6, 32, 32)
    params = recipe.sample(6, generator("graph"))
    stack, form = recipe._stacks[0], recipe._form(images)
    rows = pixel_rows(params, recipe.views, 32, 32)
    graph = torch.compile(fixed_shape.crop_and_fixed_shape, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        made = graph(images, rows, 32, False, stack.operations, form._reflections(stack, images.device))
    for a, b in zip(made, recipe(images, params), strict=True):
        assert (a - b).abs().max() < 1e-5
    rows = pixel_rows(params.to("meta"), recipe.views, 32, 32)
    assert form.from_images(stack, images.to("meta"), rows.transpose(0, 1)).shape == (2, 6, 3, 32, 32)


# --- further operations -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dim:
    """Multiply by a random factor, the second of two numbers."""

    columns = 2

    def describe(self) -> str:
        return "dim"

    def __call__(self, x: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return x * uniform[:, 1, None, None, None]


def erased(x: torch.Tensor, erasing: RandomErasing, uniform: torch.Tensor) -> torch.Tensor:
    """One sample x [3, s, s] through torchvision's erase, the rectangle by the definition; uniform [5]."""
    whether, area, ratio, top, left = uniform.tolist()
    if whether >= erasing.probability:
        return x
    side = x.shape[-1]
    (low, high), (flat, wide) = erasing.scale, erasing.ratio
    area, ratio = (low + (high - low) * area) * side * side, flat * (wide / flat) ** ratio
    h, w = min(side, round(math.sqrt(area / ratio))), min(side, round(math.sqrt(area * ratio)))
    i, j = int(top * (side - h + 1)), int(left * (side - w + 1))
    return V.erase(x, i, j, h, w, torch.tensor(erasing.fill)[:, None, None])


@pytest.mark.parametrize("path", [*FORMS, "worker"], ids=[*ids, "worker"])
def test_further_operations_have_their_own_numbers_and_change_no_other(path):
    """Random erasing equals torchvision's erase, in views of which each has its own operations."""
    erasing = RandomErasing(0.6, fill=CIFAR.mean)
    plain = dataclasses.replace(CIFAR, blur=0.5, solarize=0.2)
    views = [plain, dataclasses.replace(plain, extra=(Dim(), erasing)), dataclasses.replace(plain, extra=(erasing,))]
    images, n = photos(64, 32, 32), 64
    form = {} if path == "worker" else path
    without, recipe = ViewRecipe([plain] * 3, **form), ViewRecipe(views, **form)
    params, before = recipe.sample(n, generator("extra")), without.sample(n, generator("extra"))
    assert params.columns.extra.shape == (n, 3, 7)
    assert all(torch.equal(getattr(params.columns, name), getattr(before.columns, name)) for name in SINGLE)
    made, expected = recipe(images, params), without(images, before)
    if path == "worker":
        crops = [recipe.crop_one(image, params, i) for i, image in enumerate(images)]
        batches = [torch.stack(view) for view in zip(*crops, strict=True)]
        made, expected = recipe.finish(batches, params), without.finish(batches, before)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR.mean, CIFAR.std))
    changed = 0
    for v, view in enumerate(views):
        for i in range(n):
            x, uniform = expected[v][i] * std + mean, params.columns.extra[i, v]
            if view.extra:
                x = x * uniform[1] if len(view.extra) == 2 else x
                x = erased(x, erasing, uniform[7 - 5 :] if len(view.extra) == 2 else uniform[:5])
            assert (made[v][i] - (x - mean) / std).abs().max() < 1e-5
            changed += v == 2 and not torch.equal(made[v][i], expected[v][i])
    assert 0.45 * n < changed < 0.75 * n
    assert recipe.describe().splitlines()[2].count("random erasing p 0.6 (0.02-0.33 of the area), normalized") == 1


def test_impossible_erasing_is_refused():
    for wrong in (dict(probability=1.5), dict(scale=(0, 0.3)), dict(scale=(0.3, 1.2)), dict(ratio=(2, 1))):
        with pytest.raises(UserError, match=f"RandomErasing: {next(iter(wrong))} must be"):
            RandomErasing(**wrong)


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_boxes_are_distributed_as_torchvision():
    """Mean and spread of each box coordinate, and of the area and aspect, within five standard errors."""
    n, (height, width) = 4000, (60, 90)
    view = View(32, scale=(0.2, 1.0), ratio=(0.5, 2.0))
    ours = crop_boxes(ViewRecipe([view]).sample(n, generator("boxes")), [view], height, width)[:, 0]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, view.scale, view.ratio) for _ in range(n)]).double()
    for boxes in (ours, theirs):
        top, left, h, w = boxes.unbind(1)
        assert (boxes == boxes.round()).all() and (top >= 0).all() and (left >= 0).all()
        assert (h >= 1).all() and (w >= 1).all() and (top + h <= height).all() and (left + w <= width).all()

    def features(boxes):
        top, left, h, w = boxes.unbind(1)
        return torch.stack((top, left, h, w, h * w, (w / h).log(), top / (height - h + 1), left / (width - w + 1)), 1)

    a, b = features(ours), features(theirs)
    for x, y in ((a, b), ((a - a.mean(0)) ** 2, (b - b.mean(0)) ** 2)):
        error = (x.var(0) / n + y.var(0) / n).sqrt()
        assert ((x.mean(0) - y.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize(("height", "width"), [(8, 100), (100, 8), (30, 31)])
def test_fallback_box_is_torchvisions(height, width):
    """An area no aspect allows: every attempt fails and the center is taken."""
    view = View(16, scale=(1.0, 1.0), ratio=(0.9, 0.95) if height == 30 else (3 / 4, 4 / 3))
    ours = crop_boxes(ViewRecipe([view]).sample(3, generator("fallback")), [view], height, width)[:, 0]
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), view.scale, view.ratio)
    assert ours.tolist() == [list(theirs)] * 3


def test_first_fitting_attempt_wins():
    view = View(16)
    params = ViewRecipe([view]).sample(1, generator("first"))
    params.columns.area[0, 0] = torch.tensor([1.0, 1.0, 0.25] + [0.5] * 7)
    params.columns.log_ratio[0, 0] = torch.tensor([0.2, -0.2] + [0.0] * 8)
    params.columns.top[:], params.columns.left[:] = 0.0, 1 - 2**-24
    assert crop_boxes(params, [view], 20, 20)[0, 0].tolist() == [0, 10, 10, 10]


def test_frequencies():
    n = 12_000
    view = View(32, flip=0.5, color_jitter_prob=0.8, brightness=0.8, hue=0.2, grayscale=0.2, blur=0.1, solarize=0.9)
    params = ViewRecipe([view, view]).sample(n, generator("frequencies"))
    for name in ("flip", "color_jitter_prob", "grayscale", "blur", "solarize"):
        p = getattr(view, name)
        column = getattr(params.columns, name)
        assert set(column.unique().tolist()) == {0.0, 1.0}
        assert ((column.mean(0) - p).abs() < 5 * math.sqrt(p * (1 - p) / n)).all(), name
    counts = params.columns.order.long().flatten().bincount(minlength=24).double()
    expected = 2 * n / 24
    assert len(counts) == 24 and ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 23 degrees of freedom
    for name, low, high in (("brightness", 0.2, 1.8), ("contrast", 1.0, 1.0), ("hue", -0.2, 0.2), ("sigma", 0.1, 2.0)):
        x = getattr(params.columns, name)
        assert x.min() >= low - 1e-6 and x.max() <= high + 1e-6
        assert (x.mean() - (low + high) / 2).abs() < 5 * (high - low) / math.sqrt(12 * 2 * n) + 1e-6
    strong = ViewRecipe([View(32, color_jitter_prob=1, contrast=1.5)]).sample(n, generator("strong"))
    assert 0 <= strong.columns.contrast.min() < 0.01 and strong.columns.contrast.max() > 2.49
    both = torch.stack(
        [params.columns.hue[:, 0], params.columns.hue[:, 1], params.columns.flip[:, 0], params.columns.left[:, 0]]
    )
    assert (torch.corrcoef(both) - torch.eye(4)).abs().max() < 0.05  # views and columns are independent


def test_a_slice_of_the_numbers_gives_the_slice_of_the_views():
    """N processes with a part of the batch each make what one process makes."""
    images = photos(24, 32, 32)
    view = dataclasses.replace(CIFAR, blur=0.5, solarize=0.2)
    for form in FORMS:
        recipe = ViewRecipe([view, view], **form)
        params = recipe.sample(24, generator("ranks"))
        whole = recipe(images, params)
        assert len(params[8:16]) == 8
        for a, b in ((0, 8), (8, 16), (16, 24)):
            for part, full in zip(recipe(images[a:b], params[a:b]), whole, strict=True):
                difference = (part - full[a:b]).abs()
                assert (difference > 0.01).sum() <= 2 and difference[difference <= 0.01].max() < 1e-5


def test_determinism_and_independence_of_the_size():
    recipe = ViewRecipe([CIFAR, CIFAR])
    first, again = (recipe.sample(9, generator(0, "views", 5)) for _ in range(2))
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, recipe.sample(9, generator(0, "views", 6)).values)
    images = photos(9, 32, 32)
    before = images.clone()
    assert all(torch.equal(a, b) for a, b in zip(recipe(images, first), recipe(images, again), strict=True))
    assert torch.equal(images, before) and torch.equal(first.values, again.values)  # nothing is changed in place
    assert recipe(photos(9, 50, 40), first)[0].shape == (9, 3, 32, 32)
    assert not torch.equal(*recipe(images, first))


def test_blocks_do_not_show(monkeypatch):
    """The same views whether the batch is worked through at once or in small blocks."""
    recipe = ViewRecipe([CIFAR, CIFAR])
    images = photos(30, 32, 32)
    params = recipe.sample(30, generator("blocks"))
    at_once = recipe(images, params)
    monkeypatch.setattr(grouped, "BLOCK_VALUES", 4 * 3 * 32 * 32)
    monkeypatch.setattr(fixed_shape, "CHUNK_BYTES", 1 << 18)
    for again in (recipe(images, params), ViewRecipe([CIFAR, CIFAR], _form="accelerator")(images, params)):
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(at_once, again, strict=True))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (dict(size=0), "size"),
        (dict(scale=(0.5, 0.2)), "scale"),
        (dict(scale=(0, 1)), "scale"),
        (dict(ratio=(0, 1)), "ratio"),
        (dict(interpolation="nearest"), "interpolation"),
        (dict(hue=0.6), "hue"),
        (dict(flip=1.5), "flip"),
        (dict(brightness=-1), "brightness"),
        (dict(blur=1, blur_kernel=4), "blur_kernel"),
        (dict(size=8, blur=1, blur_kernel=17), "blur_kernel"),
        (dict(blur_sigma=(0, 1)), "blur_sigma"),
        (dict(std=(1, 0, 1)), "std"),
    ],
)
def test_impossible_views_are_refused(wrong, word):
    with pytest.raises(UserError, match=word):
        View(**{"size": 32} | wrong)


def test_wrong_images_are_refused():
    recipe = ViewRecipe([CIFAR])
    params = recipe.sample(4, generator("wrong"))
    for images in (torch.rand(4, 3, 8, 8), torch.zeros(5, 3, 8, 8, dtype=torch.uint8), photos(4, 8, 8)[:, :1]):
        with pytest.raises(ValueError, match="uint8 images"):
            recipe(images, params)
    with pytest.raises(UserError, match="at least one"):
        ViewRecipe([])
