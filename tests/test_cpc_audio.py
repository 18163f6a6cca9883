"""CPC on sound: loss against a slow loop, negatives, causality, padding, several processes, probes, whole runs."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.distributed import rank, sync_batchnorm, world_size
from common.errors import UserError
from common.log import read_metrics
from eval.card import load_cards
from eval.load import load
from methods.cpc_audio.audio import open_audio
from methods.cpc_audio.config import PRESETS, PUBLISHED
from methods.cpc_audio.loss import anchor_mask, draw_negatives, info_nce, pool_matrix
from methods.cpc_audio.model import CPC, AudioEncoder, FrameNorm, encode
from methods.cpc_audio.probes import Frames, compact_labels, few_label_probe, frame_probe, held_out_probe
from methods.cpc_audio.train import compute_loss
from tests.processes import run_command, run_ranks

ROOT = Path(__file__).parents[1]
POOLS = ("mixed", "mixed-excl", "same-speaker", "same-speaker-excl", "own")
SPEAKERS = torch.tensor([0, 1, 0, 1])
FRAMES = torch.tensor([7, 3, 9, 5])


def small(norm: str = "channel", **changes) -> AudioEncoder:
    options = dict(channels=6, context=5, kernels=(4, 3), strides=(2, 2), paddings=(1, 1), norm=norm, sample_rate=8000)
    torch.manual_seed(0)
    return AudioEncoder(**{**options, **changes}).double()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- loss ------------------------------------------------------------------------------------------------------------


def slow_info_nce(z, predictions, frames, negatives, complete):
    """One anchor, one step, one candidate at a time; (loss, chance, retrieval)."""
    _, size, steps, _ = predictions.shape
    means, chances, shares = [], [], []
    for k in range(1, steps + 1):
        losses, levels, hits = [], [], []
        for b in range(len(z)):
            for t in range(int(frames[b])):
                if t + (steps if complete else k) >= frames[b]:
                    continue
                query = predictions[b, t, k - 1]
                positive = query @ z[b, t + k]
                others = [divmod(i, size) for i in negatives[b].tolist()]
                others = [query @ z[i, j] for i, j in others if (i, j) != (b, t + k)]
                losses.append(torch.log(sum(torch.exp(s) for s in [positive, *others])) - positive)
                levels.append(math.log(1 + len(others)))
                hits.append(float(all(positive > s for s in others)))
        if losses:
            means.append(sum(losses) / len(losses))
            chances.append(sum(levels) / len(levels))
            shares.append(sum(hits) / len(hits))
    return sum(means) / len(means), sum(chances) / len(chances), sum(shares) / len(shares)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("steps", "complete"), [(1, False), (3, False), (3, True), (8, False)])
def test_loss_and_gradient_equal_the_slow_version(pool, steps, complete):
    z = noise(4, 9, 6).requires_grad_()
    predictions = noise(4, 9, steps, 6, seed=2).requires_grad_()
    negatives = draw_negatives(pool_matrix(pool, 4, SPEAKERS), FRAMES, 9, 11, draw())
    loss, parts = info_nce(z, predictions, FRAMES, negatives, complete=complete)
    expected, chance, retrieval = slow_info_nce(z, predictions, FRAMES, negatives, complete)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert float(parts["chance"]) == pytest.approx(chance, rel=1e-12)
    assert float(parts["retrieval"]) == pytest.approx(retrieval, abs=1e-12)
    ours, theirs = (torch.autograd.grad(value, (z, predictions)) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for b, count in enumerate(FRAMES.tolist()):
        assert not ours[0][b, count:].any() and not ours[1][b, count:].any()  # padding: neither anchor nor target


def test_negatives_that_are_all_the_target_itself():
    """Two frames and `own` negatives: the anchor has no negative left, and no gradient is nan."""
    z, predictions = noise(2, 4, 3).requires_grad_(), noise(2, 4, 1, 3, seed=2).requires_grad_()
    frames = torch.tensor([2, 2])
    loss, parts = info_nce(z, predictions, frames, torch.tensor([[1, 1], [5, 5]]))
    loss.backward()
    assert loss == 0 and parts["chance"] == 0 and z.grad.isfinite().all() and not predictions.grad.any()


def test_the_first_matrix_predicts_the_next_frame():
    """Off by one: predictions that are the frame k ahead solve the task, those of k - 1 do not."""
    z = 40 * torch.eye(2 * 8).view(2, 8, 16)  # every frame its own direction
    frames, steps = torch.tensor([8, 8]), 3
    negatives = draw_negatives(pool_matrix("mixed", 2), frames, 8, 64, draw())
    ahead = torch.nn.functional.pad(z, (0, 0, 0, steps + 1))
    shifted = {s: torch.stack([ahead[:, k + s : k + s + 8] for k in range(steps)], 2) for s in (0, 1)}
    loss, parts = info_nce(z, shifted[1], frames, negatives)
    assert loss < 1e-6 and parts["retrieval"] == 1
    loss, parts = info_nce(z, shifted[0], frames, negatives)  # k = 0: the frame that the context has seen
    assert loss > 10 and parts["retrieval"] == 0


def test_equal_scores_are_chance():
    frames = torch.full((4,), 32)
    negatives = draw_negatives(pool_matrix("mixed-excl", 4), frames, 32, 128, draw())
    loss, parts = info_nce(torch.zeros(4, 32, 8), torch.zeros(4, 32, 12, 8), frames, negatives, complete=True)
    assert float(loss) == pytest.approx(math.log(129)) and float(parts["chance"]) == pytest.approx(math.log(129))
    assert parts["retrieval"] == 0  # a tie is not a find
    same, query = (
        noise(1, 1, 256).float().expand(4, 32, 256),
        noise(1, 1, 1, 256, seed=2).float().expand(4, 32, 12, 256),
    )
    _, collapsed = info_nce(same.contiguous(), query.contiguous(), frames, negatives)  # equal up to rounding
    assert collapsed["retrieval"] == 0
    assert parts["anchors"].tolist() == [4 * 20] * 12


def test_anchors_of_a_full_window_are_the_published_ones():
    mask = anchor_mask(torch.tensor([128]), 128, 12, complete=True)
    assert mask.sum((0, 1)).tolist() == [116] * 12  # CPC_audio
    assert anchor_mask(torch.tensor([128]), 128, 12, complete=False).sum((0, 1)).tolist() == list(range(127, 115, -1))
    assert not anchor_mask(torch.tensor([5]), 32, 12, complete=True).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_float32_under_autocast(dtype):
    z, predictions = noise(4, 9, 6).to(dtype), noise(4, 9, 3, 6, seed=2).to(dtype)
    negatives = draw_negatives(pool_matrix("mixed", 4), FRAMES, 9, 11, draw())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = info_nce(z, predictions, FRAMES, negatives)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(z.float(), predictions.float(), FRAMES, negatives)[0])


def test_nothing_to_predict_is_said():
    with pytest.raises(UserError, match="two frames"):
        info_nce(noise(2, 4, 3), noise(2, 4, 2, 3), torch.tensor([1, 1]), torch.zeros(2, 5, dtype=torch.long))


# ---- negatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_negatives_come_from_their_pool_evenly(pool):
    matrix = pool_matrix(pool, 4, SPEAKERS)
    drawn = draw_negatives(matrix, FRAMES, 9, 20_000, draw())
    for i in range(4):
        pools = {
            "mixed": range(4),
            "mixed-excl": [j for j in range(4) if j != i],
            "same-speaker": [j for j in range(4) if SPEAKERS[j] == SPEAKERS[i]],
            "same-speaker-excl": [j for j in range(4) if SPEAKERS[j] == SPEAKERS[i] and j != i],
            "own": [i],
        }
        expected = {9 * j + t for j in pools[pool] for t in range(int(FRAMES[j]))}
        counts = torch.bincount(drawn[i], minlength=36)
        assert set(counts.nonzero().flatten().tolist()) == expected  # all frames, and no padding
        share = counts[list(expected)].double() * len(expected) / 20_000
        assert share.min() > 0.8 and share.max() < 1.2
    assert torch.equal(drawn, draw_negatives(matrix, FRAMES, 9, 20_000, draw()))
    assert not torch.equal(drawn, draw_negatives(matrix, FRAMES, 9, 20_000, draw(1)))


def test_an_empty_pool_is_refused():
    with pytest.raises(UserError, match="no frame to serve as a negative"):
        draw_negatives(pool_matrix("same-speaker-excl", 3, torch.tensor([0, 0, 1])), FRAMES[:3], 9, 4, draw())
    with pytest.raises(ValueError, match="need the speakers"):
        pool_matrix("same-speaker", 3)


# ---- network ---------------------------------------------------------------------------------------------------------


def test_geometry_is_the_papers():
    encoder = AudioEncoder()
    assert (encoder.hop, encoder.receptive_field[1]) == (160, 465)
    assert encoder.frames(torch.tensor([20480, 5120, 160])).tolist() == [128, 32, 1]
    widths = [tuple(conv.weight.shape) for conv in encoder.convolutions]
    assert widths == [(512, 1, 10), (512, 512, 8), (512, 512, 4), (512, 512, 4), (512, 512, 4)]
    model = CPC(encoder, 12)
    assert model.predictors.weight.shape == (12 * 512, 256) and model.predictors.bias is None
    assert AudioEncoder(paddings=(0,) * 5).frames(torch.tensor(20480)) == 126
    assert AudioEncoder(paddings=(2, 2, 2, 2, 1)).frames(torch.tensor(20480)) == 128  # GIM


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_a_frame_sees_its_field_and_a_context_only_the_past(norm):
    torch.manual_seed(0)  # with other weights the ReLUs may hide a field's first or last sample
    encoder = AudioEncoder(8, 6, norm=norm).double()
    wave = noise(1, 3200)
    z, c, _ = encoder.encode(wave)
    first, size = encoder.receptive_field
    for t in (4, 9, 15):
        start = 160 * t + first
        for place, seen in ((start - 1, False), (start, True), (start + size - 1, True), (start + size, False)):
            changed = wave.clone()
            changed[0, place] += 3
            other, later, _ = encoder.encode(changed)
            assert torch.equal(other[0, t], z[0, t]) != seen, (t, place)
            if place >= start + size:
                assert torch.equal(later[0, : t + 1], c[0, : t + 1])  # bitwise: nothing of the future
        changed = wave.clone()
        changed[0, start + size :] = noise(len(wave[0]) - start - size, seed=9)
        assert torch.equal(encoder.encode(changed)[1][0, : t + 1], c[0, : t + 1])
    overlap = [size - 160 * k > 0 for k in (1, 2, 3)]
    assert overlap == [True, True, False]  # z_{t+1} and z_{t+2} share samples with z_t, z_{t+3} does not


def test_channel_norm_is_of_one_frame():
    norm, x = FrameNorm(7).double(), noise(2, 5, 7)
    spread = x.std(2, correction=0, keepdim=True)
    torch.testing.assert_close(norm(x), (x - x.mean(2, keepdim=True)) / spread, rtol=1e-3, atol=1e-3)
    changed = x.clone()
    changed[:, 3:] += 1 + noise(2, 2, 7, seed=4)
    assert torch.equal(norm(changed)[:, :3], norm(x)[:, :3])


def test_layers_are_the_convolutions_that_they_name():
    encoder, waves = small("none"), noise(3, 64)
    x = waves[:, None]
    for conv in encoder.convolutions:
        x = conv(x).relu()
    torch.testing.assert_close(encoder.encode(waves)[0], x.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "channel", "batch"])
def test_a_padded_recording_equals_itself_alone(norm):
    encoder = small(norm).eval()
    if norm == "batch":
        for layer in encoder.norms:
            layer.norm.running_mean.normal_(generator=draw())
    lengths = torch.tensor([64, 40, 33, 50])
    waves = noise(4, 64) * (torch.arange(64) < lengths[:, None])
    z, c, frames = encoder.encode(waves, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone_z, alone_c, count = encoder.encode(waves[i : i + 1, :n])
        assert alone_z.shape[1] == int(count) == int(frames[i])
        torch.testing.assert_close(z[i, : int(count)], alone_z[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(c[i, : int(count)], alone_c[0], rtol=1e-12, atol=1e-12)
        assert not z[i, int(count) :].any()
    wave = waves[1, :40].float()
    torch.testing.assert_close(
        encode(encoder.float(), wave, 8000), c[1, : int(frames[1])].float(), rtol=1e-4, atol=1e-5
    )


def test_wrong_uses_are_refused():
    with pytest.raises(UserError, match="trained at 8000 Hz"):
        encode(small(), noise(100), 16000)
    with pytest.raises(UserError, match="hears sound.*not images"):
        small()(noise(2, 3, 32, 32))
    assert small()(noise(2, 1, 100)).shape == (2, 5)
    with pytest.raises(UserError, match="one each a layer"):
        small(strides=(2,))
    with pytest.raises(UserError, match="unknown norm 'layer': choose none, channel, batch"):
        small("layer")


# ---- several processes -----------------------------------------------------------------------------------------------


def gradients(pool: str, norm: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step on this process's part of a fixed global batch of uneven recordings, after DDP."""
    model = CPC(small(norm), 3).double().train()
    torch.manual_seed(3)
    model.predictors.reset_parameters()
    lengths = torch.tensor([64, 20, 33, 50, 12, 64, 40, 28])
    waves = noise(8, 64) * (torch.arange(64) < lengths[:, None])
    n = 8 // world_size()
    own = slice(rank() * n, (rank() + 1) * n)
    trained = sync_batchnorm(model)
    if world_size() > 1:
        trained = DistributedDataParallel(trained)
    frames = model.encoder.frames(lengths)
    size = int(model.encoder.frames(torch.tensor(64)))
    speakers = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])  # pairs across ranks too
    negatives = draw_negatives(pool_matrix(pool, 8, speakers), frames, size, 6, draw(5))
    loss, parts = compute_loss(trained, waves[own], lengths[own], frames, negatives, complete_anchors=True)
    loss.backward()
    logged = torch.stack([loss.detach(), parts["chance"], parts["retrieval"]])
    if world_size() > 1:
        torch.distributed.all_reduce(logged)
    return {"logged": logged / world_size()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("pool", "norm"), [("mixed", "channel"), ("same-speaker-excl", "none"), ("mixed", "batch")])
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_equal_one(ranks, pool, norm):
    one = gradients(pool, norm)
    for many in run_ranks(gradients, ranks, pool, norm):
        assert many.keys() == one.keys() and len(one) > 8
        for name, value in one.items():
            assert value.any(), name
            worst = (many[name] - value).abs().max() / value.abs().max()
            assert worst < 1e-9, (name, worst)


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_pooling_and_membership_equal_the_slow_version():
    counts = torch.tensor([3, 1, 4])
    frames = Frames(noise(8, 5).float(), counts)
    pieces = frames.x.split(counts.tolist())
    expected = torch.stack([torch.cat([p.mean(0), p.std(0, correction=0)]) for p in pieces])
    torch.testing.assert_close(frames.pooled(), expected)
    assert frames.of(torch.tensor([2, 0])).tolist() == [True] * 3 + [False] + [True] * 4
    assert frames.spread(torch.tensor([7, 8, 9])).tolist() == [7, 7, 7, 8, 9, 9, 9, 9]


def words(count: int, seed: int, per_class: int = 3) -> tuple[Frames, torch.Tensor, torch.Tensor]:
    """Recordings of 2 to 5 frames whose class is in three directions and whose speaker, faintly, in three others."""
    generator = draw(seed)
    y, speaker = torch.arange(count) % per_class, torch.arange(count) // per_class % 3
    counts = torch.randint(2, 6, (count,), generator=generator)
    x = 0.1 * torch.randn(int(counts.sum()), 6, generator=generator)
    owner = torch.arange(count).repeat_interleave(counts)
    x += torch.eye(6)[y[owner]] + 0.1 * torch.eye(6)[3 + speaker[owner]]
    return Frames(x, counts), y, speaker


def test_probes_read_what_is_there_and_nothing_else():
    (train, y, g), (test, test_y, test_g) = words(120, 0), words(60, 1)
    assert frame_probe(train, y, test, test_y, seed=0, device="cpu").accuracy > 95
    assert frame_probe(train, y, test, (test_y + 1) % 3, seed=0, device="cpu").accuracy < 5
    pooled, test_pooled = train.pooled(), test.pooled()
    one, five = (few_label_probe(pooled, y, test_pooled, test_y, per_class=n, draws=4, seed=0) for n in (1, 5))
    assert 33 < one <= five and five > 95
    assert held_out_probe(pooled, y, g, test_pooled, test_y, test_g, seed=0) > 95
    tied = (y + g) % 3  # a class that means another direction for each speaker cannot be carried over
    assert held_out_probe(pooled, tied, g, test_pooled, (test_y + test_g) % 3, test_g, seed=0) < 60


def test_the_frame_probe_chooses_on_recordings_it_has_not_fitted():
    """Random features, constant within a recording: only a split of frames would find them predictable."""
    counts, y = torch.full((60,), 8), torch.arange(60) % 2
    x = torch.randn(60, 64, generator=draw()).repeat_interleave(8, 0)
    result = frame_probe(Frames(x, counts), y, Frames(x[:8], counts[:1]), y[:1], seed=0, device="cpu")
    assert max(result.validation.values()) < 90  # a tenth of the frames would be known by heart


def test_class_numbers_are_compact_and_shared():
    train, test = compact_labels(torch.tensor([8000, 5, 90]), torch.tensor([90, 7]))
    assert train.tolist() == [3, 0, 2] and test.tolist() == [2, 1]


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_librispeech_is_the_paper():
    cfg = PRESETS["librispeech"][1]
    assert (cfg.kernels, cfg.strides) == ((10, 8, 4, 4, 4), (5, 4, 2, 2, 2))
    assert (cfg.channels, cfg.context, cfg.window, cfg.sample_rate, cfg.steps) == (512, 256, 20480, 16000, 12)
    assert (cfg.batch_size, cfg.base_lr, cfg.schedule, cfg.weight_decay) == (64, 2e-4, "constant", 0.0)
    assert (cfg.negatives, cfg.negative_count, cfg.complete_anchors) == ("mixed", 128, True)
    assert 28539 // 64 * cfg.epochs == pytest.approx(300_000, rel=1e-3)
    assert {p["target"]: p["value"] for p in PUBLISHED["librispeech"]} == {"speaker_id": 97.4, "phone": 64.6}


# ---- whole runs ------------------------------------------------------------------------------------------------------

MODULE = "methods.cpc_audio.train"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("audio")
    code, text = run_command(MODULE, "smoke", "--out", out, log=out / "log")
    assert code == 0, text
    return out / "cpc_audio-smoke"


def test_smoke_writes_the_whole_run_directory(finished):
    for name in ("config.json", "environment.json", "metrics.jsonl", "backbone.json", "report.html"):
        assert (finished / name).exists(), name
    ((_, card),) = load_cards([finished / "result.json"])  # the format of all cards
    assert (card["method"], card["preset"], card["data"]["name"]) == ("cpc_audio", "smoke", "tones")
    rows = {(row["protocol"], row["target"]): row for row in card["evaluations"]}
    for protocol in ("frame-linear", "utterance-linear", "utterance-1-label", "utterance-5-labels"):
        for target in ("glide", "timbre"):
            assert rows[protocol, target]["baselines"].keys() == {"log-mel", "random init"}
    assert rows["utterance-held-out-timbre", "glide"]["baselines"].keys() == {"log-mel", "random init"}
    assert rows["retrieval", "frame ahead"]["value"] > 0 and len(card["retrieval_per_step"]) == 12
    lines = [line for line in read_metrics(finished / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["chance"] <= math.log(17)
    report = (finished / "report.html").read_text()
    assert len(report) < 3_000_000 and "http" not in report.replace("http-equiv", "")
    assert report.count("<audio") == 6 and "log-mel" in report
    assert str(finished.parent) not in report + (finished / "result.json").read_text()  # never a path


def test_exported_encoder_loads_and_hears(finished, tmp_path):
    encoder, spec = load(finished)
    assert isinstance(encoder, AudioEncoder) and not encoder.training and encoder.num_features == 24
    assert spec.arguments["sample_rate"] == 8000 and 0.05 < encoder.level < 0.5
    store = open_audio("tones", "test")
    c = encode(encoder, store.read(0).float() / 32768, store.rate)
    assert c.shape == (int(encoder.frames(store.lengths[0])), 24) and c.isfinite().all()
    arguments = (finished, "--data", "shapes", "--limit", 40, "--protocols", "metrics")
    code, text = run_command("eval", *arguments, log=tmp_path / "log")
    assert code == 2 and "hears sound" in text and "Traceback" not in text


@pytest.mark.parametrize("pool", POOLS[1:])
def test_every_pool_trains(pool, tmp_path):
    arguments = ("smoke", "--out", tmp_path, "--no-eval", "--max-steps", 2, "--negatives", pool)
    code, text = run_command(MODULE, *arguments, log=tmp_path / "log")
    assert code == 0, text


def test_mistakes_are_one_sentence(tmp_path):
    for flags, message in (
        (("--window", 1600), "too few to look 12 ahead: use a --window of at least 2705"),
        (("--steps", 0), "at least 1"),
        (("--batch-size", 512), "larger than the data"),
        (("--labels", "glide", "digit"), "it has glide, timbre"),
        (("--data", "fsdd_nowhere"), "no such data"),
    ):
        code, text = run_command(MODULE, "smoke", "--out", tmp_path, *flags, log=tmp_path / "log")
        assert code == 2 and message in text and "Traceback" not in text, text
