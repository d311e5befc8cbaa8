"""The settings of a DDPO run."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from diffusers import DDIMScheduler

from rl.adapter import require
from rl.ddpo_checks import check_ranges, check_zero3, warn_of_ignored_settings
from rl.policy_config import RewardedPolicyConfig
from rl.rollout_plan import RolloutPlan, check_rollout, plan_rollout
from rl.sde import Schedule, ddim_scheduler, make_schedule, resolve_train_steps, slide_window


@dataclass
class DDPOConfig(RewardedPolicyConfig):
    """`rl.policy_config` with what DDPO needs besides; defaults are the small world's recipe.

    Names follow TRL's GRPOConfig where it has the same thing. An epoch is a rollout: `num_train_epochs` counts them.
    """

    command: ClassVar[str] = "run_ddpo.py"

    # Trainer's own, with other defaults
    learning_rate: float = field(default=3e-3, metadata={"help": "Initial learning rate of AdamW."})
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
    save_strategy: str = field(
        default="epoch",
        metadata={
            "help": "epoch: a checkpoint after each rollout; steps: every `save_steps` updates, which must be a "
            "multiple of the updates of a rollout; no."
        },
    )

    # Sampling
    sde_window: str | None = field(
        default=None,
        metadata={
            "help": "Only the steps of this window, such as 1:4, have noise; the others are deterministic. "
            "Default: all steps have it."
        },
    )
    sde_window_interval: int | None = field(
        default=None,
        metadata={
            "help": "Move sde_window towards the picture every so many rollouts, until the end (MixGRPO); train_steps "
            "must be all. Evaluations sample with the first window. Default: it stays."
        },
    )
    sde_window_stride: int = field(default=1, metadata={"help": "By so many steps at a time."})
    train_steps: list[str] = field(
        default_factory=lambda: ["1", "2"],
        metadata={
            "help": "Which sampling steps are trained, 0 the noisiest: a list (1 2), a window (1:3), all (that have "
            "noise), or auto:2, in each rollout the two neighbours that promise most, as the run itself measures. "
            "Where the gradient's signal is differs much between steps."
        },
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
            "before the first and behind the last. What is shared cancels in the group's comparison, and up to the "
            "first trained step a group costs as much as a picture."
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

    # Credit
    credit: Literal["scalar", "image", "focus", "words", "paid", "mask"] = field(
        default="image",
        metadata={
            "help": "scalar: z(total), penalty maps ignored; image: z(total - penalties) everywhere; "
            "focus: the same, more at the places `focus_on` names; words: more where the misrepresented words' "
            "attention was; paid: each place pays for its own penalty; mask: less where penalties are "
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
        default=0,
        metadata={"help": "With paid_scale objective, a place pays for penalties so many latent places away too."},
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

    def __post_init__(self):
        if isinstance(self.train_steps, str | int):
            self.train_steps = [self.train_steps]
        require(bool(self.train_steps), "train_steps names no step; name some, such as 0 2, or say all or auto")
        self.train_steps = [str(step) for step in self.train_steps]
        super().__post_init__()
        check_ranges(self)
        check_zero3(self)
        check_rollout(self)
        warn_of_ignored_settings(self)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def chunk_size(self) -> int:
        """Pictures whose gradient `auto` sketches as one: whole micro-batches of whole groups, so that no two chunks
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
        return scheduler, self.schedule_of(scheduler, 0)

    def schedule_of(self, scheduler: DDIMScheduler, rollout: int) -> Schedule:
        """The steps of rollout number `rollout`; they differ where the window slides.

        Args:
            scheduler: as `make_schedule` gives it.

        Raises:
            ValueError: see `rl.sde.make_schedule` and `rl.sde.slide_window`.
        """
        steps, window = self.num_inference_steps, self.sde_window
        if self.sde_window_interval is not None:
            noisy = max(resolve_train_steps("all", make_schedule(scheduler, steps, self.eta))) + 1
            window = slide_window(window, rollout, self.sde_window_interval, self.sde_window_stride, steps, noisy)
        return make_schedule(scheduler, steps, self.eta, window)

    def trained_steps(self, schedule: Schedule) -> tuple[int, ...]:
        """The steps that may be trained: those of `train_steps`; with `auto`, every one with noise.

        Raises:
            ValueError: see `rl.sde.resolve_train_steps`; or `auto` is to choose more steps than have noise.
        """
        if self.probed_steps is None:
            return resolve_train_steps(self.train_steps, schedule)
        steps = resolve_train_steps("all", schedule)
        require(
            self.probed_steps <= len(steps),
            f"train_steps is {self.train_steps[0]}, but only {len(steps)} steps have noise; choose fewer",
        )
        return steps

    def steps_per_rollout(self, schedule: Schedule) -> int:
        """How many steps each rollout trains: a fraction of `train_steps`, or as many as `auto` chooses."""
        return self.probed_steps or math.ceil(self.timestep_fraction * len(self.trained_steps(schedule)) - 1e-9)

    def plan(self, train_steps: int) -> RolloutPlan:
        """The arithmetic of a rollout of which `train_steps` sampling steps are trained; see `rl.rollout_plan`.

        Raises:
            ValueError: numbers that do not divide; the message gives them and the remedy.
        """
        return plan_rollout(self, train_steps)
