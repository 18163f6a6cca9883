"""The linear masked autoencoders: every derived number reproduced, batches of masks against loops over index sets."""

import base64
import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.rng import generator
from studies.linear_autoencoder import questions
from studies.linear_autoencoder.forms import (
    LowRank,
    Network,
    Separate,
    Tied,
    Unrolled,
    angles,
    completion_error,
    conditional_mean,
    denoising_optimum,
    draw_exactly,
    draw_kept,
    gain_db,
    low_rank,
    separate_encode,
    separate_loss,
    separate_optimum,
    spectral_factor,
    stable_eta,
    tied_encode,
    top_eigenvectors,
    train,
    unrolled_closed_form,
    unrolled_encode,
)
from studies.linear_autoencoder.questions import KEEPS, completions_of
from tests.processes import run_command

SEEDS = range(5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(m: int, seed: int = 0) -> Tensor:
    a = random(m, 2 * m, seed=seed)
    return a @ a.T / (2 * m)


@pytest.fixture(scope="module")
def data() -> list[LowRank]:
    return [low_rank(seed) for seed in SEEDS]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- the parametrizations against loops over index sets --------------------------------------------------------------


def slow_encode(kind: str, a: Tensor, b: Tensor, x: Tensor, kept: Tensor, keep: float) -> Tensor:
    """One sample and one mask at a time, with the kept rows picked out."""
    rows = []
    for sample, mask in zip(x, kept, strict=True):
        index = mask.nonzero()[:, 0]
        if kind == "separate":
            rows.append(sum(sample[i] * a[:, i] for i in index) / keep)
        elif kind == "tied":
            rows.append(torch.linalg.inv(b[index].T @ b[index]) @ b[index].T @ sample[index])
        else:
            latent = torch.zeros(b.shape[1], dtype=x.dtype)
            for _ in range(4):
                latent = latent + 0.05 * b[index].T @ (sample[index] - b[index] @ latent)
            rows.append(latent)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["separate", "tied", "unrolled"])
def test_a_batch_of_masks_equals_picking_rows_in_loss_and_gradient(kind):
    a, b, x = random(3, 9), random(9, 3, seed=1), random(20, 9, seed=2)
    kept = draw_kept(20, 9, 0.6, generator(0), at_least=4)
    assert len(kept.sum(1).unique()) > 2  # of different sizes in one batch

    def batched(a: Tensor, b: Tensor) -> Tensor:
        match kind:
            case "separate":
                return separate_encode(a, x, kept, 0.6)
            case "tied":
                return tied_encode(b, x, kept)
            case _:
                return unrolled_encode(b, x, kept, 0.05, 4)

    results = []
    for encode in (batched, lambda a, b: slow_encode(kind, a, b, x, kept, 0.6)):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        loss = (encode(a, b) @ b.T - x).square().mean()
        loss.backward()
        results.append([loss.detach(), b.grad, *([a.grad] if kind == "separate" else [])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_encoder_of_equation_16_4_may_use_all_rows_of_a_zeroed_input():
    """The lecture writes B^T x with x zeroed, which is B~^T x~; and a mask does not scale anything by 1 / p."""
    b, x = random(9, 3), random(1, 9, seed=1)
    kept = draw_exactly(1, 9, 5, generator(0))
    rows = kept[0].bool()
    expected = torch.linalg.solve(b[rows].T @ b[rows], b.T @ (kept * x)[0])
    torch.testing.assert_close(tied_encode(b, x, kept)[0], expected)
    inside = (b @ random(3, seed=2))[None]  # of the pattern: any mask with r rows returns it exactly
    torch.testing.assert_close(tied_encode(b, inside, kept) @ b.T, inside)


@pytest.mark.parametrize("seen", [1, 2, 3, 5])
def test_fewer_entries_than_latents_take_the_least_norm(seen):
    b, x, kept = random(9, 4), random(6, 9, seed=1), draw_exactly(6, 9, seen, generator(0))
    for i, latent in enumerate(tied_encode(b, x, kept)):
        rows = kept[i].bool()
        torch.testing.assert_close(latent, torch.linalg.pinv(b[rows]) @ x[i, rows], rtol=1e-7, atol=1e-9)
    limit = unrolled_closed_form(b, x, kept, stable_eta(b), 10**6)  # the null space stays 0
    torch.testing.assert_close(limit, tied_encode(b, x, kept), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shape", [(9, 3), (9, 12)])
def test_unrolled_steps_equal_the_spectral_filter(steps, shape):
    b, x, kept = random(*shape), random(20, 9, seed=1), draw_kept(20, 9, 0.5, generator(0))
    eta = stable_eta(b)
    ours = unrolled_encode(b, x, kept, eta, steps)
    torch.testing.assert_close(ours, unrolled_closed_form(b, x, kept, eta, steps), rtol=1e-12, atol=1e-12)
    if steps == 1:  # one step is the tied-weight form of the first parameterisation, A = eta B^T
        torch.testing.assert_close(ours, separate_encode(eta * b.T, x, kept))


def test_the_residual_is_clamped_and_not_the_input():
    b, x, kept = random(9, 3), random(20, 9, seed=1), draw_kept(20, 9, 0.5, generator(0))
    right = unrolled_encode(b, x, kept, 0.02, 10)
    wrong = unrolled_encode(b, kept * x, torch.ones_like(kept), 0.02, 10)  # residual -(B l) at the gaps
    assert (wrong.norm(dim=1) < right.norm(dim=1)).double().mean() > 0.9  # pulled towards zeros
    assert (right - wrong).norm() > 0.1 * right.norm()
    unknown = torch.where(kept == 1, x, 1e6)  # whatever stands in a gap has no influence
    torch.testing.assert_close(unrolled_encode(b, unknown, kept, 0.02, 10), right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tied_encode(b, unknown, kept), tied_encode(b, x, kept), rtol=1e-6, atol=1e-6)


def test_a_rate_beyond_two_over_the_norm_diverges_and_the_learned_one_cannot():
    b, x = random(9, 3), random(5, 9, seed=1)
    full = torch.ones(5, 9, dtype=torch.float64)
    assert unrolled_encode(b, x, full, 2.2 * stable_eta(b), 500).norm() > 1e6
    model = Unrolled(9, 3, generator(0), 500)
    with torch.no_grad():
        model.a.fill_(30.0)
        model.b.mul_(100)
        assert model.eta <= 2 * stable_eta(model.b) * (1 + 1e-9)
        assert torch.isfinite(model(x, full)).all()


def test_scale_and_sense_of_keep():
    """p is the probability to keep; the mean over masks of the scaled input is the input, once and not twice."""
    kept = draw_kept(200_000, 4, 0.25, generator(0))
    assert float(kept.mean()) == pytest.approx(0.25, abs=0.005)
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=torch.float64)
    scaled = separate_encode(torch.eye(4, dtype=torch.float64), x, kept, 0.25)
    torch.testing.assert_close(scaled.mean(0), x[0], rtol=0.03, atol=0.03)
    few = draw_kept(2000, 12, 0.25, generator(1), at_least=5)
    assert few.sum(1).min() >= 5 and bool((draw_exactly(50, 12, 7, generator(2)).sum(1) == 7).all())


# ---- closed forms against enumeration --------------------------------------------------------------------------------


def enumerated(s: Tensor, keep: float) -> list[tuple[float, Tensor]]:
    """(probability, diagonal matrix of k / p) of every mask."""
    masks = itertools.product((0.0, 1.0), repeat=len(s))
    return [
        (math.prod(keep if k else 1 - keep for k in mask), torch.tensor(mask, dtype=torch.float64) / keep)
        for mask in masks
    ]


@pytest.mark.parametrize("keep", [0.25, 0.6, 1.0])
def test_separate_optimum_equals_the_best_map_over_all_masks(keep):
    """Second moments summed over all 2^m masks, then reduced-rank regression by whitening: no formula in common."""
    s = covariance(6)
    inputs = sum(w * k[:, None] * s * k for w, k in enumerated(s, keep))
    cross = sum(w * s * k for w, k in enumerated(s, keep))  # E x x'^T
    value, vector = torch.linalg.eigh(inputs)
    whiten = vector * value**-0.5 @ vector.T
    u, singular, vh = torch.linalg.svd(cross @ whiten)
    for r in (1, 3, 6):
        best = (u[:, :r] * singular[:r]) @ vh[:r] @ whiten
        a, b = separate_optimum(s, keep, r)
        torch.testing.assert_close(b @ a, best, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(b.T @ b, torch.eye(r, dtype=torch.float64))
        loss = (
            sum(
                w * torch.trace(s - 2 * (b @ a) @ (k[:, None] * s) + (b @ a) @ (k[:, None] * s * k) @ (b @ a).T)
                for w, k in enumerated(s, keep)
            )
            / 6
        )
        assert separate_loss(b @ a, s, keep) == pytest.approx(float(loss), rel=1e-10)


def test_denoising_keeps_pcas_directions_and_shrinks_by_wiener(data):
    """Derived: rank r has the eigenvectors of PCA, angle 0.000 degrees, gains v / (v + noise)."""
    s = data[0].covariance
    w = denoising_optimum(s, 0.09, 8)
    pca = top_eigenvectors(s, 8)
    assert angles(torch.linalg.svd(w).U[:, :8], pca)[0] < 1e-3
    values = torch.linalg.eigvalsh(s)[-8:]
    torch.testing.assert_close(torch.linalg.eigvalsh(w)[-8:], values / (values + 0.09))
    full = denoising_optimum(s, 0.09, 64)
    torch.testing.assert_close(full, torch.linalg.solve(s + 0.09 * torch.eye(64, dtype=torch.float64), s))
    assert (full - torch.eye(64)).norm() > 3  # the identity is not optimal, however wide the latent
    assert mean([gain_db(d, d.observed @ denoising_optimum(d.covariance, 0.09, 64).T) for d in data]) == pytest.approx(
        4.6, abs=0.05
    )
    assert mean([gain_db(d, d.observed @ denoising_optimum(d.covariance, 0.09, 8).T) for d in data]) == pytest.approx(
        9.0, abs=0.05
    )


# ---- derived numbers: subspaces, gain, completion --------------------------------------------------------------------


def test_pca_against_the_truth(data):
    """1.04 degrees at most; gain 8.93 dB, where 10 log10(m / r) = 9.03 would be without estimation."""
    pcas = [top_eigenvectors(d.covariance, 8) for d in data]
    worst = [float(angles(p, d.truth)[0]) for p, d in zip(pcas, data, strict=True)]
    assert max(worst) == pytest.approx(1.04, abs=0.08) and min(worst) > 0.8
    gains = [gain_db(d, d.observed @ p @ p.T) for p, d in zip(pcas, data, strict=True)]
    assert mean(gains) == pytest.approx(8.93, abs=0.06) and mean(gains) < 10 * math.log10(8)


@pytest.mark.parametrize(("keep", "row", "gain"), [(0.75, 22, 8.25), (0.5, 27, 5.55), (0.25, 29, -0.13)])
def test_masking_tilts_the_rows_and_shrinks_the_output(data, keep, row, gain):
    """Separate: columns of B at most 0.3 (rounded) degrees from PCA, rows of A 22, 27, 29; gain on full input."""
    columns, rows, gains, mean_rows = [], [], [], []
    for d in data:
        pca = top_eigenvectors(d.covariance, 8)
        a, b = separate_optimum(d.covariance, keep, 8)
        columns.append(float(angles(b, pca)[0]))
        rows.append(float(angles(a.T, pca)[0]))
        mean_rows.append(float(angles(a.T, pca).mean()))
        gains.append(gain_db(d, d.observed @ (b @ a).T))
    assert mean(columns) == pytest.approx(0.3, abs=0.08)
    assert mean(rows) == pytest.approx(row, abs=2.5)
    assert mean(gains) == pytest.approx(gain, abs=0.12)
    assert mean(mean_rows) < mean(rows)


def test_uneven_rows_tilt_the_rows_almost_at_right_angles():
    """0.6 to 0.9 and 73 to 77 degrees, completion .39/.74/1.4 and .042/.11/.72: one draw of the scales. Draws differ by
    a factor of five, so what is tested is that these numbers lie within the range of 12 draws."""
    found = {keep: [] for keep in KEEPS}
    for seed in range(12):
        d = low_rank(seed, uneven=True)
        pca = top_eigenvectors(d.covariance, 8)
        for keep in KEEPS:
            a, b = separate_optimum(d.covariance, keep, 8)
            _, separate, tied, *_ = completions_of(d, keep, generator(seed, "test"), 512)
            found[keep].append((float(angles(b, pca)[0]), float(angles(a.T, pca)[0]), separate, tied))
    derived = {
        0.75: ((0.6, 0.9), (73, 77), 0.39, 0.042),
        0.5: ((0.6, 0.9), (73, 77), 0.74, 0.11),
        0.25: ((0.6, 0.9), (73, 77), 1.4, 0.72),
    }
    for keep, (columns, rows, separate, tied) in derived.items():
        low, high = ([f(values) for values in zip(*found[keep], strict=True)] for f in (min, max))
        assert low[0] < columns[1] and high[0] > columns[0] and low[1] < rows[1] and high[1] > rows[0]
        assert 0.8 * low[2] < separate < high[2] and 0.8 * low[3] < tied < high[3]
        if keep > 0.25:  # the separate form is the worse one on every draw; with few entries seen on most
            assert all(v[2] > 1.5 * v[3] for v in found[keep])
    assert sum(v[2] > v[3] for v in found[0.25]) >= 9


@pytest.mark.parametrize(
    ("keep", "separate", "tied"), [(0.75, 0.079, 0.018), (0.5, 0.155, 0.032), (0.25, 0.323, 0.110)]
)
def test_completion_errors(data, keep, separate, tied):
    errors = [completions_of(d, keep, generator(i, "test"), 1024) for i, d in enumerate(data)]
    fill, ours, theirs, unrolled, best = (mean(list(values)) for values in zip(*errors, strict=True))
    assert fill == pytest.approx(1.0, abs=0.05)
    assert ours == pytest.approx(separate, rel=0.06) and theirs == pytest.approx(tied, rel=0.08)
    assert best < theirs < ours < fill and best < unrolled < 1.2 * theirs


def test_completion_error_counts_gaps_only_and_is_against_the_clean_data():
    d = LowRank(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(3, 1), 1.0)
    kept = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    estimate = torch.tensor([[100.0, 1, 2], [100, 100, 3]])
    assert completion_error(d, estimate, kept) == pytest.approx((1 + 4 + 9) / 3)


def test_a_wide_tied_form_is_the_conditional_mean(data):
    """Derived: B B~^T (B~ B~^T)^-1 x~ = K_{:,K} K_{K,K}^-1 x_K, K = B B^T; error in the gaps .119 against the observed
    data with K = S, 2.2 with a random B, the noise itself .09."""
    d = data[0]
    value, vector = torch.linalg.eigh(d.covariance)
    root = vector * value.sqrt()
    part = LowRank(d.clean[:300], d.observed[:300], d.truth, d.sigma)
    kept = draw_kept(300, 64, 0.5, generator(0, "wide"))
    ours = tied_encode(root, part.observed, kept) @ root.T
    torch.testing.assert_close(ours, conditional_mean(d.covariance, part.observed, kept), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours * kept, part.observed * kept, rtol=1e-8, atol=1e-9)  # the identity on kept entries
    against_observed = LowRank(part.observed, part.observed, d.truth, d.sigma)
    assert completion_error(against_observed, ours, kept) == pytest.approx(0.119, rel=0.06)
    b = random(64, 64)
    random_b = conditional_mean(b @ b.T, part.observed, kept)
    assert completion_error(against_observed, random_b, kept) == pytest.approx(2.2, rel=0.25)
    full = torch.ones_like(kept)
    torch.testing.assert_close(tied_encode(root, part.observed, full) @ root.T, part.observed, rtol=1e-8, atol=1e-9)


# ---- identity, conditioning, unrolling -------------------------------------------------------------------------------


def test_identity_failure():
    found = questions.identity_failure(0, 30)
    vanilla = dict(zip(found["widths"], found["gains"]["vanilla"], strict=True))
    assert vanilla[8] > 8.8 and vanilla[8] > vanilla[16] > 2 and abs(vanilla[64]) < 1e-9 and abs(vanilla[96]) < 1e-9
    for name in ("denoising", "masked, keep 0.5", "unrolled, 1 step"):
        assert found["gains"][name][-1] > 4, name
    assert vanilla[4] < 0 and all(gains[0] < 0 for gains in found["gains"].values())  # half of the pattern is lost


def test_conditioning_peaks_at_the_rank():
    """200 masks of exactly |K| entries: median condition; reconstruction error against the clean data, median and mean
    (the mean at |K| = r is the mean of a heavy tail: 94 there, ours differs by the draw)."""
    found = questions.conditioning(0)
    derived = {
        64: (1.0, 0.010, 0.011),
        32: (1.9, 0.023, 0.026),
        16: (3.4, 0.065, 0.086),
        12: (5.4, 0.12, 0.18),
        10: (7.9, 0.25, 0.53),
        9: (11, 0.46, 2.2),
        8: (26, 2.1, 94),
        6: (6.4, 0.45, 0.83),
    }
    for size, (condition, median, average) in derived.items():
        i = found["sizes"].index(size)
        assert found["condition"][i][1] == pytest.approx(condition, rel=0.2), size
        assert found["pinv"][i][0] == pytest.approx(median, rel=0.35), size
        if size > 9 or size < 8:
            assert found["pinv"][i][1] == pytest.approx(average, rel=0.35), size
    peak, ridge = found["sizes"].index(8), found["ridge 0.01"]
    assert found["pinv"][peak][1] > 20 and found["pinv"][peak][1] > 10 * found["pinv"][peak][0]
    assert max(error for _, error in ridge) < 1  # a ridge takes the peak away
    assert ridge[0][1] == pytest.approx(found["pinv"][0][1], rel=0.05)  # and costs nothing with all entries


def test_error_per_coordinate_of_an_orthonormal_basis():
    """Derived: noise sigma^2 r / |K| per coordinate, for |K| well above r."""
    b = torch.linalg.qr(random(256, 4)).Q
    noise = 0.3 * random(2000, 256, seed=1)
    for seen in (64, 128, 256):
        kept = draw_exactly(2000, 256, seen, generator(0, seen))
        error = float((tied_encode(b, noise, kept) @ b.T).square().mean())
        assert error == pytest.approx(0.09 * 4 / seen, rel=0.12)


def test_steps_towards_the_pseudo_inverse():
    """Distances 4.9, .80, 3.9e-3 and below 1e-13 after 1, 5, 20 and 100 steps at condition 1.9."""
    found = questions.unrolling(0)
    error = dict(zip(found["steps"], found["error"], strict=True))
    assert error[1] == pytest.approx(4.9, rel=0.3) and error[5] == pytest.approx(0.80, rel=0.5)
    assert 1e-3 < error[20] < 1.6e-2 and error[100] < 1e-13
    torch.testing.assert_close(spectral_factor(torch.tensor([0.0, 1.0, 0.5]), 1.0, 2), torch.tensor([0.0, 1, 0.4375]))
    gains = dict(zip(found["wide steps"], found["gains"], strict=True))
    assert max(gains.values()) > 8.5 and gains[500] < 0.5  # early stopping purifies, many steps are the identity


def test_one_step_at_unit_singular_values_is_the_identity():
    """Nothing keeps small singular values small: with eta s^2 = 1 everywhere one step copies exactly."""
    b, x = torch.linalg.qr(random(9, 9)).Q, random(5, 9, seed=1)
    torch.testing.assert_close(unrolled_encode(b, x, torch.ones(5, 9).double(), 1.0, 1) @ b.T, x)


def test_mask_dependence_and_update_coverage():
    found = questions.mask_dependence(0)
    assert found["separate"] < 1e-25 and found["tied"] > 0.05 and found["unrolled"] > 0.02
    for name, (encoder, decoder) in questions.update_coverage().items():
        assert (encoder, decoder) == (0, 1), name
    many = questions.update_coverage(batch=32)
    assert all(math.isnan(v[0]) for v in many.values())  # over a batch nothing is dropped everywhere


def test_angles():
    u = torch.linalg.qr(random(9, 3)).Q
    torch.testing.assert_close(angles(u, u @ random(3, 3)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    plane = torch.eye(4, dtype=torch.float64)
    turned = plane[:, :2].clone()
    turned[:, 1] = torch.tensor([0, math.cos(1e-9), math.sin(1e-9), 0], dtype=torch.float64)
    assert float(angles(plane[:, :2], turned)[0]) == pytest.approx(math.degrees(1e-9), rel=1e-6)  # arccos would say 0
    assert float(angles(plane[:, :2], plane[:, 2:])[0]) == pytest.approx(90)


def test_data_are_centered_with_unit_signal():
    d = low_rank(3)
    assert d.observed.mean(0).abs().max() < 1e-12
    assert float(d.clean.var()) == pytest.approx(1, rel=0.05)
    assert float((d.observed - d.clean).var()) == pytest.approx(0.09, rel=0.02)
    assert torch.equal(d.clean, low_rank(3).clean) and not torch.equal(d.clean, low_rank(4).clean)


# ---- training, flags -------------------------------------------------------------------------------------------------

SMALL = dict(count=1024, m=16, rank=3)


def test_training_reaches_the_closed_form():
    d = low_rank(0, **SMALL)
    s = d.covariance
    model = train(Separate(16, 3, generator(0)), d, keep=0.5, steps=1200, lr=1e-2)
    a, b = separate_optimum(s, 0.5, 3)
    w = model.b.detach() @ model.a.detach()
    assert separate_loss(b @ a, s, 0.5) < separate_loss(w, s, 0.5) < 1.02 * separate_loss(b @ a, s, 0.5)
    assert angles(model.b.detach(), b)[0] < 6


def test_trained_tied_form_finds_pcas_subspace_and_stays_conditioned():
    d = low_rank(0, **SMALL)
    model = train(Tied(16, 3, generator(0)), d, keep=0.6, at_least=6, steps=400, lr=1e-2)
    b = model.b.detach()
    assert angles(b, top_eigenvectors(d.covariance, 3))[0] < 6
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
    with pytest.raises(UserError, match="16 of 16 is the identity"):
        Tied(16, 16, generator(0))


def test_the_tied_loss_does_not_depend_on_the_basis():
    """So settling B by QR changes nothing but its condition number."""
    b, x, kept = random(9, 3), random(20, 9, seed=1), draw_kept(20, 9, 0.6, generator(0), at_least=4)
    q = torch.linalg.qr(b).Q
    torch.testing.assert_close(tied_encode(b, x, kept) @ b.T, tied_encode(q, x, kept) @ q.T, rtol=1e-7, atol=1e-9)


def test_a_wide_unrolled_form_copies_after_vanilla_training_and_purifies_after_masked_training():
    d = low_rank(0, **SMALL)
    full = torch.ones(1, 16, dtype=torch.float64)
    gains = {}
    for name, task in (("vanilla", {}), ("noise", {"noise": 0.09}), ("masked", {"keep": 0.5})):
        model = train(Unrolled(16, 16, generator(0), 3), d, steps=400, lr=1e-2, **task)
        with torch.no_grad():
            gains[name] = gain_db(d, model(d.observed, full))
            latent = unrolled_encode(model.b, d.observed, full, 0.5 * model.eta, 3)
            rescaled = gain_db(d, latent @ model.b.T)
    assert gains["vanilla"] < 0.5 and gains["noise"] > 2
    assert rescaled > 2 and rescaled > gains["masked"] + 1  # all rows: B^T B is 1 / keep times as large


def test_training_is_a_function_of_its_seed():
    d = low_rank(0, **SMALL)
    first, again, other = (train(Separate(16, 3, generator(0)), d, keep=0.5, steps=3, seed=s).a for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_only_flags_tell_a_zero_from_a_gap():
    x, gap = random(4, 16), torch.ones(4, 16, dtype=torch.float64)
    x[:, 2] = 0
    full = gap.clone()
    gap[:, 2] = 0
    for flags in (False, True):
        model = Network(16, 32, generator(0), flags=flags)
        changed = float((model(x, full) - model(x, gap)).detach().abs().max())
        assert (changed > 1e-3) if flags else (changed == 0)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_one_page_that_loads_nothing(tmp_path):
    out = tmp_path / "page.html"
    code, text = run_command(
        "studies", "linear-autoencoder", "--seeds", 1, "--steps", 6, "--out", out, log=tmp_path / "l"
    )
    assert code == 0, text
    html = out.read_text()
    images = re.findall(r'src="(.*?)"', html)
    assert len(images) == 7 and all(i.startswith("data:image/png;base64,") for i in images)
    assert all(base64.b64decode(i.split(",")[1]).startswith(b"\x89PNG") for i in images)
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html
    assert "9/9" in text and "derived" in text and "8.93" in text and "8.93" in html
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in ("", ".html")] == []


def test_messages(tmp_path):
    code, text = run_command("studies", "linear-autoencoder", "--seeds", 0, log=tmp_path / "l")
    assert code == 2 and "must be at least 1" in text and "Traceback" not in text
    with pytest.raises(UserError, match="no mask of 4 entries can keep at least 5"):
        draw_kept(3, 4, 0.5, generator(0), at_least=5)
