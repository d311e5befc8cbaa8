"""What may be wrong with the settings of any training of a policy, one message each; and settings without effect."""

import logging
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType, TrainingArguments

from reward.training_arguments import check_no_fsdp, check_one_gpu
from rl.adapter import require

if TYPE_CHECKING:
    from rl.policy_config import PolicyConfig

logger = logging.getLogger(__name__)

GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
STRATEGIES = ("epoch", "steps", "no")
LR_SCHEDULES = tuple(
    schedule.value
    for schedule in SchedulerType
    if schedule not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # these follow an evaluation's loss
)


_OF_LABELS = (
    "label_smoothing_factor", "label_names", "include_num_input_tokens_seen",
    "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval", "metric_for_best_model",
    "greater_is_better", "liger_kernel_config", "use_cache", "remove_unused_columns",
)  # fmt: skip
"""Trainer's settings for language models, and for losses on labels and what is made of them."""

_OF_LOADERS = (
    *(setting.name for setting in fields(TrainingArguments) if setting.name.startswith("dataloader_")),
    *("data_seed", "ignore_data_skip", "train_sampling_strategy", "length_column_name"),
)


def check_names(args: "PolicyConfig") -> None:
    check_no_fsdp(args)
    for name, valid in (
        ("save_strategy", STRATEGIES),
        ("eval_strategy", STRATEGIES),
        ("lr_scheduler_type", LR_SCHEDULES),
    ):
        value = getattr(args, name)
        require(getattr(value, "value", value) in valid, f"{name} is {value!r}; it must be one of {', '.join(valid)}")


def check_engine(args: "PolicyConfig") -> None:
    check_one_gpu(args, args.command)
    require(
        not args.torch_compile,
        "torch_compile would compile the whole network as one, and for the training only; use torch_compile_unet, "
        "which compiles its transformer blocks, for the evaluation too, and in less time",
    )
    require(
        args.neftune_noise_alpha is None and not args.use_liger_kernel,
        "neftune_noise_alpha and use_liger_kernel are for language models; leave them out",
    )
    require(
        not args.save_only_model,
        "save_only_model leaves checkpoints that cannot be resumed from; leave it out: "
        "every checkpoint is a folder with the LoRA too",
    )
    require(
        not args.load_best_model_at_end,
        "load_best_model_at_end goes by the loss of an evaluation, which pictures have not; leave it out, and name "
        "the reward to go by, watch_reward: the best checkpoint is then kept",
    )
    require(
        not args.eval_on_start,
        "eval_on_start would evaluate again wherever a run goes on; leave it out: with eval_prompts there is an "
        "evaluation before the training",
    )
    if args.ema_decay is not None:
        refuse_zero3(args, "ema_decay")
    if args.train_text_encoder:
        refuse_zero3(args, "train_text_encoder")
    require(
        not _is_zero3(args) or args.hf_deepspeed_config.is_true(GATHER),
        f"with ZeRO-3, {GATHER} must be true in deepspeed's settings, or what is trained cannot be saved as a whole",
    )


def refuse_zero3(args: "PolicyConfig", setting: str) -> None:
    """Complain if `setting` is used with ZeRO-3."""
    require(
        not _is_zero3(args),
        f"{setting} needs whole weights, which a rank of ZeRO-3 has not; use ZeRO-2",
    )


def _is_zero3(args: "PolicyConfig") -> bool:
    return bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()


def check_policy_ranges(args: "PolicyConfig") -> None:
    require(math.isfinite(args.num_train_epochs), f"num_train_epochs is {args.num_train_epochs}; give a finite number")
    require(0 <= args.eta <= 1, f"eta is {args.eta}; it must lie in [0, 1]")
    require(args.num_inference_steps >= 1, f"num_inference_steps is {args.num_inference_steps}; at least 1")
    require(args.guidance_scale >= 0, f"guidance_scale is {args.guidance_scale}; it must not be negative")
    require(
        args.ema_decay is None or 0 < args.ema_decay < 1,
        f"ema_decay is {args.ema_decay}; it must lie between 0 and 1, e.g. 0.9",
    )
    dropping_dora = args.tune == "lora" and args.use_dora and args.lora_dropout > 0
    require(
        not dropping_dora or args.model_dtype == "float32" or args.bf16 or args.fp16,
        f"use_dora with lora_dropout on weights of {args.model_dtype} needs bf16, or peft would multiply numbers of "
        "unlike precision; set bf16 to true, or model_dtype to float32",
    )
    require(
        args.max_train_seconds is None or args.max_train_seconds > 0,
        f"max_train_seconds is {args.max_train_seconds}; it must be above 0",
    )
    require(0 <= args.seed < 2**32, f"seed is {args.seed}; it must lie between 0 and 2**32 - 1")
    require(bool(args.output_dir), "output_dir is empty; name a folder")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        require(getattr(args, name) >= 1, f"{name} is {getattr(args, name)}; it must be at least 1")
    require(
        not args.fp16 or args.device.type != "cpu",
        "fp16 is for GPUs: on the CPU nothing scales the loss; leave it out, or set bf16 to true",
    )
    require(
        args.model_dtype != "float16" or args.fp16,
        "model_dtype is float16 without fp16: nothing would scale the loss, and small gradients would be 0; "
        "set fp16 to true, or model_dtype to bfloat16",
    )
    value = args.reward_batch_size
    require(value is None or value >= 1, f"reward_batch_size is {value}; it must be at least 1")


def warn_of_ignored_policy_settings(args: "PolicyConfig") -> None:
    warn_of_ignored(args, _OF_LABELS, "it is for other losses than this training's")
    checkpointing = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    warn_of_ignored(args, checkpointing, "diffusers' blocks are computed again in their own way")
    warn_of_ignored(args, ("enable_jit_checkpoint",), "SIGTERM is answered by a checkpoint in any case")
    warn_of_ignored(args, ("hub_strategy", "hub_always_push"), "what a run leaves is pushed once, when all is there")
    # TrainingArguments change pin_memory by themselves, where there is no GPU.
    unused = [name for name in _OF_LOADERS if name not in (*args.loader_settings, "dataloader_pin_memory")]
    warn_of_ignored(args, unused, "this training chooses and loads its data itself")
    if args.tune == "full":
        lora = [setting.name for setting in fields(args) if "lora" in setting.name]
        warn_of_ignored(args, (*lora, "use_dora"), "tune is full, there is no LoRA")
    elif not args.train_text_encoder:
        warn_of_ignored(args, ("text_lora_target_modules",), "train_text_encoder is false")
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
