"""LARS against a slow loop and the papers' formulas, parameter groups, schedules."""

import math

import pytest
import torch
from torch import nn

from common.optim import LARS, decay_groups, set_lr
from common.schedules import cosine_schedule, scaled_lr


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).double()


def slow_lars(params, grads, buffers, lr, *, decay, trust, momentum, form):
    """One step, one tensor at a time, from the formulas alone."""
    for w, g, v in zip(params, grads, buffers, strict=True):
        if w.ndim > 1:
            u = g + decay * w
            q = trust * w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0
        else:
            u, q = g, 1.0
        if form == "lr-inside":
            v.copy_(momentum * v + lr * q * u)
            w.sub_(v)
        else:
            v.copy_(momentum * v + q * u)
            w.sub_(lr * v)


@pytest.mark.parametrize("form", ["lr-inside", "lr-outside"])
def test_lars_equals_the_slow_loop_over_a_schedule(form):
    ours, theirs = network(), [p.detach().clone() for p in network().parameters()]
    optimizer = LARS(decay_groups(ours, 0.01), lr=0.0, momentum=0.9, momentum_form=form)
    buffers = [torch.zeros_like(p) for p in theirs]
    for step in range(12):
        lr = cosine_schedule(step, base=3.0, total=12, warmup=4)
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        ours(
            torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        ).square().sum().backward()
        grads = [p.grad.clone() for p in ours.parameters()]
        optimizer.step()
        slow_lars(theirs, grads, buffers, lr, decay=0.01, trust=0.001, momentum=0.9, form=form)
    for a, b in zip(ours.parameters(), theirs, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)


def test_momentum_forms_agree_at_constant_rate_and_differ_in_warmup():
    def train(form, rates):
        model = network()
        optimizer = LARS(decay_groups(model, 1e-3), lr=0.0, momentum_form=form)
        for step, lr in enumerate(rates):
            set_lr(optimizer, lr)
            optimizer.zero_grad()
            model(
                torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            ).square().sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    constant = [0.5] * 6
    torch.testing.assert_close(train("lr-inside", constant), train("lr-outside", constant), rtol=1e-10, atol=1e-12)
    rising = [0.1 * i for i in range(6)]
    assert (train("lr-inside", rising) - train("lr-outside", rising)).abs().max() > 1e-4


def test_loss_scale_moves_only_excluded_tensors():
    """With weight decay 0, a loss times 10 changes norms and biases only."""

    def one_step(scale):
        model = network()
        optimizer = LARS(decay_groups(model, 0.0), lr=1.0)
        (scale * model(torch.ones(4, 3, 8, 8).double() + torch.arange(4).view(4, 1, 1, 1)).square().mean()).backward()
        optimizer.step()
        return dict(model.named_parameters())

    one, ten = one_step(1), one_step(10)
    for name, value in one.items():
        assert torch.allclose(value, ten[name], rtol=1e-12) == (value.ndim > 1), name


def test_zero_norms_take_a_plain_step():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))


def test_lars_state_survives_a_checkpoint():
    model, other = network(), network()
    first, second = LARS(decay_groups(model, 0.1), lr=0.2), LARS(decay_groups(other, 0.1), lr=0.9)
    model(torch.ones(4, 3, 8, 8).double()).sum().backward()
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.2
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first.state[a]["momentum"], second.state[b]["momentum"])


def test_groups_list_every_tensor_once():
    model = network()
    model[1].bias.requires_grad_(False)
    decayed, plain = decay_groups(model, 0.1)
    assert decayed["names"] == ["0.weight", "3.weight"] and decayed["adapt"] and decayed["weight_decay"] == 0.1
    assert plain["names"] == ["1.weight", "3.bias"] and not plain["adapt"] and plain["weight_decay"] == 0
    with pytest.raises(ValueError, match="lr-inside or lr-outside"):
        LARS(model.parameters(), lr=1, momentum_form="nesterov")


def test_schedules_at_the_points_of_the_reference():
    simclr = dict(base=4.8, total=31_200, warmup=3_120)  # 100 epochs of 312 steps
    assert cosine_schedule(0, **simclr) == 0
    assert cosine_schedule(3119, **simclr) == pytest.approx(4.8 * 3119 / 3120)
    assert cosine_schedule(3120, **simclr) == 4.8
    assert cosine_schedule(17_160, **simclr) == pytest.approx(2.4)
    assert 0 < cosine_schedule(31_199, **simclr) < 1e-7
    swav = dict(base=4.8, total=1000, warmup=100, start=0.3, final=0.0048, endpoint=True)  # numpy.linspace
    assert cosine_schedule(0, **swav) == 0.3
    assert cosine_schedule(99, **swav) == pytest.approx(4.8) and cosine_schedule(100, **swav) == 4.8
    assert cosine_schedule(999, **swav) == pytest.approx(0.0048, abs=1e-4)
    ema = [
        1 - (1 - 0.996) * (math.cos(math.pi * k / 10) + 1) / 2 for k in range(10)
    ]  # BYOL's momentum is the same curve
    assert [cosine_schedule(k, base=0.996, final=1.0, total=10) for k in range(10)] == pytest.approx(ema)


def test_learning_rate_rules_meet_at_4096():
    assert scaled_lr(0.3, 4096, "linear") == pytest.approx(4.8)
    assert scaled_lr(0.075, 4096, "sqrt") == pytest.approx(4.8)
    assert scaled_lr(1.0, 512, "linear") == 2.0 and scaled_lr(0.1, 512, "none") == 0.1
    with pytest.raises(ValueError, match="linear, sqrt or none"):
        scaled_lr(1, 2, "cubic")
