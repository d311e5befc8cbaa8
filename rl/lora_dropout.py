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
    """What stands before a LoRA's A where inputs are dropped.

    Attributes:
        factors: (B, in) float32, of the inputs of each row that comes in: 0, or so much that the mean stays.
        axis: of what comes in, on which its inputs are.
    """

    def __init__(self, axis: int):
        super().__init__()
        self.factors: torch.Tensor | None = None
        self.axis = axis

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        assert len(values) == len(self.factors), "other rows than inputs were drawn for"
        shape = [len(values)] + [1] * (values.ndim - 1)
        shape[self.axis] = -1
        return values * self.factors.to(values.dtype).reshape(shape)


class LoraDropout:
    """The dropout of all LoRA layers of a network: nothing is dropped, nor done, but within `applied`.

    Attributes:
        kept: (B, F) bool, which inputs are kept just now; None: all.
    """

    def __init__(self, layers: Sequence[LoraLayer], probability: float):
        """
        Args:
            layers: in the order in which their inputs are counted; a layer's adapters all drop the same.
            probability: that an input is dropped, in (0, 1); those kept are scaled by 1 / (1 - probability).
        """
        self.kept: torch.Tensor | None = None
        self._probability, self._layers = probability, list(layers)
        self._sizes = [layer.in_features for layer in layers]
        convolves = [isinstance(layer.get_base_layer(), nn.Conv2d) for layer in layers]
        self._parts = [InputDropout(axis=1 if one else -1) for one in convolves]
        self._nothing = nn.Identity()  # as peft has it: by it a DoRA knows that the base need not be asked twice

    def draw(self, keys: DropoutKeys) -> torch.Tensor:
        """(B, F) bool on the CPU, which inputs B pictures keep: by each picture's key alone."""
        drawn = {key: torch.rand(sum(self._sizes), generator=keyed_generator(*key)) for key in dict.fromkeys(keys)}
        return torch.stack([drawn[key] >= self._probability for key in keys])

    @contextmanager
    def applied(self, kept: torch.Tensor | None) -> Iterator[None]:
        """Within it the network's B rows keep only those inputs, (B, F) bool; None: all.

        A DoRA's layers must be in training mode: in the other, peft passes by what stands before A.
        """
        before = self.kept
        self._set(kept)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, kept: torch.Tensor | None) -> None:
        self.kept = kept
        if kept is None:
            self._stand([self._nothing] * len(self._layers))
            return
        assert all(layer.training or not layer.lora_variant for layer in self._layers), "a DoRA would drop nothing"
        factors = kept.float() / (1 - self._probability)
        for part, own in zip(self._parts, factors.split(self._sizes, dim=1), strict=True):
            part.factors = own
        self._stand(self._parts)

    def _stand(self, parts: Sequence[nn.Module]) -> None:
        for layer, part in zip(self._layers, parts, strict=True):
            for adapter in layer.lora_A:
                layer.lora_dropout[adapter] = part
