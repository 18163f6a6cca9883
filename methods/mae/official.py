"""The layout of the official code (facebookresearch/mae): names of encoder and decoder there and here.

There the encoder's keys are timm's, and the decoder's are mask_token, decoder_pos_embed, decoder_embed.*,
decoder_blocks.*, decoder_norm.* and decoder_pred.*. timm's `vit_*.mae` are the encoder alone.
"""

from torch import Tensor

from .model import MAE

DECODER = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed.": "decoder_embed.",
    "blocks.": "decoder_blocks.",
    "norm.": "decoder_norm.",
    "predict.": "decoder_pred.",
}


def decoder_tensors(model: MAE) -> dict[str, Tensor]:
    """The decoder's parameters and positions by their official names, each the model's own memory."""
    found = {}
    for name, tensor in model.decoder.state_dict().items():
        start = next(start for start in DECODER if name.startswith(start))
        found[DECODER[start] + name.removeprefix(start)] = tensor
    return found


def official_state(model: MAE) -> dict[str, Tensor]:
    """The model's state dict under the official names, as the value of "model" in the official files."""
    return {**model.backbone.state_dict(), **decoder_tensors(model)}
