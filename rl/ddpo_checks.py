"""What may be wrong with the settings of a DDPO run, one message each; and settings that have no effect."""

import logging
import os
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType

from rl.adapter import require
from rl.advantages import BASELINES
from rl.credit import CREDITS, FOCUSES, PAID_SCALES

if TYPE_CHECKING:
    from rl.ddpo_config import DDPOConfig

logger = logging.getLogger(__name__)

GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
SAVE_STRATEGIES = ("epoch", "steps", "no")
LR_SCHEDULES = tuple(
    schedule.value
    for schedule in SchedulerType
    if schedule not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # these follow an evaluation's loss
)


def check_names(args: "DDPOConfig") -> None:
    require(
        not args.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"),
        "fsdp is not supported: the LoRA could not be saved; "
        "to shard over GPUs, use --deepspeed configs/deepspeed/zero2.json",
    )
    for name, valid in (("save_strategy", SAVE_STRATEGIES), ("lr_scheduler_type", LR_SCHEDULES)):
        value = getattr(args, name)
        require(getattr(value, "value", value) in valid, f"{name} is {value!r}; it must be one of {', '.join(valid)}")


def check_engine(args: "DDPOConfig") -> None:
    require(
        args.n_gpu <= 1,
        f"this process sees {args.n_gpu} GPUs, and would spread its batches over them by torch's DataParallel, "
        "which does not fit rollouts; start one process a GPU: accelerate launch --config_file "
        "configs/accelerate/multi_gpu.yaml run_ddpo.py ..., or show it one: CUDA_VISIBLE_DEVICES=0",
    )
    require(
        not args.torch_compile,
        "torch_compile would compile the whole network as one, and for the training only; use torch_compile_unet, "
        "which compiles its transformer blocks, for the evaluation too, and in less time",
    )
    require(
        not args.save_only_model,
        "save_only_model leaves checkpoints that cannot be resumed from; leave it out: "
        "every checkpoint is a folder with the LoRA too",
    )
    if args.deepspeed and args.hf_deepspeed_config.is_zero3():
        for name, used in (("train_steps auto", args.probed_steps), ("ema_decay", args.ema_decay)):
            require(used is None, f"{name} needs whole weights, which a rank of ZeRO-3 has not; use ZeRO-2")
        require(
            args.hf_deepspeed_config.is_true(GATHER),
            f"with ZeRO-3, {GATHER} must be true in deepspeed's settings, or what is trained cannot be saved as a whole",
        )


def check_ranges(args: "DDPOConfig") -> None:
    require(
        args.num_generations >= (2 if args.advantage_baseline == "group" else 1),
        f"num_generations is {args.num_generations}; an advantage compares at least 2 pictures of a prompt, "
        "unless advantage_baseline is prompt or batch",
    )
    check_credit(args)
    check_steps(args)
    require(0 <= args.eta <= 1, f"eta is {args.eta}; it must lie in [0, 1]")
    require(args.eta > 0, "eta is 0: steps without noise have no log-prob to train; set it above 0, e.g. 1")
    require(args.num_inference_steps >= 1, f"num_inference_steps is {args.num_inference_steps}; at least 1")
    require(args.guidance_scale >= 0, f"guidance_scale is {args.guidance_scale}; it must not be negative")
    for name in ("epsilon", "epsilon_location", "advantage_std_floor", "advantage_clip"):
        require(getattr(args, name) > 0, f"{name} is {getattr(args, name)}; it must be above 0")
    require(args.epsilon_high is None or args.epsilon_high > 0, f"epsilon_high is {args.epsilon_high}; above 0")
    require(
        args.ema_decay is None or 0 < args.ema_decay < 1,
        f"ema_decay is {args.ema_decay}; it must lie between 0 and 1, e.g. 0.9",
    )
    for name in (
        "num_iterations",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    ):
        require(getattr(args, name) >= 1, f"{name} is {getattr(args, name)}; it must be at least 1")
    require(
        args.max_steps > 0 or args.num_train_epochs > 0,
        f"num_train_epochs is {args.num_train_epochs}; it counts rollouts, so it must be at least 1",
    )
    for name in (
        "per_device_rollout_batch_size",
        "reward_batch_size",
        "generation_batch_size",
        "steps_per_generation",
    ):
        value = getattr(args, name)
        require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
    require(args.beta >= 0, f"beta is {args.beta}; it must not be negative")
    require(args.num_log_images >= 0, f"num_log_images is {args.num_log_images}; it must not be negative")
    require(
        not args.auto_find_batch_size,
        "auto_find_batch_size would break up groups; set a smaller per_device_train_batch_size instead",
    )


def check_steps(args: "DDPOConfig") -> None:
    require(0 < args.timestep_fraction <= 1, f"timestep_fraction is {args.timestep_fraction}; it lies in (0, 1]")
    if not any(part.partition(":")[0] == "auto" for part in args.train_steps):
        return
    _, _, count = args.train_steps[0].partition(":")
    require(
        len(args.train_steps) == 1 and (count == "" or count.isdigit()) and args.probed_steps >= 1,
        f"train_steps {' '.join(args.train_steps)!r} is not understood; `auto:2` stands alone, 2 being a number",
    )
    require(args.timestep_fraction == 1, "timestep_fraction does not go with train_steps auto; leave it out")
    require(
        args.tune == "lora",
        "train_steps auto keeps a gradient of all weights for each step, too much with tune full; name them",
    )
    require(args.probe_rollouts >= 1, f"probe_rollouts is {args.probe_rollouts}; auto needs at least 1")
    require(args.probe_every >= 0, f"probe_every is {args.probe_every}; it must not be negative")


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
    if args.probed_steps is None:
        warn_of_ignored(args, ("probe_rollouts", "probe_every"), "train_steps is not auto")
    if args.guidance_scale == 1:
        warn_of_ignored(args, ("train_guidance",), "guidance_scale is 1, so there is none")
    if args.credit == "mask" or (args.credit == "paid" and args.paid_scale == "unit"):
        logger.warning(
            "credit %s is for comparison: it teaches to draw less, or shields what is wrong (see rl/credit.py)",
            args.credit,
        )
    unused = "epsilon_location" if level == "image" else "epsilon"
    warn_of_ignored(args, (unused,), f"importance_sampling_level is {level}")
    if "tensorboard" not in args.report_to and args.num_log_images > 0:
        warn_of_ignored(args, ("num_log_images",), "report_to does not name tensorboard")
    if args.tune == "full":
        lora = [setting.name for setting in fields(args) if "lora" in setting.name]
        warn_of_ignored(args, (*lora, "use_dora"), "tune is full, there is no LoRA")
    if args.init_adapter is not None:
        warn_of_ignored(args, ("init_lora_weights",), "the LoRA starts from init_adapter")
    if args.device.type == "cpu":
        warn_of_ignored(args, ("offload",), "the run is on the CPU")


def warn_of_ignored(settings: object, names: Iterable[str], why: str) -> None:
    """Warn of those of `names` that a dataclass of settings holds another value for than its default."""
    for setting in fields(settings):
        if setting.name in names and getattr(settings, setting.name) != _default(setting):
            logger.warning("%s=%r is ignored: %s", setting.name, getattr(settings, setting.name), why)


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()
