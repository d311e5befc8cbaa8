"""Where a text-to-image network looked for each word while it drew: cross-attention, summed up during sampling.

Shapes: B pictures, L text positions, h x w the latent grid, n places of an attention layer.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn

from reward.feedback import SEPARATORS


class WordAttention:
    """Within it (`with WordAttention(unet, grid) as attention:`) every pass of the U-Net adds to the maps.

    The layers are those at the middle resolutions: at the finest, attention follows edges; at the coarsest, a place is
    as large as an object ("Prompt-to-Prompt", Hertz et al. 2022, arXiv 2208.01626, and after it most, use 16 x 16 of
    64 x 64). All layers and passes count alike, heads are averaged. With guidance, only the conditional half counts.
    """

    def __init__(self, unet: nn.Module, grid: tuple[int, int], batch_size: int):
        """
        Args:
            unet: diffusers' UNet2DConditionModel; peft's layers may be in it.
            grid: (h, w) of the latents it will be given.
            batch_size: B; the last B rows of each pass are the conditional ones.

        Raises:
            ValueError: the network has no cross-attention.
        """
        self._factors = middle_layers(unet)
        self._layers = {name: unet.get_submodule(name) for name in self._factors}
        finest = min(self._factors.values())
        self._grid, self._batch_size = grid, batch_size
        self._size = tuple(-(-side // finest) for side in grid)
        self._sum: torch.Tensor | None = None
        self._passes = 0
        self._hooks: list = []

    def __enter__(self) -> "WordAttention":
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(self._factors[name]), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def maps(self) -> torch.Tensor:
        """(B, L, h', w') float32, mean attention probability; h' x w' is the finest of the layers' grids."""
        assert self._sum is not None, "no pass yet"
        return self._sum / self._passes

    def _hook(self, factor: int):
        @torch.no_grad()
        def add(layer: nn.Module, inputs: tuple, keywords: dict) -> None:
            hidden = inputs[0] if inputs else keywords["hidden_states"]
            # Projected with all rows: a LoRA's dropout is drawn for all of them.
            asked, told = layer.to_q(hidden), layer.to_k(keywords["encoder_hidden_states"])
            query, key = (layer.head_to_batch_dim(part[-self._batch_size :]) for part in (asked, told))
            looked = layer.get_attention_scores(query, key).float()  # (B * heads, n, L)
            looked = looked.unflatten(0, (self._batch_size, -1)).mean(dim=1).transpose(1, 2)  # (B, L, n)
            height, width = (-(-side // factor) for side in self._grid)
            looked = nn.functional.interpolate(looked.unflatten(-1, (height, width)), self._size, mode="nearest")
            self._sum = looked if self._sum is None else self._sum + looked
            self._passes += 1

        return add


def middle_layers(unet: nn.Module) -> dict[str, int]:
    """Name of each cross-attention layer at a middle resolution -> how many times smaller its grid is than the latents.

    Left out are the latents' own resolution and the smallest with attention, unless there are no others.

    Raises:
        ValueError: the network has no cross-attention.
    """
    levels = len(unet.config.block_out_channels)
    found = {}
    for name, _ in unet.named_modules():
        if name.endswith(".attn2"):
            kind, number = re.match(r"(down|up|mid)_block(?:s\.(\d+))?", name).groups()
            level = {"down": int(number or 0), "up": levels - 1 - int(number or 0), "mid": levels - 1}[kind]
            found[name] = 2**level
    if not found:
        raise ValueError(
            "this network has no cross-attention, so credit by words is not possible; choose another credit"
        )
    middle = set(found.values()) - {1, max(found.values())} or set(found.values())
    return {name: factor for name, factor in found.items() if factor in middle}


def word_positions(tokenizer, prompts: Sequence[str]) -> list[list[list[int]]]:
    """For each prompt, for each word of `reward.feedback.tokenize(prompt)`, the text positions of the word's pieces.

    Args:
        tokenizer: a fast one of transformers; the prompt is cut off at its `model_max_length`, and words beyond have no
            positions.

    >>> word_positions(clip_tokenizer, ["a tyrannosaurus"])
    [[[1], [2, 3, 4, 5]]]
    """
    encoded = tokenizer(
        list(prompts), truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
    )
    found = []
    for prompt, spans in zip(prompts, encoded["offset_mapping"], strict=True):
        words = [match.span() for match in re.finditer(f"[^{re.escape(SEPARATORS)}]+", prompt)]
        found.append(
            [
                [place for place, (start, end) in enumerate(spans) if start < end and start < last and end > first]
                for first, last in words
            ]
        )
    return found
