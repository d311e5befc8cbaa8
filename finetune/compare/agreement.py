"""How a comparison asks all its rewards about the same pictures before any training: by `finetune.agreement`."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from finetune.agreement import AgreementArguments, open_input
from finetune.command_line import as_flags
from finetune.compare.config import Comparison
from finetune.compare.entrants import Entrant, parse_entrant
from finetune.compare.folder import AGREEMENT, training_command
from finetune.compare.rewards import Spec, as_text
from finetune.generate import GenerationArguments
from reward.arguments import parse_arguments
from rl.policy_config import RewardedPolicyConfig

_HANDED_ON = ("policy", "num_inference_steps", "eta", "guidance_scale", "model_dtype", "start_timestep", "resolution")
_HALF = {"bf16": "bfloat16", "fp16": "float16"}


def is_agreed(comparison: Comparison, rewards: Mapping[str, Any]) -> bool:
    """Whether `rewards` were asked to agree, those that were added later included, and none of them failed."""
    file = comparison.folder / AGREEMENT
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    failed = found.get("failed", {})
    said = {as_text(entry) for name, entry in found["settings"]["rewards"].items() if name not in failed}
    return {as_text(entry) for entry in rewards.values()} <= said


def agreement_rewards(comparison: Comparison, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The rewards that are asked, as `finetune.agreement` reads them, each by a name of its own: the evaluators', then
    those that entrants train on unless an evaluator is just that; of weighted sums, the members.

    Args:
        leave_out: names of entrants whose rewards are not asked.
    """
    found = {one.name: _entry(one.spec, one.term) for one in comparison.evaluators}
    trained: dict[Spec, list[str]] = {}
    for entrant in comparison.entrants:
        if entrant.name in leave_out:
            continue
        for member, reward, kwargs, _ in entrant.spec.named:
            name = f"{entrant.name}: {member}" if member else entrant.name
            trained.setdefault(Spec.of(reward, json.loads(kwargs)), []).append(name)
    for spec, names in trained.items():
        if (entry := _entry(spec)) in found.values():
            continue
        name = ", ".join(names)
        while name in found:  # an evaluator may be called like an entrant
            name += " (trained on)"
        found[name] = entry
    return found


def check_agreement(comparison: Comparison) -> None:
    """Complain about what could not be asked, before anything is, unless it was asked already; loads no model.

    Raises:
        ValueError: a setting of `agreement` that is none, or is ignored as `agreement_prompts` is 0; pictures, labels
            or choices that cannot be read; or a start that the pictures cannot be drawn from.
    """
    arguments, rewards = comparison.arguments, agreement_rewards(comparison)
    if not arguments.agreement_prompts:
        _refuse_ignored(arguments.agreement)
        return
    if is_agreed(comparison, rewards):
        return
    command = agreement_command(comparison, rewards)[1:]
    if "pictures" not in arguments.agreement:
        _refuse_undrawn(comparison.entrants[0])
        # Its own prompts are not written yet, and its pictures go by them.
        command += ["--prompts", arguments.prompts, "--pictures", str(comparison.folder / "undrawn")]
    try:
        open_input(*parse_arguments([AgreementArguments, GenerationArguments], command))
    except ValueError as error:
        raise ValueError(f"agreement: {error}") from error


def agreement_command(comparison: Comparison, rewards: Mapping[str, Any]) -> list[str]:
    """What measures how `rewards` agree, behind `python -m`; pictures are drawn by the first entrant's start."""
    arguments, entrant = comparison.arguments, comparison.entrants[0]
    _, args = parse_entrant(entrant.command, training_command(comparison, entrant, 0)[1:])
    settings: dict[str, Any] = {"report": str(comparison.folder / AGREEMENT), "rewards": dict(rewards)}
    if "pictures" not in arguments.agreement:
        folder = comparison.folder / "agreement"
        settings |= _drawing(entrant.start, args)
        settings |= {"pictures": str(folder / "pictures"), "prompts": str(folder / "prompts.txt")}
        settings["num_generations"] = arguments.agreement_generations
    if comparison.decide_by is not None:
        settings["against"] = [comparison.decide_by, *arguments.agreement.get("labels", [])]
    settings |= {"use_cpu": args.use_cpu, **arguments.agreement}
    return ["finetune.agreement", *as_flags(settings)]


def _drawing(start: Mapping[str, Any], args: RewardedPolicyConfig) -> dict[str, Any]:
    """Settings of `GenerationArguments` that draw what a policy draws before its training."""
    settings = {name: start[name] for name in _HANDED_ON if start[name] is not None}
    # A LoRA to start from, fused, is the same function up to rounding, and what is trained adds nothing to it yet.
    adapters = [*start["base_adapters"], *filter(None, [start["init_adapter"]])]
    settings |= {"base_adapters": adapters} if adapters else {}
    return settings | {name: True for name in ("vae_slicing", "vae_tiling") if getattr(args, name)}


def _refuse_ignored(agreement: Mapping[str, Any]) -> None:
    if agreement:
        raise ValueError(
            f"agreement sets {', '.join(agreement)}, which is ignored: agreement_prompts is 0, so agreement before "
            "training is not measured, not even on `pictures` that are there; leave agreement out, or set "
            "agreement_prompts above 0"
        )


def _refuse_undrawn(entrant: Entrant) -> None:
    """Complain about a start that `finetune.agreement` would draw other pictures by than the entrant does."""
    start = entrant.start
    names = ("sde_window", "original_size", "crops_coords_top_left", "target_size")
    wrong = [f"{name} {start[name]}" for name in names if start[name] not in (None, [0, 0])]
    # With weights of that precision the U-Net computes in it anyway.
    wrong += [f"{name} with model_dtype {start['model_dtype']}, not {dtype}" for name, dtype in _HALF.items()
              if start[name] and start["model_dtype"] != dtype]  # fmt: skip
    if wrong:
        raise ValueError(
            f"agreement's pictures are to be what {entrant.name!r} draws before training, and finetune.agreement "
            f"cannot draw by its {'; '.join(wrong)}; give `agreement: {{pictures: ...}}`, pictures that are there, or "
            "`agreement_prompts: 0` for no agreement before training"
        )


def _entry(spec: Spec, term: str | None = None) -> dict[str, Any]:
    """One reward by itself, or a term of it, as a YAML names it."""
    ((_, reward, kwargs, _),) = spec.named
    return {"reward": reward, "kwargs": json.loads(kwargs)} | ({"term": term} if term else {})
