"""An evaluation on each of some ranks, for test_evaluate.py."""

import numpy as np

from fastsskd import distributed
from fastsskd.evaluation.evaluate import rate


def save_scores(clips: str, checkpoint: str, out: str) -> None:
    """Three crops of each clip; the first rank writes what all of them know."""
    distributed.start("cpu", 60.0)
    rated = rate([checkpoint], clips, crops=3, batch_size=2, workers=1)
    if distributed.rank() == 0:
        np.savez(out, probs=rated.clips.probs, key=rated.clips.key)
