"""How a comparison asks all its rewards about the same pictures before any training: by `finetune.agreement`."""

import json
from typing import Any

from finetune.command_line import as_flags
from finetune.compare_config import Comparison
from finetune.compare_entrants import parse_entrant
from finetune.compare_folder import AGREEMENT, training_command
from finetune.compare_rewards import Spec


def is_agreed(comparison: Comparison) -> bool:
    """Whether all rewards were asked to agree, those that were added later included."""
    file = comparison.folder / AGREEMENT
    if not file.is_file():
        return False
    return set(agreement_names(comparison).values()) <= set(json.loads(file.read_text(encoding="utf-8"))["raters"])


def agreement_names(comparison: Comparison) -> dict[Spec, str]:
    """The rewards that are asked to agree, each once and by a name; of weighted sums, the members."""
    found: dict[Spec, list[str]] = {}
    for one in comparison.evaluators:
        found.setdefault(one.spec, []).append(one.name)
    for entrant in comparison.entrants:
        if len(entrant.spec.named) == 1 and not entrant.spec.named[0][0]:
            found.setdefault(entrant.spec, []).append(entrant.name)
            continue
        for name, reward, kwargs, _ in entrant.spec.named:
            found.setdefault(Spec.of(reward, json.loads(kwargs)), []).append(f"{entrant.name}: {name}")
    evaluators = {one.name for one in comparison.evaluators}
    return {
        spec: next((name for name in names if name in evaluators), ", ".join(names)) for spec, names in found.items()
    }


def agreement_command(comparison: Comparison) -> list[str]:
    """What measures it, behind `python -m`."""
    arguments, folder, start = comparison.arguments, comparison.folder / "agreement", comparison.entrants[0].start
    rewards = {}
    for spec, name in agreement_names(comparison).items():
        ((_, reward, kwargs, _),) = spec.named
        rewards[name] = {"reward": reward, "kwargs": json.loads(kwargs)}
    settings: dict[str, Any] = {"report": str(comparison.folder / AGREEMENT), "rewards": rewards}
    if "pictures" not in arguments.agreement:
        names = ("policy", "num_inference_steps", "eta", "guidance_scale", "model_dtype", "start_timestep",
                 "resolution", "base_adapters")  # fmt: skip
        settings |= {name: start[name] for name in names if start[name] not in (None, [])}
        settings |= {"pictures": str(folder / "pictures"), "prompts": str(folder / "prompts.txt")}
        settings["num_generations"] = arguments.agreement_generations
    if comparison.decide_by is not None:
        spec = next(one.spec for one in comparison.evaluators if one.name == comparison.decide_by)
        settings["against"] = [agreement_names(comparison)[spec], *arguments.agreement.get("labels", [])]
    _, args = parse_entrant(comparison.entrants[0].command, training_command(comparison, comparison.entrants[0], 0)[1:])
    settings |= {"use_cpu": args.use_cpu, **arguments.agreement}
    return ["finetune.agreement", *as_flags(settings)]
