"""The settings of a RAHF: all that its model, and the preparation of its inputs, are built from."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from reward.feedback import HEATMAPS, LABEL_RANGE, SCORES, SEPARATORS
from reward.t5_family import check_text_config
from reward.vision import check_size, size_of, stride_of

OUTPUT_NAMES = (*(f"{name} score" for name in SCORES), *(f"{name} heatmap" for name in HEATMAPS), "misaligned words")
"""What `augmented_prompt` writes before the prompt, by output."""

LOSS_SETTINGS = ("score_loss_weight", "heatmap_loss_weight", "word_loss_weight", "heatmap_positive_weight")
"""Fields that the loss is computed with; settings of a training."""

_CHOICES = {
    "variant": ("multi_head", "augmented_prompt"),
    "heatmap_head": ("paper", "light"),
    "score_head": ("paper", "light"),
    "words": ("tagging", "sequence", "none"),
}
_LEAST = {"max_text_length": 2, "image_pooling": 1}
_SIDES = ("image_size", "heatmap_size")
_OF_COLOURS = ("image_mean", "image_std")
_CHECKED = (*_CHOICES, *_LEAST, *_SIDES, *_OF_COLOURS, *LOSS_SETTINGS, "head_width", "word_threshold")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values of `RahfConfig`'s fields that fit no model, whatever its encoders; None is not looked at.

    Raises:
        ValueError: names the field, its value, and what it may be.
    """
    for name, value in options.items():
        if value is None:
            continue
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, not {value!r}")
        if name in _LEAST and value < _LEAST[name]:
            raise ValueError(f"{name} must be at least {_LEAST[name]}, not {value}")
        if name in _SIDES and not _is_size(value):
            raise ValueError(f"{name} must be a side of at least 1, or [height, width] of such, not {value!r}")
        if name in _OF_COLOURS and (len(value) != 3 or (name == "image_std" and min(value) <= 0)):
            raise ValueError(f"{name} takes a number for each of R, G, B, of image_std above 0, not {list(value)}")
        if name == "head_width" and not 0 < value < float("inf"):
            raise ValueError(f"head_width must be a number above 0, not {value}")
        if name in LOSS_SETTINGS and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number from 0 on, not {value}")
        if name == "word_threshold" and not 0 <= value <= 1:
            raise ValueError(f"word_threshold is a probability, in [0, 1], not {value}")


class RahfConfig(PreTrainedConfig):
    """Everything needed to build a `RahfModel` and to prepare its inputs; nothing is downloaded.

    Args:
        vision_config: config of the vision encoder; see `reward.vision` for which.
        text_config: config of a T5, mT5 or UMT5, its encoder (and decoder).
        variant: "multi_head" or "augmented_prompt"; see the head of `reward.model`.
        heatmap_head: "paper", or "light".
        score_head: "paper", or "light", which also reads the fused text tokens.
        words: "tagging", one logit a prompt token; "sequence", the paper's decoder, see `reward.word_sequence`; "none".
        mark_id, output_ids: ids of the mark behind misaligned words, and of each of `OUTPUT_NAMES`; they come from the
            tokenizer, by `reward.vocabulary`.
        head_width: factor on the heads' channels; 1 is the paper's.
        image_pooling: T5 reads one token for each so many patches along height and width; 1 is the paper's.
        image_size: side in pixels of the square images that the vision encoder sees, or their [height, width]; that of
            its config if None, which a ResNet's does not say. For another size than its own, a ViT's position
            embeddings are interpolated.
        heatmap_size: side of the heatmaps in pixels, or their [height, width]; `image_size` if None.
        image_mean, image_std: normalisation of the images, for each of R, G, B in [0, 1]: the one that the vision
            encoder was pretrained with (`from_backbones` takes it from the encoder's folder).
        max_text_length: prompts are cut after so many pieces; words behind are not judged.
        word_separators: characters at which prompts are split into words, those of `reward.feedback.tokenize`: a model
            that was trained on other words is refused.
        label_range: lowest and highest label of scores and heatmaps that the model was trained on, and so of what it
            predicts: [0, 1] here; a model of another range is refused.
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
    mark_id: int | None = None
    output_ids: list[list[int]] | None = None
    head_width: float = 1.0
    image_pooling: int = 1
    image_size: int | list[int] | tuple[int, ...] | None = None
    heatmap_size: int | list[int] | tuple[int, ...] | None = None
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    max_text_length: int = 128
    word_separators: str = SEPARATORS
    label_range: list[float] | tuple[float, float] = LABEL_RANGE
    word_threshold: float = 0.5
    score_loss_weight: float = 1.0
    heatmap_loss_weight: float = 1.0
    word_loss_weight: float = 1.0
    heatmap_positive_weight: float = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_options({name: getattr(self, name) for name in _CHECKED})
        check_text_config(self.text_config)
        if self.word_separators != SEPARATORS:
            raise ValueError(f"the model's prompts were split at {self.word_separators!r}; here it is {SEPARATORS!r}")
        if tuple(self.label_range) != LABEL_RANGE:
            raise ValueError(f"the model's labels lay in {list(self.label_range)}; here it is {list(LABEL_RANGE)}")
        if self.image_size is None:
            self.image_size = size_of(self.vision_config)
        if self.heatmap_size is None:
            self.heatmap_size = self.image_size
        check_size(self.vision_config, self.input_size)
        if any(side % self.image_pooling for side in self.grid):
            raise ValueError(
                f"image_pooling must divide both sides of the grid of {self.grid[0]} x {self.grid[1]} patches, not be "
                f"{self.image_pooling}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, which would read any model's settings, and warn.

        Raises:
            ValueError: they are of a model of another kind.
        """
        if (kind := config_dict.get("model_type")) != cls.model_type:
            raise ValueError(f"the config is of a {kind!r}, not of a RAHF (its model_type must be {cls.model_type!r})")
        return super().from_dict(config_dict, **kwargs)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the vision encoder sees."""
        return _pair(self.image_size)

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the heatmaps."""
        return _pair(self.heatmap_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Features of the vision encoder along the height and the width of the image."""
        stride = stride_of(self.vision_config)
        return self.input_size[0] // stride, self.input_size[1] // stride


def _is_size(size: object) -> bool:
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    return all(isinstance(side, int) and side >= 1 for side in sides)


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


AutoConfig.register("rahf", RahfConfig)
