"""Small stand-ins for gradients, taken while a backward pass runs.

Shapes: P trained weights, d numbers of a sketch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from rl.rollout import keyed_generator

WIDTH = 4096
"""d: an inner product of sketches errs by about |g| |h| / sqrt(d), far below the noise between chunks."""
FLOOR = 0.01
"""Smallest mean square of a weight's gradient that counts, in units of the mean over all weights."""


def metric(squares: torch.Tensor) -> torch.Tensor:
    """What each weight's gradient is multiplied by, from the mean of its square (P,): half of what Adam does to it, so
    that the inner product of two gradients is that of one with the step that Adam would take along the other."""
    return (squares + FLOOR * squares.mean().clamp(min=torch.finfo(torch.float32).tiny)) ** -0.25


def random_signs(count: int, seed: int) -> torch.Tensor:
    """(P,) int8 of -1 and 1, the same on every machine."""
    return torch.randint(2, (count,), generator=keyed_generator(seed, "signs"), dtype=torch.int8) * 2 - 1


class GradientSketch:
    """Listens to backward passes, whatever engine runs them: what each gives this rank's weights, before anything is
    summed over micro-batches or ranks.

    A sketch is a count sketch ("Finding frequent items in data streams", Charikar et al. 2002): weight i, scaled, with
    a random sign, is added to number i mod d. Until `measure` has made the scale, squares are summed up instead.

    Args:
        weights: that are trained, P numbers in all.
        seed: of the signs.
        width: d.

    Attributes:
        scale: (P,) float32, see `metric`; None before `measure`.
    """

    def __init__(self, weights: Sequence[nn.Parameter], seed: int, width: int = WIDTH):
        self.scale: torch.Tensor | None = None
        self._weights, self._width = list(weights), width
        self._signs = random_signs(sum(weight.numel() for weight in weights), seed)
        self._squares: torch.Tensor | None = None  # their sum over so many passes
        self._passes = 0
        self._heard: torch.Tensor | None = None  # of the pass that is listened to
        self._factor = torch.ones(())
        first = 0
        for weight in weights:
            weight.register_hook(partial(self._hear, first))
            first += weight.numel()

    @contextmanager
    def listening(self) -> Iterator[torch.Tensor]:
        """The sketch (d,) of the backward pass inside, complete at the end; zeros while there is no scale."""
        device = self._weights[0].device
        self._signs = self._signs.to(device)
        if self.scale is not None:
            self.scale = self.scale.to(device)
        elif self._squares is None:
            self._squares, self._passes = torch.zeros(len(self._signs), device=device), 0
        self._heard = torch.zeros(self._width, device=device)
        try:
            yield self._heard
        finally:
            self._heard = None
            self._passes += 1

    def follow(self, loss: torch.Tensor) -> None:
        """Of the pass that is listened to, take the gradient of `loss` (), not of the multiple of it that an engine
        goes back from: its share of the micro-batches, and the scale against small numbers of float16."""
        if self._heard is not None:
            loss.register_hook(self._take_factor)

    def measure(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Make the scale of what was heard so far; not if some of it is not finite, which float16 makes it.

        Args:
            mean: of a tensor, over ranks.
        """
        squares, self._squares = mean(self._squares / self._passes), None
        if bool(squares.isfinite().all()):
            self.scale = metric(squares)

    def _take_factor(self, gradient: torch.Tensor) -> None:
        self._factor = gradient.detach().float()

    def _hear(self, first: int, gradient: torch.Tensor) -> None:
        if self._heard is None:
            return
        place = slice(first, first + gradient.numel())
        exact = gradient.detach().flatten().float() / self._factor
        if self.scale is None:
            self._squares[place] += exact.square()
            return
        signed = exact * self.scale[place] * self._signs[place]
        before = first % self._width
        padded = nn.functional.pad(signed, (before, -(before + len(signed)) % self._width))
        self._heard += padded.unflatten(0, (-1, self._width)).sum(dim=0)

    def state(self) -> dict[str, torch.Tensor]:
        """As safetensors take it; empty before `measure`."""
        return {} if self.scale is None else {"scale": self.scale}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.scale = state.get("scale")
