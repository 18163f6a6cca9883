"""Recordings: from a spec to a store of waves, and to log-mel features.

`open_audio` makes an `AudioStore`: all recordings as one int16 tensor if they fit into memory, otherwise encoded bytes
that are decoded on demand. WAV and FLAC (and what else libsndfile reads) are decoded by `soundfile`, whose wheel
brings its own library, so no system package is needed. Nothing is resampled: a network's strides are in samples, and a
rate that differs from the wanted one is an error.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.rng import generator
from common.sources import (
    Rows,
    arrow_column,
    content_hash,
    held_out,
    is_encoded,
    is_path,
    listed,
    load_hub,
    load_parquet,
    parquet_files,
    read_labels,
    spread,
)
from common.threads import wait_for, worker_pool
from common.transfer import to_device

TONES = "tones"
OFFLINE = "`--data tones` (synthetic, needs no file) or a directory of parquet files"
_AUDIO_NAMES = ("audio", "speech", "sound", "recording", "wav", "flac")


@dataclass(kw_only=True, eq=False)
class AudioStore:
    """Recordings of one sample rate and various lengths, as 16-bit integers.

    `samples` (int16, all recordings one after the other) is on the store's device, or None where they do not fit into
    memory: then `source` and `rows` say where the encoded bytes are.
    """

    name: str  # "tones", a hub name's or folder's last part: never a path
    fingerprint: str  # hash of the content, equal on every machine
    rate: int  # Hz
    lengths: Tensor  # long [N], in samples, on the CPU
    labels: dict[str, Tensor] = field(default_factory=dict)  # long [N] each; -1 where a recording has none
    samples: Tensor | None = None
    source: Any = None
    rows: Tensor | None = None
    device: torch.device = torch.device("cpu")
    workers: int = 2

    def __post_init__(self):
        self.starts = self.lengths.cumsum(0) - self.lengths  # of each recording in `samples`

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def seconds(self) -> float:
        return int(self.lengths.sum()) / self.rate

    def read(self, i: int) -> Tensor:
        """Recording i, int16 [L] on the CPU. UserError names it when it cannot be decoded."""
        if self.samples is not None:
            return self.samples[self.starts[i] : self.starts[i] + self.lengths[i]].cpu()
        return _decode(self.source, int(self.rows[i]))[0]

    def cut(self, indices: Tensor, starts: Tensor, window: int) -> Tensor:
        """Windows of recordings `indices` [n] from sample `starts` [n] on: float32 [n, window] in [-1, 1).

        Zeros follow where a recording ends inside its window. On the store's device.
        """
        left = (self.lengths[indices] - starts).clamp(max=window)
        if self.samples is None:
            out = torch.zeros(len(indices), window, dtype=torch.int16)
            for row, (i, start, count) in enumerate(zip(indices.tolist(), starts.tolist(), left.tolist(), strict=True)):
                out[row, :count] = self.read(i)[start : start + count]
            return to_device(out.float() / 32768, self.device)
        place = torch.arange(window)
        inside = place < left[:, None]
        where = torch.where(inside, (self.starts[indices] + starts)[:, None] + place, 0)
        return self.samples[to_device(where, self.device)].float().div_(32768).mul_(to_device(inside, self.device))

    def whole(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(float32 [n, longest], lengths [n]) of complete recordings, zero-padded at the end."""
        lengths = self.lengths[indices]
        return self.cut(indices, torch.zeros_like(indices), int(lengths.max())), lengths

    def level(self, sample: int = 1000) -> float:
        """Root mean square of up to `sample` recordings, evenly spaced: one constant to divide the waves by."""
        total = count = 0
        for i in spread(len(self), sample):
            wave = self.read(i).double() / 32768
            total, count = total + float(wave.square().sum()), count + len(wave)
        return max(math.sqrt(total / max(count, 1)), 1e-4)


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_audio(
    spec: str,
    split: str = "train",
    *,
    part: str | None = None,
    sample_rate: int = 0,
    labels: Sequence[str] = (),
    audio_column: str = "",
    limit: int = 0,
    memory_budget: int = 16 << 30,
    device: str | torch.device = "cpu",
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> AudioStore:
    """Open the recordings that `spec` names.

    spec: "tones" (drawn, see `draw_tones`), "org/name" or "org/name:configuration" of the Hugging Face hub, or a
        directory of parquet files as the hub lays them out.
    split: a split of that data. part: None (all of it), or "train" and "test": a tenth, chosen by a fixed seed, is held
        out as test, for data whose labels (speakers, say) are not the same in its splits.
    sample_rate: the rate that all recordings must have, in Hz; 0: that of the first one, for all.
    labels: columns of integers or strings to read. limit: the first so many of a random order with a fixed seed.
    memory_budget: bytes; recordings whose 16-bit samples fit are decoded now, by `workers` threads.
    Channels are averaged. The fingerprint hashes number, lengths, labels and the bytes of up to 1,024 recordings.

    Raises UserError for a path, split, column or rate that does not exist (listing existing ones), no network, and a
    corrupt recording (named by split and row).
    """
    device = torch.device(device)
    if part not in (None, "train", "test"):
        raise ValueError(f"part is None, train or test, not {part!r}")
    if spec == TONES:
        return _open_tones(split, part, sample_rate, tuple(labels), limit, device)
    path = Path(spec).expanduser().resolve() if _is_local(spec) else None
    if path is not None:
        if not path.is_dir():
            raise UserError(f"--data {spec}: there is no such directory; give one with parquet files")
        files = parquet_files(path)
        if not files:
            raise UserError(f"--data {spec}: no parquet files in it; give {OFFLINE}, or org/name on the hub")
        if split not in files:
            raise UserError(f"--data {spec}: no split {split!r}; it has {listed(files)}")
        name, data = path.name, load_parquet(path, files)
    else:
        name, data = spec.split(":")[0].split("/")[-1], {split: _encoded(load_hub(spec, log, split, OFFLINE))}

    features = data[split].features
    column = _find_audio_column(features, spec, audio_column)
    source = Rows(arrow_column(data[split], column), split, spec, path)
    rows = held_out(len(source), part)
    if limit and limit < len(rows):
        rows = rows[torch.randperm(len(rows), generator=generator("limit", len(rows)))[:limit].sort().values]
    if not len(rows):
        raise UserError(f"--data {spec}: split {split!r} has no recordings")
    for wanted in labels:
        if wanted not in features:
            raise UserError(f"--labels {wanted}: {spec} has no such column; it has {listed(features)}")
    read = {name: read_labels(data, split, name)[rows] for name in labels}

    with worker_pool(workers) as pool:
        heads = [pool.submit(_header, source, row) for row in rows.tolist()]
        wait_for(heads)
        found = [head.result() for head in heads]
    lengths = torch.tensor([count for count, _ in found])
    rate = sample_rate or found[0][1]
    for row, (_, other) in zip(rows.tolist(), found, strict=True):
        if other != rate:
            raise UserError(
                f"{source.where(row)} has {other} Hz, not {rate}: nothing is resampled here, because the strides of "
                f"the network are in samples. Resample the files (sox IN -r {rate} OUT), or choose --sample-rate "
                f"{other} and strides for it"
            )
    shown = [bytes(source.encoded(int(rows[i]))) for i in spread(len(rows), 1024)]
    numbers = [lengths.numpy().astype("<i8").tobytes(), *(v.numpy().astype("<i8").tobytes() for v in read.values())]
    store = AudioStore(
        name=name,
        fingerprint=content_hash(str(len(rows)).encode(), *numbers, *shown),
        rate=rate,
        lengths=lengths,
        labels=read,
        source=source,
        rows=rows,
        device=device,
        workers=workers,
    )
    if 2 * int(lengths.sum()) <= memory_budget:
        store.samples = _decode_all(store).to(device)
    return store


def _is_local(spec: str) -> bool:
    try:
        return is_path(spec)
    except UserError:  # a bare word that is neither a folder nor a name known to common.data
        raise UserError(
            f"--data {spec}: no such data; give {OFFLINE}, or org/name of a data set on the Hugging Face hub"
        ) from None


def _encoded(data: Any) -> Any:
    """The data set with its sounds as bytes: torchcodec, which would decode them, needs FFmpeg on the system."""
    import datasets

    for name in [name for name, feature in data.features.items() if isinstance(feature, datasets.Audio)]:
        data = data.cast_column(name, datasets.Audio(decode=False))
    return data


def _find_audio_column(features: Any, spec: str, named: str) -> str:
    import datasets

    arrow = features.arrow_schema
    if named:
        if named not in features:
            raise UserError(f"--audio-column {named}: {spec} has no such column; it has {listed(features)}")
        if not is_encoded(arrow.field(named).type):
            kind = arrow.field(named).type
            raise UserError(f"--audio-column {named}: this column of {spec} holds {kind}, not encoded recordings")
        return named
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    found = found or [f.name for f in arrow if f.name.lower() in _AUDIO_NAMES and is_encoded(f.type)]
    if len(found) != 1:
        what = f"several columns hold recordings ({listed(found)})" if found else "no column holds recordings"
        raise UserError(f"--data {spec}: {what}; its columns are {listed(features)}; name one with --audio-column")
    return found[0]


def _header(source: Rows, row: int) -> tuple[int, int]:
    """(samples, Hz) from the header alone."""
    import soundfile  # loads libsndfile, which `tones` does not need

    try:
        about = soundfile.info(io.BytesIO(source.encoded(row)))
        if about.frames < 1:
            raise ValueError("it has no samples")
        return about.frames, about.samplerate
    except Exception as error:
        raise _corrupt(source, row, error) from error


def _decode(source: Rows, row: int) -> tuple[Tensor, int]:
    """(int16 [L], Hz): 16-bit recordings as they are, others rounded to 16 bits, channels averaged."""
    import soundfile

    try:
        wave, rate = soundfile.read(io.BytesIO(source.encoded(row)), dtype="float32", always_2d=True)
    except Exception as error:
        raise _corrupt(source, row, error) from error
    if not np.isfinite(wave).all():
        raise _corrupt(source, row, ValueError("it holds samples that are not finite"))
    wave = torch.from_numpy(wave).mean(1)
    return (wave * 32768).round_().clamp_(-32768, 32767).to(torch.int16), rate


def _corrupt(source: Rows, row: int, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return UserError(f"corrupt recording, {source.where(row)}: {reason}; replace or remove it")


def _decode_all(store: AudioStore) -> Tensor:
    samples = torch.empty(int(store.lengths.sum()), dtype=torch.int16)

    def work(i: int) -> None:
        wave = _decode(store.source, int(store.rows[i]))[0]
        if len(wave) != store.lengths[i]:
            error = ValueError(f"{len(wave)} of the {int(store.lengths[i])} samples that its header promises")
            raise _corrupt(store.source, int(store.rows[i]), error)
        samples[store.starts[i] : store.starts[i] + len(wave)] = wave

    with worker_pool(store.workers) as pool:
        wait_for(pool.submit(work, i) for i in range(len(store)))
    return samples


# ---- drawn recordings with known factors -----------------------------------------------------------------------------

GLIDES = ("flat", "up", "down", "hill", "valley", "steps up", "steps down", "vibrato")
TIMBRES = 6
_TONES_RATE, _TONES_VERSION = 8000, 1
_TONES_COUNT = {"train": (1200, 0), "test": (240, 1)}  # recordings, seed


def draw_tones(count: int, seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """`count` recordings of 0.35 to 0.7 s at 8 kHz (int16 [L] each), and their factors, long [count] each.

    "glide": how the pitch moves, one of `GLIDES`, within an octave around a base pitch that is random; a short frame
    hears a pitch, not a glide, so this is the factor that needs context. "timbre": the strengths of eight harmonics,
    one of `TIMBRES` fixed voices, heard in every frame. Base pitch (110 to 220 Hz), length, level and noise are random.
    """
    draw = generator("tones", _TONES_VERSION, seed, count)
    voices = torch.rand(TIMBRES, 8, generator=generator("tones voices", _TONES_VERSION), dtype=torch.float64) ** 2
    glide = torch.arange(count) % len(GLIDES)
    timbre = torch.randint(TIMBRES, (count,), generator=draw)
    base, length, level = torch.rand(3, count, generator=draw, dtype=torch.float64)
    waves = []
    for i in range(count):
        n = int(_TONES_RATE * (0.35 + 0.35 * float(length[i])))
        x = torch.linspace(0, 1, n, dtype=torch.float64)
        curve = (
            torch.zeros_like(x),
            x - 0.5,
            0.5 - x,
            0.5 - (2 * x - 1).abs(),
            (2 * x - 1).abs() - 0.5,
            (4 * x).floor().clamp(max=3) / 3 - 0.5,
            0.5 - (4 * x).floor().clamp(max=3) / 3,
            0.25 * torch.sin(12 * math.pi * x),
        )[int(glide[i])]
        pitch = 110 * 2 ** float(base[i]) * 2**curve  # Hz
        phase = 2 * math.pi * pitch.cumsum(0) / _TONES_RATE
        harmonics = torch.arange(1, 9, dtype=torch.float64)
        tone = (voices[timbre[i]][:, None] * torch.sin(harmonics[:, None] * phase)).sum(0)
        envelope = (20 * torch.minimum(x, 1 - x)).clamp(max=1)
        wave = envelope * tone / tone.square().mean().sqrt() * 0.1 * 2 ** float(level[i])
        wave += 0.005 * torch.randn(n, generator=draw, dtype=torch.float64)
        waves.append((wave * 32768).round().clamp(-32768, 32767).to(torch.int16))
    return waves, {"glide": glide, "timbre": timbre}


def _open_tones(split: str, part: str | None, rate: int, wanted: tuple[str, ...], limit: int, device) -> AudioStore:
    if split not in _TONES_COUNT:
        raise UserError(f"--data tones has the splits train and test, not {split!r}")
    if part is not None:
        raise UserError("--data tones has a test split: nothing is held out of train")
    if rate not in (0, _TONES_RATE):
        raise UserError(f"--data tones is synthesized at {_TONES_RATE} Hz, not {rate}")
    count, seed = _TONES_COUNT[split]
    waves, factors = draw_tones(count, seed)
    if missing := [name for name in wanted if name not in factors]:
        raise UserError(f"--labels {missing[0]}: tones has no such column; it has {listed(factors)}")
    count = min(count, limit or count)
    return AudioStore(
        name=TONES,
        fingerprint=content_hash(f"tones version {_TONES_VERSION} seed {seed} n {count}".encode()),
        rate=_TONES_RATE,
        lengths=torch.tensor([len(wave) for wave in waves[:count]]),
        labels={name: factors[name][:count] for name in wanted},
        samples=torch.cat(waves[:count]).to(device),
        device=device,
    )


# ---- log-mel ---------------------------------------------------------------------------------------------------------


def mel_filters(bands: int, bins: int, rate: int) -> Tensor:
    """Triangular filters, evenly spaced on O'Shaughnessy's mel scale from 0 to rate / 2: float32 [bins, bands]."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    up, down = (frequency - low) / (middle - low), (high - frequency) / (high - middle)
    return torch.minimum(up, down).clamp(min=0).float()


def log_mel(
    waves: Tensor, lengths: Tensor, rate: int, *, hop: float = 0.02, window: float = 0.025, bands: int = 40
) -> tuple[Tensor, Tensor]:
    """(features [n, T, bands], frames [n]): log energies in mel bands, Hann window, frames that lie inside only.

    waves: float [n, L], zeros after `lengths` [n]; `hop` and `window` in seconds. A recording shorter than the window
    has one frame.
    """
    step, size = round(hop * rate), round(window * rate)
    waves = torch.nn.functional.pad(waves, (0, size))
    power = torch.stft(
        waves, size, step, window=torch.hann_window(size, device=waves.device), center=False, return_complex=True
    )
    power = power.abs().square().transpose(1, 2)  # [n, T, bins]
    frames = 1 + (lengths - size).clamp(min=0) // step
    features = (power @ mel_filters(bands, size // 2 + 1, rate).to(waves.device)).add(1e-6).log()
    return features[:, : int(frames.max())], frames
