"""RAHF: one predictor of rich human feedback (arXiv 2312.10240, section 4.1).

    image -> ViT -> patch tokens -> linear --+
                                             +-- [image | text] -> T5 encoder -> fused image tokens -> heatmaps, scores
    prompt -> embeddings of its pieces ------+                                -> fused text tokens  -> words

Shapes: B images of S x S pixels, D the width of T5, g x g the grid of patch tokens, P = g * g, L positions of the
longest prompt in the batch (pieces of words, and an end), T its words, h the side of a heatmap, V the vocabulary.

Order and positions. Image tokens come first, so that neither the padding of a prompt nor its length moves anything
that is seen. T5 knows positions only by a learned bias on the distance in the sequence; as the paper's construction
implies, it runs over the concatenation: between patches it is the distance in raster order, between words the usual
one, and across the two segments a large distance whose sign tells them apart. Where a patch lies in the image it knows
from the ViT's position embeddings, which the linear map carries over; for a staged encoder (`reward.vision`), which has
none, a learned table is added behind that map. Padding is masked as a key everywhere.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, T5Config
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.models.t5.modeling_t5 import T5Stack
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
from reward.vision import is_staged, only_features, stride_of, tokens_of, width_of


class RahfConfig(PreTrainedConfig):
    """Everything needed to build a `RahfModel` and to prepare its inputs; nothing is downloaded.

    Args:
        vision_config: config of the vision encoder, for square images; see `reward.vision` for which.
        text_config: `T5Config` of the text encoder (and decoder).
        variant: "multi_head", one head for each score and heatmap.
        heatmap_head: "paper", or "light" for small models.
        score_head: "paper", or "light" for small models, which also reads the fused text tokens.
        words: "tagging", one logit a prompt token, or "none".
        text_decoder: also build T5's decoder.
        tie_word_embeddings: the decoder's word embeddings are the encoder's, as in T5.
        head_width: factor on the heads' channels; 1 is the paper's.
        image_size: side in pixels of the square images that the vision encoder sees; that of its config if None,
            which a ResNet's does not say.
        heatmap_size: side of the heatmaps in pixels; `image_size` if None.
        image_mean, image_std: normalisation of the images, for each of R, G, B in [0, 1].
        max_text_length: prompts are cut after so many pieces; words behind are not judged.
        word_threshold: a word counts as misaligned if its probability is above; training sets it to the best F1 on dev.
        score_loss_weight, heatmap_loss_weight, word_loss_weight: weights of the loss terms.
        heatmap_positive_weight: how often marked pixels count in the heatmaps' loss, see `reward.losses.heatmap_loss`.
    """

    model_type = "rahf"
    sub_configs_defaults = {  # noqa: RUF012 the form of transformers
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
    }
    keys_to_ignore_at_inference = ["score_loss", "heatmap_loss", "word_loss"]  # noqa: RUF012

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    variant: str = "multi_head"
    heatmap_head: str = "light"
    score_head: str = "light"
    words: str = "tagging"
    text_decoder: bool = False
    tie_word_embeddings: bool = True
    head_width: float = 1.0
    image_size: int | None = None
    heatmap_size: int | None = None
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    max_text_length: int = 128
    word_threshold: float = 0.5
    score_loss_weight: float = 1.0
    heatmap_loss_weight: float = 1.0
    word_loss_weight: float = 1.0
    heatmap_positive_weight: float = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, valid in (
            ("variant", ("multi_head",)),
            ("heatmap_head", ("paper", "light")),
            ("score_head", ("paper", "light")),
            ("words", ("tagging", "none")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, not {getattr(self, name)!r}")
        if not isinstance(self.text_config, T5Config):
            raise ValueError(f"the text encoder must be a T5, not a {self.text_config.model_type!r}")
        if self.image_size is None:
            self.image_size = _image_size(self.vision_config)
        if self.image_size % stride_of(self.vision_config):
            raise ValueError(
                f"image_size {self.image_size} is no multiple of {stride_of(self.vision_config)}, the pixels that one "
                "feature of the vision encoder stands for"
            )
        if self.heatmap_size is None:
            self.heatmap_size = self.image_size

    @property
    def grid(self) -> int:
        """Features of the vision encoder along one side of the image."""
        return self.image_size // stride_of(self.vision_config)


@dataclass
class RahfOutput(ModelOutput):
    """What `RahfModel` says of a batch.

    Attributes:
        loss: scalar, weighted sum of the terms whose targets were given; None without targets.
        scores: (B, 4) in [0, 1], in the order of `reward.feedback.SCORES`.
        heatmaps: (B, 2, h, h) in [0, 1], in the order of `reward.feedback.HEATMAPS`.
        word_logits: (B, T), above 0 where the word is more likely misaligned than not; arbitrary at padding.
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
        self.vision = only_features(AutoModel.from_config(config.vision_config))
        self.project = nn.Linear(width_of(config.vision_config), width)
        self.places = nn.Embedding(config.grid**2, width) if is_staged(config.vision_config) else None
        self.encoder = T5Stack(_stack_config(text, is_decoder=False))
        if config.text_decoder:
            self.decoder = T5Stack(_stack_config(text, is_decoder=True))
            self._tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}
        self.heatmap_heads = nn.ModuleDict({name: _heatmap_head(config) for name in HEATMAPS})
        score_head = PaperScoreHead if config.score_head == "paper" else LightScoreHead
        self.score_heads = nn.ModuleDict({name: score_head(width, config.head_width) for name in SCORES})
        self.word_head = TaggingHead(width) if config.words == "tagging" else None
        self.post_init()

    @classmethod
    def from_backbones(cls, vision: PreTrainedModel | str | Path, text: PreTrainedModel | str | Path, **options):
        """A RAHF whose encoders come pretrained and whose heads are new.

        Args:
            vision: a vision model as `reward.vision` knows them, alone or beside CLIP's or SigLIP's text model; or the
                folder of one.
            text: a T5 (encoder only, or with its decoder), or the folder of one.
            options: fields of `RahfConfig`.
        """
        from transformers import T5ForConditionalGeneration

        if not isinstance(vision, PreTrainedModel):
            vision = AutoModel.from_pretrained(vision)
        vision = getattr(vision, "vision_model", vision)  # of CLIP's or SigLIP's two towers, the one for pictures
        if not isinstance(text, PreTrainedModel):
            text = T5ForConditionalGeneration.from_pretrained(text)
        config = RahfConfig(vision_config=vision.config.to_dict(), text_config=text.config.to_dict(), **options)
        model = cls(config)
        _copy_weights(vision, model.vision, "vision encoder")
        _copy_weights(text.get_encoder(), model.encoder, "text encoder")
        if config.text_decoder:
            _copy_weights(text.get_decoder(), model.decoder, "text decoder")
            model.tie_weights()
        return model

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; the weights are then copied, so that the model predicts the bits that it did when saved.

        safetensors hands out views of the file at odd addresses, and CPU kernels round differently there.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            parameter.data = parameter.data.clone()
        return loaded

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

    def fuse(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders: images (B, 3, S, S), prompts (B, L) -> image tokens (B, P, D) and text tokens (B, L, D)."""
        patches = self.config.grid**2
        image = self.project(tokens_of(self.vision(pixel_values=pixel_values).last_hidden_state, patches))  # (B, P, D)
        if self.places is not None:
            image = image + self.places.weight
        text = self.encoder.embed_tokens(input_ids)  # (B, L, D)
        mask = torch.cat([attention_mask.new_ones(image.shape[:2]), attention_mask], dim=1)  # (B, P + L)
        fused = self.encoder(inputs_embeds=torch.cat([image, text], dim=1), attention_mask=mask).last_hidden_state
        return fused[:, :patches], fused[:, patches:]

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
            pixel_values: (B, 3, S, S), as `reward.data.preprocess` makes them.
            input_ids, attention_mask: (B, L), as `reward.data.encode_prompts` makes them.
            word_positions: (B, T), where in L each word begins, -1 where there is none.
            scores, heatmaps: targets (B, 4) and (B, 2, h, h) in [0, 1].
            word_labels: targets (B, T), 1 = misaligned, -100 = not counted.
        """
        image, text = self.fuse(pixel_values, input_ids, attention_mask)
        grid = self.config.grid
        feature_map = image.transpose(1, 2).unflatten(2, (grid, grid))  # (B, D, g, g)
        predicted = RahfOutput(
            scores=torch.stack(
                [self.score_heads[name](feature_map, text, attention_mask) for name in SCORES], dim=1
            ).sigmoid(),
            heatmaps=torch.stack([self.heatmap_heads[name](feature_map) for name in HEATMAPS], dim=1).sigmoid(),
        )
        if self.word_head is not None and word_positions is not None:
            predicted.word_logits = self.word_head(text, word_positions)
        return self._with_loss(predicted, scores, heatmaps, word_labels)

    def _with_loss(self, predicted, scores, heatmaps, word_labels) -> RahfOutput:
        config, total = self.config, []
        if scores is not None:
            predicted.score_loss = losses.score_loss(predicted.scores, scores)
            total.append(config.score_loss_weight * predicted.score_loss)
        if heatmaps is not None:
            predicted.heatmap_loss = losses.heatmap_loss(predicted.heatmaps, heatmaps, config.heatmap_positive_weight)
            total.append(config.heatmap_loss_weight * predicted.heatmap_loss)
        if word_labels is not None and predicted.word_logits is not None:
            predicted.word_loss = losses.word_loss(predicted.word_logits, word_labels)
            total.append(config.word_loss_weight * predicted.word_loss)
        if total:
            predicted.loss = torch.stack(total).sum()
        return predicted


def _image_size(vision: PreTrainedConfig) -> int:
    size = getattr(vision, "image_size", None)
    if size is None:
        raise ValueError(f"give image_size: the vision encoder, a {vision.model_type!r}, has none of its own")
    return size if isinstance(size, int) else size[0]


def _stack_config(text: T5Config, is_decoder: bool) -> T5Config:
    config = T5Config.from_dict(text.to_dict())
    config.is_decoder = is_decoder
    config.use_cache = is_decoder
    if is_decoder:
        config.num_layers = config.num_decoder_layers
    config._attn_implementation = text._attn_implementation
    return config


def _heatmap_head(config: RahfConfig) -> nn.Module:
    width = config.text_config.d_model
    if config.heatmap_head == "paper":
        return PaperHeatmapHead(width, config.heatmap_size, config.head_width)
    return LightHeatmapHead(width, config.heatmap_size, config.grid, config.head_width)


def _copy_weights(source: nn.Module, target: nn.Module, what: str):
    """Load `source`'s weights into `target`; whatever `target` has must be there."""
    missing, _ = target.load_state_dict(source.state_dict(), strict=False)
    if missing:
        raise ValueError(f"the {what} given lacks weights: {', '.join(missing[:3])} ({len(missing)} in all)")


AutoConfig.register("rahf", RahfConfig)
