"""Dropout of a LoRA's inputs that a picture keeps, from its noise to its update.

torch's dropout drops anew in every pass: the policy that is asked again how likely a step was would not be the one that
made it, and the ratio of DDPO's first pass would not be 1. Here whole inputs of a layer are dropped, at all places and
in all sampling steps alike, as if columns of the LoRA's A were absent ("A theoretically grounded application of dropout
in recurrent neural networks", Gal & Ghahramani 2016, arXiv 1512.05287, does so over time). So one policy draws a
picture and learns from it. Of a DoRA all that it adds is without them, the base's share of that included.

Shapes: B pictures, F inputs of all layers together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rl.keyed import keyed_generator

DropoutKeys = Sequence[tuple[int | str, ...]]
"""For each of B pictures, what the draw of the inputs that it keeps depends on."""


class InputDropout(nn.Module):
    """What stands before a LoRA's A in the place of peft's dropout.

    Attributes:
        kept: (B, in) bool, which inputs each row that comes in keeps; None: all.
    """

    def __init__(self, probability: float, axis: int):
        """
        Args:
            probability: that an input is dropped; those kept are scaled by 1 / (1 - probability).
            axis: of what comes in, on which its inputs are.
        """
        super().__init__()
        self.kept: torch.Tensor | None = None
        self._scale, self._axis = 1 / (1 - probability), axis

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            return values
        shape = [len(self.kept)] + [1] * (values.ndim - 1)
        shape[self._axis] = -1
        return values * (self.kept.to(values.dtype) * self._scale).reshape(shape)


class LoraDropout:
    """The dropout of all LoRA layers of a network: nothing is dropped but within `applied`."""

    def __init__(self, layers: Sequence[LoraLayer], probability: float):
        """Put it on `layers`, in the order in which their inputs are counted; a layer's adapters all drop the same.

        Args:
            probability: that an input is dropped, in (0, 1).
        """
        self._probability = probability
        self._sizes = [layer.in_features for layer in layers]
        self._parts: list[InputDropout] = []
        for layer in layers:
            part = InputDropout(probability, axis=1 if isinstance(layer.get_base_layer(), nn.Conv2d) else -1)
            for adapter in layer.lora_A:
                layer.lora_dropout[adapter] = part
            self._parts.append(part)
        self.kept: torch.Tensor | None = None

    def draw(self, keys: DropoutKeys) -> torch.Tensor:
        """(B, F) bool on the CPU, which inputs B pictures keep: by each picture's key alone."""
        drawn = {key: torch.rand(sum(self._sizes), generator=keyed_generator(*key)) for key in dict.fromkeys(keys)}
        return torch.stack([drawn[key] >= self._probability for key in keys])

    @contextmanager
    def applied(self, kept: torch.Tensor | None) -> Iterator[None]:
        """Within it the network's B rows keep only those inputs, (B, F) bool; None: all."""
        before = self.kept
        self._set(kept)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, kept: torch.Tensor | None) -> None:
        self.kept = kept
        each = [None] * len(self._parts) if kept is None else kept.split(self._sizes, dim=1)
        for part, own in zip(self._parts, each, strict=True):
            part.kept = own
