"""RAHF: one predictor of rich human feedback (arXiv 2312.10240, section 4.1).

    image -> ViT -> patch tokens -> linear --+
                                             +-- [image | text] -> T5 encoder -> fused image tokens -> heatmaps, scores
    prompt -> embeddings of its pieces ------+                                -> fused text tokens  -> words

Shapes: B images of H x W pixels, D the width of T5, g x k the grid of patch tokens, P = g * k, L positions of the
longest prompt in the batch (pieces of words, and an end), T its words, h x w a heatmap's pixels, V the vocabulary.

Variants. `multi_head` reads everything from one pass of the encoder, by a head for each score and heatmap.
`augmented_prompt` has one head a kind; what it is to say stands before the prompt ("implausibility heatmap"), and the
encoder reads image and prompt once for each of the seven outputs. It costs seven passes of T5, and one of the ViT.

Order and positions. Image tokens come first, so that neither the padding of a prompt nor its length moves anything
that is seen. T5 knows positions only by a learned bias on the distance in the sequence; as the paper's construction
implies, it runs over the concatenation: between patches it is the distance in raster order, between words the usual
one, and across the two segments a large distance whose sign tells them apart. Where a patch lies in the image it knows
from the ViT's position embeddings, which the linear map carries over; for a staged encoder (`reward.vision`), which has
none, a learned table is added behind that map. Padding is masked as a key everywhere.

Pooling. With `image_pooling` n, T5 reads the mean of each n x n patch tokens, 1 / n**2 as many. What it says of such a
block stands at all its patches, and the patch's own token is added through a linear map, so that heads still see every
patch. It is ours, not the paper's; what T5 costs says `benchmarks/rahf_speed.py`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from reward import losses
from reward.feedback import HEATMAPS, SCORES
from reward.heads import (
    HEATMAP_LOGIT,
    HeatmapReadOut,
    LightHeatmapHead,
    LightScoreHead,
    PaperHeatmapHead,
    PaperScoreHead,
    TaggingHead,
)
from reward.rahf_config import OUTPUT_NAMES, RahfConfig
from reward.t5_family import new_stack, output_scale
from reward.vision import (
    is_staged,
    normalisation_of,
    only_features,
    resizing,
    see,
    tokens_of,
    width_of,
)
from reward.word_sequence import SequenceHead, write_marks

logger = logging.getLogger(__name__)


@dataclass
class RahfOutput(ModelOutput):
    """What `RahfModel` says of a batch.

    Attributes:
        loss: scalar, weighted sum of the terms whose targets were given; None without targets.
        scores: (B, 4) in [0, 1], in the order of `reward.feedback.SCORES`; float32 whatever the model computes in, as
            in bf16 ranks would meet ties.
        heatmaps: (B, 2, h, w) in [0, 1], in the order of `reward.feedback.HEATMAPS`; float32.
        word_logits: (B, T), above 0 where the word is more likely misaligned than not; arbitrary at padding. None while
            a decoder is trained: it is then told the marks instead of choosing them.
        score_loss, heatmap_loss, word_loss: scalars, the terms before weighting; None without their targets.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    heatmaps: torch.Tensor | None = None
    word_logits: torch.Tensor | None = None
    score_loss: torch.Tensor | None = None
    heatmap_loss: torch.Tensor | None = None
    word_loss: torch.Tensor | None = None


class RahfModel(PreTrainedModel):
    """The RAHF predictor; see the head of this file. `reward.predict` is the way to use a trained one."""

    config_class = RahfConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: RahfConfig):
        super().__init__(config)
        text, width = config.text_config, config.text_config.d_model
        # In the precision of all other parts, whatever the encoder was stored in.
        self.vision = only_features(AutoModel.from_config(config.vision_config, dtype=torch.get_default_dtype()))
        self.resizing = resizing(config.vision_config, config.input_size)
        self.project = nn.Linear(width_of(config.vision_config), width)
        places = config.grid[0] * config.grid[1]
        self.places = nn.Embedding(places, width) if is_staged(config.vision_config) else None
        self.encoder = new_stack(text)
        self.detail = nn.Linear(width, width) if config.image_pooling > 1 else None
        score_head = PaperScoreHead if config.score_head == "paper" else LightScoreHead
        each = config.variant == "multi_head"
        self.heatmap_heads = nn.ModuleDict({name: _heatmap_head(config) for name in (HEATMAPS if each else ["any"])})
        self.score_heads = nn.ModuleDict(
            {name: score_head(width, config.head_width) for name in (SCORES if each else ["any"])}
        )
        self.word_head = None
        if config.words != "none":
            sequence = config.words == "sequence"
            self.word_head = SequenceHead(text) if sequence else TaggingHead(width)
        self.post_init()

    @classmethod
    def from_backbones(cls, vision: PreTrainedModel | str | Path, text: PreTrainedModel | str | Path, **options):
        """A RAHF whose encoders come pretrained and whose heads are new.

        Args:
            vision: a vision model that `reward.vision` knows, or the folder of one, whose image processor then says how
                pixels are normalised, unless `options` do.
            text: a T5, mT5 or UMT5 (encoder only, or with its decoder, which `words="sequence"` needs), or its folder.
            options: fields of `RahfConfig`.

        Raises:
            ValueError: an option that is no field, a text model or vision encoder of another kind, or lost weights.
        """
        if unknown := sorted(options.keys() - RahfConfig.__annotations__.keys()):
            raise ValueError(f"RahfConfig has no field {unknown[0]!r}; it has {', '.join(RahfConfig.__annotations__)}")
        lost: dict[str, set[str]] = {"vision": set(), "text": set()}
        if not isinstance(vision, PreTrainedModel):
            options = _with_normalisation(vision, options)
            vision, told = AutoModel.from_pretrained(vision, output_loading_info=True)
            lost["vision"] = {name.removeprefix("vision_model.") for name in told["missing_keys"]}
        if not isinstance(text, PreTrainedModel):
            text, told = AutoModelForSeq2SeqLM.from_pretrained(text, output_loading_info=True)
            lost["text"] = set(told["missing_keys"])
        # A model of image and text keeps the two apart (CLIP, SigLIP).
        vision = getattr(vision, "vision_model", vision)
        config = RahfConfig(vision_config=vision.config.to_dict(), text_config=text.config.to_dict(), **options)
        model = cls(config)
        _refuse_lost("vision encoder", lost["vision"] & model.vision.state_dict().keys())
        needed = ("encoder.", "shared.", "decoder.", "lm_head.")[: 4 if config.words == "sequence" else 2]
        _refuse_lost("text model", {name for name in lost["text"] if name.startswith(needed)})
        _copy_weights(vision, model.vision, "vision encoder")
        _copy_weights(text.get_encoder(), model.encoder, "text encoder")
        if config.words == "sequence":
            _copy_weights(text.get_decoder(), model.word_head.decoder, "text decoder")
            written = text.get_output_embeddings().weight.detach()
            model.word_head.write.weight.data.copy_(written * output_scale(text.config))
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers; the weights are then copied, so that the model predicts the bits that it did when saved.

        safetensors hands out views of the file at odd addresses, and CPU kernels round differently there.

        Args:
            attn_implementation: by part, `{"vision_config": ..., "text_config": ...}`, or one for both; a flash
                attention is the vision encoder's alone, as T5's relative positions have none.
            output_loading_info: return what was not found, too, which is an error otherwise.

        Raises:
            ValueError: the checkpoint is of another class, or lacks weights.
        """
        attention = kwargs.get("attn_implementation")
        if isinstance(attention, str) and "flash" in attention:
            kwargs["attn_implementation"] = {"vision_config": attention, "text_config": "sdpa"}
        model, told = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        if output_loading_info:
            return model, told
        if lost := sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}):
            raise ValueError(
                f"{folder} lacks weights of the model, or has them in other sizes: {lost[:3]} ({len(lost)} in all)"
            )
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """New layers keep the scale of what flows through them (T5's embeddings have a variance of 1, not 0.02**2)."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.normal_(module.weight, std=(module.weight[0].numel()) ** -0.5)
            if module.bias is not None:
                init.constant_(module.bias, HEATMAP_LOGIT if isinstance(module, HeatmapReadOut) else 0.0)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """As in transformers, with the weights under the modules' own names.

        transformers would rename the ViT's to those of its version 4; `Trainer` loads checkpoints by the modules'
        names, and would then leave the ViT as it is when it resumes or goes back to the best checkpoint.
        """
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.word_head.write if isinstance(self.word_head, SequenceHead) else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.word_head.write = value

    def patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> the vision encoder's features of each place on its grid, (B, P, its width)."""
        if pixel_values.shape[-2:] != self.config.input_size:  # an encoder of any size would leave out a part of it
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])} pixels, and the model sees "
                f"{self.config.input_size}; `reward.data.preprocess` brings pictures to that size"
            )
        features = see(self.vision, pixel_values, **self.resizing)
        return tokens_of(features, self.config.grid[0] * self.config.grid[1])

    def see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> their features as T5 takes them, (B, P, D)."""
        image = self.project(self.patch_features(pixel_values))
        return image if self.places is None else image + self.places(torch.arange(image.shape[1], device=image.device))

    def fuse(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders: images (B, 3, H, W), prompts (B, L) -> image tokens (B, P, D) and text tokens (B, L, D)."""
        return self._attend(self.see(pixel_values), self.encoder.embed_tokens(input_ids), attention_mask)

    def _attend(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, P, D) and embedded text (B, L, D) with its mask (B, L), each after it saw both."""
        read = image if self.detail is None else self._pool(image)
        patches = read.shape[1]
        mask = torch.cat([mask.new_ones(read.shape[:2]), mask], dim=1)
        fused = self.encoder(inputs_embeds=torch.cat([read, text], dim=1), attention_mask=mask).last_hidden_state
        seen, text = fused[:, :patches], fused[:, patches:]
        return (seen if self.detail is None else self._spread(seen) + self.detail(image)), text

    def _pool(self, image: torch.Tensor) -> torch.Tensor:
        """Patch tokens (B, P, D) -> the means of their blocks (B, P / n**2, D)."""
        rows, columns, side = *self.config.grid, self.config.image_pooling
        blocks = image.unflatten(1, (rows // side, side, columns // side, side))
        return blocks.mean((2, 4)).flatten(1, 2)

    def _spread(self, blocks: torch.Tensor) -> torch.Tensor:
        """Tokens of blocks (B, P / n**2, D) -> each at all patches of its block (B, P, D)."""
        rows, columns, side = *self.config.grid, self.config.image_pooling
        grid = blocks.unflatten(1, (rows // side, columns // side))
        return grid.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1, 2)

    def _attend_by_output(self, image: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> list:
        """For each of `OUTPUT_NAMES`, image and text tokens that were fused for it: what is wanted leads the prompt."""
        names, named = _output_names(self.config.output_ids, input_ids)  # (7, N) each
        outputs, batch, length = len(names), len(image), input_ids.shape[1]
        rows = names.repeat_interleave(batch, 0), named.repeat_interleave(batch, 0)  # of one output after the other
        ids = torch.cat([rows[0], input_ids.repeat(outputs, 1)], dim=1)
        mask = torch.cat([rows[1].to(mask), mask.repeat(outputs, 1)], dim=1)
        seen, text = self._attend(image.repeat(outputs, 1, 1), self.encoder.embed_tokens(ids), mask)
        return list(zip(seen.chunk(outputs), text[:, -length:].chunk(outputs), strict=True))

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        word_positions: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        heatmaps: torch.Tensor | None = None,
        word_labels: torch.Tensor | None = None,
    ) -> RahfOutput:
        """Predict rich feedback, and its loss where targets are given.

        Args:
            pixel_values: (B, 3, H, W), as `reward.data.preprocess` makes them.
            input_ids, attention_mask: (B, L), as `reward.data.encode_prompts` makes them.
            word_positions: (B, T), where in L each word begins, -1 where there is none.
            scores, heatmaps: targets (B, 4) and (B, 2, h, w) in [0, 1].
            word_labels: targets (B, T), 1 = misaligned, -100 = not counted. A decoder of words in sequence learns no
                mark behind the latter; for words that it does not see, which is what they are, it writes nothing.

        The graph breaks (`torch.compile`) only where a decoder chooses its marks: not in training.
        """
        image = self.see(pixel_values)
        if self.config.variant == "multi_head":
            fused = self._attend(image, self.encoder.embed_tokens(input_ids), attention_mask)
            by_output = [fused] * len(OUTPUT_NAMES)
        else:
            by_output = self._attend_by_output(image, input_ids, attention_mask)
        maps = [seen.transpose(1, 2).unflatten(2, self.config.grid) for seen, _ in by_output]  # (B, D, g, k) each
        scored = [
            _of(self.score_heads, name)(maps[index], by_output[index][1], attention_mask)
            for index, name in enumerate(SCORES)
        ]
        mapped = [_of(self.heatmap_heads, name)(maps[index]) for index, name in enumerate(HEATMAPS, start=len(SCORES))]
        predicted = RahfOutput(
            scores=torch.stack(scored, dim=1).float().sigmoid(), heatmaps=torch.stack(mapped, dim=1).float().sigmoid()
        )
        if word_positions is not None:
            self._add_words(predicted, by_output[-1][1], input_ids, attention_mask, word_positions, word_labels)
        return self._with_loss(predicted, scores, heatmaps)

    def _add_words(self, predicted, text, input_ids, attention_mask, word_positions, word_labels) -> None:
        """Logits of the words and, with labels, their loss."""
        if isinstance(self.word_head, TaggingHead):
            predicted.word_logits = self.word_head(text, word_positions)
            if word_labels is not None:
                predicted.word_loss = losses.word_loss(predicted.word_logits, word_labels)
        elif isinstance(self.word_head, SequenceHead):
            if (mark := self.config.mark_id) is None:
                raise ValueError("the model has no mark for misaligned words yet; give it a tokenizer: adopt_tokenizer")
            fused = self.encoder.embed_tokens, text, attention_mask
            if word_labels is not None:
                marked = write_marks(input_ids, attention_mask, word_positions, word_labels == 1, mark)
                predicted.word_loss = self.word_head.loss(*fused, marked)
            if not self.training:
                predicted.word_logits = self.word_head.read(*fused, input_ids, word_positions, mark)

    def _with_loss(self, predicted, scores, heatmaps) -> RahfOutput:
        config, total = self.config, []
        if scores is not None:
            predicted.score_loss = losses.score_loss(predicted.scores, scores)
            total.append(config.score_loss_weight * predicted.score_loss)
        if heatmaps is not None:
            predicted.heatmap_loss = losses.heatmap_loss(predicted.heatmaps, heatmaps, config.heatmap_positive_weight)
            total.append(config.heatmap_loss_weight * predicted.heatmap_loss)
        if predicted.word_loss is not None:
            total.append(config.word_loss_weight * predicted.word_loss)
        if total:
            predicted.loss = torch.stack(total).sum()
        return predicted


def _of(heads: nn.ModuleDict, name: str) -> nn.Module:
    return heads[name] if name in heads else heads["any"]


def _output_names(output_ids: list[list[int]] | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the names of outputs, (7, N), and where they are (bool).

    Where a tokenizer cuts names into differing numbers of pieces, masked places stand before the shorter ones, and the
    prompt is as far behind the image for each: T5 knows distances, so that is a part of what the model learned.
    """
    if output_ids is None:
        raise ValueError("the model does not know the names of its outputs yet; give it a tokenizer: adopt_tokenizer")
    longest = max(map(len, output_ids))
    ids = like.new_tensor([[0] * (longest - len(name)) + name for name in output_ids])
    lengths = like.new_tensor([len(name) for name in output_ids])
    return ids, torch.arange(longest, device=like.device) >= longest - lengths[:, None]


def _heatmap_head(config: RahfConfig) -> nn.Module:
    width = config.text_config.d_model
    if config.heatmap_head == "paper":
        return PaperHeatmapHead(width, config.map_size, config.head_width)
    return LightHeatmapHead(width, config.map_size, config.grid, config.head_width)


def _with_normalisation(vision: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with `image_mean` and `image_std` of a pretrained vision encoder, where they do not name them."""
    if {"image_mean", "image_std"} <= options.keys():
        return dict(options)
    told = normalisation_of(vision)
    if told is None:
        logger.warning(
            "%s does not say how the vision encoder's pixels were normalised (preprocessor_config.json): image_mean "
            "and image_std are 0.5 where they are not given",
            vision,
        )
        return dict(options)
    return {"image_mean": told[0], "image_std": told[1], **options}


def _refuse_lost(what: str, names: set[str]) -> None:
    if names:
        raise ValueError(f"the {what} given lacks weights: {', '.join(sorted(names)[:3])} ({len(names)} in all)")


def _copy_weights(source: nn.Module, target: nn.Module, what: str):
    """Load `source`'s weights into `target`; whatever `target` has must be there."""
    missing, _ = target.load_state_dict(source.state_dict(), strict=False)
    _refuse_lost(what, set(missing))


AutoModel.register(RahfConfig, RahfModel)
