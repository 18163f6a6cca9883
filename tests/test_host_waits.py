"""A training step never waits for a GPU. Without one, torch's "meta" device takes its place.

Meta tensors have no values: whatever asks for one fails, as do results whose size depends on values. What copies from
the host without `non_blocking`, as torch.tensor(..., device=...) does, is found by watching.
"""

import importlib
import pkgutil
from dataclasses import replace
from functools import wraps

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

import common.run
import methods

METHODS = sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.ispkg)
TRAIN = {method: importlib.import_module(f"methods.{method}.train") for method in METHODS}
META = torch.device("meta")
# Besides `smoke` as it is: whatever else a step can do.
VARIANTS = {
    "amdim": [{"online_probes": True}],
    "autoencoder": [{"variant": "denoising"}, {"variant": "masked", "loss_on": "masked"}],
    "barlow": [{"optimizer": "larc"}],
    "cpc": [
        {"negatives": "all", "directions": 4},
        {"context": "gru", "context_depth": 1, "patch_brightness": 0.1, "patch_contrast": 0.1},
    ],
    "cpc_audio": [{"negatives": "same-speaker", "complete_anchors": True, "norm": "batch"}],
    "dim": [{"estimator": "dv", "grayscale": True, "alpha": 0.5}, {"estimator": "infonce", "contrast": True}],
    "dino": [{"centering": "sinkhorn"}],
    "dropout_ssl": [{"arm": arm} for arm in ("A1s", "A2", "A3", "A4", "A5", "A5r", "A7", "A8")],
    "ijepa": [{"loss": "l2"}],
    "mae": [{"masking": masking} for masking in ("block", "grid", "window")],
    "moco": [{"bn_groups": 0, "symmetric": True}],
    "simclr": [{"micro_batch": 16, "norm": "group"}],
    "swav": [{"queue_start": 0, "queue_length": 64}],
}


class Waits(Exception):
    pass


class Trained(Exception):
    pass


class NoWait(TorchDispatchMode):
    """Refuses copies to the device for which the host waits, once `refuses`."""

    refuses = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if not self.refuses:
            pass
        elif name == "_to_copy" and kwargs.get("device", args[0].device) == META != args[0].device:
            if not kwargs.get("non_blocking"):
                raise Waits(f"a copy of {tuple(args[0].shape)} to the device waits for it")
        elif name == "copy_" and args[0].device == META != args[1].device:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                raise Waits(f"a copy of {tuple(args[1].shape)} into a tensor of the device waits for it")
        if "generator" in kwargs and kwargs.get("device") == META:
            kwargs["generator"] = None
        return function(*args, **kwargs)


def refuse_on_device(make):
    @wraps(make)
    def checked(*args, **kwargs):
        made = make(*args, **kwargs)
        given = args[-1] if make is torch.Tensor.new_tensor else args[0]
        if NoWait.refuses and made.device == META and not (isinstance(given, torch.Tensor) and given.device == META):
            raise Waits(f"{make.__name__} copies a constant to the device and waits for it")
        return made

    return checked


@pytest.fixture
def device_without_values(monkeypatch):
    """The device of whatever is trained now is "meta"."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    AcceleratorState._reset_state(reset_partial_state=True)
    autocast, generator = torch.autocast, torch.Generator
    monkeypatch.setattr(torch, "autocast", lambda kind, **kw: autocast("cpu" if kind == "meta" else kind, **kw))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    for holder, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(holder, name, refuse_on_device(getattr(holder, name)))

    def three_steps(run):
        for step in range(3):
            monkeypatch.setattr(NoWait, "refuses", step > 0)  # the first fills caches of constants
            with NoWait():
                yield step
        raise Trained

    monkeypatch.setattr("methods.dropout_ssl.measure.Measure.__call__", lambda measure, epoch: {})  # between steps
    monkeypatch.setattr("methods.cpc_audio.audio.AudioStore.level", lambda store: 1.0)  # read once, before the steps
    monkeypatch.setattr(common.run.Run, "steps", three_steps)
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("method", "changes"), [(m, c) for m in METHODS for c in ({}, *VARIANTS.get(m, ()))], ids=str)
def test_a_step_does_not_wait_for_the_device(method, changes, device_without_values, tmp_path):
    train = TRAIN[method]
    cfg = replace(train.PRESETS["smoke"][1], out=str(tmp_path), eval=False, **changes)
    with pytest.raises(Trained):
        train.main("smoke", cfg)
