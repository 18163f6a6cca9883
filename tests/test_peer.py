"""benchmarks/peer.py: what it claims to be equal on both sides is equal. lightly is optional; most tests need it."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peer
from common import rng
from common.cli import run_cli
from common.errors import UserError
from methods.barlow.loss import barlow_twins
from methods.byol.loss import byol_loss
from methods.dino.loss import dino_loss
from methods.simclr.train import contrast
from methods.simsiam.loss import simsiam
from methods.swav.loss import sinkhorn, swapped_prediction

try:
    from benchmarks import lightly_methods
except ModuleNotFoundError as missing:
    lightly_methods = None
    reason = f"{missing.name} is not installed: {peer.INSTALL}"
else:
    reason = ""
needs_lightly = pytest.mark.skipif(lightly_methods is None, reason=reason)


def config(method: str, **changes: object):
    preset = importlib.import_module(f"methods.{method}.config").PRESETS["quickstart"][1]
    return replace(preset, interpolation="bicubic" if method == "dino" else preset.interpolation, **changes)


def test_both_sides_begin_with_the_same_backbone(tmp_path):
    cfg = config(
        "simclr", limit=64, batch_size=64, out=str(tmp_path), name="run", epochs=1, knn_every=0, eval=False, max_steps=1
    )
    ours = peer.Ours("simclr", cfg)
    ours.epoch(0, 1)
    assert ours.hyperparameters[0][0]["lr"] == 0  # the first step of the warm-up: weights are the initial ones
    trained, spec = peer.load(ours.directory)
    weights = dict(peer.initial_backbone(spec, cfg.seed).named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in trained.named_parameters())


def test_the_package_that_is_missing_is_named(tmp_path, capsys):
    if lightly_methods is not None:
        pytest.skip("lightly is installed")
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: peer.main(peer.Arguments(out=tmp_path / "peer.json")))
    assert stopped.value.code == 2 and peer.INSTALL in capsys.readouterr().err


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(UserError, match="no counterpart of mae"):
        peer.main(peer.Arguments(methods=("mae",)))
    with pytest.raises(UserError, match="--epochs is 0: it must be at least 1"):
        peer.main(peer.Arguments(epochs=0))
    with pytest.raises(UserError, match="measure first"):
        peer.main(peer.Arguments(show=True, out=tmp_path / "none.json"))


def test_readme_has_the_table_of_the_committed_results():
    results = peer.ROOT / peer.Arguments().out
    if not results.exists():
        pytest.skip("not measured yet")
    assert peer.table(json.loads(results.read_text())).strip() in (peer.ROOT / "README.md").read_text()


def our_loss(method: str, cfg, z: list[Tensor], built) -> Tensor:
    """Of two views' outputs [n, D], with targets equal to the predictions."""
    fixed = [x.detach() for x in z]
    match method:
        case "simclr":
            return contrast(*z, cfg)[0]
        case "barlow":
            return cfg.loss_weight * barlow_twins(*z, cfg.lambd)[0]
        case "byol":
            return cfg.loss_weight * byol_loss(*z, *fixed)[0]
        case "simsiam":
            return simsiam(*z, *z)[0]
        case "swav":
            scores = torch.stack([built.prototypes.heads[0](nn.functional.normalize(x, dim=1)) for x in z])
            codes = sinkhorn(scores.detach(), cfg.epsilon, cfg.sinkhorn_iterations)
            return swapped_prediction(scores, codes, cfg.temperature)[0]
        case "dino":
            center = torch.zeros(z[0].shape[1])
            return dino_loss(
                torch.cat(z),
                torch.cat(fixed),
                center,
                student_temperature=cfg.student_temperature,
                teacher_temperature=cfg.teacher_temperature,
            )[0]
    raise AssertionError(method)


class Unchanged(nn.Module):
    """A network that returns its input."""

    def __init__(self):
        super().__init__()
        self.averaged = nn.Parameter(torch.zeros(1))  # something for the moving averages

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)  # under no_grad this has no gradient


NETWORKS = (
    *("backbone", "projection_head", "prediction_head", "backbone_momentum", "projection_head_momentum"),
    *("student_head", "teacher_head", "teacher_backbone"),
)


@needs_lightly
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", peer.METHODS)
def test_losses_have_the_same_gradient(method):
    cfg = config(method)
    torch.manual_seed(0)
    built = lightly_methods.METHODS[method](peer.create_backbone(cfg.resnet_spec()), cfg, 1000)
    for name in NETWORKS:
        if hasattr(built, name):
            setattr(built, name, Unchanged())
    width = {"dino": getattr(cfg, "out_dim", 0), "swav": getattr(cfg, "projector_dim", 0)}.get(method, 48)
    if method == "swav":
        built.prototypes.normalize()
    z = [torch.randn(32, width, requires_grad=True) for _ in range(2)]
    theirs = torch.autograd.grad(built.loss(z, 500, 0).sum(), z)
    ours = torch.autograd.grad(our_loss(method, cfg, z, built), z)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-7)


def colored_noise(n: int, size: int) -> Tensor:
    """uint8 [n, 3, S, S]: a color for each image, and waves of gray whose length in a view is the scale of its crop."""
    draw = torch.Generator().manual_seed(0)
    color, coarse = torch.rand(n, 3, 1, 1, generator=draw), torch.rand(n, 1, 8, 8, generator=draw)
    waves = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return ((color + waves) * 127).to(torch.uint8)


def statistics(view: Tensor, image: Tensor) -> Tensor:
    """[n, 12] of views and their images, [n, 3, S, S] in [0, 1]."""
    chroma, before = (x.mean((2, 3)) - x.mean((1, 2, 3))[:, None] for x in (view, image))
    gray, pixels = view.mean(1), view.flatten(2)
    detail = (gray[..., 1:] - gray[..., :-1]).abs().mean((1, 2))
    columns = [
        *(view.mean((2, 3)), pixels.std(2)),  # brightness and contrast of each channel
        *(pixels.amax((1, 2)), chroma.norm(dim=1) < 0.02),  # solarization, grayscale
        *((chroma * before).sum(1), chroma.norm(dim=1)),  # hue, saturation
        *(detail / gray.flatten(1).std(1), (gray * image.mean(1)).mean((1, 2))),  # size of the crop, flip
    ]
    return torch.cat([column.double().reshape(len(view), -1) for column in columns], 1)


@needs_lightly
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", peer.METHODS)
def test_views_have_the_same_distribution(method):
    cfg = config(method)
    images = colored_noise(4000, cfg.image_size)
    augment = importlib.import_module(f"methods.{method}.augment")
    recipe = (augment.two_views if hasattr(augment, "two_views") else augment.multi_crop)(cfg)
    built = lightly_methods.METHODS[method](peer.create_backbone(cfg.resnet_spec()), cfg, 1000)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
    ours = recipe(images, recipe.sample(len(images), rng.generator("test views")))
    torch.manual_seed(0)
    peer.np.random.seed(0)
    data = peer.PilImages(images, built.transform())
    theirs = [torch.stack(views) for views in zip(*(data[i] for i in range(len(data))), strict=True)]
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        a, b = (statistics(view * std + mean, images / 255) for view in (mine, other))
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 4 * error + 2e-3).all()), (a.mean(0), b.mean(0), error)


@needs_lightly
@pytest.mark.parametrize("method", ("simclr", "swav"))
def test_a_method_is_compared(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    page, out = tmp_path / "page.md", tmp_path / "peer.json"
    page.write_text(f"before\n{peer.BEGIN}\n{peer.END}\nafter\n")
    args = peer.Arguments(methods=(method,), epochs=1, limit=256, out=out, update_readme=str(page))
    peer.main(args)
    (result,) = json.loads(out.read_text())
    assert result["train_images"] == 256 and len(result["epochs_measured"]) == 1
    for side in ("ours", "lightly"):
        protocols = [row["protocol"] for row in result["evaluations"][side]]
        assert protocols == ["knn-20-0.07", "knn-200-0.1", "linear"]
    assert peer.table([result]).strip() in page.read_text()
    capsys.readouterr()
    peer.main(replace(args, show=True, update_readme=""))
    assert peer.table([result]).strip() in capsys.readouterr().out
