"""Small stand-ins for gradients, taken while a backward pass runs.

Shapes: P trained weights, d numbers of a sketch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from rl.keyed import keyed_generator

WIDTH = 4093
"""d: an inner product of sketches errs by about |g| |h| / sqrt(d), far below the noise between chunks. A prime number,
for the weights of a matrix's column are as far apart as its rows are long, and must not all come to the same place."""
BYTES_A_WEIGHT = 9
"""Of memory: its scale, its sign, and what the next scale is made of."""
FLOOR = 0.01
"""Smallest mean square of a weight's gradient that counts, in units of the mean over all weights."""


def metric(squares: torch.Tensor) -> torch.Tensor:
    """What each weight's gradient is multiplied by, from the mean of its square (P,): half of what Adam does to it, so
    that the inner product of two gradients is that of one with the step that Adam would take along the other."""
    return (squares + FLOOR * squares.mean()) ** -0.25


def random_signs(count: int) -> torch.Tensor:
    """(P,) int8 of -1 and 1, the same on every machine."""
    return torch.randint(2, (count,), generator=keyed_generator("signs"), dtype=torch.int8) * 2 - 1


class GradientSketch:
    """Listens to backward passes, whatever engine runs them: what each gives this rank's weights, before anything is
    summed over micro-batches or ranks.

    A sketch is a count sketch ("Finding frequent items in data streams", Charikar et al. 2002), without its hashing of
    places: weight i, scaled, with a random sign, is added to number i mod d. So only sketches of one scale, which
    `renew` makes of what was heard since it made the last, can be compared.

    Args:
        weights: that are trained, P numbers in all.
        width: d.

    Attributes:
        scale: (P,) float32, see `metric`; None before the first.
    """

    def __init__(self, weights: Sequence[nn.Parameter], width: int = WIDTH):
        self.scale: torch.Tensor | None = None
        self._weights, self._width = list(weights), width
        self._signs = random_signs(sum(weight.numel() for weight in weights))
        self._squares: torch.Tensor | None = None  # their sum over so many passes
        self._passes = 0
        self._factor: torch.Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[torch.Tensor]:
        """The sketch (d,) of the backward pass inside, complete at the end; zeros while there is no scale. The pass
        must be of a loss that was given to `follow` inside."""
        device = self._weights[0].device
        self._signs = self._signs.to(device)
        self.scale = None if self.scale is None else self.scale.to(device)
        if self._squares is None:
            self._squares, self._passes = torch.zeros(len(self._signs), device=device), 0
        self._factor = None
        found, hooks, first = torch.zeros(self._width, device=device), [], 0
        for weight in self._weights:
            hooks.append(weight.register_hook(partial(self._hear, found, first)))
            first += weight.numel()
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
            self._passes += 1

    def follow(self, loss: torch.Tensor) -> None:
        """Take the gradient of `loss` (), not of the multiple of it that an engine goes back from: its share of the
        micro-batches, and the scale against small numbers of float16."""
        loss.register_hook(self._take_factor)

    def renew(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Make the scale of what was heard since the last one was made; the last one stays if that is nothing, or not
        finite, which float16 makes it.

        Args:
            mean: of a tensor, over ranks.

        Returns:
            The root of the mean squared length of the gradients that were heard, not scaled.
        """
        squares, self._squares = mean(self._squares / self._passes), None
        if bool(squares.isfinite().all()) and bool(squares.any()):
            self.scale = metric(squares)
        return float(squares.sum().sqrt())

    def _take_factor(self, gradient: torch.Tensor) -> None:
        self._factor = gradient.detach().float()

    def _hear(self, found: torch.Tensor, first: int, gradient: torch.Tensor) -> None:
        assert self._factor is not None, "the loss was not followed"
        place = slice(first, first + gradient.numel())
        exact = gradient.detach().flatten().float() / self._factor
        self._squares[place] += exact.square()
        if self.scale is None:
            return
        signed = exact * self.scale[place] * self._signs[place]
        before = first % self._width
        padded = nn.functional.pad(signed, (before, -(before + len(signed)) % self._width))
        found += padded.unflatten(0, (-1, self._width)).sum(dim=0)

    def state(self) -> dict[str, torch.Tensor]:
        """As safetensors take it, between two rollouts; empty before the first scale."""
        return {} if self.scale is None else {"scale": self.scale}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.scale = state.get("scale")
