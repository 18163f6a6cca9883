"""The objective on held-out images: a section of the report and a row of the result card."""

import torch

from common.html import table
from common.rng import generator
from common.views.recipe import ViewRecipe
from eval.features import frozen

from .config import Config
from .health import SIGNALS
from .loss import chance, draw_positions, multi_scale
from .model import AMDIM


@torch.no_grad()
def held_out(
    model: AMDIM, test, recipe: ViewRecipe, cfg: Config, device: torch.device, limit: int = 2000
) -> dict[str, float]:
    """The objective on views of test images, in this process alone, in eval mode: means over batches as in training."""
    batch, rows = min(cfg.batch_size, len(test)), []
    with frozen(model):
        for number in range(min(limit, len(test)) // batch):
            images = test.eval_images(number * batch, (number + 1) * batch, cfg.image_size).to(device)
            params = recipe.sample(batch, generator(cfg.seed, "held out", number)).to(device)
            f1, f5, f7, _ = model(*recipe(images, params))
            places = draw_positions(cfg.seed, -1 - number, batch).to(device)
            loss, parts = multi_scale(f1, f5, f7, places, clip=cfg.clip, penalty=cfg.penalty, alone=True)
            rows.append({"loss": loss, **parts})
    means = {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}
    return {"images": len(rows) * batch, "batch": batch, **means}


def held_out_section(found: dict[str, float]) -> tuple[str, str]:
    """(title, HTML) for the report: the objective on held-out images next to its chance levels."""
    levels = chance(found["batch"])
    rows = [(name, f"{found[name]:.4g}", f"{level:.4g}", SIGNALS[name]) for name, level in levels.items()]
    caption = (
        f"Views of {found['images']:,} test images, in batches of {found['batch']}, network in eval mode: retrieval is "
        f"{found['retrieval'] / levels['retrieval']:.0f} times chance. Chance of the loss is without the penalty."
    )
    return "Retrieval on held-out images", table(
        ("quantity", "test images", "by chance", "meaning"), rows, caption=caption, numeric=(1, 2)
    )


def held_out_row(found: dict[str, float]) -> dict:
    """Retrieval on held-out images as a row of the result card."""
    row = {"protocol": "retrieval", "target": "1-5", "metric": "top-1", "value": 100 * found["retrieval"]}
    text = f"Views of test images, eval mode: {SIGNALS['retrieval']}, among {found['batch']} images."
    settings = {"batch": found["batch"], "test_images": found["images"], "chance": 100 / found["batch"]}
    return {**row, "settings": settings, "text": text, "baselines": {}}
