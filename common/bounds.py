"""What the numbers of a config may be: finite and not negative, and for some fields positive or at most 1."""

import dataclasses
import math
from typing import Any

from common.errors import UserError

POSITIVE = frozenset(
    """batch_size epochs steps image_size local_size crop_size window sample_rate log_every save_every keep
    temperature student_temperature teacher_temperature warmup_teacher_temperature epsilon trust_coefficient
    channels layers kernels strides stride stem_width stem_kernel stem_stride hidden hidden_dim bottleneck
    bottleneck_dim out_dim projector projector_dim prototypes head_layers predictor_dim predictor_hidden predictor_depth
    min_keep decoder_depth decoder_dim decoder_heads decoder_width blocks patch mask_patch mask_window copies
    crop_scale crop_area global_crop_scale local_crop_scale local_scale context_scale target_scale target_aspect
    mi_units ndf y_dim n_rkhs n_depth context context_width context_depth prediction_steps negative_count
    num_negatives schedule_scale layer_decay measured patch_std""".split()
)
"""Fields that are above 0, or whose every number is."""
AT_MOST_1 = frozenset(
    """ema_momentum ema_momentum_end center_momentum momentum color_jitter_prob grayscale flip solarize blur
    mask_ratio drop_path crop_scale crop_area global_crop_scale local_crop_scale local_scale context_scale
    target_scale layer_decay p pretrain_share weight_decay weight_decay_end""".split()
)
"""Momenta, probabilities, shares of an area, and weight decays."""
BELOW_1 = frozenset(["betas"])
AT_MOST_1000 = frozenset(
    """layers projector_layers head_layers depth n_depth context_depth decoder_depth predictor_depth copies draws
    prediction_steps local_views blocks masks sinkhorn_iterations""".split()
)
"""What is built or drawn one by one, so that nothing else would stop a number with too many zeros."""
PIXELS = frozenset("image_size local_size crop_size patch patch_size patch_crop mask_patch".split())
MOST = dict.fromkeys(AT_MOST_1, 1) | dict.fromkeys(AT_MOST_1000, 1000) | dict.fromkeys(PIXELS, 8192)
"""The largest value of a field, where there is one of its own."""
LARGEST = 1e30  # float32 holds it
LARGEST_WHOLE = 1 << 53  # JSON and float64 hold it exactly
SEEDS = range(-(1 << 63), 1 << 64)  # what torch.manual_seed takes


def check_numbers(config: Any) -> None:
    """Raise UserError for the first number of a config (`TrainingConfig`) that makes no sense: the flag, the bound."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, list | tuple) else (value,)
        for number in numbers:
            if number == 0 and field.name in config.zero_is_off:
                continue
            if isinstance(number, int | float) and not isinstance(number, bool):
                if wrong := problem(field.name, number):
                    raise UserError(f"--{field.name.replace('_', '-')} is {number}: it must be {wrong}")


def bound_of(name: str, kind: type) -> str:
    """The bounds of a field of ints or floats, as --help shows them."""
    if name == "seed":
        return "64 bits"
    if name in BELOW_1:
        return ">= 0, below 1"
    if name in MOST and kind is float:
        return f"> 0, at most {MOST[name]}" if name in POSITIVE else f"0 to {MOST[name]}"
    if name in MOST:
        return f"{1 if name in POSITIVE else 0} to {MOST[name]}"
    return (">= 1" if kind is int else "> 0") if name in POSITIVE else ">= 0"


def problem(name: str, number: int | float) -> str:
    """The bound that a field's number breaks, in words; empty if none."""
    if name == "seed":
        return "" if number in SEEDS else "a number of 64 bits"
    if not math.isfinite(number):
        return "a finite number"
    if name in POSITIVE and number <= 0:
        return "above 0" if isinstance(number, float) else "at least 1"
    if number < 0:
        return "at least 0"
    if name in BELOW_1:
        return "below 1" if number >= 1 else ""
    most = MOST.get(name, LARGEST_WHOLE if isinstance(number, int) else LARGEST)
    return f"at most {most:g}" if number > most else ""
