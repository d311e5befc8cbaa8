"""The settings that every training of a policy shares: how pictures are sampled, what is trained, memory, the run."""

import logging
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, TypeVar

from diffusers import DDIMScheduler
from transformers import TrainingArguments

from reward.engines import prepare_deepspeed_on_cpu
from reward.training_arguments import check_deepspeed_settings, check_training_arguments
from rl.adapter import DEFAULT_LORA_TARGETS, DEFAULT_TEXT_LORA_TARGETS, AdapterSettings, require
from rl.memory import MemorySettings
from rl.policy import PictureSize
from rl.policy_checks import (
    check_engine,
    check_names,
    check_policy_ranges,
    warn_of_ignored,
    warn_of_ignored_policy_settings,
)
from rl.sde import Schedule, ddim_scheduler, make_schedule
from rl.watch_limits import check_measured, check_watch, never_measured

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings")


@dataclass
class PolicyConfig(TrainingArguments):
    """`transformers.TrainingArguments` with what a training of a diffusion policy needs besides, whatever its loss.

    Attributes:
        command: how the training is started, for messages.
        loader_settings: Trainer's settings of data loaders that it heeds; of others it warns.
    """

    command: ClassVar[str]
    loader_settings: ClassVar[tuple[str, ...]] = ()

    # Trainer's own, with other defaults
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule, as in transformers."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    save_total_limit: int | None = field(
        default=2,
        metadata={
            "help": "Keep so many checkpoints, the newest; besides, the one of the best held-out reward; where none is "
            "watched, the last one that drew pictures no monitor objects to."
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where to log to, as in transformers."}
    )
    eval_strategy: str = field(
        default="no",
        metadata={
            "help": "Evaluate on eval_prompts in the midst of training too. epoch: after each rollout; steps: every "
            "`eval_steps` updates, which must be a multiple of the updates of a rollout; no. Curves `eval/...`, and "
            "the same pictures every time in the folder `samples`."
        },
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pictures of one batch of the evaluation."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bars."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter of the LoRA is used in every forward."}
    )

    # Sampling
    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps."})
    eta: float = field(
        default=1.0, metadata={"help": "Noise of a step: 1 as DDPM's, 0 none (nothing to train by DDPO)."}
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is none and costs half."})
    start_timestep: int | None = field(
        default=None,
        metadata={
            "help": "Start sampling at this timestep instead of the noise schedule's end, where some networks' "
            "first prediction says nothing. Best with start_timestep + 1 a multiple of the steps."
        },
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Height and width of the pictures; default: what the pipeline was trained at."}
    )
    original_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Stable Diffusion XL is told that its pictures were cut from ones of this height and width; "
            "default: their own, as in diffusers."
        },
    )
    crops_coords_top_left: list[int] = field(
        default_factory=lambda: [0, 0],
        metadata={"help": "XL is told that they were cut out from here on, pixels from top and left."},
    )
    target_size: list[int] | None = field(
        default=None, metadata={"help": "XL is told that they are of this height and width; default: their own."}
    )
    reward_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pictures given to the reward at once; default: as many as are sampled at once."},
    )

    # What is trained
    tune: Literal["lora", "full"] = field(
        default="lora",
        metadata={
            "help": "lora: a LoRA on the U-Net; full: all of the U-Net's weights, in float32, left in the folder "
            "`unet`. A copy of the base is then kept if beta is above 0; else `kl` is not logged."
        },
    )
    train_text_encoder: bool = field(
        default=False,
        metadata={
            "help": "Train a LoRA on the text encoder too, on both of XL; prompts are then encoded in every batch and "
            "update. Rank, alpha and kind are the U-Net's."
        },
    )
    text_lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TEXT_LORA_TARGETS),
        metadata={"help": "Names of the text encoders' layers that get a LoRA: attention; fc1 fc2 are the others."},
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    lora_alpha: float = field(default=8.0, metadata={"help": "The LoRA's output is scaled by lora_alpha / lora_rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_LORA_TARGETS),
        metadata={"help": "Names of the U-Net's layers that get a LoRA: attention and convolutions."},
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability that an input of a layer of the U-Net's LoRA is dropped in training, so that few "
            "prompts or pictures are not learnt by heart; usually 0 to 0.1. What is dropped stays so for a picture, "
            "from its noise to its update, and in DDPO for all pictures of a prompt's group. A rollout's figures are "
            "of what is left; evaluations, and what is saved, are of the whole. Text encoders' LoRAs see all."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the LoRA's output by lora_alpha / sqrt(lora_rank) instead (rsLoRA)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train each weight's magnitude apart from its direction (DoRA); slower."}
    )
    init_lora_weights: str = field(
        default="default",
        metadata={
            "help": "How the LoRA starts, by peft's names: default, gaussian; for linear layers also orthogonal, "
            "olora, pissa, pissa_niter_N. What comes out of the last three has twice the rank, as a LoRA on the "
            "unchanged base model has to."
        },
    )
    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Start from the LoRA in this folder, or .safetensors file, as diffusers loads it. Rank, alpha, "
            "layers and kind come from there."
        },
    )
    base_adapters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of LoRAs that are added to the base model's weights before training. To use the result "
            "in diffusers, load and fuse the same ones first."
        },
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Precision of the frozen weights; what is trained is float32 (with DeepSpeed and bf16 or fp16, "
            "float32 in its optimizer, and rounded to that where it is used and saved)."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the trained weights, from the first update on, with this "
            "decay an update; it is what the run leaves behind. None: no average."
        },
    )

    # Memory
    vae_slicing: bool = field(default=False, metadata={"help": "Decode pictures one by one; the same pictures."})
    vae_tiling: bool = field(
        default=False,
        metadata={"help": "Decode large pictures in overlapping tiles; slightly other pictures where tiles meet."},
    )
    offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the VAE, the text encoders (unless they are trained) and the reward's model on the CPU while "
            "they are not needed."
        },
    )
    torch_compile_unet: bool = field(
        default=False,
        metadata={
            "help": "Compile the U-Net's transformer blocks; the first rollout and update take minutes longer, and "
            "DDPO's ratio of the first pass is 1 up to rounding only."
        },
    )

    # Run
    max_train_seconds: float | None = field(
        default=None,
        metadata={
            "help": "End the run behind the rollout in which it has trained for so many seconds, those before it was "
            "resumed included; on a CPU they are the processor's. A checkpoint is kept of where it ended."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "What to go on from: a checkpoint's folder; `latest`, the newest whole one in output_dir; or "
            "`auto`, that one if there is any, else start anew, so that one command does both."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output folder that holds another run, deleting that run."}
    )

    def __post_init__(self):
        for name in ("save_strategy", "eval_strategy"):
            if getattr(self, name) is False:  # what YAML makes of a bare `no`
                setattr(self, name, "no")
        check_names(self)
        check_deepspeed_settings(self.deepspeed)
        if self.deepspeed and self.use_cpu:
            prepare_deepspeed_on_cpu()
        super().__post_init__()
        check_policy_ranges(self)
        check_training_arguments(self)
        check_engine(self)
        for kind in (AdapterSettings, PictureSize, MemorySettings):
            self.part(kind)  # checks them
        warn_of_ignored_policy_settings(self)

    def part(self, kind: type[Settings]) -> Settings:
        """Those of the settings that the dataclass `kind` has; e.g. `args.part(AdapterSettings)`."""
        return kind(**{setting.name: getattr(self, setting.name) for setting in fields(kind)})

    def make_schedule(self, scheduler) -> tuple[DDIMScheduler, Schedule]:
        """The DDIM scheduler that samples as these settings say, and its steps, from a pipeline's own scheduler.

        Raises:
            ValueError: see `rl.sde.ddim_scheduler` and `rl.sde.make_schedule`.
        """
        scheduler = ddim_scheduler(scheduler, self.start_timestep)
        return scheduler, make_schedule(scheduler, self.num_inference_steps, self.eta)

    @property
    def needs_reference(self) -> bool:
        """Whether the base model is asked for during training, so that full fine-tuning must keep a copy of it."""
        return False


@dataclass
class RewardedPolicyConfig(PolicyConfig):
    """What a training that raises a reward needs besides: monitors of its being gamed, pictures of what it does."""

    # Watch
    watch_limits: dict = field(
        default_factory=dict,
        metadata={
            "help": "Limits of the monitors that see a reward being gamed, name -> number in place of the default, or "
            "null for none; rl/watch_limits.py lists them."
        },
    )
    stop_on: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Monitors that end the run when they cross their limits, or all that are measured; by default they "
            "only warn. What such a run leaves is the best checkpoint by watch_reward, else the last from before."
        },
    )

    # Pictures
    num_log_images: int = field(
        default=8, metadata={"help": "Pictures with overlays in TensorBoard after each rollout; 0 for none."}
    )

    def __post_init__(self):
        self.watch_limits, self.stop_on = self.watch_limits or {}, self.stop_on or []
        if isinstance(self.stop_on, str):
            self.stop_on = [self.stop_on]
        check_watch(self.watch_limits, self.stop_on)
        super().__post_init__()
        check_measured(self.stop_on, self.never_measured)
        if self.stop_on and self.save_strategy == "no":
            logger.warning(
                "stop_on ends a run that is being gamed, but save_strategy is no: there will be no checkpoint from "
                "before, and what is left is the last update's"
            )
        require(self.num_log_images >= 0, f"num_log_images is {self.num_log_images}; it must not be negative")
        if "tensorboard" not in self.report_to and self.num_log_images > 0:
            warn_of_ignored(self, ("num_log_images",), "report_to does not name tensorboard")

    @property
    def never_measured(self) -> dict[str, str]:
        """The monitors that a run of these settings never measures, whatever its rewards -> why."""
        has_base = self.tune == "lora" or self.needs_reference
        return never_measured(self.num_generations, has_base, evaluates=self.eval_strategy != "no")
