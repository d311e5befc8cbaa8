"""The head that LAION's aesthetic predictor and ImageReward share: five linear layers without anything between them."""

from torch import nn

_WIDTHS = (1024, 128, 64, 16, 1)


class LinearHead(nn.Module):
    """(..., width) -> (..., 1).

    Weights are named `layers.0`, `2`, `4`, `6`, `7`: in training dropout stood between the first four.
    """

    def __init__(self, width: int):
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in zip((width, *_WIDTHS), _WIDTHS, strict=False)]
        first, second, third, fourth, last = linear
        self.layers = nn.Sequential(first, nn.Identity(), second, nn.Identity(), third, nn.Identity(), fourth, last)

    def forward(self, seen):
        return self.layers(seen)
