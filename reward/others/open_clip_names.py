"""open_clip's names of a CLIP's weights -> those of transformers' `CLIPModel`.

For models whose picture encoder is open_clip's own ViT and whose text encoder is built in, as in ViT-H-14: layers of
the two are `visual.transformer.resblocks.N` and `transformer.resblocks.N`; query, key and value are one matrix; the two
projections are stored transposed.
"""

import re
from collections.abc import Mapping

import torch

_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_NOT_WEIGHTS = ("attn_mask",)  # the text encoder's causal mask, which older versions saved


def in_names_of_transformers(weights: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The same weights under the other names; `module.`, which DDP puts before names, is taken off.

    Args:
        where: their file, for messages.

    Raises:
        ValueError: a name is not one of those above.
    """
    found: dict[str, torch.Tensor] = {}
    for given, value in weights.items():
        name = given.removeprefix("module.")
        if name in _NOT_WEIGHTS:
            continue
        if name in _WHOLE:
            found[_WHOLE[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T.contiguous()
        elif not (layer := _in_layer(name, value)):
            raise ValueError(
                f"{where} has the weight {given}, which open_clip's ViT with a text encoder of its own has not: it is "
                "of another model, or of another version of it"
            )
        else:
            found |= layer
    return found


def _in_layer(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a weight of a layer is in transformers; nothing if it is none."""
    if not (match := _LAYER.fullmatch(name)):
        return {}
    picture, number, part, kind = match.groups()
    layer = f"{'vision' if picture else 'text'}_model.encoder.layers.{number}"
    if part == "attn.in_proj":
        each = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{which}_proj.{kind}": third.contiguous() for which, third in each}
    return {f"{layer}.{_IN_LAYER[part]}.{kind}": value} if part in _IN_LAYER else {}
