"""Questions about self-supervised learning, each answered by a table of runs and one figure: `python -m studies`."""

from .augmentation import STUDY as AUGMENTATION
from .autoencoder import STUDY as AUTOENCODER
from .decoder import STUDY as DECODER
from .dropout import STUDIES as DROPOUT
from .first import STUDY as FIRST
from .label_free import STUDY as LABEL_FREE
from .projector import STUDY as PROJECTOR
from .scale import STUDY as SCALE
from .stability import STUDY as STABILITY
from .study import Study

_ALL = (FIRST, PROJECTOR, AUGMENTATION, SCALE, STABILITY, LABEL_FREE, DECODER, AUTOENCODER, *DROPOUT)
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
