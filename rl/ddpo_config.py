"""The settings of a DDPO run, and the arithmetic of its batches."""

import logging
import os
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from transformers import SchedulerType, TrainingArguments

from rl.advantages import CREDITS, FOCUSES
from rl.engines import prepare_deepspeed_on_cpu
from rl.policy import DEFAULT_LORA_TARGETS
from rl.watch import check_watch

logger = logging.getLogger(__name__)

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
    train_steps: list[str] = field(
        default_factory=lambda: ["1", "2"],
        metadata={
            "help": "Which sampling steps are trained, 0 the noisiest: a list (1 2), a window (1:3) or all. "
            "Where the gradient's signal is differs much between steps."
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
    credit: Literal["scalar", "image", "focus"] = field(
        default="image",
        metadata={
            "help": "scalar: z(total), penalty maps ignored; image: z(total - penalties) everywhere; "
            "focus: the same, more at the places `focus_on` names."
        },
    )
    focus_on: Literal["maps", "content"] = field(
        default="maps",
        metadata={"help": "maps: where the picture's own penalty maps are high; content: where something is drawn."},
    )
    focus_floor: float = field(
        default=0.2, metadata={"help": "Weight of a place outside the focus (the mean is 1); 1 is no focus."}
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group", metadata={"help": "What an advantage is divided by: its group's std, the batch's, or nothing."}
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
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL divergence to the base model; above 0 costs a forward a row."}
    )

    # Adapter
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    lora_alpha: float = field(default=8.0, metadata={"help": "The LoRA's output is scaled by lora_alpha / lora_rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_LORA_TARGETS),
        metadata={"help": "Names of the U-Net's layers that get a LoRA: attention and convolutions."},
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the frozen weights; the LoRA is float32."}
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
        self._warn_of_ignored()

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
            not self.save_only_model,
            "save_only_model leaves checkpoints that cannot be resumed from; leave it out: "
            "every checkpoint is a folder with the LoRA too",
        )

    def _warn_of_ignored(self) -> None:
        level = self.importance_sampling_level
        if self.credit != "focus":
            warn_of_ignored(self, ("focus_on", "focus_floor"), f"credit is {self.credit}, not focus")
        unused = "epsilon_location" if level == "image" else "epsilon"
        warn_of_ignored(self, (unused,), f"importance_sampling_level is {level}")
        if "tensorboard" not in self.report_to and self.num_log_images > 0:
            warn_of_ignored(self, ("num_log_images",), "report_to does not name tensorboard")

    def _check_ranges(self) -> None:
        _require(
            self.num_generations >= 2,
            f"num_generations is {self.num_generations}; an advantage compares at least 2 pictures of a prompt",
        )
        _require(0 <= self.eta <= 1, f"eta is {self.eta}; it must lie in [0, 1]")
        _require(self.eta > 0, "eta is 0: steps without noise have no log-prob to train; set it above 0, e.g. 1")
        _require(self.num_inference_steps >= 1, f"num_inference_steps is {self.num_inference_steps}; at least 1")
        _require(self.guidance_scale >= 0, f"guidance_scale is {self.guidance_scale}; it must not be negative")
        _require(self.credit in CREDITS, f"credit is {self.credit!r}; it must be one of {', '.join(CREDITS)}")
        _require(self.focus_on in FOCUSES, f"focus_on is {self.focus_on!r}; it must be one of {', '.join(FOCUSES)}")
        _require(0 <= self.focus_floor <= 1, f"focus_floor is {self.focus_floor}; it must lie in [0, 1]")
        for name in ("epsilon", "epsilon_location", "advantage_std_floor", "advantage_clip", "lora_alpha"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "num_iterations",
            "lora_rank",
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
        _require(len(self.lora_target_modules) > 0, "lora_target_modules is empty; name at least one layer")
        _require(self.num_log_images >= 0, f"num_log_images is {self.num_log_images}; it must not be negative")
        _require(
            not self.auto_find_batch_size,
            "auto_find_batch_size would break up groups; set a smaller per_device_train_batch_size instead",
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
