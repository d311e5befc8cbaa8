"""What may be wrong with the settings of a DDPO run, one message each; and settings that have no effect."""

import logging
import math
from typing import TYPE_CHECKING

from rl.adapter import require
from rl.advantages import BASELINES
from rl.credit import CREDITS, FOCUSES, PAID_SCALES
from rl.policy_checks import refuse_zero3, warn_of_ignored

if TYPE_CHECKING:
    from rl.ddpo_config import DDPOConfig

logger = logging.getLogger(__name__)


def check_zero3(args: "DDPOConfig") -> None:
    if args.probed_steps is not None:
        refuse_zero3(args, "train_steps auto")


def check_ranges(args: "DDPOConfig") -> None:
    require(
        args.num_generations >= (2 if args.advantage_baseline == "group" else 1),
        f"num_generations is {args.num_generations}; an advantage compares at least 2 pictures of a prompt, "
        "unless advantage_baseline is prompt or batch",
    )
    check_credit(args)
    check_steps(args)
    compared = f"advantage_baseline is {args.advantage_baseline}, num_generations is {args.num_generations}"
    require(
        args.share_noise == "none" or (args.advantage_baseline == "group" and args.num_generations > 1),
        f"share_noise {args.share_noise} helps by cancelling where a group is compared within itself, but {compared}; "
        "set it to none, or advantage_baseline to group",
    )
    require(args.eta > 0, "eta is 0: steps without noise have no log-prob to train; set it above 0, e.g. 1")
    for name in ("epsilon", "epsilon_location", "advantage_std_floor", "advantage_clip"):
        require(getattr(args, name) > 0, f"{name} is {getattr(args, name)}; it must be above 0")
    require(args.epsilon_high is None or args.epsilon_high > 0, f"epsilon_high is {args.epsilon_high}; above 0")
    require(args.num_iterations >= 1, f"num_iterations is {args.num_iterations}; it must be at least 1")
    require(
        args.max_steps > 0 or args.num_train_epochs > 0,
        f"num_train_epochs is {args.num_train_epochs}; it counts rollouts, so it must be at least 1",
    )
    for name in (
        "per_device_rollout_batch_size",
        "generation_batch_size",
        "steps_per_generation",
    ):
        value = getattr(args, name)
        require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
    require(0 <= args.beta < math.inf, f"beta is {args.beta}; it must be a number from 0 on")
    require(
        not args.auto_find_batch_size,
        "auto_find_batch_size would break up groups; set a smaller per_device_train_batch_size instead",
    )


def check_steps(args: "DDPOConfig") -> None:
    require(0 < args.timestep_fraction <= 1, f"timestep_fraction is {args.timestep_fraction}; it lies in (0, 1]")
    if args.sde_window_interval is not None:
        require(args.sde_window is not None, "sde_window_interval moves sde_window, which is not set; set it, e.g. 0:2")
        require(
            args.train_steps == ["all"],
            f"train_steps is {' '.join(args.train_steps)}, but with sde_window_interval a rollout trains its window's "
            "steps; set train_steps to all",
        )
        for name in ("sde_window_interval", "sde_window_stride"):
            require(getattr(args, name) >= 1, f"{name} is {getattr(args, name)}; it must be at least 1")
    if not any(part.partition(":")[0] == "auto" for part in args.train_steps):
        return
    _, _, count = args.train_steps[0].partition(":")
    require(
        len(args.train_steps) == 1 and (count == "" or count.isdigit()) and args.probed_steps >= 1,
        f"train_steps {' '.join(args.train_steps)!r} is not understood; `auto:2` stands alone, 2 being a number",
    )
    require(args.timestep_fraction == 1, "timestep_fraction does not go with train_steps auto; leave it out")
    require(
        args.timestep_weighting == "uniform",
        f"timestep_weighting is {args.timestep_weighting}, but train_steps auto compares windows, and within each of "
        "them the weights' mean is 1; leave it out, or name the steps",
    )
    require(
        args.tune == "lora",
        "train_steps auto keeps nine bytes of each trained weight, too much with tune full; name the steps",
    )
    require(
        args.advantage_baseline == "group" and args.scale_rewards == "group",
        "train_steps auto compares gradients of pictures that share nothing, so advantages must be within groups; "
        f"advantage_baseline ({args.advantage_baseline}) and scale_rewards ({args.scale_rewards}) must be group",
    )


def check_credit(args: "DDPOConfig") -> None:
    choices = {
        "credit": CREDITS, "focus_on": FOCUSES, "paid_scale": PAID_SCALES, "advantage_baseline": BASELINES,
        "scale_rewards": ("group", "batch", "none"), "timestep_weighting": ("uniform", "std"),
    }  # fmt: skip
    for name, valid in choices.items():
        value = getattr(args, name)
        require(value in valid, f"{name} is {value!r}; it must be one of {', '.join(valid)}")
    require(0 <= args.focus_floor <= 1, f"focus_floor is {args.focus_floor}; it must lie in [0, 1]")
    for name in ("paid_reach", "paid_weight", "min_group_std"):
        require(getattr(args, name) >= 0, f"{name} is {getattr(args, name)}; it must not be negative")
    require(args.prompt_min_count >= 2, f"prompt_min_count is {args.prompt_min_count}; a std needs at least 2")
    require(
        args.prompt_buffer_size >= args.prompt_min_count,
        f"prompt_buffer_size ({args.prompt_buffer_size}) is below prompt_min_count ({args.prompt_min_count}), "
        "so no prompt's own statistics would ever be used",
    )
    if args.credit != "paid":
        return
    require(
        args.importance_sampling_level == "location",
        "credit paid differs from place to place, also in sign, so ratio and clip must be each place's: "
        "set importance_sampling_level to location",
    )
    require(
        args.advantage_baseline == "group" and args.scale_rewards == "group",
        "credit paid compares each place within a prompt's group; "
        f"advantage_baseline ({args.advantage_baseline}) and scale_rewards ({args.scale_rewards}) must be group",
    )


def warn_of_ignored_settings(args: "DDPOConfig") -> None:
    level = args.importance_sampling_level
    if args.credit not in ("focus", "words"):
        warn_of_ignored(args, ("focus_floor",), f"credit is {args.credit}")
    if args.credit != "focus":
        warn_of_ignored(args, ("focus_on",), f"credit is {args.credit}, not focus")
    paid = {"paid_reach"} if args.paid_scale == "unit" else {"paid_weight"}
    if args.credit != "paid":
        warn_of_ignored(args, ("paid_scale", "paid_reach", "paid_weight"), f"credit is {args.credit}, not paid")
    else:
        warn_of_ignored(args, paid, f"paid_scale is {args.paid_scale}")
    if args.advantage_baseline != "prompt":
        why = f"advantage_baseline is {args.advantage_baseline}"
        warn_of_ignored(args, ("prompt_buffer_size", "prompt_min_count"), why)
    if args.advantage_baseline != "group":
        warn_of_ignored(args, ("min_group_std",), f"advantage_baseline is {args.advantage_baseline}")
    if args.sde_window_interval is None:
        warn_of_ignored(args, ("sde_window_stride",), "sde_window_interval is not given, so the window stays")
    if args.guidance_scale == 1:
        warn_of_ignored(args, ("train_guidance",), "guidance_scale is 1, so there is none")
    if args.credit == "mask" or (args.credit == "paid" and args.paid_scale == "unit"):
        logger.warning(
            "credit %s is for comparison: it teaches to draw less, or shields what is wrong (see rl/credit.py)",
            args.credit,
        )
    unused = "epsilon_location" if level == "image" else "epsilon"
    warn_of_ignored(args, (unused,), f"importance_sampling_level is {level}")
