"""Of the small world's predictor: what nobody sees leaves a picture itself, and no two pictures are one."""

import numpy as np
import torch

from finetune.rules import SAME
from finetune.small_changes import as_jpeg, shifted
from reward.predict import RichFeedbackPredictor
from tests.test_house import ROOT
from tinyworld.rated import read_pictures

ASSETS = ROOT / "tinyworld/assets"


def test_what_nobody_sees_moves_a_picture_less_than_other_pictures_lie_apart():
    predictor = RichFeedbackPredictor.from_pretrained(ASSETS / "rahf")
    rows = list(read_pictures(ASSETS / "pickapic/test.parquet"))[:200]
    images = torch.from_numpy(np.stack([picture for _, picture, _ in rows])).permute(0, 3, 1, 2).float() / 255
    captions = [caption for *_, caption in rows]

    def directions(pictures):
        _, features = predictor.with_features(pictures, captions)
        return features / features.norm(dim=1, keepdim=True)

    seen = directions(images)
    apart = (1 - seen @ seen.T)[torch.triu_indices(len(seen), len(seen), 1).unbind()]
    assert (apart < SAME).float().mean() < 1e-3
    assert apart.quantile(0.01) > 5 * SAME
    for change in (as_jpeg, shifted):
        moved = 1 - (seen * directions(change(images))).sum(dim=1)
        assert moved.median() < SAME / 2
        assert moved.quantile(0.9) < SAME
