import numpy as np
import pytest
import torch
from PIL import Image

from reward.report_figure import MapExample, extremes, report_figure, save_png


@pytest.mark.parametrize(
    ("cc", "best", "worst"),
    [
        ([0.1, np.nan, 0.9, 0.5, 0.3], [2, 3], [0, 4]),
        ([0.1, 0.2, 0.9, 0.5, 0.3, 0.4, 0.6], [2, 6], [0, 1]),
        ([0.1, 0.2, 0.3], [2, 1], [0]),
        ([np.nan, 0.2], [1], []),
        ([np.nan], [], []),
    ],
)
def test_best_and_worst_share_no_picture(cc, best, worst):
    assert extremes(np.array(cc), 2) == (best, worst)


def test_any_prompt_can_be_drawn(tmp_path):
    """Neither mathematics that does not parse nor characters without a glyph stop or warn."""
    image, heatmap = torch.rand(3, 20, 30), torch.rand(8, 8)
    examples = [MapExample(image, heatmap, 1 - heatmap, title) for title in ("$5 for $x_{", "猫 " * 80)]
    scores = np.random.default_rng(0).random((2, 5, 4))
    with_maps = report_figure(*scores, {"implausibility": (examples, examples[:1]), "misalignment": ([], [])})
    save_png(with_maps, tmp_path / "with.png")
    save_png(report_figure(*scores, {}), tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as large, Image.open(tmp_path / "without.png") as small:
        assert large.width == small.width
        assert large.height > 1.5 * small.height
