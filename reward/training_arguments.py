"""What can be wrong with `transformers.TrainingArguments`, whatever is trained, and what they would do to a model.

Trainer finds a bad learning rate, a logger that is not installed or a mismatch in DeepSpeed's settings only when it
begins to train, which is late: models have been loaded, and an older run in the output folder may be gone.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils.generic import strtobool


def check_one_gpu(args: TrainingArguments, command: str) -> None:
    """Complain if this process sees several GPUs: Trainer would give each a batch, and say nothing.

    Args:
        command: what `accelerate launch` is to start, for the message.

    Raises:
        ValueError: it does.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"this process sees {args.n_gpu} GPUs, and would spread its batches over them by torch's DataParallel, so "
            "that batch sizes would not be what they are set to; start one process a GPU: accelerate launch "
            f"--config_file configs/accelerate/multi_gpu.yaml {command} ..., or show it one: CUDA_VISIBLE_DEVICES=0"
        )


def check_no_fsdp(args: TrainingArguments) -> None:
    """Complain about FSDP, by Trainer's settings or by `accelerate launch`'s.

    Raises:
        ValueError: it is asked for.
    """
    if args.fsdp or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        raise ValueError(
            "fsdp is not supported: what is trained could not be saved; to shard over GPUs, use --deepspeed "
            "configs/deepspeed/zero2.json"
        )


def check_deepspeed_settings(setting: object) -> None:
    """Complain about DeepSpeed's settings, before anything of DeepSpeed is started.

    Args:
        setting: `deepspeed` of `TrainingArguments`: a file's path, JSON, a mapping; None or "" for none.

    Raises:
        ValueError: there is no such file, it is not JSON, or JSON of something else than settings; or what it says of
            ZeRO is nothing that DeepSpeed knows. Or there is none, and `accelerate launch` has been told to use its own
            settings of DeepSpeed, which no checkpoint would name and no check here would see.
    """
    if setting in (None, ""):
        if strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
            raise ValueError(
                "accelerate was told to use DeepSpeed by settings of its own; give them as --deepspeed FILE, such "
                "as configs/deepspeed/zero2.json, and launch with --config_file configs/accelerate/multi_gpu.yaml"
            )
        return
    if isinstance(setting, Mapping):
        _check_zero(setting, "given")
        return
    if not isinstance(setting, str):
        raise ValueError(f"deepspeed is {setting!r}; it takes a JSON file, such as configs/deepspeed/zero2.json")
    if setting.lstrip().startswith("{"):
        try:
            _check_zero(json.loads(setting), "given")
        except json.JSONDecodeError as error:
            raise ValueError(f"deepspeed is {setting!r}, which is no JSON: {error}") from error
        return
    try:
        content = json.loads(Path(setting).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read DeepSpeed's settings {setting}: {error.strerror}; --deepspeed takes a JSON file, such as "
            "configs/deepspeed/zero2.json"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"DeepSpeed's settings {setting} are not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"DeepSpeed's settings {setting} are JSON, but not a mapping of settings")
    _check_zero(content, setting)


def _check_zero(settings: Mapping[str, object], where: str) -> None:
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"DeepSpeed's settings {where}: zero_optimization is {zero!r}; it must be a mapping")
    if not zero:
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds, and only these settings need it

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValueError as error:
        raise ValueError(f"DeepSpeed's settings {where}: {' '.join(str(error).split())}") from error


def check_training_arguments(args: TrainingArguments) -> None:
    """Complain about what Trainer would find out as it begins to train: an optimizer and a schedule of the learning
    rate are made of these settings, for one number.

    Raises:
        ValueError: a logger that is not installed; a rate, a beta or an option that the optimizer or the schedule does
            not take; settings of DeepSpeed's that contradict these; a launcher that was told to compute in another
            precision, which Trainer would do while every record of the run says these settings.
    """
    if args.mixed_precision != "no" and not (args.bf16 or args.fp16):
        raise ValueError(
            f"accelerate was told to compute in {args.mixed_precision} (mixed_precision of its settings, or "
            "ACCELERATE_MIXED_PRECISION), but neither bf16 nor fp16 is set; set the one that you mean, or tell "
            'accelerate "no"'
        )
    installed = sorted(get_available_reporting_integrations())
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or []:
        if name not in installed:
            there = ", ".join(installed)
            raise ValueError(f"report_to names {name!r}, which is not installed; what is: {there}; or none")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number from 0 on, not {value}")
    if mismatches := getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", None):
        what = "; ".join(mismatch.strip().removeprefix("- ") for mismatch in mismatches)
        raise ValueError(f'DeepSpeed\'s settings contradict the others: {what}; write "auto" there')
    number = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(()))])
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, number)
        optimizer = kind(number.parameters(), **options)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(1),
            num_training_steps=1,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, KeyError, ImportError) as error:
        if args.optim_target_modules and isinstance(error, ValueError):  # it looks for them in the model
            return
        raise ValueError(
            f"no optimizer can be made of these settings: {error} (optim {getattr(args.optim, 'value', args.optim)}, "
            f"optim_args {args.optim_args}, learning_rate {args.learning_rate}, adam_beta1 {args.adam_beta1}, "
            f"adam_beta2 {args.adam_beta2}, lr_scheduler_kwargs {args.lr_scheduler_kwargs})"
        ) from error


@contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Inside, models are loaded with all of their weights on every rank; DeepSpeed shards what is trained, later.

    Once the settings of ZeRO-3 exist, transformers loads every model in shards, and reads their shapes as empty; those
    of an earlier run of this process may exist still.
    """
    settings = getattr(args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            set_hf_deepspeed_config(settings)
