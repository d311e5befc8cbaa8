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


def heatmap_loss(predicted: torch.Tensor, true: torch.Tensor, positive_weight: float = 1.0) -> torch.Tensor:
    """Pixel MSE of heatmaps (B, M, h, w) in [0, 1]; the denominator is B * M * h * w.

    Most pixels of the targets are 0, and so are many whole maps. `positive_weight` W counts the squared error of each
    pixel with a target above 0 so many times; 1 is the paper's loss. The denominator stays, so the pressure on empty
    maps and pixels is the same for every W, and equal micro-batches add up to one large batch.

    What W costs: where a pixel is marked with probability q, by m on average, the loss is least not at the mean q * m
    but at W * q * m / (1 - q + W * q). Maps become bolder, and MSE, on empty maps above all, rises with W.
    """
    error = (predicted.float() - true.float()).square()
    if positive_weight != 1:
        error = torch.where(true > 0, positive_weight * error, error)
    return error.mean()


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
