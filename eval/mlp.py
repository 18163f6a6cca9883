"""A classifier with one hidden layer on frozen features: what a line through them cannot read.

The learning rate is chosen as for the linear probe, on a tenth of the training images; the test set is read once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.rng import generator
from eval.features import Standardized, frozen, place, standardized
from eval.linear import (
    MIN_STEPS,
    ProbeResult,
    chosen_rate,
    probe_batches,
    ranked,
    trained_settings,
    validation_split,
)
from eval.setup import RAW, Candidate, EvalSetup, Row, accuracy_rows, top1

HIDDEN = 512
LEARNING_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01)
EPOCHS, BATCH_SIZE = 20, 256


def mlp_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int | None = None,
    rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Linear-ReLU-linear with 512 hidden units on cached features: `train_x` [N, D], `train_y` [N], `test_x` [M, D],
    `test_y` [M].

    Each rate trains on nine tenths of the training set; the one with the best top-1 on the rest (the smaller one on a
    tie) trains again on all of it. Features are standardized by what trains. Deterministic in `seed`. Raises UserError
    for fewer than 20 images.
    """
    x, y = place(train_x, device), train_y.to(device)
    classes = num_classes or int(max(train_y.max(), test_y.max())) + 1
    fit, held_out = (part.to(device) for part in validation_split(train_y, seed))
    fit_x = standardized(x, fit, device=device)
    held_x = fit_x.of(x, held_out)
    validation = {}
    for rate in rates:
        network = train_mlp(fit_x, y[fit], rate, num_classes=classes, epochs=epochs, seed=seed)
        validation[rate] = top1(rank(network, held_x)[:, 0], y[held_out])
    best = max(rates, key=lambda rate: (validation[rate], -rate))
    whole = standardized(x, device=device)
    network = train_mlp(whole, y, best, num_classes=classes, epochs=epochs, seed=seed)
    ranking = rank(network, whole.of(test_x)).cpu()
    return ProbeResult(top1(ranking[:, 0], test_y), best, validation, ranking)


def train_mlp(x: Standardized, y: Tensor, rate: float, *, num_classes: int, epochs: int, seed: int) -> nn.Module:
    """Adam with a cosine to 0 on `x` [N, D], `y` [N], for `epochs` or for more where these are fewer than `MIN_STEPS`
    steps; no decay. Initial weights and order are functions of the seed; a partial last batch is dropped."""
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(generator(seed, "mlp init").initial_seed())
        network = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes)).to(x.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for rows, factor in probe_batches(len(x), epochs=epochs, batch_size=BATCH_SIZE, seed=seed, device=x.device):
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    return network


def rank(network: nn.Module, x: Standardized, chunk: int = 8192) -> Tensor:
    """The most likely classes, int64 [N, n], as `linear.ranked`."""
    with frozen(network):
        return torch.cat([ranked(network(part)) for part in x.split(chunk)])


def protocol(setup: EvalSetup, candidate: Candidate) -> list[Row]:
    """`mlp_probe` of the label. Not of raw pixels, whose thousands of inputs would take most of the time."""
    if candidate.name == RAW:
        return []
    data = setup.labeled(candidate)
    rates = LEARNING_RATES
    result = mlp_probe(*data, num_classes=setup.num_classes, rates=rates, seed=setup.seed, device=setup.device)
    n = len(data.train_y)
    settings = trained_settings(
        setup,
        n,
        optimizer="Adam",
        hidden=HIDDEN,
        standardised=True,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        min_steps=MIN_STEPS,
        learning_rates=list(rates),
    )
    text = (
        f"Classifier with one hidden layer of {HIDDEN} ReLU units on cached features ({setup.geometry}, no "
        f"augmentation), standardized by training statistics; Adam, cosine, no weight decay, batch {BATCH_SIZE}, "
        f"{EPOCHS} epochs (at least {MIN_STEPS} steps); learning rate out of {len(rates)} from "
        f"{min(rates):g} to {max(rates):g}, chosen on a tenth of the {n:,} training images, then "
        f"trained on all of them; tested once on {len(data.test_y):,}."
    )
    chosen = chosen_rate("learning_rate", result)
    return accuracy_rows(setup, "mlp", result.ranking, data.test_y, settings, text, chosen)
