"""How a comparison asks all its rewards about the same pictures before any training: by `finetune.agreement`."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from finetune.agreement import AgreementArguments, open_input
from finetune.command_line import as_flags
from finetune.compare.config import Comparison
from finetune.compare.entrants import parse_entrant
from finetune.compare.folder import AGREEMENT, training_command
from finetune.compare.rewards import Spec, as_text
from finetune.generate import GenerationArguments
from reward.arguments import parse_arguments


def is_agreed(comparison: Comparison, rewards: Mapping[str, Any]) -> bool:
    """Whether `rewards` were asked to agree, those that were added later included."""
    file = comparison.folder / AGREEMENT
    if not file.is_file():
        return False
    asked = json.loads(file.read_text(encoding="utf-8"))["settings"]["rewards"]
    return {as_text(entry) for entry in rewards.values()} <= {as_text(entry) for entry in asked.values()}


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
        ValueError: a setting of `agreement` that is none, or pictures, labels or choices that cannot be read.
    """
    arguments, rewards = comparison.arguments, agreement_rewards(comparison)
    if not arguments.agreement_prompts or is_agreed(comparison, rewards):
        return
    command = agreement_command(comparison, rewards)[1:]
    if "pictures" not in arguments.agreement:  # its own prompts are not written yet, and its pictures go by them
        command += ["--prompts", arguments.prompts, "--pictures", str(comparison.folder / "undrawn")]
    try:
        open_input(*parse_arguments([AgreementArguments, GenerationArguments], command))
    except ValueError as error:
        raise ValueError(f"agreement: {error}") from error


def agreement_command(comparison: Comparison, rewards: Mapping[str, Any]) -> list[str]:
    """What measures how `rewards` agree, behind `python -m`."""
    arguments, folder, start = comparison.arguments, comparison.folder / "agreement", comparison.entrants[0].start
    settings: dict[str, Any] = {"report": str(comparison.folder / AGREEMENT), "rewards": dict(rewards)}
    if "pictures" not in arguments.agreement:
        names = ("policy", "num_inference_steps", "eta", "guidance_scale", "model_dtype", "start_timestep",
                 "resolution", "base_adapters")  # fmt: skip
        settings |= {name: start[name] for name in names if start[name] not in (None, [])}
        settings |= {"pictures": str(folder / "pictures"), "prompts": str(folder / "prompts.txt")}
        settings["num_generations"] = arguments.agreement_generations
    if comparison.decide_by is not None:
        settings["against"] = [comparison.decide_by, *arguments.agreement.get("labels", [])]
    _, args = parse_entrant(comparison.entrants[0].command, training_command(comparison, comparison.entrants[0], 0)[1:])
    settings |= {"use_cpu": args.use_cpu, **arguments.agreement}
    return ["finetune.agreement", *as_flags(settings)]


def _entry(spec: Spec, term: str | None = None) -> dict[str, Any]:
    """One reward by itself, or a term of it, as a YAML names it."""
    ((_, reward, kwargs, _),) = spec.named
    return {"reward": reward, "kwargs": json.loads(kwargs)} | ({"term": term} if term else {})
