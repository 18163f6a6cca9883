"""CPC's audio network: strided convolutions on the raw wave, a GRU over their frames, one matrix a step ahead.

Legend (the paper's): z_t latent frame, c_t context, W_k the predictor of frame t + k. B recordings of L samples, T
frames, D = channels, C = context, K = steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.transfer import to_device


class FrameNorm(nn.LayerNorm):
    """Each frame's channels to mean 0, variance 1, then scale and shift: [B, T, D] -> [B, T, D].

    Over a single frame (CPC_audio's ChannelNorm). A GroupNorm would take its statistics over time as well, which leaks
    the future into every frame.
    """


class BatchNorm(nn.Module):
    """Over all frames of the global batch, padding included: [B, T, D] -> [B, T, D]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


NORMS = {"none": lambda channels: nn.Identity(), "channel": FrameNorm, "batch": BatchNorm}


class AudioEncoder(nn.Module):
    """g_enc and g_ar: waves -> frames z_t and their contexts c_t.

    Kernels, strides and paddings are in samples of the layer below. Waves are divided by `level` (a constant of the
    training set) before the first layer. The GRU starts every recording from zero.
    """

    def __init__(
        self,
        channels: int = 512,
        context: int = 256,
        kernels: Sequence[int] = (10, 8, 4, 4, 4),
        strides: Sequence[int] = (5, 4, 2, 2, 2),
        paddings: Sequence[int] = (3, 2, 1, 1, 1),
        norm: str = "none",
        sample_rate: int = 16000,
        level: float = 1.0,
    ):
        super().__init__()
        if not len(kernels) == len(strides) == len(paddings) > 0:
            raise UserError(
                f"{len(kernels)} --kernels, {len(strides)} --strides and {len(paddings)} --paddings: one each a layer"
            )
        if norm not in NORMS:
            raise UserError(f"unknown norm {norm!r}: choose {', '.join(NORMS)}")
        self.geometry = tuple(zip(kernels, strides, paddings, strict=True))
        self.sample_rate, self.level, self.channels, self.num_features = sample_rate, level, channels, context
        widths = [1] + [channels] * len(kernels)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, k, stride=s, padding=p, bias=norm != "batch")
            for a, b, (k, s, p) in zip(widths, widths[1:], self.geometry, strict=False)
        )
        self.norms = nn.ModuleList(NORMS[norm](channels) for _ in kernels)
        self.gru = nn.GRU(channels, context, batch_first=True)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        product = 1
        for _, stride, _ in self.geometry:
            product *= stride
        return product

    @property
    def receptive_field(self) -> tuple[int, int]:
        """(first sample, length) of what z_0 sees; the first is negative by the padding. z_t: `hop` * t later."""
        first, size, jump = 0, 1, 1
        for kernel, stride, padding in self.geometry:
            first, size = first - padding * jump, size + (kernel - 1) * jump
            jump *= stride
        return first, size

    def frames(self, lengths: Tensor) -> Tensor:
        """Frames of recordings of `lengths` samples, long, any shape: what the layers make of each alone."""
        for kernel, stride, padding in self.geometry:
            lengths = ((lengths + 2 * padding - kernel) // stride + 1).clamp(min=0)
        return lengths

    def latents(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """[B, L], lengths [B] -> z [B, T, D]. Frames after a recording's end are zero, and none before them knows how
        far the batch was padded: between layers, everything beyond the end is zero as in the recording alone."""
        x, lengths = waves[..., None] / self.level, to_device(lengths, waves.device)  # [B, L, 1]
        for conv, norm, (kernel, stride, padding) in zip(self.convolutions, self.norms, self.geometry, strict=True):
            x = norm(_convolve(conv, x))  # [B, T, D]: channels last, one pass for a frame's norm
            lengths = ((lengths + 2 * padding - kernel) // stride + 1).clamp(min=0)
            beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            x = x.masked_fill(beyond[..., None], 0).relu_()
        return x

    def encode(self, waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """waves [B, L] in [-1, 1), zeros after `lengths` [B] -> (z [B, T, D], c [B, T, C], frames [B]).

        c_t depends on z_0 .. z_t alone; frames from `frames[b]` on are padding and mean nothing.
        """
        if lengths is None:
            lengths = torch.full((len(waves),), waves.shape[1])
        z = self.latents(waves, lengths)
        return z, self.gru(z)[0], self.frames(lengths)

    def forward(self, waves: Tensor) -> Tensor:
        """[B, 1, L] -> [B, num_features]: the mean of c_t over time. `encode` has the frames."""
        if waves.ndim != 3 or waves.shape[1] != 1:
            raise UserError(
                f"this encoder hears sound, waves [B, 1, L] at {self.sample_rate} Hz, not images {list(waves.shape)}: "
                "python -m eval is for images; train_audio evaluates this network itself"
            )
        return self.encode(waves[:, 0])[1].mean(1)


def _convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """`conv` of x [B, L, C] -> [B, T, D]. As a 2-D convolution of one row, which on CPUs has a kernel for channels that
    lie side by side (twice as fast); the wave's single channel is a matrix product of its windows."""
    stride, padding = conv.stride[0], conv.padding[0]
    if conv.in_channels == 1:
        windows = nn.functional.pad(x[..., 0], (padding, padding)).unfold(1, conv.kernel_size[0], stride)
        return nn.functional.linear(windows, conv.weight[:, 0], conv.bias)
    rows = x.transpose(1, 2)[:, :, None]  # [B, C, 1, L], the memory of [B, L, C]
    options = dict(stride=(1, stride), padding=(0, padding))
    return nn.functional.conv2d(rows, conv.weight[:, :, None], conv.bias, **options)[:, :, 0].transpose(1, 2)


def encode(encoder: AudioEncoder, wave: Tensor, sample_rate: int) -> Tensor:
    """c [T, C] of one recording [L] in [-1, 1): what to build on. Raises UserError for another sample rate."""
    if sample_rate != encoder.sample_rate:
        raise UserError(
            f"the encoder was trained at {encoder.sample_rate} Hz: resample the recording, not {sample_rate}"
        )
    with torch.no_grad():
        return encoder.encode(wave[None])[1][0]


class CPC(nn.Module):
    """Encoder and the W_k: waves [B, L], lengths [B] -> (z [B, T, D], c [B, T, C], W_k c_t [B, T, K, D])."""

    def __init__(self, encoder: AudioEncoder, steps: int):
        super().__init__()
        self.encoder, self.steps = encoder, steps
        self.predictors = nn.Linear(encoder.num_features, steps * encoder.channels, bias=False)  # W_1, W_2, ... stacked

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, c, _ = self.encoder.encode(waves, lengths)
        return z, c, self.predictors(c).unflatten(2, (self.steps, -1))
