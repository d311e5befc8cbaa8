"""The three losses of RAHF (arXiv 2312.10240, section 4.2); pure: tensors in, scalar out.

Shapes: B images, K scores, M heatmaps of h x w, T tokens of the longest prompt.
"""

import torch
import torch.nn.functional as F

IGNORE = -100
"""Label of a place that does not count: padding, or a word the encoder did not see."""


def score_loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """MSE of scores (B, K) in [0, 1]; the denominator is B * K."""
    return F.mse_loss(predicted.float(), true.float())


def heatmap_loss(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Pixel MSE of heatmaps (B, M, h, w) in [0, 1]; the denominator is B * M * h * w."""
    return F.mse_loss(predicted.float(), true.float())


def word_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of word tags: logits (B, T), labels (B, T) with 1 = misaligned and -100 = not counted.

    The mean over each prompt's counted words, then over prompts: the denominator is B (a prompt without counted words
    gives 0), so that accumulating over equal micro-batches is the same as one large batch.
    """
    counted = labels != IGNORE
    loss = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0).float(), reduction="none")
    return ((loss * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()


def caption_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of hidden caption words: logits (N, V), labels (N,); the denominator is N, no words give 0."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)
