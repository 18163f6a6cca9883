"""The conditions of each hypothesis, and what the runs make of them: a verdict for the weak and the strong form.

What counts as support was written down first: the `CONDITIONS` below. Those on A0, A1 and A2 are older than any run;
those on A4 and A5 and the fewest seeds were settled after a smoke run. A condition holds when the 95 % interval of its
paired difference lies on the right side of zero, fails when it lies on the other side, and is open otherwise. Nothing
here is chosen by looking at results.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from common.rng import generator

# Student's t, 97.5 %, by degrees of freedom from 1 on.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)

NAMES = {
    "V": "V: share of the variance of h that masks make",
    "g_inst": "g_inst: same record − same class, cosine",
    "g_cls": "g_cls: same class − other class, cosine",
    "alignment": "alignment: squared distance of two masks",
    "nt_xent_all_0.5": "NT-Xent / chance, all negatives",
    "nt_xent_other_0.5": "NT-Xent / chance, other classes",
    "nt_xent_same_0.5": "NT-Xent / chance, same class",
    "consistency": "consistency: E KL(p_geo ‖ p_m)",
    "ce_geo": "cross-entropy of p_geo",
    "rank": "effective rank of h",
    "gradient_nt_xent": "cos(∇ labels, ∇ NT-Xent)",
    "gradient_alignment": "cos(∇ labels, ∇ alignment)",
    "accuracy": "test accuracy, %",
    "sigma": "sigma of the VAE layer",
}
CORE = ("A0", "A1", "A2")
OF_CORE = ("nt_xent_other_0.5", "gradient_nt_xent", "gradient_alignment")
"""What is read of these arms alone."""
SUMMARY = ("V", "g_inst", "nt_xent_same_0.5", "consistency", "accuracy")
START = "its start"
TENTH = "a tenth of its start"
FEWEST = "the gap with most labels"


@dataclass(frozen=True)
class Condition:
    """`arm`'s value of `measure` at the end minus `other`'s is above zero ("+"), below ("-"), not above ("not +") or
    neither ("=").

    other: an arm; START or TENTH, the same run before training; "", zero; FEWEST, for which it is the gap A1 - A0 with
    the fewest labels minus that with the most.
    """

    arm: str
    measure: str
    other: str
    sign: str
    kind: str = "held-out"

    def sentence(self) -> str:
        name = NAMES[self.measure].split(":")[0]
        if self.other == FEWEST:
            return f"A1 − A0, {name}: larger with the fewest labels than with the most"
        against = {START: "before training", "": "0", TENTH: TENTH}.get(self.other, f"in {self.other}")
        comparison = {"+": "higher than", "-": "lower than", "not +": "not higher than", "=": "the same as"}[self.sign]
        return f"{self.arm}: {name} {comparison} {against}"


def against(measure: str, sign: str, *others: str) -> list[Condition]:
    return [Condition("A1", measure, other, sign) for other in others]


CONDITIONS: dict[str, tuple[str, list[Condition]]] = {
    "weak": (
        "Weak form: the noise makes predictions consistent, and classes contrast",
        [*against("consistency", "-", "A0", "A2"), *against("nt_xent_other_0.5", "-", START, "A0")],
    ),
    "strong": (
        "Strong form: instance-level contrast. Two masks of a record are closer than two records of its class",
        [*against("g_inst", "+", START, "A0", "A2"), *against("nt_xent_same_0.5", "-", START, "A0", "A2")],
    ),
    "H1": (
        "H1. Representations of a record under different masks converge",
        [*against("V", "-", START, "A0", "A2", "A9"), *against("g_inst", "+", START, "A0", "A2", "A9")],
    ),
    "H2": (
        "H2. The labels' loss lowers a self-supervised loss that nobody optimises",
        [
            *against("nt_xent_all_0.5", "-", START, "A0"),
            *against("nt_xent_same_0.5", "-", START, "A0"),
            *against("alignment", "-", START, "A0"),
            *against("gradient_nt_xent", "+", ""),
            *against("gradient_alignment", "+", ""),
        ],
    ),
    "H3": (
        "H3. Zipped masks in one batch do what many epochs do",
        [Condition("A6", m, "A1", "=") for m in ("V", "g_inst", "accuracy")],
    ),
    "H4": (
        "H4. Gaussian or VAE noise can replace dropout",
        [
            *(Condition(arm, m, "A0", s) for arm in ("A3", "A4") for m, s in (("V", "-"), ("g_inst", "+"))),
            Condition("A4", "sigma", TENTH, "+", kind="own"),
        ],
    ),
    "H5": (
        "H5. A free lunch: the gain of dropout is largest with few labels, an explicit loss adds little",
        [*against("accuracy", "+", "A0", "A2", FEWEST), Condition("A5", "accuracy", "A1", "not +")],
    ),
}


def abridged(card: dict) -> dict:
    """The card with the measurements that are read: those of `NAMES` on held-out records (the accuracy is that on test
    records), and sigma of an arm's own noise."""
    unread = ("accuracy", "sigma", *(() if card["config"]["arm"] in CORE else OF_CORE))
    read = {"held-out": [name for name in NAMES if name not in unread], "own": ["sigma"], "train": []}
    lines = []
    for line in card["measurements"]:
        if found := {name: line[name] for name in read[line["kind"]] if name in line}:
            lines.append({"step": line["step"], "kind": line["kind"], **found})
    return {**card, "measurements": lines}


@dataclass(frozen=True)
class Results:
    """Result cards by (variant, labels, seed); labels 0: all. `planned`: how many there will be."""

    about: str
    variants: tuple[str, ...]
    budgets: tuple[int, ...]
    cards: dict[tuple[str, int, int], dict]
    planned: int

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for _, _, seed in self.cards})

    def curve(self, variant: str, labels: int, measure: str, kind: str = "held-out") -> dict[int, dict[int, float]]:
        """seed -> {step: value}."""
        found = {}
        for seed in self.seeds:
            card = self.cards.get((variant, labels, seed))
            if card is not None:
                lines = [m for m in card["measurements"] if m["kind"] == kind and measure in m]
                found[seed] = {m["step"]: m[measure] for m in lines}
        return {seed: curve for seed, curve in found.items() if curve}

    def value(
        self,
        variant: str,
        labels: int,
        measure: str,
        kind: str = "held-out",
        *,
        first: bool = False,
        step: int | None = None,
    ) -> dict[int, float]:
        """seed -> the value at the end (or before training, or after `step`); accuracy is of the whole test set."""
        if measure == "accuracy" and not first and step is None:
            cards = {seed: self.cards.get((variant, labels, seed)) for seed in self.seeds}
            return {seed: card["evaluations"][0]["value"] for seed, card in cards.items() if card}
        curves = self.curve(variant, labels, measure, kind)
        if measure.startswith("gradient"):  # the sign matters on the way, not at the end, where gradients vanish
            return {seed: sum(c.values()) / len(c) for seed, c in curves.items()}
        if step is not None:
            return {seed: c[step] for seed, c in curves.items() if step in c}
        return {seed: c[(min if first else max)(c)] for seed, c in curves.items()}

    def pairs(self, condition: Condition, labels: int) -> list[float]:
        """Differences, paired by seed."""
        mine = self.value(condition.arm, labels, condition.measure, condition.kind)
        if condition.other == "":
            return list(mine.values())
        if condition.other == FEWEST:
            return self._shrinking(condition.measure)
        if condition.other in (START, TENTH):
            theirs = self.value(condition.arm, labels, condition.measure, condition.kind, first=True)
            theirs = {seed: v * (0.1 if condition.other == TENTH else 1) for seed, v in theirs.items()}
        else:
            theirs = self.value(condition.other, labels, condition.measure, condition.kind)
        return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]

    def _shrinking(self, measure: str) -> list[float]:
        budgets = sorted(self.budgets, key=lambda n: n or math.inf)
        if len(budgets) == 1:
            return []
        gaps = []
        for labels in (budgets[0], budgets[-1]):
            a, b = (self.value(arm, labels, measure) for arm in ("A1", "A0"))
            gaps.append({seed: a[seed] - b[seed] for seed in a if seed in b})
        return [gaps[0][seed] - gaps[1][seed] for seed in gaps[0] if seed in gaps[1]]


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval. One value has none: (value, -inf, inf)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = T[min(n - 1, len(T)) - 1] * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def bootstrap(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Paired bootstrap, 95 %: percentiles of the mean of resampled differences."""
    x = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(x), (draws, len(x)), generator=generator("bootstrap"))
    low, high = x[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def judge(condition: Condition, values: list[float]) -> str:
    """holds, fails, open, or not run."""
    if not values:
        return "not run"
    _, low, high = interval(values)
    if condition.sign in ("=", "not +"):  # a wide interval must not pass for equality: three seeds at least
        differs = low > 0 or (high < 0 and condition.sign == "=")
        return "fails" if differs else "holds" if len(values) >= 3 else "open"
    low, high = (low, high) if condition.sign == "+" else (-high, -low)
    return "holds" if low > 0 else "fails" if high < 0 else "open"


def verdict(results: Results, name: str, labels: int) -> tuple[str, list[tuple[Condition, list[float], str]]]:
    """(supported, refuted or undecided; each condition with its differences and what became of it)."""
    found = [(c, values, judge(c, values)) for c in CONDITIONS[name][1] for values in [results.pairs(c, labels)]]
    states = [state for *_, state in found if state != "not run"]
    if not states:
        return "not run", found
    return "refuted" if "fails" in states else "undecided" if "open" in states else "supported", found
