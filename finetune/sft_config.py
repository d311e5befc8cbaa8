"""The settings of supervised fine-tuning."""

from dataclasses import dataclass, field
from typing import ClassVar

from finetune.rule_reading import read_number
from rl.adapter import require
from rl.policy_checks import warn_of_ignored
from rl.policy_config import PolicyConfig


@dataclass
class SftConfig(PolicyConfig):
    """`PolicyConfig` with what learning from pictures needs besides; defaults are the small world's recipe.

    An epoch is a pass over the pictures. How pictures are sampled (`num_inference_steps`, `start_timestep` and their
    like) matters to evaluations alone.
    """

    command: ClassVar[str] = "-m finetune.sft"
    loader_settings: ClassVar[tuple[str, ...]] = ("dataloader_num_workers",)

    # Trainer's own, with other defaults
    learning_rate: float = field(default=3e-4, metadata={"help": "Highest learning rate of AdamW."})
    warmup_steps: float = field(default=20, metadata={"help": "Updates of warm-up."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pictures of one forward and backward."})
    save_strategy: str = field(
        default="epoch",
        metadata={"help": "epoch: a checkpoint after each pass; steps: every `save_steps` updates; no."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})

    # The loss
    noise_offset: float = field(
        default=0.0,
        metadata={
            "help": "Shift each channel's noise by so much times a random number, so that very dark and very light "
            "pictures are learnt; 0.05 to 0.1 is usual, 0 is off."
        },
    )
    snr_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Min-SNR weighting of the timesteps (Hang et al. 2023) with this gamma, usually 5; None: off."
        },
    )
    prompt_dropout: float = field(
        default=0.1,
        metadata={"help": "Share of pictures that are learnt without their prompt, which guidance needs."},
    )

    # What counts how much
    weight_by: dict = field(
        default_factory=dict,
        metadata={
            "help": "Weigh pictures by columns of their table, name -> factor, e.g. {overall: 1.0}; `finetune.select` "
            "writes every predicted score there. Empty: all count alike."
        },
    )
    weight_temperature: float | None = field(
        default=None,
        metadata={"help": "With weight_by: a picture counts as exp(value / this). None: as its value."},
    )

    # Pictures
    aspect_buckets: bool = field(
        default=False,
        metadata={
            "help": "Cut pictures to the nearest of several aspect ratios from 1:2 to 2:1, each of as many pixels as "
            "`resolution` squared, instead of to squares."
        },
    )
    cache_latents: bool = field(
        default=True,
        metadata={
            "help": "Encode every picture once, before training, and keep the latents in memory (at 512 x 512, 64 KB "
            "a picture and process; at 1024 x 1024, 256 KB)."
        },
    )

    def __post_init__(self):
        self.weight_by = {
            str(name): read_number(factor, f"weight_by: the factor of {name}")
            for name, factor in (self.weight_by or {}).items()
        }
        super().__post_init__()
        require(self.noise_offset >= 0, f"noise_offset is {self.noise_offset}; it must not be negative")
        require(self.snr_gamma is None or self.snr_gamma > 0, f"snr_gamma is {self.snr_gamma}; it must be above 0")
        require(0 <= self.prompt_dropout <= 1, f"prompt_dropout is {self.prompt_dropout}; it must lie in [0, 1]")
        require(
            self.weight_temperature is None or self.weight_temperature > 0,
            f"weight_temperature is {self.weight_temperature}; it must be above 0",
        )
        require(
            not self.auto_find_batch_size,
            "auto_find_batch_size would start the run anew; set a smaller per_device_train_batch_size instead",
        )
        require(
            not (self.deepspeed and self.hf_deepspeed_config.is_zero3()),
            "ZeRO-3 is not supported: it has not been tried here; ZeRO-2 shards gradients and optimizer: use "
            "configs/deepspeed/zero2.json",
        )
        told = ("original_size", "crops_coords_top_left", "target_size")
        warn_of_ignored(self, told, "XL is told of each picture how it was cut; the evaluation alone goes by this")
        if not self.weight_by:
            warn_of_ignored(self, ("weight_temperature",), "there is no weight_by")
