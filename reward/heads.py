"""Heads of RAHF: fused tokens to heatmaps, scores and word logits. All outputs are logits; the model applies sigmoids.

Shapes: B images, D channels of the fused tokens, g x k the grid of patch tokens, h x w a heatmap's pixels, L text
positions, T tokens (words) of a prompt.
"""

import torch
import torch.nn.functional as F
from torch import nn

HEATMAP_LOGIT = -3.0
"""Start of a heatmap's bias: most pixels of the targets are 0, and sigmoid(-3) = 0.05."""


class HeatmapReadOut(nn.Conv2d):
    """The last layer of a heatmap head; a type of its own, because its bias starts at `HEATMAP_LOGIT`."""

    def __init__(self, channels: int):
        super().__init__(channels, 1, 3, padding=1)


class _Norm(nn.GroupNorm):
    """Layer norm over channels and places of a feature map."""

    def __init__(self, channels: int):
        super().__init__(1, channels)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        # Where a pixel's channels lie together, torch's kernel for CPUs loses digits of a large mean: none is left.
        return super().forward(feature_map - feature_map.mean((1, 2, 3), keepdim=True))


class PaperHeatmapHead(nn.Module):
    """The heatmap head of arXiv 2312.10240: 2 convolutions, then 4 stride-2 transposed ones, each with 2 read-outs.

    Channels (768, 384), (768, 384, 384, 192), times `width`. The grid grows 16-fold; the result is resized to `size`.
    Norm and activation between the layers are ours, the paper's are not known to us.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: float = 1.0):
        super().__init__()
        self.size = size
        layers, last = [], channels
        for wide in (768, 384):
            layers += _convolution(last, last := _scaled(wide, width))
        for wide in (768, 384, 384, 192):
            out = _scaled(wide, width)
            layers += [nn.ConvTranspose2d(last, out, 4, stride=2, padding=1), _Norm(out), nn.GELU()]
            layers += _convolution(out, out) + _convolution(out, out)
            last = out
        self.body = nn.Sequential(*layers, *_convolution(last, last))
        self.read = HeatmapReadOut(last)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, D, g, k) -> logits (B, h, w)."""
        # Convolutions are faster on CPUs where a pixel's channels lie together, those of narrow layers most.
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
        return _to_size(self.read(self.body(feature_map)), self.size)[:, 0]


class LightHeatmapHead(nn.Module):
    """A cheap head: every stage is one 3x3 convolution with sub-pixel upsampling, channels halved, until h is reached.

    Our own, for small models: the paper's head alone would cost a hundred times the rest of them.
    """

    def __init__(self, channels: int, size: tuple[int, int], grid: tuple[int, int], width: float = 1.0):
        super().__init__()
        self.size = size
        last = _scaled(64, width)
        layers = [nn.Conv2d(channels, last, 1), nn.GELU()]
        height = grid[0]
        while height < size[0]:
            out = max(last // 2, 8)
            layers += [nn.Conv2d(last, 4 * out, 3, padding=1), nn.PixelShuffle(2), nn.GELU()]
            last, height = out, 2 * height
        self.body = nn.Sequential(*layers)
        self.read = HeatmapReadOut(last)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, D, g, k) -> logits (B, h, w)."""
        return _to_size(self.read(self.body(feature_map)), self.size)[:, 0]


class PaperScoreHead(nn.Module):
    """A stack of stride-2 convolutions over the feature map, then linear layers, one scalar (arXiv 2312.10240)."""

    def __init__(self, channels: int, width: float = 1.0):
        super().__init__()
        layers, last = [], channels
        for wide in (768, 384, 128, 64):
            layers += _convolution(last, last := _scaled(wide, width), stride=2)
        self.body = nn.Sequential(*layers)
        self.linear = nn.Sequential(nn.Linear(last, last), nn.GELU(), nn.Linear(last, 1))

    def forward(self, feature_map: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """(B, D, g, k) -> logits (B,). `text` and `text_mask` are not used, as in the paper."""
        return self.linear(self.body(feature_map).mean((-2, -1)))[:, 0]


class LightScoreHead(nn.Module):
    """Mean and maximum over places and over text positions, then a small perceptron. Our own, for small models.

    One broken corner or one missing word decides a score, so the maximum is there; and a missing thing has no place in
    the image, so the text is.
    """

    def __init__(self, channels: int, width: float = 1.0):
        super().__init__()
        inner = _scaled(64, width)
        self.place = nn.Conv2d(channels, inner, 3, padding=1)
        self.word = nn.Linear(channels, inner)
        self.linear = nn.Sequential(nn.Linear(4 * inner, inner), nn.GELU(), nn.Linear(inner, 1))

    def forward(self, feature_map: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """(B, D, g, k), (B, L, D) and its mask (B, L) -> logits (B,)."""
        places = F.gelu(self.place(feature_map)).flatten(2)  # (B, C, g * k)
        hidden = ~text_mask.bool()[:, :, None]
        words = F.gelu(self.word(text))  # (B, L, C)
        total = words.masked_fill(hidden, 0.0).sum(1) / text_mask.sum(1, keepdim=True).clamp(min=1)
        highest = words.masked_fill(hidden, -1.0).amax(1)  # GELU is above -0.2, so padding never wins
        return self.linear(torch.cat([places.mean(-1), places.amax(-1), total, highest], dim=1))[:, 0]


class TaggingHead(nn.Module):
    """One logit a prompt token, read from the fused state of the token's first piece; > 0 means misaligned.

    Our own: one pass of the encoder, where the paper's decoder writes the words one after another.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(channels, channels), nn.GELU())
        self.read = nn.Linear(channels, 1)

    def forward(self, text: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Text (B, L, D) and for each word its position in it (B, T), -1 where there is none -> logits (B, T)."""
        index = positions.clamp(min=0)[:, :, None].expand(-1, -1, text.shape[-1])
        return self.read(self.body(text.gather(1, index)))[:, :, 0]


def _convolution(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride=stride, padding=1), _Norm(out), nn.GELU()]


def _scaled(channels: int, width: float) -> int:
    return max(int(channels * width), 4)


def _to_size(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
