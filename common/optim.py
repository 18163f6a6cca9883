"""LARS, LARC and parameter groups. AdamW and SGD come from torch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Tensors = tuple[Tensor, ...] | list[Tensor]  # what torch's _foreach functions take and return


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters: matrices and kernels with `weight_decay`, vectors (ndim <= 1) without.

    Biases and the scales and shifts of norms are 1-D; LARS leaves that group alone (`adapt` False). Each group keeps
    the parameters' `names`, so that a test or a reader can list what is decayed.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups: list[dict] = [
        {"names": [n for n, p in named if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"names": [n for n, p in named if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    params = dict(named)
    return [{**g, "params": [params[n] for n in g["names"]]} for g in groups if g["names"]]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as the self-supervised papers use it.

    Per tensor w with gradient g: u = g + weight_decay * w; q = trust_coefficient * |w| / |u| if both norms are
    positive, else 1.
    Groups with `adapt` False use u unchanged (q = 1); `decay_groups` puts biases and norms there.

    momentum_form "lr-inside" (SimCLR's TensorFlow code): v = m v + lr q u, w = w - v.
    momentum_form "lr-outside" (torch's form; BYOL, Barlow Twins, MoCo-v3): v = m v + q u, w = w - lr v.
    Equal under a constant rate; with warm-up the first carries older rates inside its buffer, so a checkpoint of one
    is not a checkpoint of the other. No epsilon, no clipping, no Nesterov. Norms are taken of whole tensors in float32
    at least; gradients must be unscaled (GradScaler.step does it).
    Source: google-research/simclr lars_optimizer.py; facebookresearch/barlowtwins main.py.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        momentum_form: str = "lr-inside",
    ):
        if momentum_form not in ("lr-inside", "lr-outside"):
            raise ValueError(f"unknown momentum_form {momentum_form!r}: lr-inside or lr-outside")
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            adapt=True,
            momentum_form=momentum_form,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch: overloads
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in params]
            update = self._update(group, params, [p.grad for p in params])
            torch._foreach_mul_(velocity, group["momentum"])
            if group["momentum_form"] == "lr-inside":
                torch._foreach_add_(velocity, update, alpha=group["lr"])
                torch._foreach_sub_(params, velocity)
            else:
                torch._foreach_add_(velocity, update)
                torch._foreach_add_(params, velocity, alpha=-group["lr"])
        return loss

    def _update(self, group: dict, params: Tensors, update: Tensors) -> Tensors:
        """q u of each tensor, from the gradients."""
        if group["weight_decay"]:
            update = torch._foreach_add(update, params, alpha=group["weight_decay"])
        if group["adapt"]:
            w_norm = torch.stack(torch._foreach_norm(params))
            u_norm = torch.stack(torch._foreach_norm(update))
            # One small tensor op for all layers: no host sync, no branch per tensor.
            ratio = torch.where((w_norm > 0) & (u_norm > 0), group["trust_coefficient"] * w_norm / u_norm, 1.0)
            update = torch._foreach_mul(update, list(ratio.unbind()))
        return update


class LARC(LARS):
    """NVIDIA apex's relative of LARS, around torch's SGD: SwAV's optimizer, for every tensor, norms and biases too.

    Per tensor w with gradient g: q = trust_coefficient * |w| / (|g| + weight_decay * |w| + 1e-8), the sum of two norms
    where LARS has the norm of the sum; v = m v + q (g + weight_decay * w); w = w - lr v. Where w or g is
    zero the gradient is used unchanged, without decay: a bias that starts at zero first makes a plain SGD step.
    clip: q <- min(q / lr, 1), so that a tensor's rate is the smaller of q and lr; SwAV leaves it off.
    Groups with `adapt` False take plain SGD with their weight decay. Defaults are SwAV's; apex's are trust 0.02, clip.
    Source: the formula of apex/parallel/LARC.py, as SwAV's main_swav.py calls it.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        clip: bool = False,
    ):
        self.clip = clip
        super().__init__(
            params,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            momentum_form="lr-outside",
        )

    def _update(self, group: dict, params: Tensors, update: Tensors) -> Tensors:
        decay = group["weight_decay"]
        if not group["adapt"]:
            return torch._foreach_add(update, params, alpha=decay) if decay else update
        w_norm, g_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(update))
        ratio = group["trust_coefficient"] * w_norm / (g_norm + decay * w_norm + 1e-8)
        if self.clip:
            ratio = (ratio / group["lr"]).clamp(max=1) if group["lr"] else torch.ones_like(ratio)
        both = (w_norm > 0) & (g_norm > 0)
        if decay:
            decays = both.to(ratio.dtype) * decay
            update = torch._foreach_add(update, torch._foreach_mul(params, list(decays.unbind())))
        return torch._foreach_mul(update, list(torch.where(both, ratio, 1.0).unbind()))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all groups, times each group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_optimizer(
    name: str, groups: list[dict], *, momentum: float, lars_form: str = "lr-outside"
) -> torch.optim.Optimizer:
    """The optimizer of that name at rate 0; `set_lr` sets the rate before every step.

    "lars" (`momentum_form` as in `LARS`), "larc" (apex's defaults: trust coefficient 0.02, clipped), "sgd", "adamw"
    (which ignores `momentum`). Raises ValueError for another name.
    """
    match name:
        case "lars":
            return LARS(groups, lr=0.0, momentum=momentum, momentum_form=lars_form)
        case "larc":
            return LARC(groups, lr=0.0, momentum=momentum, trust_coefficient=0.02, clip=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0)
    raise ValueError(f"unknown optimizer {name!r}: lars, larc, sgd or adamw")
