"""The small world's predictor with the judge's maps in place of its own: what credit by place is worth at its best."""

from collections.abc import Sequence

import numpy as np
import torch

from reward.feedback import Reward
from reward.rich import RichReward
from tinyworld.judge import judge

JUDGE_MAPS = "judge_maps:JudgeMaps"
"""As a `reward` of run_ddpo.py, with this folder on the path."""


class JudgeMaps(RichReward):
    """The predictor's reward, but with the judge's masks in place of its heatmaps, at the same weights."""

    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        said = super().__call__(images, prompts)
        pictures = images.permute(0, 2, 3, 1).float().cpu().numpy()
        verdicts = [judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        masks = {
            "implausibility": [verdict.implausible for verdict in verdicts],
            "misalignment": [verdict.misaligned for verdict in verdicts],
        }
        weights = {name: weight for name, weight in self.penalty_weights.items() if weight}
        maps = {name: weight * torch.from_numpy(np.stack(masks[name])).float() for name, weight in weights.items()}
        return Reward(said.total, maps, said.word_penalties, said.terms)
