"""Recordings: decoding, splits, windows and log-mel, against slow versions; every error message."""

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from common.errors import UserError
from eval.linear import linear_probe
from methods.cpc_audio.audio import GLIDES, TIMBRES, AudioStore, draw_tones, log_mel, mel_filters, open_audio
from methods.cpc_audio.augment import WindowLoader

FSDD = Path(__file__).parents[2] / "shared" / "data" / "fsdd"
quiet = dict(log=lambda text: None)


def encoded(wave: np.ndarray, rate: int = 8000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def noise(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**15), 2**15, length).astype(np.int16)


def write(folder: Path, blobs: list[bytes], split: str = "train", **columns) -> Path:
    folder.mkdir(exist_ok=True)
    sound = [{"bytes": blob, "path": f"{i}.wav"} for i, blob in enumerate(blobs)]
    pq.write_table(pa.table({"audio": sound, **columns}), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture()
def folder(tmp_path):
    blobs = [encoded(noise(100 + 40 * i, i), kind="FLAC" if i % 2 else "WAV") for i in range(30)]
    who = ["ann", "bob", "eve"] * 10
    write(tmp_path / "words", blobs, digit=list(range(30)), who=who)
    return write(tmp_path / "words", blobs[:4], "test", digit=[3, 1, 4, 1], who=["eve", "bob", "ann", "ann"])


def test_wav_and_flac_come_back_bit_for_bit(folder):
    train = open_audio(str(folder), labels=("digit", "who"), **quiet)
    assert (train.name, train.rate, len(train)) == ("words", 8000, 30)
    assert train.lengths.tolist() == [100 + 40 * i for i in range(30)]
    for i in range(30):
        assert torch.equal(train.read(i), torch.from_numpy(noise(100 + 40 * i, i)))
    assert train.labels["digit"].tolist() == list(range(30)) and train.labels["who"].tolist() == [0, 1, 2] * 10
    test = open_audio(str(folder), "test", labels=("who",), **quiet)
    assert test.labels["who"].tolist() == [2, 1, 0, 0]  # strings are numbered alike in both splits
    assert train.seconds == sum(100 + 40 * i for i in range(30)) / 8000
    every = np.concatenate([noise(100 + 40 * i, i) for i in range(30)]).astype(np.float64) / 32768
    assert train.level() == pytest.approx(math.sqrt((every**2).mean()))


def test_other_encodings_are_rounded_and_averaged(tmp_path):
    stereo = np.stack([noise(64, 1), noise(64, 2)], 1)
    real = np.array([0.5, -0.25, 1.5, -1.5, 1e-5])
    folder = write(tmp_path / "w", [encoded(stereo), encoded(real, subtype="FLOAT"), encoded(noise(9, 3) // 2)])
    store = open_audio(str(folder), **quiet)
    mean = torch.from_numpy(stereo.astype(np.float64)).mean(1)
    assert (store.read(0).double() - mean).abs().max() <= 0.5
    assert store.read(1).tolist() == [16384, -8192, 32767, -32768, 0]


def test_streamed_equals_resident(folder):
    resident = open_audio(str(folder), **quiet)
    streamed = open_audio(str(folder), memory_budget=0, **quiet)
    assert resident.samples is not None and streamed.samples is None
    assert resident.fingerprint == streamed.fingerprint
    indices, starts = torch.tensor([3, 29, 0, 7]), torch.tensor([5, 900, 0, 300])
    waves = resident.cut(indices, starts, 200)
    assert torch.equal(waves, streamed.cut(indices, starts, 200))
    for row, (i, start) in enumerate(zip(indices.tolist(), starts.tolist(), strict=True)):
        piece = noise(100 + 40 * i, i)[start : start + 200] / 32768
        expected = np.concatenate([piece, np.zeros(200 - len(piece))])
        np.testing.assert_array_equal(waves[row].numpy(), expected.astype(np.float32))
    whole, lengths = resident.whole(torch.tensor([4, 2]))
    assert whole.shape == (2, 260) and lengths.tolist() == [260, 180] and not whole[1, 180:].any()
    options = dict(window=150, batch_size=8, seed=1)
    ours, theirs = WindowLoader(streamed, **options), WindowLoader(resident, **options)
    for step in (0, 1, 5, 2):  # a jump drops what was prepared
        assert torch.equal(ours(step).waves, theirs(step).waves)
    ours.close()


def test_held_out_tenth_and_limit(folder):
    parts = {part: open_audio(str(folder), part=part, labels=("digit",), **quiet) for part in ("train", "test")}
    train, test = (set(store.labels["digit"].tolist()) for store in parts.values())
    assert len(train) == 27 and len(test) == 3 and not train & test
    few = open_audio(str(folder), limit=5, labels=("digit",), **quiet)
    more = open_audio(str(folder), limit=9, labels=("digit",), **quiet)
    assert set(few.labels["digit"].tolist()) < set(more.labels["digit"].tolist())
    assert few.fingerprint != more.fingerprint


def test_errors_name_what_is_wrong(folder, tmp_path, monkeypatch):
    def fails(match: str, spec, split: str = "train", **options):
        with pytest.raises(UserError, match=match):
            open_audio(str(spec), split, **options, **quiet)

    fails("there is no such directory", tmp_path / "none")
    fails("no such data; give `--data tones`", "fsddd")
    (tmp_path / "empty").mkdir()
    fails("no parquet files", tmp_path / "empty")
    fails("no split 'dev'; it has test, train|no split 'dev'; it has train, test", folder, "dev")
    fails("no such column; it has audio, digit, who", folder, labels=("speaker",))
    fails("no such column", folder, audio_column="sound")
    fails("holds int64, not encoded recordings", folder, audio_column="digit")
    fails("8000 Hz, not 16000: nothing is resampled", folder, sample_rate=16000)
    fails("8000 Hz, not 7000", write(tmp_path / "m", [encoded(noise(9, 0), 7000), encoded(noise(9, 0))]))
    corrupt = write(tmp_path / "bad", [encoded(noise(90, 0)), b"no sound at all"])
    fails("corrupt recording, row 1 of split 'train' of .*bad: ", corrupt)
    whole = encoded(noise(4000, 0), kind="FLAC")
    fails("corrupt recording, row 0 of split 'train'", write(tmp_path / "cut", [whole[: len(whole) // 2]]))
    infinite = encoded(np.array([0.0, np.inf]), subtype="FLOAT")
    fails("not finite", write(tmp_path / "inf", [infinite]))
    fails("it has no samples", write(tmp_path / "zero", [encoded(noise(0, 0))]))
    (tmp_path / "none").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "none" / "train.parquet")
    fails("no column holds recordings; its columns are x", tmp_path / "none")
    two = [{"bytes": encoded(noise(9, 0)), "path": None}]
    (tmp_path / "two").mkdir()
    pq.write_table(pa.table({"audio": two, "speech": two}), tmp_path / "two" / "train.parquet")
    fails(r"several columns hold recordings \(audio, speech\)", tmp_path / "two")
    assert len(open_audio(str(tmp_path / "two"), audio_column="speech", **quiet)) == 1
    fails("cannot load split 'train' of nobody/nothing from the Hugging Face hub", "nobody/nothing")
    fails("splits train and test, not 'dev'", "tones", "dev")
    fails("synthesized at 8000 Hz, not 16000", "tones", sample_rate=16000)
    fails("it has glide, timbre", "tones", labels=("digit",))
    fails("has a test split: nothing is held out", "tones", part="test")


def test_hub_recordings_are_read_without_its_decoder(folder, monkeypatch):
    """A hub data set has an Audio feature, whose own decoder needs FFmpeg: it must never be asked."""
    import datasets

    def hub(name, configuration, split):
        assert (name, configuration, split) == ("org/words", "clean", "train")
        data = datasets.load_dataset("parquet", data_files={"train": str(folder / "train-00000-of-00001.parquet")})
        return data["train"].cast_column("audio", datasets.Audio())

    expected = open_audio(str(folder), **quiet)
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: hub(*a, **k) if a[0] == "org/words" else real(*a, **k)
    )
    store = open_audio("org/words:clean", **quiet)
    assert store.name == "words" and torch.equal(store.samples, expected.samples)


# ---- tones -----------------------------------------------------------------------------------------------------------


def test_tones_are_a_function_of_the_seed():
    waves, factors = draw_tones(32, 3)
    again, _ = draw_tones(32, 3)
    assert all(torch.equal(a, b) for a, b in zip(waves, again, strict=True))
    assert not torch.equal(waves[0][:1000], draw_tones(32, 4)[0][0][:1000])
    assert set(factors["glide"].tolist()) == set(range(len(GLIDES))) and factors["timbre"].max() < TIMBRES
    assert all(2800 <= len(wave) <= 5600 and wave.abs().max() > 500 for wave in waves)
    train, test = (open_audio("tones", split, labels=("glide", "timbre")) for split in ("train", "test"))
    assert (len(train), len(test)) == (1200, 240) and train.fingerprint != test.fingerprint
    few = open_audio("tones", limit=5, labels=("timbre",))
    assert torch.equal(few.read(4), train.read(4)) and list(few.labels) == ["timbre"]


def test_a_glide_is_where_the_pitch_goes():
    """The period of the first and of the last quarter, by autocorrelation, of tones that go up and down."""

    def period(x: torch.Tensor) -> int:
        spectrum = torch.fft.rfft(x.double() * torch.hann_window(len(x)), 4096).abs().square()
        return 25 + int(torch.fft.irfft(spectrum)[25:110].argmax())  # 73 to 320 Hz

    waves, factors = draw_tones(160, 0)
    right = []
    for kind, sign in (("up", -1), ("down", 1)):
        for i in (factors["glide"] == GLIDES.index(kind)).nonzero().flatten().tolist():
            part = len(waves[i]) // 4
            right.append((period(waves[i][-part:]) - period(waves[i][:part])) * sign > 0)
    assert len(right) == 40 and sum(right) >= 34  # the rest: octave mistakes of the measurement


# ---- windows ---------------------------------------------------------------------------------------------------------


def store_of(lengths: list[int]) -> AudioStore:
    samples = torch.arange(sum(lengths)).to(torch.int16)
    return AudioStore(name="made", fingerprint="", rate=8000, lengths=torch.tensor(lengths), samples=samples)


def test_ranks_get_slices_of_one_batch_and_epochs_visit_everything_once():
    store = store_of([50 + 7 * i for i in range(21)])
    one = WindowLoader(store, window=100, batch_size=4, seed=5)
    assert one.steps_per_epoch == 5
    for ranks in (2, 4):
        parts = [WindowLoader(store, window=100, batch_size=4, seed=5, rank=r, world_size=ranks) for r in range(ranks)]
        for step in (7, 0):
            assert torch.equal(torch.cat([p(step).waves for p in parts]), one(step).waves)
            assert all(torch.equal(p(step).lengths, one(step).lengths) for p in parts)
    seen = torch.cat([one(step).indices for step in range(5)])
    assert len(seen.unique()) == 20 and not torch.equal(seen, torch.cat([one(s).indices for s in range(5, 10)]))
    assert not torch.equal(one(0).waves, WindowLoader(store, window=100, batch_size=4, seed=6)(0).waves)


def test_windows_are_pieces_and_padding_is_zero():
    store = store_of([40, 100, 160, 1000])
    loader = WindowLoader(store, window=100, batch_size=4, seed=0)
    firsts = []
    for step in range(60):
        batch = loader(step)
        values = (batch.waves * 32768).round().long()
        for i, row, length in zip(batch.indices.tolist(), values, batch.lengths.tolist(), strict=True):
            assert length == min(100, int(store.lengths[i])) and not row[length:].any()
            start = int(row[0] - store.starts[i])
            assert 0 <= start <= int(store.lengths[i]) - length
            assert torch.equal(row[:length], torch.arange(int(row[0]), int(row[0]) + length))
            firsts += [start] if i == 2 else []
    assert min(firsts) == 0 or max(firsts) == 60 or len(set(firsts)) > 20  # anywhere


def test_batches_of_one_speaker_in_runs():
    store, speakers = store_of([50] * 22), torch.tensor([0] * 9 + [1] * 9 + [2] * 4)
    loader = WindowLoader(store, window=50, batch_size=8, seed=0, groups=speakers, group_size=4)
    assert loader.steps_per_epoch == 2  # 2 + 2 + 1 runs of 4
    for step in range(6):
        runs = speakers[loader(step).indices].view(2, 4)
        assert (runs == runs[:, :1]).all()
        assert len(loader(step).indices.unique()) == 8


def test_impossible_batches_are_refused():
    store = store_of([50] * 6)

    def fails(match: str, **options):
        with pytest.raises(UserError, match=match):
            WindowLoader(store, window=10, seed=0, **options)

    fails("at least 2 windows", batch_size=1)
    fails("larger than the data: made has 6", batch_size=8)
    fails("4 windows do not divide among 3 processes", batch_size=4, world_size=3)
    fails("multiple of the 3 recordings", batch_size=4, groups=torch.zeros(6), group_size=3)
    fails("no speaker has 3 recordings", batch_size=3, groups=torch.arange(6), group_size=3)


# ---- log-mel ---------------------------------------------------------------------------------------------------------


def test_mel_filters_are_triangles_that_meet():
    filters = mel_filters(20, 513, 8000)
    assert filters.min() == 0 and filters.max() <= 1 and (filters.max(0).values > 0.8).all()
    peaks = filters.argmax(0).double() * 4000 / 512
    mels = 2595 * (1 + peaks / 700).log10()
    assert (mels.diff() - mels.diff().mean()).abs().max() < 0.2 * mels.diff().mean()  # evenly spaced in mel
    inside = slice(int(filters[:, 0].argmax()), int(filters[:, -1].argmax()))
    torch.testing.assert_close(filters[inside].sum(1), torch.ones(inside.stop - inside.start))


def test_log_mel_against_a_slow_transform():
    wave = torch.from_numpy(noise(1000, 1).astype(np.float32) / 32768)
    features, frames = log_mel(wave[None], torch.tensor([1000]), 8000, hop=0.02, window=0.025, bands=8)
    assert features.shape == (1, 6, 8) and frames.tolist() == [6]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    filters = mel_filters(8, 101, 8000).double().numpy()
    for t in range(6):
        power = np.abs(np.fft.rfft(window * wave.double().numpy()[160 * t : 160 * t + 200])) ** 2
        np.testing.assert_allclose(features[0, t].numpy(), np.log(power @ filters + 1e-6), rtol=1e-3)


def test_log_mel_does_not_see_the_padding():
    wave = torch.from_numpy(noise(900, 1).astype(np.float32) / 32768)
    alone, count = log_mel(wave[None], torch.tensor([900]), 8000)
    padded = torch.cat([wave, torch.zeros(700)])
    both, counts = log_mel(torch.stack([padded, torch.ones(1600)]), torch.tensor([900, 1600]), 8000)
    assert counts.tolist() == [int(count), 9]
    torch.testing.assert_close(both[0, : int(count)], alone[0])
    assert log_mel(torch.ones(1, 20), torch.tensor([20]), 8000)[1].tolist() == [1]


@pytest.mark.skipif(not FSDD.exists(), reason="the spoken digits are not beside the project")
def test_spoken_digits_and_their_log_mel_baseline():
    """94.7 % digits and 99.7 % speakers from mean and std of log-mel frames were measured by others."""
    stores = [open_audio(str(FSDD), split, labels=("digit", "speaker"), **quiet) for split in ("train", "test")]
    assert [len(s) for s in stores] == [2700, 300] and stores[0].rate == 8000
    pooled = []
    for store in stores:
        features, frames = log_mel(*store.whole(torch.arange(len(store))), store.rate)
        inside = (torch.arange(features.shape[1]) < frames[:, None])[..., None]
        mean = (features * inside).sum(1) / frames[:, None]
        spread = (((features - mean[:, None]) ** 2 * inside).sum(1) / frames[:, None]).sqrt()
        pooled.append(torch.cat([mean, spread], 1))
    for label, expected in (("digit", 94.7), ("speaker", 99.7)):
        found = linear_probe(pooled[0], stores[0].labels[label], pooled[1], stores[1].labels[label]).accuracy
        assert abs(found - expected) < 2.5, (label, found)
