"""Weights in the layout of the official code (facebookresearch/mae), encoder alone or with decoder, both ways.

There the encoder's keys are timm's, and the decoder's are mask_token, decoder_pos_embed, decoder_embed.*,
decoder_blocks.*, decoder_norm.* and decoder_pred.*. timm's `vit_*.mae` are the encoder alone.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError

from .model import MAE

DECODER = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed.": "decoder_embed.",
    "blocks.": "decoder_blocks.",
    "norm.": "decoder_norm.",
    "predict.": "decoder_pred.",
}


def _official_name(name: str) -> str:
    if name.startswith("backbone."):
        return name.removeprefix("backbone.")
    part = name.removeprefix("decoder.")
    start = next(start for start in DECODER if part.startswith(start))
    return DECODER[start] + part.removeprefix(start)


def official_state(model: MAE) -> dict[str, Tensor]:
    """The model's state dict under the official names, as the value of "model" in the official files."""
    return {_official_name(name): value for name, value in model.state_dict().items()}


def load_official(model: MAE, state: Mapping[str, Tensor], source: str = "the checkpoint") -> bool:
    """Copy official weights into `model`; returns whether they held a decoder (without one, ours stays as it is).

    Raises UserError that names missing and unknown keys and differing shapes; the model is then unchanged.
    """
    ours = {_official_name(name): name for name in model.state_dict()}
    with_decoder = any(name.startswith(tuple(DECODER.values())) for name in state)
    if not with_decoder:
        ours = {theirs: name for theirs, name in ours.items() if name.startswith("backbone.")}
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in ours if name not in state]
    wrong += [f"{name} is not in the network" for name in state if name not in ours]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, the network has {tuple(own[ours[name]].shape)}"
        for name in ours
        if name in state and state[name].shape != own[ours[name]].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(
            f"{source} is of another architecture: {'; '.join(wrong[:6])}{more}. Set --backbone, --patch-size, "
            "--image-size and the --decoder options as it was trained."
        )
    model.load_state_dict({**own, **{name: state[theirs] for theirs, name in ours.items()}})
    return with_decoder


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a .pth file of the official code (weights, or a dict with "model").

    Nothing but tensors, numbers and an argparse.Namespace is unpickled. Raises UserError for a file that is missing,
    broken, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--init {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official files carry their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"--init {path} cannot be read as weights ({reason})") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f'--init {path} holds no weights: expected tensors by name, or a dict with them under "model"')
    return state
