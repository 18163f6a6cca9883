"""SyncBatchNorm against one process's BatchNorm and against torch's own; no wait for the device; one compiled
graph; features that processes share."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from common import distributed
from common.data import ImageStore
from common.distributed import SyncBatchNorm, all_gather, rank, sync_batchnorm, world_size
from common.errors import UserError
from eval.features import extract_features
from tests.processes import run_ranks

NORMS = {
    "1d": lambda: nn.BatchNorm1d(6),
    "2d": lambda: nn.BatchNorm2d(6),
    "without affine": lambda: nn.BatchNorm1d(6, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "with activation": lambda: BatchNormAct2d(6, act_layer=nn.SiLU, inplace=False),
}


def norm_of(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    norm = NORMS[kind]().to(dtype).train()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def rows_of(norm: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of 12 inputs with large means and small variances, and of the weights of their outputs."""
    shape = (12, 6) if isinstance(norm, nn.BatchNorm1d) else (12, 6, 5, 4)
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = 0.3 * x + torch.arange(6.0).view(6, *[1] * (x.ndim - 2))
    own = slice(rank() * 12 // world_size(), (rank() + 1) * 12 // world_size())
    return x[own].to(dtype), weights[own].to(dtype)


def two_steps(kind: str, dtype: torch.dtype, channels_last: bool = False) -> dict[str, torch.Tensor]:
    """Outputs and gradients of all rows, gradients of the parameters, and the state after two passes."""
    norm = norm_of(kind, dtype)
    x, weights = rows_of(norm, dtype)
    norm = sync_batchnorm(norm)
    assert isinstance(norm, SyncBatchNorm) == (world_size() > 1)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    for factor in (1, 2):
        y = norm(factor * x)
        (y.square() * weights).sum().backward()
    grads = {name: p.grad for name, p in norm.named_parameters()}
    if world_size() > 1:
        for grad in grads.values():
            dist.all_reduce(grad)
    state = {name: value for name, value in norm.state_dict().items() if name not in grads}
    evaluated = {"eval": all_gather(norm.eval()(x).detach())} if state else {}
    return {"y": all_gather(y.detach()), "x": all_gather(x.grad)} | grads | state | evaluated


def every_kind(dtype: torch.dtype) -> dict[tuple[str, bool], dict[str, torch.Tensor]]:
    return {(kind, last): two_steps(kind, dtype, last) for kind in NORMS for last in (False, "2d" in kind)}


def test_sync_batchnorm_equals_batchnorm_of_all_rows():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        one = every_kind(dtype)
        for many in run_ranks(every_kind, 3, dtype):
            for case, expected in one.items():
                assert many[case].keys() == expected.keys()
                for name, value in expected.items():
                    worst = (many[case][name] - value).abs().max()
                    assert worst <= tolerance * value.abs().max(), (case, name, dtype)


def in_bfloat16(sync: bool) -> list[torch.Tensor]:
    norm = norm_of("2d", torch.float32)
    x, weights = rows_of(norm, torch.float32)
    if sync:
        norm = sync_batchnorm(norm)
    x = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    (y.float() * weights).sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32
    return [all_gather(v.detach().float()) for v in (y, x.grad)] + [norm.running_mean, norm.running_var]


def test_statistics_of_bfloat16_are_float32():
    """As accurate as torch's BatchNorm, which keeps float32 statistics: bfloat16 ones are off by a hundredth."""
    one = in_bfloat16(False)
    for many in run_ranks(in_bfloat16, 2, True):
        for ours, theirs, tolerance in zip(many, one, (8e-3, 8e-3, 1e-6, 1e-5), strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# ---- torch's own -----------------------------------------------------------------------------------------------------

KERNELS = [name for name in vars(distributed._PlainKernels) if name.startswith("batch_norm")]


class Waits(AssertionError):
    pass


class NoWait(TorchDispatchMode):
    """Refuses operations whose result's size or value the host has to know."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise Waits(function)
        if function.overloadpacket.__name__ == "index" and any(i.dtype == torch.bool for i in args[1]):
            raise Waits(function)
        return function(*args, **(kwargs or {}))


def with_torchs_kernels() -> list[dict[str, torch.Tensor]]:
    """Outputs, gradients and buffers of torch's function and of ours, which both call torch's operators.

    The operators have no CPU kernels: here these are the plain ones.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in KERNELS:
        library.impl(name, getattr(distributed._PlainKernels, name), "CPU")
    found = []
    for function in (torchs_function, ours_on_a_gpu):
        norm = norm_of("2d", torch.float32)
        x, weights = rows_of(norm, torch.float32)
        x.requires_grad_()
        if function is torchs_function:
            with pytest.raises(Waits), NoWait():
                function(norm_of("2d", torch.float32), x)
        with NoWait() if function is ours_on_a_gpu else nullcontext():
            y = function(norm, x)
        (y.square() * weights).sum().backward()
        found.append({"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in norm.named_parameters()}})
        found[-1] |= {"mean": norm.running_mean, "var": norm.running_var}
    return found


def torchs_function(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    buffers = norm.running_mean, norm.running_var
    return TorchSyncBatchNorm.apply(x, norm.weight, norm.bias, *buffers, norm.eps, 0.1, dist.group.WORLD, world_size())


def ours_on_a_gpu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    distributed._PlainKernels = torch
    return sync_batchnorm(norm)(x)


def test_sync_batchnorm_equals_torchs_to_the_bit():
    for theirs, ours in run_ranks(with_torchs_kernels, 2):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_or_not(compiled: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), NORMS["2d"](), nn.ReLU(), nn.Flatten(), nn.Linear(96, 6), NORMS["1d"]())
    network = sync_batchnorm(network)
    if compiled:
        network.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(rank()))
    for _ in range(2):
        network(x).square().mul(torch.arange(6.0)).sum().backward()
    return [p.grad for p in network.parameters()] + list(network.buffers())


def test_sync_batchnorm_compiles_to_one_graph():
    for ours, eager in zip(run_ranks(compiled_or_not, 2, True), run_ranks(compiled_or_not, 2, False), strict=True):
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other)


# ---- features that processes share -----------------------------------------------------------------------------------


def store_of(images: int, broken: int = -1) -> ImageStore:
    pixels = torch.randint(256, (images, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    if broken >= 0:
        pixels[broken] = 0
    return ImageStore(images=pixels, name="noise", fingerprint="")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7))


def features(images: int, shared: bool) -> torch.Tensor:
    """In batches of 8 images; the other processes' networks have other BatchNorm statistics."""
    module = network()
    module[1].running_mean += rank()
    before = module[1].running_mean.clone()
    store = store_of(images)
    found = extract_features(module, store, image_size=8, mean=(0.5,) * 3, std=(1,) * 3, batch_size=8, shared=shared)
    assert torch.equal(module[1].running_mean, before)
    return found


@pytest.mark.parametrize("images", [61, 16, 5])
def test_shared_features_are_those_of_one_process(images):
    first, *others = run_ranks(features, 3, images, True)
    assert torch.equal(first, features(images, False)) and first.shape == (images, 7)
    assert all(other.numel() == 0 for other in others)


class Diverged(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) / (images.flatten(1).sum(1, keepdim=True) != 0)


def features_that_are_not_finite() -> str:
    """Of one image, the last of the first process."""
    with pytest.raises(UserError) as error:
        store = store_of(20, broken=3)
        extract_features(Diverged(), store, image_size=8, mean=(0,) * 3, std=(1,) * 3, batch_size=4, shared=True)
    return str(error.value)


def test_every_process_hears_of_features_that_are_not_finite():
    assert all("1 of 20 images are not finite" in text for text in run_ranks(features_that_are_not_finite, 2))
