"""How often the true patch is found among candidates of held-out images: a section of the report."""

from torch import Tensor

from common.backbones import BackboneSpec
from common.html import table
from common.rng import generator
from eval.features import frozen, normalizer

from .loss import draw_negatives, info_nce_all, info_nce_sampled, positives, turned
from .model import CPC


def held_out(
    model: CPC, store, spec: BackboneSpec, *, crop: int, batch: int, count: int, seed: int, limit: int = 1000
) -> dict[int, dict[str, float]]:
    """offset -> {"sampled", "all"}, the retrieval on the middle crops of test images without jitter, and their chance
    levels {"sampled chance", "all chance"}; negatives: drawn from, or all of, the patches of `batch` images at a time.
    """
    batch = min(batch, len(store))
    device = next(model.parameters()).device
    normalize = normalizer(spec.mean, spec.std, device)
    found = {o: dict.fromkeys(("sampled", "all", "all chance"), 0.0) for o in model.offsets}
    batches = max(1, min(limit, len(store)) // batch)
    directions = len(model.contexts)
    with frozen(model):
        for i in range(batches):
            images = store.eval_images(i * batch, (i + 1) * batch, spec.image_size)
            compared, predictions, _ = model(normalize(_middle(images, crop)))
            compared, stream = compared.float(), generator(seed, "held out", i)
            for direction, prediction in enumerate(predictions):
                candidates = turned(compared, direction)
                rows, columns = candidates.shape[1:3]
                sizes = [batch * (rows - o) * columns for o in model.offsets]
                candidates = candidates.flatten(0, 2)
                for o, part in zip(model.offsets, prediction.split(sizes), strict=True):
                    own, weight = (x.to(device) for x in positives(batch, rows, columns, (o,)))
                    drawn = draw_negatives(batch, batch, rows, columns, (o,), count, stream).to(device)
                    share = 1 / (batches * directions)
                    sampled = info_nce_sampled(part, candidates, own, drawn, weight)[1]["retrieval"]
                    found[o]["sampled"] += float(sampled) * share
                    found[o]["all"] += float(info_nce_all(part, candidates, own, weight)[1]["retrieval"]) * share
                    found[o]["all chance"] += share / len(candidates)
    return {o: {**values, "sampled chance": 1 / (1 + count)} for o, values in found.items()}


def _middle(images: Tensor, size: int) -> Tensor:
    top, left = ((n - size) // 2 for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def sentence(found: dict[int, dict[str, float]]) -> str:
    """One line: the mean over offsets, and how many times chance it is."""
    mean = {name: sum(values[name] for values in found.values()) / len(found) for name in next(iter(found.values()))}
    parts = [
        f"{100 * mean[kind]:.1f} % {text} ({mean[kind] / mean[f'{kind} chance']:.1f} times chance)"
        for kind, text in (("sampled", "of positives beat the sampled negatives"), ("all", "beat all other patches"))
    ]
    return f"held-out retrieval: {', '.join(parts)}"


def rows_of(found: dict[int, dict[str, float]]) -> list[dict]:
    """Rows of the result card: the mean over offsets, against sampled negatives and against all patches."""
    rows = []
    for kind, against in (("sampled", "drawn negatives"), ("all", "all patches")):
        value, chance = (100 * sum(v[name] for v in found.values()) / len(found) for name in (kind, f"{kind} chance"))
        text = f"Test images: share of predictions whose true patch beats {against}; mean over offsets {tuple(found)}."
        row = {"protocol": "retrieval", "target": against, "metric": "top-1", "value": value}
        rows.append({**row, "settings": {"offsets": list(found), "chance": chance}, "text": text, "baselines": {}})
    return rows


def section(found: dict[int, dict[str, float]], stride: int, patch: int) -> tuple[str, str]:
    """(title, HTML) for the report."""
    rows = []
    for o, values in found.items():
        shared = max(0, patch - o * stride)
        cells = [f"{o}", f"{shared} px" if shared else "none"]
        for kind in ("sampled", "all"):
            chance = values[f"{kind} chance"]
            cells += [f"{100 * values[kind]:.1f} %", f"{100 * chance:.2g} %", f"{values[kind] / chance:.1f}"]
        rows.append(tuple(cells))
    head = ["rows below", "shared rows of pixels"]
    for kind in ("sampled negatives", "all patches"):
        head += [f"beats {kind}", "chance", "times chance"]
    text = "How often the true patch has the highest score, on test images with nothing random. A tie is a miss."
    body = f'<p class="muted">{text}</p>' + table(head, rows, numeric=tuple(range(2, 8)))
    return "Retrieval on held-out images", body
