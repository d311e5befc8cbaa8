"""Settings of `python -m reward.train`: what to train on which data, and `transformers.TrainingArguments` with our own.

Every mistake that can be seen in the settings alone is an error here, before data or models are read.
"""

import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from reward.augmentation import SIDED_WORDS, Augmentation
from reward.engines import prepare_deepspeed_on_cpu
from reward.feedback import HEATMAPS, SCORES
from reward.rahf_config import LOSS_SETTINGS, check_options
from reward.training_arguments import (
    check_deepspeed_settings,
    check_no_fsdp,
    check_one_gpu,
    check_training_arguments,
)

_MODEL_SETTINGS = (
    "variant", "heatmap_head", "score_head", "words", "head_width", "image_pooling", "max_text_length", "image_mean",
    "image_std",
)  # fmt: skip

_OF_HEATMAPS = ("mse", "mse_empty", "cc", "sim", "kld", "nss", "auc_judd")
DEV_METRICS = (
    "quality",
    "loss",
    *(f"{metric}_{name}" for name in SCORES for metric in ("plcc", "srcc")),
    *(f"{metric}_{name}" for name in HEATMAPS for metric in _OF_HEATMAPS),
    *(f"{metric}_words" for metric in ("precision", "recall", "f1")),
)
"""What the best checkpoint may be chosen by, with or without `eval_`: `reward.trainer.dev_metrics`, and the loss."""

_LOWER_IS_BETTER = ("loss", "mse_", "kld_")  # how such names begin

_GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"

_FIXED = {
    "remove_unused_columns": (False, "the collator reads columns that the model does not"),
    "dataloader_persistent_workers": (False, "workers that stay do not hear of new epochs"),
    "save_only_model": (False, "checkpoints are there to be resumed, which takes the optimizer too"),
    "eval_do_concat_batches": (True, "the metrics of dev are those of all its pictures together"),
    "batch_eval_metrics": (False, "the metrics of dev are those of all its pictures together"),
    "bf16_full_eval": (False, "it would leave the model that is saved in half precision; bf16 evaluates in it too"),
    "fp16_full_eval": (False, "it would leave the model that is saved in half precision; fp16 evaluates in it too"),
    "do_train": (True, "training is what the command does"),
    "do_eval": (True, "what was trained is evaluated on dev in any case; eval_strategy says when else"),
    "do_predict": (False, "the test split is for `python -m reward.evaluate`"),
}
"""Settings that take one value only, and why."""

_OF_LEARNING = (
    "learning_rate", "backbone_learning_rate", "weight_decay", "optim", "optim_args", "optim_target_modules",
    "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "max_grad_norm", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha",
    "bf16", "fp16", *LOSS_SETTINGS,
)  # fmt: skip
"""What of Trainer's settings decides how a model learns, be it for longer or in other micro-batches."""

_FREE = ("data", "in_memory", "panels")
"""Of ours, what decides nothing: of the data, the pictures count."""

_SAMPLING = ("random", "sequential")  # the others go by the lengths of examples


@dataclass
class RahfArguments:
    """What to train, on which data."""

    data: str = field(metadata={"help": "folder written by `python -m reward.richhf`"})
    model: str | None = field(default=None, metadata={"help": "RAHF checkpoint to start from"})
    vision_model: str | None = field(
        default=None, metadata={"help": "pretrained vision encoder, where there is no RAHF"}
    )
    text_model: str | None = field(default=None, metadata={"help": "pretrained T5, with its tokenizer"})
    heatmap_head: str | None = field(
        default=None, metadata={"help": "paper or light; unset: what --model has, or light"}
    )
    score_head: str | None = field(default=None, metadata={"help": "paper or light; unset: what --model has, or light"})
    head_width: float | None = field(default=None, metadata={"help": "factor on the heads' channels"})
    image_pooling: int | None = field(
        default=None, metadata={"help": "T5 reads one token for each so many patches, along height and width; 1: all"}
    )
    variant: str | None = field(default=None, metadata={"help": "multi_head or augmented_prompt"})
    words: str | None = field(default=None, metadata={"help": "tagging, sequence or none"})
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "what the encoder sees: one side, or height and width; unset: the model's own"},
    )
    heatmap_size: list[int] | None = field(
        default=None, metadata={"help": "of the heatmaps: one side, or height and width; unset: the model's own"}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "of R, G, B in [0, 1]; unset: as the vision encoder was pretrained"}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "of R, G, B in [0, 1]; unset: as the vision encoder was pretrained"}
    )
    max_text_length: int | None = field(default=None, metadata={"help": "pieces of a prompt that are read"})
    in_memory: bool = field(default=False, metadata={"help": "decode all pictures once; for small pictures"})
    flip_probability: float = field(
        default=0.0,
        metadata={"help": "how often left and right are swapped, where the prompt has none of sided_words"},
    )
    sided_words: list[str] = field(
        default_factory=lambda: list(SIDED_WORDS),
        metadata={"help": "words of prompts that a flip would belie, as left of becomes right of"},
    )
    crop_probability: float = field(default=0.0, metadata={"help": "how often picture and maps are cropped alike"})
    crop_min_side: float = field(default=0.8, metadata={"help": "smallest side kept by a crop, as a share"})
    brightness: float = field(default=0.0, metadata={"help": "x: factor in [1 - x, 1 + x]"})
    contrast: float = field(default=0.0, metadata={"help": "x: factor in [1 - x, 1 + x]"})
    hue: float = field(default=0.0, metadata={"help": "x: turn in [-x, x] of the full circle; at most 0.5"})
    saturation: float = field(default=0.0, metadata={"help": "x: factor in [1 - x, 1 + x]"})
    grayscale_probability: float = field(default=0.0, metadata={"help": "how often all colour is taken"})
    jpeg_probability: float = field(default=0.0, metadata={"help": "how often the picture goes through JPEG"})
    jpeg_min_quality: int = field(default=70, metadata={"help": "lowest JPEG quality, 1 to 95; the highest is 95"})
    panels: int = field(default=8, metadata={"help": "dev pictures drawn at each evaluation; 0: none"})

    def __post_init__(self):
        backbones = self.vision_model is not None and self.text_model is not None
        if (self.model is not None) == backbones:
            raise ValueError("give either --model (a RAHF checkpoint), or both --vision_model and --text_model")
        for name in ("image_size", "heatmap_size"):
            if (sides := getattr(self, name)) is not None and len(sides) not in (1, 2):
                raise ValueError(f"{name} is one side, or height and width, not {sides}")
        _check_least(self, ("panels",), 0)
        check_options(self.model_options)
        self.augmentation(seed=0)  # checks its settings

    @property
    def model_options(self) -> dict:
        """The settings of the model's config that were given."""
        given = {name: getattr(self, name) for name in _MODEL_SETTINGS}
        for name in ("image_size", "heatmap_size"):
            sides = getattr(self, name)
            given[name] = sides[0] if sides is not None and len(sides) == 1 else sides
        return {name: value for name, value in given.items() if value is not None}

    def augmentation(self, seed: int) -> Augmentation:
        names = [item.name for item in fields(Augmentation) if item.name != "seed"]
        return Augmentation(seed=seed, **{name: getattr(self, name) for name in names})


@dataclass
class RahfTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what RAHF adds; `learning_rate` is that of the heads."""

    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "rate of what is pretrained of the vision encoder and T5; unset: learning_rate"}
    )
    score_loss_weight: float = field(default=1.0, metadata={"help": "weight of the scores' MSE"})
    heatmap_loss_weight: float = field(default=1.0, metadata={"help": "weight of the heatmaps' pixel MSE"})
    word_loss_weight: float = field(default=1.0, metadata={"help": "weight of the words' cross-entropy"})
    heatmap_positive_weight: float = field(
        default=1.0, metadata={"help": "how often marked pixels count in the heatmaps' MSE; 1: the paper's loss"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "what to go on from: a checkpoint's folder; `latest` or `last`, the newest whole one in "
            "output_dir; or `auto`, that one if there is any, else begin anew"
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "begin anew in a folder that is not empty, deleting the training in it"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "rate of the heads and the projection"})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "decay after the warm-up"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when dev is evaluated"})
    save_strategy: str = field(default="epoch", metadata={"help": "when a checkpoint is written"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept; the best is always kept"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "end with the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(
        default="eval_quality",
        metadata={"help": "see reward.trainer.dev_metrics; mse, kld and loss count as better the lower they are"},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 the parser wants None first
        default="tensorboard", metadata={"help": "where figures are logged"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be false: our collator reads them all"})
    do_train: bool = field(default=True, metadata={"help": "must be true: training is what the command does"})
    do_eval: bool = field(default=True, metadata={"help": "must be true: eval_strategy says when dev is evaluated"})

    def __post_init__(self):
        self._check_best_metric()
        for name, (value, why) in _FIXED.items():  # Trainer would change do_eval
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {str(value).lower()}: {why}")
        if self.resumes_if_it_can and self.overwrite_output_dir:
            raise ValueError(
                "overwrite_output_dir would delete the training that resume_from_checkpoint auto goes on with; give "
                "one of them"
            )
        check_deepspeed_settings(self.deepspeed)
        check_no_fsdp(self)
        if self.deepspeed and self.use_cpu:
            prepare_deepspeed_on_cpu()
        super().__post_init__()
        check_one_gpu(self, "-m reward.train")
        if self.label_names is not None:
            raise ValueError(
                f"label_names is {self.label_names}; leave it out: what RAHF learns from has its own names"
            )
        self.label_names = ["scores", "heatmaps", "word_labels"]
        if self.train_sampling_strategy not in _SAMPLING:
            raise ValueError(
                f"train_sampling_strategy must be one of {', '.join(_SAMPLING)}, not {self.train_sampling_strategy!r}: "
                "how long a prompt is, only the collator finds out"
            )
        zero = self.hf_deepspeed_config if self.deepspeed else None
        if zero and zero.is_zero3() and not zero.is_true(_GATHER):
            raise ValueError(f"with ZeRO-3, {_GATHER} must be true in {self.deepspeed}, or no whole model can be saved")
        for name in ("label_smoothing_factor", "prediction_loss_only"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; leave it out: it is for losses of one label")
        check_training_arguments(self)
        _check_least(self, (*LOSS_SETTINGS, "backbone_learning_rate"), 0)
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        _check_least(self, sizes, 1)
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, not {self.num_train_epochs}; or give max_steps")

    @property
    def resumes_if_it_can(self) -> bool:
        """Whether one command both begins a training and goes on with it."""
        return str(self.resume_from_checkpoint).lower() == "auto"

    def _check_best_metric(self) -> None:
        """Refuse what is no metric of dev; and say, where nobody did, which end of it is the better one."""
        if self.metric_for_best_model is None:
            return
        name = self.metric_for_best_model.removeprefix("eval_")
        if name not in DEV_METRICS:
            (near,) = difflib.get_close_matches(name, DEV_METRICS, n=1, cutoff=0.0)
            raise ValueError(
                f"metric_for_best_model {self.metric_for_best_model!r} is no metric of dev; the nearest is eval_{near}"
            )
        if self.greater_is_better is None:
            self.greater_is_better = not name.startswith(_LOWER_IS_BETTER)


def learning_settings(arguments: RahfArguments, args: RahfTrainingArguments, train: Dataset) -> dict[str, Any]:
    """What a training that goes on must have as the one that was stopped; how long it lasts is not among it.

    Args:
        train: the split; its pictures count, not where they lie.
    """
    uids = hashlib.sha256("\n".join(train["uid"]).encode()).hexdigest()
    return {
        **{name: value for name, value in asdict(arguments).items() if name not in _FREE},
        **{name: getattr(args, name) for name in _OF_LEARNING},
        "pictures an update": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "pictures (SHA-256 of their uids)": uids,
    }


def _check_least(settings: object, names: Sequence[str], least: int) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be a number from {least} on, not {value}")
