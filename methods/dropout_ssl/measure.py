"""Measurements on the way: a network in eval mode with only the noise layer on, on held-out and on training records."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError

from .loss import alignment
from .metrics import (
    calibration_error,
    centered,
    cka,
    contrast,
    cosine,
    geometry,
    output_terms,
    prototypes,
    similarity_of_pairs,
)
from .model import Network
from .noise import VAE, mask_keys

EPOCHS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # study design: 0, 1, 2, 5, 10, 20 ...
TEMPERATURES = (0.1, 0.5)
CHUNK = 512


def measured_steps(records: int, pool: int, per_step: int, total: int) -> list[int]:
    """Steps after which A1 has seen its `records` 0, 1, 2, 5 ... times, the last one, and where A10 has seen all of the
    `pool` once: the same steps for all arms of a budget."""
    found = {min(math.ceil(e * records / per_step), total) for e in EPOCHS}
    return sorted(found | {min(pool // per_step, total), total})


class Measure:
    """Called after some steps; its state, the features of the last call, belongs to the checkpoint.

    sets: name -> (inputs, labels, ids) of "held-out" and "train, measured" records. `own`: measure under the arm's own
    noise too, under the same names with kind "own".
    """

    def __init__(
        self,
        network: Network,
        sets: dict[str, tuple[Tensor, Tensor, Tensor]],
        *,
        seed: int,
        masks: int,
        own: bool,
        batch: int,
    ):
        if masks < 2:
            raise UserError(f"--masks {masks}: two masks of a record are needed to compare them")
        self.network, self.sets, self.seed, self.masks, self.own, self.batch = network, sets, seed, masks, own, batch
        self._before: dict[str, Tensor] = {}

    def state_dict(self) -> dict:
        return {name: h.cpu() for name, h in self._before.items()}

    def load_state_dict(self, state: dict) -> None:
        self._before = dict(state)

    def __call__(self, epoch: float) -> dict[str, dict[str, float]]:
        """kind -> measurements: "held-out" and "train" under the common noise, "own" held-out under the arm's."""
        was_training = self.network.training
        self.network.eval()  # BatchNorm's statistics are frozen; the noise layer depends on keys, not on the mode
        try:
            found = {"held-out": self._of("held-out"), "train": self._of("train, measured")}
            if self.own:
                found["own"] = self._of("held-out", common=False)
            if isinstance(self.network.noise, VAE):
                found["own"]["sigma"] = float(self.network.noise.sigma)
            found["held-out"] |= self._drift(epoch) | self._gradients() | self._clean()
        finally:
            self.network.train(was_training)
        return {kind: {k: v for k, v in values.items() if math.isfinite(v)} for kind, values in found.items()}

    @torch.no_grad()
    def noisy(self, name: str, copy: int, epoch: int = 0, common: bool = True) -> tuple[Tensor, Tensor]:
        """(features [N, D], log-probabilities [N, K]) of a set under one mask for each record."""
        inputs, _, ids = self.sets[name]
        features, log_p = [], []
        for x, i in zip(inputs.split(CHUNK), ids.split(CHUNK), strict=True):
            out = self.network(x, mask_keys(self.seed, name, epoch, i, copy), common=common)
            features.append(out.features.float())
            log_p.append(F.log_softmax(out.logits.float(), dim=1))
        return torch.cat(features), torch.cat(log_p)

    def _of(self, name: str, common: bool = True) -> dict[str, float]:
        y = self.sets[name][1]
        drawn = [self.noisy(name, copy, common=common) for copy in range(self.masks)]
        h, log_p = torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn])
        found = similarity_of_pairs(h, y) | geometry(h) | output_terms(log_p, y)
        for temperature in TEMPERATURES:
            found |= contrast(h, y, temperature)
        return found | prototypes(h, log_p, self.network.head.weight.detach(), y)

    def _drift(self, epoch: float) -> dict[str, float]:
        """The post's m_1 ... m_n literally: cosine of features now and at the last measurement, mask fresh or the same.

        The second reflects only the change of the weights; the difference is due to the masks.
        """
        now = {
            "fixed": self.noisy("held-out", self.masks)[0],
            "fresh": self.noisy("held-out", self.masks, epoch=1 + math.ceil(epoch))[0],
        }
        found = {}
        if self._before:
            before = centered(self._before["fixed"][None].to(now["fixed"].device))[0]
            for name, h in now.items():
                found[f"drift_{name}"] = float(F.cosine_similarity(centered(h[None])[0], before, dim=1).mean())
            found["cka"] = cka(before, now["fixed"])
        self._before = {"fixed": now["fixed"]}
        return found

    def _gradients(self) -> dict[str, float]:
        """Cosines of the supervised gradient with those of losses without labels, over the encoder's weights."""
        x, y, ids = (t[: self.batch] for t in self.sets["train, measured"])
        weights = [w for w in self.network.backbone.parameters() if w.requires_grad]
        first, second = (self.network(x, mask_keys(self.seed, "gradients", 0, ids, c), common=True) for c in (0, 1))
        supervised = 0.5 * (F.cross_entropy(first.logits, y) + F.cross_entropy(second.logits, y))
        losses = {"labels": supervised, "alignment": alignment(first.features, second.features)}
        losses |= {"nt_xent": nt_xent_here(first.features, second.features, 0.5)}
        gradients = {}
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            gradients[name] = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        return {f"gradient_{name}": cosine(gradients["labels"], gradients[name]) for name in ("alignment", "nt_xent")}

    @torch.no_grad()
    def _clean(self) -> dict[str, float]:
        x, y, _ = self.sets["held-out"]
        log_p = torch.cat([F.log_softmax(self.network(part).logits.float(), dim=1) for part in x.split(CHUNK)])
        return {"accuracy": 100 * float((log_p.argmax(1) == y).double().mean()), "ece": calibration_error(log_p, y)}


def nt_xent_here(h1: Tensor, h2: Tensor, temperature: float) -> Tensor:
    """`loss.nt_xent` on this process alone: measurements are made by one process while the others wait."""
    n = len(h1)
    z = F.normalize(torch.cat([h1, h2]).float(), dim=1)
    scores = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(scores, (torch.arange(2 * n, device=z.device) + n) % (2 * n))


@torch.no_grad()
def clean_outputs(network: nn.Module, inputs, count: int) -> tuple[Tensor, Tensor]:
    """(features [N, D], log-probabilities [N, K]) of all records, without noise; `inputs(rows)` makes a chunk."""
    was_training = network.training
    network.eval()
    parts = [network(inputs(rows)) for rows in torch.arange(count).split(CHUNK)]
    network.train(was_training)
    return (
        torch.cat([out.features.float() for out in parts]),
        torch.cat([F.log_softmax(out.logits.float(), dim=1) for out in parts]),
    )
