"""The judge's figures for a set of pictures: what the build logs, and what the README quotes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from reward.feedback import SCORES
from tinyworld.judge import KINDS, judge


def figures_of(pictures: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Means over (N, 64, 64, 3) pictures: the judge's scores, share satisfied, and share with each kind of flaw."""
    verdicts = [judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    figures = {name: float(np.mean([verdict.scores[name] for verdict in verdicts])) for name in SCORES}
    figures["satisfied"] = float(np.mean([verdict.satisfied for verdict in verdicts]))
    flaws = Counter(flaw for verdict in verdicts for flaw in verdict.flaws)
    figures |= {flaw: flaws[flaw] / len(verdicts) for flaw in KINDS}
    return {name: round(value, 4) for name, value in figures.items()} | {"n": len(verdicts)}
