"""Linear probes on frames and on complete recordings (paper section 3.1), and retrieval on held-out sound.

A `Frames` holds features of every frame of a store. CPC's c_t, an untrained encoder's c_t and log-mel go through the
same probes; everything is selected on a tenth of the training *recordings*.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.rng import generator
from eval.features import standardizer
from eval.linear import (
    EPOCHS,
    LEARNING_RATES,
    MIN_STEPS,
    HeadBank,
    ProbeResult,
    linear_probe,
    validation_split,
)
from eval.setup import top1

from .audio import AudioStore, log_mel
from .loss import draw_negatives, info_nce, pool_matrix
from .model import CPC, AudioEncoder

LOG_MEL, RANDOM = "log-mel", "random init"
FEW_STEPS, FEW_RATE = 200, 0.1  # of the probes from 1 and 5 labels a class, which have nothing to choose a rate on


@dataclass
class Frames:
    """Features of all frames of a store: `x` [F, D], recording after recording, `counts` [N] frames each."""

    x: Tensor
    counts: Tensor

    def of(self, recordings: Tensor) -> Tensor:
        """bool [F]: frames of these recordings."""
        chosen = torch.zeros(len(self.counts), dtype=torch.bool)
        chosen[recordings] = True
        return chosen.repeat_interleave(self.counts)

    def spread(self, values: Tensor) -> Tensor:
        """[N] -> [F]: a recording's value for each of its frames."""
        return values.repeat_interleave(self.counts)

    def pooled(self) -> Tensor:
        """[N, 2 D]: mean and standard deviation over each recording's frames."""
        owner, shape = self.spread(torch.arange(len(self.counts))), (len(self.counts), self.x.shape[1])
        mean = torch.zeros(shape).index_add_(0, owner, self.x) / self.counts[:, None]
        square = torch.zeros(shape).index_add_(0, owner, (self.x - mean[owner]).square()) / self.counts[:, None]
        return torch.cat([mean, square.sqrt()], 1)


@torch.no_grad()
def extract(store: AudioStore, features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], batch: int = 64) -> Frames:
    """Frames of every complete recording. `features`: (waves [n, L], lengths [n]) -> ([n, T, D], frames [n])."""
    order = store.lengths.argsort()  # equal lengths together: little padding
    found: list[Tensor] = [torch.empty(0)] * len(store)
    for indices in order.split(batch):
        x, counts = features(*store.whole(indices))
        for i, row, count in zip(indices.tolist(), x.float().cpu(), counts.tolist(), strict=True):
            found[i] = row[:count].clone()
    return Frames(torch.cat(found), torch.tensor([len(x) for x in found]))


def contexts(encoder: AudioEncoder) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """c_t, from a zero state at the start of each recording."""
    encoder.eval()

    def features(waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        _, c, frames = encoder.encode(waves, lengths)
        return c, frames

    return features


def mel(rate: int, hop: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda waves, lengths: log_mel(waves, lengths, rate, hop=hop)


# ---- probes ----------------------------------------------------------------------------------------------------------


def frame_probe(
    train: Frames, train_y: Tensor, test: Frames, test_y: Tensor, *, seed: int, device: torch.device | str
) -> ProbeResult:
    """The paper's protocol: a linear classifier for every single frame, labels of recordings [N] and [M].

    As `eval.linear.linear_probe`, except that the tenth that chooses the learning rate is a tenth of the recordings:
    frames of one recording are too similar to be on both sides.
    """
    fit, held_out = (train.of(part).nonzero().flatten() for part in validation_split(train_y, seed))
    y, y_test = train.spread(train_y), test.spread(test_y)
    return linear_probe(train.x, y, test.x, y_test, seed=seed, device=device, split=(fit, held_out))


def few_label_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, per_class: int, draws: int, seed: int
) -> float:
    """Mean top-1 of linear classifiers trained on `per_class` recordings of each class, over `draws` random subsets.

    Features are standardized by all training recordings, whose labels are not used. 200 steps of Nesterov SGD at rate
    0.1, cosine, the subset as one batch: with so few labels there is nothing to choose a rate on.
    """
    normalize, classes = standardizer(train_x), int(max(train_y.max(), test_y.max())) + 1
    x, total = normalize(test_x), 0.0
    for number in range(draws):
        order = torch.randperm(len(train_y), generator=generator(seed, "few labels", number))
        chosen = torch.cat([order[train_y[order] == k][:per_class] for k in train_y.unique()])
        bank = HeadBank(x.shape[1], classes, 1)
        for step in range(FEW_STEPS):
            rate = torch.tensor([FEW_RATE * (1 - step / FEW_STEPS)])
            bank.step(normalize(train_x[chosen]), train_y[chosen], rate)
        total += top1(bank.rank(x)[:, 0], test_y)
    return total / draws


def held_out_probe(
    train_x: Tensor, train_y: Tensor, train_group: Tensor, test_x: Tensor, test_y: Tensor, test_group: Tensor, seed: int
) -> float:
    """Mean over groups of the top-1 on the group's test recordings of a probe trained on all others' recordings."""
    found = []
    for group in test_group.unique():
        keep, asked = train_group != group, test_group == group
        result = linear_probe(train_x[keep], train_y[keep], test_x[asked], test_y[asked], seed=seed)
        found.append(result.accuracy)
    return sum(found) / len(found)


# ---- retrieval -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval(model: CPC, store: AudioStore, cfg, speakers: Tensor | None) -> tuple[float, list[float], list[int]]:
    """(mean over steps, per step, anchors per step) of the share of held-out frames that are found, in percent.

    The training objective on the first window of every test recording, in store order, batches as in training.
    """
    model.eval()
    device = next(model.parameters()).device
    hits, anchors = torch.zeros(cfg.steps), torch.zeros(cfg.steps, dtype=torch.long)
    order = torch.arange(len(store)) if speakers is None else speakers.argsort(stable=True)
    for number, indices in enumerate(order.split(cfg.batch_size)):
        if len(indices) < 2:
            continue  # a single recording has no negatives
        lengths = store.lengths[indices].clamp(max=cfg.window)
        waves = store.cut(indices, torch.zeros_like(indices), cfg.window).to(device)
        z, _, predictions = model(waves, lengths)
        frames = model.encoder.frames(lengths)
        allowed = pool_matrix(cfg.negatives, len(indices), None if speakers is None else speakers[indices])
        draw = generator(cfg.seed, "held-out negatives", number)
        negatives = draw_negatives(allowed, frames, z.shape[1], cfg.negative_count, draw)
        _, parts = info_nce(z, predictions, frames, negatives, complete=cfg.complete_anchors)
        hits, anchors = hits + parts["hits"].cpu(), anchors + parts["anchors"].cpu()
    shares = [100 * h / max(a, 1) for h, a in zip(hits.tolist(), anchors.tolist(), strict=True)]
    reached = [s for s, a in zip(shares, anchors.tolist(), strict=True) if a]
    return sum(reached) / max(len(reached), 1), shares, anchors.tolist()


# ---- all of them -----------------------------------------------------------------------------------------------------


def compact_labels(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Class numbers 0 .. C - 1 for the integers of the columns, equal in both splits."""
    values = torch.cat([train, test]).unique()
    return torch.searchsorted(values, train), torch.searchsorted(values, test)


def probe_all(
    subjects: dict[str, tuple[Frames, Frames]],
    labels: dict[str, tuple[Tensor, Tensor]],
    *,
    draws: int,
    seed: int,
    device: torch.device | str,
    about: str,
    log: Callable[[str], None],
    save: Callable[[list[dict]], object] = lambda rows: None,
) -> tuple[list[dict], dict[str, dict[str, Tensor]]]:
    """(rows as `eval.protocols.evaluate` makes them, {label: {subject: frame predictions on test}}).

    subjects: name -> (training, test) frames, the trained encoder first, the baselines after it; labels: column ->
    (training, test) class numbers [N], [M]. `save` gets the rows after each subject.
    """
    (main, *_), names = subjects, list(labels)
    sizes = {"train_recordings": len(labels[names[0]][0]), "test_recordings": len(labels[names[0]][1])}
    sweep = dict(optimizer="SGD, Nesterov 0.9", schedule="cosine", weight_decay=0.0, batch_size=256, standardised=True)
    sweep |= dict(epochs=EPOCHS, min_steps=MIN_STEPS, learning_rates=list(LEARNING_RATES))
    sweep |= dict(selection="top-1 on a stratified tenth of the training recordings, then trained on all")
    chosen_as = (
        f"SGD with Nesterov momentum, batch 256, {EPOCHS} epochs (at least {MIN_STEPS} steps), learning rate out of "
        f"{len(LEARNING_RATES)} chosen on a tenth of the training recordings"
    )
    whole = "mean and standard deviation over the frames of a whole recording"
    rows: dict[tuple[str, str], dict] = {}
    said: dict[str, dict[str, Tensor]] = {name: {} for name in names}

    def put(subject: str, protocol: str, target: str, value: float, settings: dict, text: str, **more) -> None:
        if subject == main:
            row = {"protocol": protocol, "target": target, "metric": "top-1", "value": float(value)}
            row |= {"settings": {"features": about, **sizes, **settings}, "text": text, "baselines": {}, **more}
            rows[protocol, target] = row
        else:
            rows[protocol, target]["baselines"][subject] = float(value)

    for subject, (train, test) in subjects.items():
        pooled = train.pooled(), test.pooled()
        for target, (y, test_y) in labels.items():
            result = frame_probe(train, y, test, test_y, seed=seed, device=device)
            said[target][subject] = result.predictions
            chosen = {"learning_rate": result.learning_rate, "at_edge_of_sweep": result.at_edge}
            counts = f"{len(train.x):,} training frames, tested on {len(test.x):,}"
            text = f"The paper's protocol: a linear classifier for every single frame, without averaging; {chosen_as}."
            put(subject, "frame-linear", target, result.accuracy, sweep, f"{text} {counts}.", chosen=chosen)
        for target, (y, test_y) in labels.items():
            result = linear_probe(pooled[0], y, pooled[1], test_y, seed=seed, device=device)
            chosen = {"learning_rate": result.learning_rate, "at_edge_of_sweep": result.at_edge}
            text = f"Linear classifier on {whole}; {chosen_as}."
            put(subject, "utterance-linear", target, result.accuracy, sweep, text, chosen=chosen)
        for count in (1, 5):
            for target, (y, test_y) in labels.items():
                value = few_label_probe(pooled[0], y, pooled[1], test_y, per_class=count, draws=draws, seed=seed)
                text = (
                    f"Linear classifier on {whole}, trained on {count} labeled recording{'s' * (count > 1)} of each "
                    f"class: mean over {draws} random subsets; {FEW_STEPS} steps at rate {FEW_RATE:g}, nothing chosen."
                )
                settings = {"labels_per_class": count, "draws": draws, "steps": FEW_STEPS, "rate": FEW_RATE}
                put(subject, f"utterance-{count}-label{'s' * (count > 1)}", target, value, settings, text)
        if len(names) > 1:
            (target, group), text = names[:2], ""
            (y, test_y), (g, test_g) = labels[target], labels[group]
            value = held_out_probe(pooled[0], y, g, pooled[1], test_y, test_g, seed)
            text = (
                f"Linear classifier on {whole}: {target} of the test recordings of one {group} by a probe trained on "
                f"all others, mean over every {group}; {chosen_as}. The pretraining, without labels, heard all of them."
            )
            put(subject, f"utterance-held-out-{group}", target, value, {**sweep, "held_out": group}, text)
        save(list(rows.values()))
        log(f"evaluation: {subject}, {train.x.shape[1]} features a frame")
    return list(rows.values()), said
