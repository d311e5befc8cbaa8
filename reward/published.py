"""Figures that others published on RichHF-18K's test split (955 pictures), to stand beside ours.

"RAHF", "ResNet-50" and "CLIP" are those of the paper (arXiv 2312.10240, section 5.1); "public code" is what the first
author's re-implementation reports, ImageDoctor what its authors do. On other data they say nothing.
"""

from collections.abc import Mapping

SOURCE = "arXiv 2312.10240; re-implementation by its first author; ImageDoctor"

_RESNET, _CLIP = "ResNet-50 (paper)", "CLIP, fine-tuned (paper)"
_MULTI_HEAD, _AUGMENTED = "RAHF multi-head (paper)", "RAHF augmented prompt (paper)"
_PUBLIC, _IMAGE_DOCTOR = "RAHF multi-head (public code)", "ImageDoctor"


def _scores(plausibility, aesthetics, alignment, overall) -> Mapping[str, Mapping[str, float]]:
    """Scores in the paper's order of columns, each (PLCC, SRCC), or (PLCC,) where no more is known."""
    columns = {"plausibility": plausibility, "alignment": alignment, "aesthetics": aesthetics, "overall": overall}
    return {name: dict(zip(("plcc", "srcc"), pair, strict=False)) for name, pair in columns.items()}


def _maps(*values: float) -> Mapping[str, float]:
    return dict(zip(("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd"), values, strict=True))


SCORE_ROWS = {
    _RESNET: _scores((0.495, 0.487), (0.370, 0.363), (0.108, 0.119), (0.337, 0.308)),
    _CLIP: _scores((0.390, 0.378), (0.357, 0.360), (0.398, 0.390), (0.353, 0.352)),
    _MULTI_HEAD: _scores((0.666, 0.654), (0.605, 0.591), (0.487, 0.500), (0.582, 0.561)),
    _AUGMENTED: _scores((0.693, 0.681), (0.600, 0.589), (0.474, 0.496), (0.580, 0.562)),
    _PUBLIC: _scores((0.739, 0.726), (0.629, 0.621), (0.565, 0.564), (0.642, 0.634)),
    _IMAGE_DOCTOR: _scores((0.727,), (0.681,), (0.808,), (0.745,)),
}
"""Row -> name of `SCORES` -> `plcc`, `srcc`."""

HEATMAP_ROWS = {
    "implausibility": {
        _RESNET: _maps(0.00996, 0.00093, 0.506, 1.669, 0.338, 2.924, 0.909),
        _MULTI_HEAD: _maps(0.01216, 0.00141, 0.425, 1.971, 0.302, 2.330, 0.877),
        _AUGMENTED: _maps(0.00920, 0.00095, 0.556, 1.652, 0.409, 3.085, 0.913),
        _PUBLIC: _maps(0.00724, 0.00078, 0.525, 1.649, 0.339, 2.029, 0.905),
    },
    "misalignment": {"RAHF (paper)": _maps(0.00304, 0.00006, 0.212, 2.933, 0.106, 1.411, 0.841)},
}
"""Name of `HEATMAPS` -> row -> metrics as of `reward.metrics.map_metrics`."""

WORD_ROWS = {
    _MULTI_HEAD: {"precision": 0.629, "recall": 0.330, "f1": 0.433},
    _AUGMENTED: {"precision": 0.613, "recall": 0.341, "f1": 0.439},
}
"""Row -> `precision`, `recall`, `f1` of "misaligned", in [0, 1]."""
