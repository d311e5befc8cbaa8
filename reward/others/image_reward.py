"""ImageReward: what experts prefer among the pictures of a prompt, said by a BLIP with a linear head."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import BlipTextModel, BlipVisionModel

from reward.others import blip_names
from reward.others.clip import check_processor
from reward.others.files import check_file, load_model, load_tensors, read_weights
from reward.others.frozen import SeeingReward
from reward.others.linear_head import LinearHead
from reward.others.showing import Showing
from reward.others.texts import encode, load_tokenizer

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of its raw scores over its training data, its authors say
_LENGTH = 35
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's contrastive loss; the reward does not use them


class ImageReward(SeeingReward):
    """ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977): of mean 0 and deviation 1 over its training data.

    A BLIP (ViT-L/16, 224 x 224, and BERT-base with cross-attention) reads the prompt, 35 tokens of it, while looking at
    the picture; a linear head on the first token gives the score. Its authors' four example pictures get 0.58, 0.27,
    -1.41 and -2.03. That most pictures get -2.5 to 2 is our estimate from these and from mean and deviation.

    Args:
        model: `ImageReward.pt`, its authors' file (on the hub `THUDM/ImageReward/ImageReward.pt`), or its tensors as
            safetensors.
        tokenizer: folder or the hub's name of BERT's, `bert-base-uncased`. The two tokens that BLIP adds to it are not
            used here.
        batch_size, dtype: see `FrozenReward`.

    The file's names were read off its authors' code, not off the file: `blip.visual_encoder.` and `blip.text_encoder.`
    with the names of Salesforce's BLIP, `mlp.layers.`, and two projections that are not used. A name that is not among
    these is an error, not a guess. Sizes are read off the weights' shapes.
    """

    name = "imagereward"

    def __init__(self, model: str | Path, tokenizer: str | Path, batch_size: int = 32, dtype: str = "float32"):
        super().__init__(batch_size, dtype)
        check_file("model", model)
        self.source, self.words = model, check_processor(tokenizer, tokenizer, "tokenizer")

    def _load(self) -> nn.Module:
        self.tokenizer, where = load_tokenizer(self.words), str(self.source)
        parts = _parts(read_weights(self.source), where)
        eye = blip_names.picture_names(parts["blip.visual_encoder."], where)
        eye = load_model(BlipVisionModel, self.source, blip_names.picture_config(eye, where), eye)
        text = parts["blip.text_encoder."]
        config = blip_names.text_config(text, where)
        if len(self.tokenizer) > config.vocab_size:
            raise ValueError(
                f"tokenizer: {self.words} has {len(self.tokenizer)} tokens, the model reads {config.vocab_size}; give "
                "that of bert-base-uncased"
            )
        text = load_model(BlipTextModel, self.source, config, text, add_pooling_layer=False)
        head = LinearHead(config.hidden_size)
        load_tensors(head, parts["mlp."], self.source)
        side = eye.config.image_size
        self.showing = Showing((side, side))
        return nn.ModuleDict({"eye": eye, "text": text, "head": head})

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        text = encode(self.tokenizer, prompts, _LENGTH, self.device, full=True)
        read = self.model["text"](
            text.input_ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=self._look(images),
        ).last_hidden_state  # (b, 35, D)
        return (self.model["head"](read[:, 0]).squeeze(-1).float() - _MEAN) / _STD

    def _look(self, images: torch.Tensor) -> torch.Tensor:
        return self.model["eye"](self.showing(images).to(self.dtype)).last_hidden_state

    def _see(self, images: torch.Tensor) -> torch.Tensor:
        return self._look(images).mean(dim=1)


def _parts(weights: Mapping[str, torch.Tensor], where: str) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each part, by its prefix, which is taken off."""
    parts = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, value in weights.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = value
        elif not name.startswith(_UNUSED):
            raise ValueError(f"{where} has the weight {name}, which ImageReward has not: it is of another model")
    if empty := [prefix for prefix, part in parts.items() if not part]:
        raise ValueError(f"{where} has no weights whose names begin with {', '.join(empty)}: it is no ImageReward")
    return parts
