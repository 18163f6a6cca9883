"""What a study measures of a finished run besides its evaluation; the rows go into the run's card.

python -m studies.measure projector runs/study-projector/simclr-2-seed0
"""

import sys
from pathlib import Path

from common.cli import run_cli
from common.errors import UserError
from eval.card import FILE, merge_rows, read_card, save_card

from . import STUDIES
from .study import Study, measured_by


def measure(study: Study, directory: Path) -> None:
    """Raises UserError where the study measures nothing, or the run is not finished."""
    if study.measure is None:
        raise UserError(f"{study.name} measures nothing besides the evaluation")
    card = read_card(directory / FILE)
    card["evaluations"] = merge_rows(card["evaluations"], study.measure(directory, card))
    card["measured"] = [measured_by(study)]
    save_card(directory / FILE, card)


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in STUDIES:
        raise UserError(f"usage: python -m studies.measure NAME RUN_DIRECTORY; studies are {', '.join(STUDIES)}")
    measure(STUDIES[sys.argv[1]], Path(sys.argv[2]))


if __name__ == "__main__":
    run_cli(main)
