"""The predictor's feedback as a reward: scores, heatmap-weighted penalties, words."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reward.feedback import HEATMAPS, SCORES, Reward
from reward.predict import RichFeedbackPredictor


class RichReward:
    """Reward of images by predicted rich human feedback; differentiable.

    For one image with predicted scores s, heatmaps h and word probabilities p (T of them):

        total     = sum of score_weights[k] * s[k]  -  word_weight * mean(p)
        penalties = penalty_weights[m] * h[m], a map for each m of non-zero weight

    so that `Reward.objective` subtracts penalty_weights[m] times the heatmap's mean. Nothing is clipped or replaced:
    NaN in an image gives a reward of NaN, for the trainer to stop at.

    Args:
        model: folder of a RAHF checkpoint, or a predictor.
        score_weights: weight of each score, names of `SCORES`; scores left out count 0.
        penalty_weights: weight of each heatmap, names of `HEATMAPS`, >= 0.
        word_weight: what a prompt whose words are all misaligned costs, >= 0.
        batch_size: how many images the predictor sees at once.

    `Reward.terms` holds the predictions before weighting: each score, each heatmap's mean, and `misaligned_words`, the
    mean probability over a prompt's words (0 for a prompt without words).
    """

    differentiable = True

    def __init__(
        self,
        model: str | Path | RichFeedbackPredictor,
        score_weights: Mapping[str, float] | None = None,
        penalty_weights: Mapping[str, float] | None = None,
        word_weight: float = 0.0,
        batch_size: int = 64,
    ):
        self.score_weights = _checked(
            "score_weights", {"overall": 1.0} if score_weights is None else score_weights, SCORES
        )
        self.penalty_weights = _checked("penalty_weights", penalty_weights or {}, HEATMAPS)
        _check_number("word_weight", word_weight)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
        negative = {name: value for name, value in self.penalty_weights.items() if value < 0}
        if negative or word_weight < 0:
            raise ValueError(f"penalties must not be negative, they are subtracted: {negative or word_weight}")
        self.word_weight, self.batch_size = word_weight, batch_size
        self.predictor = (
            model if isinstance(model, RichFeedbackPredictor) else RichFeedbackPredictor.from_pretrained(model)
        )

    @classmethod
    def gives(
        cls, *, penalty_weights: Mapping[str, float] | None = None, word_weight: float = 0.0, **others: Any
    ) -> set[str]:
        """Which of `penalties` and `word_penalties` a reward with these arguments has: what is known without its model.

        Raises:
            ValueError: a penalty of what is no heatmap.
        """
        weights = _checked("penalty_weights", penalty_weights or {}, HEATMAPS)
        given = {"penalties": any(weights.values()), "word_penalties": bool(word_weight)}
        return {name for name, there in given.items() if there}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The scores that are rewarded, each in the range of the predictor's labels."""
        lowest, highest = self.predictor.model.config.label_range
        return {name: (lowest, highest) for name, weight in self.score_weights.items() if weight}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the predictor's vision encoder sees in `images` (B, 3, H, W) in [0, 1], (B, D)."""
        return self.predictor.features(images, self.batch_size)

    def to(self, device: str | torch.device) -> "RichReward":
        self.predictor.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1] for their B `prompts`; see the class."""
        feedback = self.predictor(images, prompts, batch_size=self.batch_size)
        counts = [max(len(tokens), 1) for tokens in feedback.tokens]
        wrong = torch.stack([p.sum() / count for p, count in zip(feedback.misaligned, counts, strict=True)])  # (B,)
        total = -self.word_weight * wrong
        for name, weight in self.score_weights.items():
            total = total + weight * feedback.scores[name]
        return Reward(
            total=total,
            penalties={
                name: weight * feedback.heatmaps[name] for name, weight in self.penalty_weights.items() if weight
            },
            word_penalties=[self.word_weight / count * p for p, count in zip(feedback.misaligned, counts, strict=True)]
            if self.word_weight
            else None,
            terms={
                **feedback.scores,
                **{name: maps.mean((-2, -1)) for name, maps in feedback.heatmaps.items()},
                "misaligned_words": wrong,
            },
            wrong_words=[p > self.predictor.word_threshold for p in feedback.misaligned],
            heatmaps=feedback.heatmaps,
        )


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}; it must be a finite number")


def _checked(what: str, weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{what} is {weights!r}; it must be a mapping, name: weight")
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(f"{what} has no {', '.join(unknown)}; it may have {', '.join(names)}")
    for name, value in weights.items():
        _check_number(f"{what}: {name}", value)
    return {name: float(value) for name, value in weights.items()}
