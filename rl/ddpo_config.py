"""The settings of a DDPO run, and the arithmetic of its batches."""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from diffusers import DDIMScheduler
from transformers import SchedulerType, TrainingArguments

from rl.adapter import DEFAULT_LORA_TARGETS, AdapterSettings
from rl.advantages import BASELINES
from rl.credit import CREDITS, FOCUSES, PAID_SCALES
from rl.engines import prepare_deepspeed_on_cpu
from rl.memory import MemorySettings
from rl.policy import PictureSize
from rl.sde import Schedule, ddim_scheduler, make_schedule, resolve_train_steps
from rl.watch import check_watch

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings")

SAVE_STRATEGIES = ("epoch", "steps", "no")
LR_SCHEDULES = tuple(
    schedule.value
    for schedule in SchedulerType
    if schedule not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # these follow an evaluation's loss
)


@dataclass(frozen=True)
class RolloutPlan:
    """How the pictures of one rollout become micro-batches and optimizer updates.

    A row is a pair (picture, trained timestep). A micro-batch is `per_device_train_batch_size` consecutive pictures at
    *one* timestep - the very batch the rollout ran at that step, so that on the first pass the ratio is exactly 1 -
    and is one plain forward and backward. An epoch of the Trainer is one rollout.

    Example: `generation_batch_size` 256, `num_generations` 8, `train_steps` [1, 2], one rank,
    `per_device_train_batch_size` 64, `gradient_accumulation_steps` 8, `num_train_epochs` 20:

        256 pictures / 8               = 32 prompts a rollout
        256 pictures * 2 steps         = 512 rows
        512 rows / 64                  = 8 micro-batches (`steps_per_generation`), in the order
                                         pictures 0-63 at step 1, 0-63 at step 2, 64-127 at step 1, ...
        8 micro-batches / 8            = 1 optimizer update a rollout
        20 rollouts * 1                = 20 updates (`max_steps`)

    On two ranks, each has 128 of the pictures, 256 rows, 4 micro-batches: `gradient_accumulation_steps` must be 4 (or 2
    or 1, for 2 or 4 updates a rollout). With `num_iterations` 2 every micro-batch is gone through twice.

    Attributes:
        pictures: of a rollout, over all ranks.
        pictures_per_rank: on this rank.
        prompts: of a rollout, over all ranks.
        train_steps: number of trained steps, K.
        micro_batches: of one pass over a rollout, on each rank; TRL's `steps_per_generation`.
        updates: optimizer updates a rollout, over all its passes.
    """

    pictures: int
    pictures_per_rank: int
    prompts: int
    train_steps: int
    micro_batches: int
    updates: int


@dataclass
class DDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` with what DDPO needs besides; defaults are the small world's recipe.

    Names follow TRL's GRPOConfig where it has the same thing. An epoch is a rollout: `num_train_epochs` counts them.
    """

    # Trainer's own, with other defaults
    learning_rate: float = field(default=3e-3, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule, as in transformers."}
    )
    warmup_steps: float = field(
        default=3,
        metadata={
            "help": "Updates of warm-up. LoRA's B starts at 0, and Adam's first steps would be a jolt. The first "
            "update has 1 / warmup_steps of the learning rate, not 0."
        },
    )
    num_train_epochs: float = field(default=20, metadata={"help": "Number of rollouts. `max_steps` counts updates."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Rows (picture, timestep) of one forward and backward."}
    )
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Micro-batches of one optimizer update; must divide those of a rollout."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    save_strategy: str = field(
        default="epoch",
        metadata={
            "help": "epoch: a checkpoint after each rollout; steps: every `save_steps` updates, which must be a "
            "multiple of the updates of a rollout; no."
        },
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={"help": "Keep so many checkpoints, the newest; besides, the one of the best held-out reward."},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where to log to, as in transformers."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pictures of one batch of the evaluation."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bars."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter of the LoRA is used in every forward."}
    )

    # Sampling
    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps."})
    eta: float = field(default=1.0, metadata={"help": "Noise of a step: 1 as DDPM's, 0 none (nothing to train)."})
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
    sde_window: str | None = field(
        default=None,
        metadata={
            "help": "Only the steps of this window, such as 1:4, have noise; the others are deterministic. "
            "Default: all steps have it."
        },
    )
    train_steps: list[str] = field(
        default_factory=lambda: ["1", "2"],
        metadata={
            "help": "Which sampling steps are trained, 0 the noisiest: a list (1 2), a window (1:3), all (that have "
            "noise), or auto:2, the two of most expected gain, which the run measures itself. "
            "Where the gradient's signal is differs much between steps."
        },
    )
    probe_rollouts: int = field(
        default=3, metadata={"help": "With train_steps auto: the first so many rollouts measure every step."}
    )
    probe_every: int = field(
        default=10, metadata={"help": "With train_steps auto: after these, every so many rollouts do; 0: none."}
    )
    timestep_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of train_steps that a rollout trains, drawn anew for each; rounded up to whole steps."
        },
    )
    share_noise: Literal["none", "before", "around"] = field(
        default="none",
        metadata={
            "help": "Noise that all pictures of a group share: none; before the first trained step; around, that is "
            "before the first and behind the last. What is shared cancels in the group's comparison."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pictures of a rollout, over all ranks (256 if `steps_per_generation` is not given either)."},
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches of a rollout on each rank; another way to say `generation_batch_size`."},
    )
    num_generations: int = field(default=8, metadata={"help": "Pictures of one prompt: the group of an advantage."})
    per_device_rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pictures sampled at once (default: `per_device_train_batch_size`). If it differs from that, "
            "the ratio of the first pass is 1 up to rounding only."
        },
    )
    reward_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pictures given to the reward at once; default: as many as are sampled at once."},
    )

    # Credit
    credit: Literal["scalar", "image", "focus", "words", "paid", "mask"] = field(
        default="image",
        metadata={
            "help": "scalar: z(total), penalty maps ignored; image: z(total - penalties) everywhere; "
            "focus: the same, more at the places `focus_on` names; words: more where the misrepresented words' "
            "attention was; paid: each place pays for the penalties near it; mask: less where penalties are "
            "(DenseFlow-GRPO's, for comparison). See rl/credit.py."
        },
    )
    focus_on: Literal["maps", "content"] = field(
        default="maps",
        metadata={"help": "maps: where the picture's own penalty maps are high; content: where something is drawn."},
    )
    focus_floor: float = field(
        default=0.2, metadata={"help": "Weight of a place outside the focus (the mean is 1); 1 is no focus."}
    )
    paid_scale: Literal["objective", "unit"] = field(
        default="objective",
        metadata={
            "help": "objective: a place's penalty counts as it does in the image's reward; unit: it has unit size at "
            "each place (BoxFlow-GRPO's, for comparison: it empties the pictures)."
        },
    )
    paid_reach: int = field(
        default=2,
        metadata={"help": "With paid_scale objective, a place pays for penalties so many latent places away."},
    )
    paid_weight: float = field(default=1.0, metadata={"help": "Weight of the penalty with paid_scale unit."})
    advantage_baseline: Literal["group", "prompt", "batch"] = field(
        default="group",
        metadata={
            "help": "What a picture is compared with: the group of its prompt in the rollout; its prompt's last "
            "rewards over rollouts (ddpo-pytorch's statistics); or the whole rollout."
        },
    )
    prompt_buffer_size: int = field(
        default=32, metadata={"help": "With advantage_baseline prompt: so many last rewards of each prompt are kept."}
    )
    prompt_min_count: int = field(
        default=16,
        metadata={"help": "With advantage_baseline prompt: a prompt with fewer is compared with the rollout."},
    )
    min_group_std: float = field(
        default=0.0,
        metadata={"help": "Groups whose rewards' std is not above this are skipped, and counted (groups_skipped)."},
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={
            "help": "What an advantage is divided by: the std of what it is compared with, the batch's, or nothing."
        },
    )
    advantage_std_floor: float = field(
        default=1e-3, metadata={"help": "Smallest std divided by, in units of the reward."}
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to +- this."})

    # Update
    num_iterations: int = field(default=1, metadata={"help": "Passes over each rollout."})
    importance_sampling_level: Literal["image", "location"] = field(
        default="image",
        metadata={"help": "Whether ratio and clip are the image's or each latent location's."},
    )
    epsilon: float = field(default=0.01, metadata={"help": "Clip range of an image's ratio."})
    epsilon_location: float = field(
        default=0.1,
        metadata={"help": "Clip range of a location's ratio, which moves about sqrt(h * w) times as far."},
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "How far the ratio (the image's or the location's) may rise above 1; default: as it may fall."
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL divergence to the base model; above 0 costs a forward a row."}
    )
    timestep_weighting: Literal["uniform", "std"] = field(
        default="uniform", metadata={"help": "Weight of each trained step's loss: all alike, or as the step's std."}
    )
    train_guidance: bool = field(
        default=True,
        metadata={
            "help": "Whether the log-prob is the guided network's. If not, an update costs half, and the unguided "
            "network is moved towards what the guided one did well."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the trained weights, with this decay an update; it is what "
            "the run leaves behind. None: no average."
        },
    )

    # Adapter
    tune: Literal["lora", "full"] = field(
        default="lora",
        metadata={
            "help": "lora: a LoRA on the U-Net; full: all of the U-Net's weights, in float32, left in the folder "
            "`unet`. A copy of the base is then kept if beta is above 0; else `kl` is not logged."
        },
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
            "help": "Must be 0: what is dropped in the update was not in the rollout, and the ratio would not be 1."
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
        default="float32", metadata={"help": "Precision of the frozen weights; what is trained is float32."}
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
            "help": "Keep the VAE, the text encoders and the reward's model on the CPU while they are not needed."
        },
    )
    torch_compile_unet: bool = field(
        default=False,
        metadata={
            "help": "Compile the U-Net's transformer blocks; the first rollout and update take minutes longer, and "
            "the ratio of the first pass is 1 up to rounding only."
        },
    )

    # Watch
    watch_limits: dict = field(
        default_factory=dict,
        metadata={
            "help": "Limits of the monitors that see a reward being gamed, name -> number in place of the default, or "
            "null for none; rl/watch.py lists them."
        },
    )
    stop_on: list[str] = field(
        default_factory=list,
        metadata={"help": "Monitors that end the run when they cross their limits, or all; by default they only warn."},
    )

    # Run
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
    num_log_images: int = field(
        default=8, metadata={"help": "Pictures with overlays in TensorBoard after each rollout; 0 for none."}
    )

    def __post_init__(self):
        if isinstance(self.train_steps, str | int):
            self.train_steps = [self.train_steps]
        self.train_steps = [str(step) for step in self.train_steps]
        self.watch_limits, self.stop_on = self.watch_limits or {}, self.stop_on or []
        if isinstance(self.stop_on, str):
            self.stop_on = [self.stop_on]
        check_watch(self.watch_limits, self.stop_on)
        if self.save_strategy is False:  # what YAML makes of a bare `no`
            self.save_strategy = "no"
        self._check_names()
        if self.deepspeed and self.use_cpu:
            prepare_deepspeed_on_cpu()
        super().__post_init__()
        self._check_ranges()
        self._check_engine()
        self._check_rollout()
        for kind in (AdapterSettings, PictureSize, MemorySettings):
            self.part(kind)  # checks them
        self._warn_of_ignored()

    def part(self, kind: type[Settings]) -> Settings:
        """Those of the settings that the dataclass `kind` has; e.g. `args.part(AdapterSettings)`."""
        return kind(**{setting.name: getattr(self, setting.name) for setting in fields(kind)})

    def _check_names(self) -> None:
        _require(
            not self.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"),
            "fsdp is not supported: the LoRA could not be saved; "
            "to shard over GPUs, use --deepspeed configs/deepspeed/zero2.json",
        )
        for name, valid in (("save_strategy", SAVE_STRATEGIES), ("lr_scheduler_type", LR_SCHEDULES)):
            value = getattr(self, name)
            _require(
                getattr(value, "value", value) in valid, f"{name} is {value!r}; it must be one of {', '.join(valid)}"
            )

    def _check_engine(self) -> None:
        _require(
            self.n_gpu <= 1,
            f"this process sees {self.n_gpu} GPUs, and would spread its batches over them by torch's DataParallel, "
            "which does not fit rollouts; start one process a GPU: accelerate launch --config_file "
            "configs/accelerate/multi_gpu.yaml run_ddpo.py ..., or show it one: CUDA_VISIBLE_DEVICES=0",
        )
        _require(
            not self.torch_compile,
            "torch_compile would compile the whole network as one, and for the training only; use torch_compile_unet, "
            "which compiles its transformer blocks, for the evaluation too, and in less time",
        )
        _require(
            not self.save_only_model,
            "save_only_model leaves checkpoints that cannot be resumed from; leave it out: "
            "every checkpoint is a folder with the LoRA too",
        )
        if self.deepspeed and self.hf_deepspeed_config.is_zero3():
            for name, used in (("train_steps auto", self.probed_steps), ("ema_decay", self.ema_decay)):
                _require(used is None, f"{name} needs whole weights, which a rank of ZeRO-3 has not; use ZeRO-2")

    @property
    def chunk_size(self) -> int:
        """Pictures whose gradient the probe takes at once: whole micro-batches of whole groups, so that no two chunks
        share a baseline. Example: micro-batches of 4 and groups of 8 make chunks of 8, of 64 and 8 chunks of 64."""
        return math.lcm(self.per_device_train_batch_size, self.num_generations)

    @property
    def probed_steps(self) -> int | None:
        """K of `train_steps: auto:K`; None if the steps are named."""
        auto, _, count = self.train_steps[0].partition(":")
        return int(count or 2) if auto == "auto" else None

    def make_schedule(self, scheduler) -> tuple[DDIMScheduler, Schedule]:
        """The DDIM scheduler that samples as these settings say, and its steps, from a pipeline's own scheduler.

        Raises:
            ValueError: see `rl.sde.ddim_scheduler` and `rl.sde.make_schedule`.
        """
        scheduler = ddim_scheduler(scheduler, self.start_timestep)
        return scheduler, make_schedule(scheduler, self.num_inference_steps, self.eta, self.sde_window)

    def trained_steps(self, schedule: Schedule) -> tuple[int, ...]:
        """The steps that may be trained: those of `train_steps`; with `auto`, every one with noise.

        Raises:
            ValueError: see `rl.sde.resolve_train_steps`; or `auto` is to choose more steps than have noise.
        """
        if self.probed_steps is None:
            return resolve_train_steps(self.train_steps, schedule)
        steps = resolve_train_steps("all", schedule)
        _require(
            self.probed_steps <= len(steps),
            f"train_steps is {self.train_steps[0]}, but only {len(steps)} steps have noise; choose fewer",
        )
        return steps

    def steps_per_rollout(self, schedule: Schedule) -> int:
        """How many steps each rollout trains: a fraction of `train_steps`, or as many as `auto` chooses."""
        return self.probed_steps or math.ceil(self.timestep_fraction * len(self.trained_steps(schedule)) - 1e-9)

    def _check_steps(self) -> None:
        _require(0 < self.timestep_fraction <= 1, f"timestep_fraction is {self.timestep_fraction}; it lies in (0, 1]")
        if not any(part.partition(":")[0] == "auto" for part in self.train_steps):
            return
        _, _, count = self.train_steps[0].partition(":")
        _require(
            len(self.train_steps) == 1 and (count == "" or count.isdigit()) and self.probed_steps >= 1,
            f"train_steps {' '.join(self.train_steps)!r} is not understood; `auto:2` stands alone, 2 being a number",
        )
        _require(self.timestep_fraction == 1, "timestep_fraction does not go with train_steps auto; leave it out")
        _require(
            self.tune == "lora",
            "train_steps auto keeps a gradient of all weights for each step, too much with tune full; name them",
        )
        _require(self.probe_rollouts >= 1, f"probe_rollouts is {self.probe_rollouts}; auto needs at least 1")
        _require(self.probe_every >= 0, f"probe_every is {self.probe_every}; it must not be negative")

    def _warn_of_ignored(self) -> None:
        level = self.importance_sampling_level
        if self.credit not in ("focus", "words"):
            warn_of_ignored(self, ("focus_floor",), f"credit is {self.credit}")
        if self.credit != "focus":
            warn_of_ignored(self, ("focus_on",), f"credit is {self.credit}, not focus")
        paid = {"paid_reach"} if self.paid_scale == "unit" else {"paid_weight"}
        if self.credit != "paid":
            warn_of_ignored(self, ("paid_scale", "paid_reach", "paid_weight"), f"credit is {self.credit}, not paid")
        else:
            warn_of_ignored(self, paid, f"paid_scale is {self.paid_scale}")
        if self.advantage_baseline != "prompt":
            why = f"advantage_baseline is {self.advantage_baseline}"
            warn_of_ignored(self, ("prompt_buffer_size", "prompt_min_count"), why)
        if self.advantage_baseline != "group":
            warn_of_ignored(self, ("min_group_std",), f"advantage_baseline is {self.advantage_baseline}")
        if self.probed_steps is None:
            warn_of_ignored(self, ("probe_rollouts", "probe_every"), "train_steps is not auto")
        if self.guidance_scale == 1:
            warn_of_ignored(self, ("train_guidance",), "guidance_scale is 1, so there is none")
        if self.credit == "mask" or (self.credit == "paid" and self.paid_scale == "unit"):
            logger.warning(
                "credit %s is for comparison: it teaches to draw less, or shields what is wrong (see rl/credit.py)",
                self.credit,
            )
        unused = "epsilon_location" if level == "image" else "epsilon"
        warn_of_ignored(self, (unused,), f"importance_sampling_level is {level}")
        if "tensorboard" not in self.report_to and self.num_log_images > 0:
            warn_of_ignored(self, ("num_log_images",), "report_to does not name tensorboard")
        if self.tune == "full":
            lora = [setting.name for setting in fields(self) if "lora" in setting.name]
            warn_of_ignored(self, (*lora, "use_dora"), "tune is full, there is no LoRA")
        if self.init_adapter is not None:
            warn_of_ignored(self, ("init_lora_weights",), "the LoRA starts from init_adapter")
        if self.device.type == "cpu":
            warn_of_ignored(self, ("offload",), "the run is on the CPU")

    def _check_ranges(self) -> None:
        _require(
            self.num_generations >= (2 if self.advantage_baseline == "group" else 1),
            f"num_generations is {self.num_generations}; an advantage compares at least 2 pictures of a prompt, "
            "unless advantage_baseline is prompt or batch",
        )
        self._check_credit()
        self._check_steps()
        _require(0 <= self.eta <= 1, f"eta is {self.eta}; it must lie in [0, 1]")
        _require(self.eta > 0, "eta is 0: steps without noise have no log-prob to train; set it above 0, e.g. 1")
        _require(self.num_inference_steps >= 1, f"num_inference_steps is {self.num_inference_steps}; at least 1")
        _require(self.guidance_scale >= 0, f"guidance_scale is {self.guidance_scale}; it must not be negative")
        for name in ("epsilon", "epsilon_location", "advantage_std_floor", "advantage_clip"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        _require(self.epsilon_high is None or self.epsilon_high > 0, f"epsilon_high is {self.epsilon_high}; above 0")
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay is {self.ema_decay}; it must lie between 0 and 1, e.g. 0.9",
        )
        for name in (
            "num_iterations",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.max_steps > 0 or self.num_train_epochs > 0,
            f"num_train_epochs is {self.num_train_epochs}; it counts rollouts, so it must be at least 1",
        )
        for name in (
            "per_device_rollout_batch_size",
            "reward_batch_size",
            "generation_batch_size",
            "steps_per_generation",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
        _require(self.beta >= 0, f"beta is {self.beta}; it must not be negative")
        _require(self.num_log_images >= 0, f"num_log_images is {self.num_log_images}; it must not be negative")
        _require(
            not self.auto_find_batch_size,
            "auto_find_batch_size would break up groups; set a smaller per_device_train_batch_size instead",
        )

    def _check_chunks(self, pictures: int) -> None:
        size, world = self.chunk_size, self.world_size
        _require(
            pictures % (size * world) == 0 and pictures >= 3 * size,
            f"train_steps auto compares the gradients of chunks of {size} pictures (whole groups of "
            f"{self.num_generations}, whole micro-batches of {self.per_device_train_batch_size}), at least 3 of them, "
            f"shared evenly by the {world} processes; a rollout of {pictures} has not: set generation_batch_size to a "
            f"multiple of {size * world} from {-(-3 // world) * size * world} on, or a smaller batch size",
        )

    def _check_credit(self) -> None:
        choices = {
            "credit": CREDITS, "focus_on": FOCUSES, "paid_scale": PAID_SCALES, "advantage_baseline": BASELINES,
            "scale_rewards": ("group", "batch", "none"), "timestep_weighting": ("uniform", "std"),
        }  # fmt: skip
        for name, valid in choices.items():
            value = getattr(self, name)
            _require(value in valid, f"{name} is {value!r}; it must be one of {', '.join(valid)}")
        _require(0 <= self.focus_floor <= 1, f"focus_floor is {self.focus_floor}; it must lie in [0, 1]")
        for name in ("paid_reach", "paid_weight", "min_group_std"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        _require(self.prompt_min_count >= 2, f"prompt_min_count is {self.prompt_min_count}; a std needs at least 2")
        _require(
            self.prompt_buffer_size >= self.prompt_min_count,
            f"prompt_buffer_size ({self.prompt_buffer_size}) is below prompt_min_count ({self.prompt_min_count}), "
            "so no prompt's own statistics would ever be used",
        )
        if self.credit != "paid":
            return
        _require(
            self.importance_sampling_level == "location",
            "credit paid differs from place to place, also in sign, so ratio and clip must be each place's: "
            "set importance_sampling_level to location",
        )
        _require(
            self.advantage_baseline == "group" and self.scale_rewards == "group",
            "credit paid compares each place within a prompt's group; "
            f"advantage_baseline ({self.advantage_baseline}) and scale_rewards ({self.scale_rewards}) must be group",
        )

    def _check_rollout(self) -> None:
        _require(
            self.generation_batch_size is None or self.steps_per_generation is None,
            f"generation_batch_size ({self.generation_batch_size}) and steps_per_generation "
            f"({self.steps_per_generation}) both say how large a rollout is; give one of them",
        )
        if self.generation_batch_size is None and self.steps_per_generation is None:
            self.generation_batch_size = 256
        if self.generation_batch_size is not None:
            self._check_pictures(self.generation_batch_size)

    def _check_pictures(self, pictures: int) -> None:
        world, batch, group = self.world_size, self.per_device_train_batch_size, self.num_generations
        _require(
            pictures % group == 0,
            f"generation_batch_size ({pictures}) is not a multiple of num_generations ({group}); "
            f"use {_near(pictures, group)} pictures a rollout",
        )
        _require(
            pictures % (world * batch) == 0,
            f"generation_batch_size ({pictures}) is not a multiple of per_device_train_batch_size ({batch}) times "
            f"the number of processes ({world}); use {_near(pictures, world * batch)} pictures a rollout, "
            "or another batch size",
        )

    def plan(self, train_steps: int) -> RolloutPlan:
        """The arithmetic of a rollout of which `train_steps` sampling steps are trained; see `RolloutPlan`.

        Raises:
            ValueError: numbers that do not divide; the message gives them and the remedy.
        """
        world, batch, accumulate = self.world_size, self.per_device_train_batch_size, self.gradient_accumulation_steps
        pictures = self.generation_batch_size
        if pictures is None:
            _require(
                self.steps_per_generation % train_steps == 0,
                f"steps_per_generation ({self.steps_per_generation}) is not a multiple of the number of trained "
                f"steps ({train_steps}); use {_near(self.steps_per_generation, train_steps)}",
            )
            pictures = self.steps_per_generation // train_steps * batch * world
            self._check_pictures(pictures)
        if self.probed_steps is not None:
            self._check_chunks(pictures)
        micro_batches = pictures // (world * batch) * train_steps
        fitting = [number for number in range(1, micro_batches + 1) if micro_batches % number == 0]
        _require(
            micro_batches % accumulate == 0,
            f"gradient_accumulation_steps ({accumulate}) does not divide the {micro_batches} micro-batches of a "
            f"rollout ({pictures} pictures x {train_steps} trained steps / {batch} rows / {world} processes); "
            f"use one of {', '.join(map(str, fitting))}",
        )
        updates = micro_batches // accumulate * self.num_iterations
        _require(
            self.max_steps <= 0 or self.max_steps % updates == 0,
            f"max_steps ({self.max_steps}) is not a multiple of the {updates} updates of a rollout; "
            f"use {_near(self.max_steps, updates)}, or num_train_epochs, which counts rollouts",
        )
        _require(
            self.max_steps > 0 or self.num_train_epochs == int(self.num_train_epochs),
            f"num_train_epochs is {self.num_train_epochs}; it counts rollouts, so it must be a whole number",
        )
        _require(
            self.save_strategy != "steps" or (self.save_steps >= 1 and self.save_steps % updates == 0),
            f"save_steps ({self.save_steps}) is not a multiple of the {updates} updates of a rollout, and a "
            "checkpoint holds no half-used rollout; "
            f"use {_near(int(max(self.save_steps, 1)), updates)}, or save_strategy epoch",
        )
        return RolloutPlan(
            pictures=pictures,
            pictures_per_rank=pictures // world,
            prompts=pictures // self.num_generations,
            train_steps=train_steps,
            micro_batches=micro_batches,
            updates=updates,
        )


def warn_of_ignored(settings: object, names: Iterable[str], why: str) -> None:
    """Warn of those of `names` that a dataclass of settings holds another value for than its default."""
    for setting in fields(settings):
        if setting.name in names and getattr(settings, setting.name) != _default(setting):
            logger.warning("%s=%r is ignored: %s", setting.name, getattr(settings, setting.name), why)


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _near(number: int, divisor: int) -> str:
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
