"""The settings of a training by back-propagation through sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from finetune.backprop import VARIANTS, Reach, choose_reach
from reward.by_name import NamedReward, find_attribute
from rl.adapter import require
from rl.policy_checks import warn_of_ignored
from rl.policy_config import RewardedPolicyConfig
from rl.rollout_plan import near
from rl.sde import Schedule
from rl.watch_limits import check_measured


@dataclass(frozen=True)
class UpdatePlan:
    """How the pictures of one optimizer update become micro-batches.

    Example: `per_device_train_batch_size` 16, `gradient_accumulation_steps` 2, `num_generations` 2, two processes:

        16 pictures * 2 micro-batches   = 32 pictures on each process, the first has 0-31, the second 32-63
        32 * 2 processes                = 64 pictures an update
        64 / 2                          = 32 prompts

    Attributes:
        pictures: of an update, over all ranks.
        pictures_per_rank: on this rank.
        prompts: of an update, over all ranks.
        micro_batches: of an update, on each rank.
        updates: 1; a run can stop and go on behind every update.
    """

    pictures: int
    pictures_per_rank: int
    prompts: int
    micro_batches: int
    updates: int = 1


@dataclass
class DraftConfig(RewardedPolicyConfig):
    """`rl.policy_config` with what back-propagation through sampling needs besides; see `finetune.backprop`.

    An epoch is an update, as in TRL's AlignPropTrainer: `num_train_epochs` and `max_steps` both count updates.

    The monitor `kl` has no limit here unless `watch_limits` gives it one. DDPO's is of steps with much noise; the last
    ones, through which the gradient goes here, have so little that a change nobody sees is far beyond it.
    """

    command: ClassVar[str] = "-m finetune.draft"

    # Trainer's own, with other defaults
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of AdamW."})
    warmup_steps: float = field(
        default=3,
        metadata={
            "help": "Updates of warm-up. LoRA's B starts at 0, and Adam's first steps would be a jolt. The first "
            "update has 1 / warmup_steps of the learning rate, not 0."
        },
    )
    num_train_epochs: float = field(default=32, metadata={"help": "Number of updates; so is `max_steps`."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pictures of one forward and backward."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Micro-batches of one optimizer update."})
    save_strategy: str = field(
        default="steps", metadata={"help": "steps: a checkpoint every `save_steps` updates; epoch: each update; no."}
    )
    save_steps: float = field(default=10, metadata={"help": "Updates between two checkpoints."})

    # Back-propagation
    reward_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pictures given to the reward at once; default: all of a micro-batch. Fewer cost a forward of the "
            "reward more, in the backward pass, and need the memory of so many alone."
        },
    )
    variant: Literal["draft", "draft_k", "draft_lv", "alignprop", "refl"] = field(
        default="draft_k",
        metadata={
            "help": "What the gradient goes through. draft: all sampling steps; draft_k: the last `backprop_steps`; "
            "draft_lv: the last one, as it came and `lv_draws` - 1 times from fresh noise; alignprop: a random number "
            "of last steps; refl: one random late step, whose estimate of the clean picture is rewarded. See "
            "finetune/backprop.py."
        },
    )
    backprop_steps: int = field(default=1, metadata={"help": "With variant draft_k: the number of last steps, K."})
    lv_draws: int = field(
        default=2,
        metadata={"help": "With variant draft_lv: the last step as it came and so many less one noised again."},
    )
    backprop_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "With variant alignprop: fewest and most last steps (TRL's truncated_rand_backprop_minmax counts "
            "from the other end); default: 1 and all."
        },
    )
    refl_steps: int | None = field(
        default=None, metadata={"help": "With variant refl: of how many last steps one is drawn; default: a quarter."}
    )
    recompute_steps: bool = field(
        default=True,
        metadata={
            "help": "Where the gradient goes through several steps, compute each again in the backward pass: a forward "
            "a step more, and the memory of about one step instead of K."
        },
    )
    num_generations: int = field(
        default=2,
        metadata={"help": "Pictures of one prompt in an update; from 2 on, their diversity is watched."},
    )

    # Region constraint
    region_weight: float = field(
        default=0.0,
        metadata={
            "help": "b of the region constraint: + b * mean |(1 - M) (picture - picture of the base model)|, M the "
            "dilated problem region of the latter (finetune/region_constraint.py). Above 0, the base draws all "
            "pictures too."
        },
    )
    region_threshold: float = field(
        default=0.5,
        metadata={
            "help": "A place belongs to the problem region if the reward's penalty maps together cost more than this "
            "there, in units of the reward (a heatmap of RichReward times its penalty_weight)."
        },
    )
    region_dilation: float = field(
        default=0.05, metadata={"help": "So far the region grows, as a share of the picture's shorter side."}
    )
    region_gradient: Literal["picture", "region"] = field(
        default="picture",
        metadata={
            "help": "Which pixels the reward may change. picture: all, held back by region_weight outside M, as was "
            "published; region: those of M alone, so that a picture without a problem changes nothing."
        },
    )

    # Guards
    beta: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance to the base model; above 0 costs a forward a step with gradients."},
    )
    distance: Literal["noise", "kl"] = field(
        default="noise",
        metadata={
            "help": "noise: mean squared difference of the predicted noises; kl: KL divergence of the steps, which "
            "weighs it by what a step makes of it, and which steps without noise (the last one) have not."
        },
    )

    def __post_init__(self):
        self.watch_limits = {"kl": None} | (self.watch_limits or {})
        super().__post_init__()
        check_ranges(self)
        check_reach(self)
        warn_of_ignored_settings(self)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or self.region_weight > 0

    @property
    def total_updates(self) -> int:
        return self.max_steps if self.max_steps > 0 else int(self.num_train_epochs)

    @property
    def never_measured(self) -> dict[str, str]:
        alike = "pictures that are rewarded alike have a gradient as good as any other"
        return super().never_measured | {"dead_groups": alike}

    def reach(self, update: int) -> Reach:
        """What the gradient of one update goes through."""
        return choose_reach(self, self.num_inference_steps, update)

    def plan(self) -> UpdatePlan:
        """The arithmetic of an update.

        Raises:
            ValueError: its pictures are not whole groups of `num_generations`.
        """
        per_rank = self.per_device_train_batch_size * self.gradient_accumulation_steps
        pictures = per_rank * self.world_size
        require(
            pictures % self.num_generations == 0,
            f"an update has {pictures} pictures ({self.per_device_train_batch_size} x "
            f"{self.gradient_accumulation_steps} micro-batches x {self.world_size} processes), not a multiple of "
            f"num_generations ({self.num_generations}); use {near(pictures, self.num_generations)} pictures",
        )
        return UpdatePlan(pictures, per_rank, pictures // self.num_generations, self.gradient_accumulation_steps)

    def never_measured_on(self, schedule: Schedule) -> dict[str, str]:
        """As `never_measured`, of the steps of a pipeline."""
        reaches = {self.reach(update) for update in range(min(self.total_updates, 1000))}  # all that there are
        if any((schedule.stds[reach.first : reach.last + 1] > 0).any() for reach in reaches):
            return self.never_measured
        return self.never_measured | {"kl": "no step with gradients has noise, so there is no divergence"}

    def check_schedule(self, schedule: Schedule) -> None:
        """Complain where the steps of a pipeline do not allow what is asked for.

        Raises:
            ValueError: a KL divergence of steps none of which has noise.
        """
        check_measured(self.stop_on, self.never_measured_on(schedule))
        if self.beta <= 0 or self.distance != "kl":
            return
        for update in range(self.total_updates):
            reach = self.reach(update)
            require(
                bool((schedule.stds[reach.first : reach.last + 1] > 0).any()),
                f"distance kl needs a step with noise among those with gradients, but those of update {update + 1} "
                f"({reach.first} to {reach.last}, variant {self.variant}) have none: set distance to noise"
                + (", or eta above 0" if self.eta == 0 else ", or let the gradient go through more steps"),
            )


def check_differentiable(rewards: Sequence[NamedReward]) -> None:
    """Complain about rewards that say of themselves that no gradient flows through them; nothing is made.

    A class that says so only when it is made is looked at then, see `finetune.draft_trainer.check_reward_fn`.

    Raises:
        ValueError: one of them does; or see `reward.by_name.find_attribute`.
    """
    for entry in rewards:
        attribute = find_attribute(entry.reward)
        unknown = isinstance(attribute, type) and not hasattr(attribute, "differentiable")
        require(unknown or getattr(attribute, "differentiable", False), not_differentiable(entry.reward))


def not_differentiable(name: str) -> str:
    return (
        f"the reward {name} is not differentiable: no gradient flows from it into the pictures; take one that is "
        "(its attribute `differentiable` is true), such as reward.rich:RichReward, through whose scores, heatmaps and "
        "words it flows, or train with this one by run_ddpo.py, which needs no gradient of it"
    )


def check_ranges(args: DraftConfig) -> None:
    require(args.variant in VARIANTS, f"variant is {args.variant!r}; it must be one of {', '.join(VARIANTS)}")
    require(args.distance in ("noise", "kl"), f"distance is {args.distance!r}; it must be one of noise, kl")
    require(
        args.max_steps > 0 or (args.num_train_epochs >= 1 and args.num_train_epochs == int(args.num_train_epochs)),
        f"num_train_epochs is {args.num_train_epochs}; it counts updates, so it must be a whole number, at least 1",
    )
    require(args.num_generations >= 1, f"num_generations is {args.num_generations}; it must be at least 1")
    for name in ("beta", "region_weight", "region_threshold"):
        value = getattr(args, name)
        require(0 <= value < math.inf, f"{name} is {value}; it must be a number from 0 on")
    require(
        0 <= args.region_dilation <= 0.5,
        f"region_dilation is {args.region_dilation}; it is a share of the picture's side, in [0, 0.5]",
    )
    require(
        not args.auto_find_batch_size,
        "auto_find_batch_size would change the pictures of an update; set a smaller per_device_train_batch_size, with "
        "more gradient_accumulation_steps, instead",
    )
    require(
        not (args.deepspeed and args.hf_deepspeed_config.is_zero3()),
        "ZeRO-3 is not supported: it gathers weights forward by forward, and here one backward pass goes through many; "
        "use configs/deepspeed/zero2.json",
    )
    args.plan()


def check_reach(args: DraftConfig) -> None:
    steps = args.num_inference_steps
    if args.variant == "draft_k":
        require(
            1 <= args.backprop_steps <= steps,
            f"backprop_steps is {args.backprop_steps}, but a picture is sampled in {steps} steps "
            f"(num_inference_steps); use 1 to {steps}",
        )
    if args.variant == "draft_lv":
        require(args.lv_draws >= 1, f"lv_draws is {args.lv_draws}; it must be at least 1")
    if args.variant == "alignprop" and args.backprop_range is not None:
        given = list(args.backprop_range)
        require(
            len(given) == 2 and 1 <= given[0] <= given[1] <= steps,
            f"backprop_range is {given}; it is the fewest and the most of the {steps} sampling steps, e.g. 1 {steps}",
        )
    if args.variant == "refl" and args.refl_steps is not None:
        require(
            1 <= args.refl_steps <= steps,
            f"refl_steps is {args.refl_steps}, but a picture is sampled in {steps} steps (num_inference_steps); "
            f"use 1 to {steps}",
        )


def warn_of_ignored_settings(args: DraftConfig) -> None:
    own = {"draft_k": "backprop_steps", "draft_lv": "lv_draws", "alignprop": "backprop_range", "refl": "refl_steps"}
    others = [name for variant, name in own.items() if variant != args.variant]
    if args.variant in ("draft_lv", "refl"):
        others.append("recompute_steps")
    warn_of_ignored(args, others, f"variant is {args.variant}")
    if args.region_weight == 0:
        regional = ("region_threshold", "region_dilation", "region_gradient")
        warn_of_ignored(args, regional, "region_weight is 0, there is no constraint")
    if args.beta == 0:
        warn_of_ignored(args, ("distance",), "beta is 0")
