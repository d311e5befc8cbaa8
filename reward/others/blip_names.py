"""BLIP's own names of its weights, as ImageReward keeps them -> transformers' BLIP, and the sizes that weights tell.

`visual_encoder.` is timm's ViT; `text_encoder.` is a BERT with cross-attention in every layer, whose names transformers
has kept.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import BlipTextConfig, BlipVisionConfig

_HEAD = 64
"""Width of an attention head in every BLIP, base or large, picture or text."""

_WHOLE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_IN_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def picture_names(weights: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Weights of a `visual_encoder`, that prefix taken off, by the names of transformers' `BlipVisionModel`.

    Raises:
        ValueError: a name is not one of those above.
    """
    found = {}
    for name, value in weights.items():
        match = _LAYER.fullmatch(name)
        if name in _WHOLE:
            found[_WHOLE[name]] = value
        elif match and match[2] in _IN_LAYER:
            found[f"encoder.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"] = value
        else:
            raise ValueError(f"{where} has the weight {name} in its picture encoder, which BLIP's has not")
    return found


def picture_config(weights: Mapping[str, torch.Tensor], where: str) -> BlipVisionConfig:
    """Sizes of a picture encoder, from its weights by transformers' names.

    Raises:
        ValueError: they are not those of a BLIP.
    """
    with _told(where):
        width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
        places = weights["embeddings.position_embedding"].shape[1] - 1
        return BlipVisionConfig(
            hidden_size=width,
            intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(weights, r"encoder\.layers\.(\d+)\."),
            num_attention_heads=_heads(width),
            image_size=round(places**0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,  # timm's, with which BLIP was trained; that of this class is another
        )


def text_config(weights: Mapping[str, torch.Tensor], where: str) -> BlipTextConfig:
    """Sizes of a text encoder, from its weights.

    Raises:
        ValueError: they are not those of a BLIP.
    """
    with _told(where):
        vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
        return BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(weights, r"encoder\.layer\.(\d+)\."),
            num_attention_heads=_heads(width),
            max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        )


def _layers(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))


def _heads(width: int) -> int:
    if width % _HEAD:
        raise ValueError(f"its width {width} is no multiple of {_HEAD}, the width of BLIP's heads")
    return width // _HEAD


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Whatever goes wrong inside means that the weights of `where` are not those of a BLIP."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} holds no BLIP: {error.args[0]}") from error
