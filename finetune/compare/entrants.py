"""The entrants of a comparison: each a training, as a config of `run_ddpo.py` or `finetune.draft` and changes of it."""

import hashlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.command_line import as_flags
from finetune.compare.rewards import BASE, Spec, as_text
from finetune.draft_config import DraftConfig, check_differentiable
from finetune.run import read_schedule
from finetune.run_arguments import RewardedRunArguments
from reward.arguments import parse_arguments
from rl.adapter import AdapterSettings, check_adapter_files, require
from rl.ddpo_config import DDPOConfig
from rl.policy_config import RewardedPolicyConfig
from rl.rollout_plan import near

if TYPE_CHECKING:
    from finetune.compare.config import CompareArguments, Comparison

COMMANDS = {"run_ddpo": DDPOConfig, "finetune.draft": DraftConfig}
"""What trains -> its settings, besides `RewardedRunArguments`."""
OWNED = {
    "prompts": "prompts", "eval_prompts": "held_out", "seed": "seeds", "output_dir": "output_dir",
    "num_train_epochs": "budget_images or budget_seconds", "max_steps": "budget_images or budget_seconds",
    "max_train_seconds": "budget_seconds", "save_strategy": "looks", "save_steps": "looks", "save_total_limit": "looks",
    "resume_from_checkpoint": None, "overwrite_output_dir": None, "eval_strategy": None,
    "stop_on": "budget_images or budget_seconds",  # one that ends early has drawn fewer pictures than the others
}  # fmt: skip
"""Settings of a training that are the comparison's, and what says them there; with `budget_seconds`, `save_steps` is an
entrant's own, as `looks` cannot be dealt out to rollouts whose number is not known."""
_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True)
class Entrant:
    """A training that is compared.

    Attributes:
        command: module that is run, of `COMMANDS`.
        changes: settings in place of the config's.
        spec: the reward trained on.
        upper_bound: it is there to be compared with, not to be chosen: its reward is what no real project has.
        note: what is tried here, in a few words.
        pictures: of a rollout, or of an update of `finetune.draft`.
        updates: of a rollout.
        rollouts: of the training; None where its time decides.
        save_steps: updates between two checkpoints, which are what is looked at.
        against: name of the entrant that this one is to be compared with, whatever others there are; None for nobody.
        start: what the policy is before training and how it samples; entrants of the same one share a base.
    """

    name: str
    command: str
    config: str
    changes: Mapping[str, Any]
    spec: Spec
    upper_bound: bool
    note: str
    pictures: int
    updates: int
    rollouts: int | None
    save_steps: int
    start: Mapping[str, Any]
    against: str | None = None

    @property
    def folder(self) -> str:
        return slug(self.name)

    @property
    def base(self) -> str:
        """Names the base's folder."""
        return hashlib.blake2b(as_text(self.start).encode(), digest_size=4).hexdigest()


def run_flags(comparison: "Comparison", entrant: Entrant, seed: int, folder: Path) -> list[str]:
    """The flags of one training, behind `python -m <command>`."""
    arguments = comparison.arguments
    flags = _fixed(arguments) | dict(entrant.changes)
    flags |= {"seed": seed, "output_dir": str(folder), "save_steps": entrant.save_steps}
    if entrant.rollouts is not None:
        flags |= {"num_train_epochs": entrant.rollouts}
    else:
        flags |= {"num_train_epochs": 100_000, "max_train_seconds": arguments.budget_seconds}
    return ["--config", entrant.config, *as_flags(flags)]


def parse_entrant(command: str, flags: Sequence[str]) -> tuple[RewardedRunArguments, RewardedPolicyConfig]:
    """A training's settings, as the command itself reads them; what its YAML's `env` sets is set in its own process."""
    with _ENVIRONMENT:
        before = dict(os.environ)
        try:
            return parse_arguments([RewardedRunArguments, COMMANDS[command]], flags)
        finally:
            for name in {name for name, value in os.environ.items() if before.get(name) != value}:
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]


def read_entrant(name: Any, entry: Any, arguments: "CompareArguments") -> Entrant:
    """The training that a YAML's entry describes, its settings checked; loads no model.

    Raises:
        ValueError: it could not be run, or not beside the others; the message says why.
    """
    place = f"entrants: {name!r}"
    require(isinstance(name, str) and bool(slug(name)), f"{place} cannot be a name; give it a text with letters")
    require(name != BASE, f"{place}: {BASE!r} is the policy before training; choose another name")
    valid = ("config", "command", "changes", "upper_bound", "note", "against")
    require(isinstance(entry, Mapping), f"{place} is {entry!r}; write a mapping of {', '.join(valid)}")
    if unknown := [key for key in entry if key not in valid]:
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}; it may have {', '.join(valid)}")
    bound = entry.get("upper_bound", False)
    require(isinstance(bound, bool), f"{place}: upper_bound is {bound!r}; it is true or false")
    require(
        isinstance(entry.get("config"), str), f"{place} has no config: name a YAML of run_ddpo.py or finetune.draft"
    )
    command = entry.get("command", "run_ddpo")
    require(command in COMMANDS, f"{place}: command is {command!r}; it must be one of {', '.join(COMMANDS)}")
    against = entry.get("against")
    require(
        against is None or (against in arguments.entrants and against != name),
        f"{place}: against is {against!r}; name another of the entrants: {', '.join(map(str, arguments.entrants))}",
    )
    changes = entry.get("changes") or {}
    require(isinstance(changes, Mapping), f"{place}: changes is {changes!r}; write a mapping of setting: value")
    changes = dict(arguments.common) | dict(changes)
    free = ("save_steps",) if arguments.budget_seconds is not None else ()
    if owned := [key for key in changes if key in OWNED and key not in free]:
        says = OWNED[owned[0]]
        raise ValueError(
            f"{place} changes {owned[0]}, which is the same for all entrants"
            + (f"; the comparison's {says} says it" if says else "; take it away")
        )
    if "rewards" in changes and "reward" not in changes:  # what the config says of the other must go
        changes |= {"reward": "", "reward_kwargs": {}}
    elif changes.get("reward"):
        changes = {"rewards": {}, "reward_kwargs": {}} | changes
    changes.setdefault("eval_rewards", {})
    if not changes["eval_rewards"]:  # the config's own are taken away, and with them the one that it may watch
        changes.setdefault("watch_reward", "")
    trial = {"output_dir": arguments.output_dir, "num_train_epochs": 1, "save_strategy": "no"}
    flags = ["--config", entry["config"], *as_flags(_fixed(arguments) | changes | trial)]
    try:
        run, args = parse_entrant(command, flags)
        require(not args.stop_on, f"its config has stop_on {args.stop_on}, which may end it early; take it out")
        spec = Spec.sum_of(run.rewards) if run.rewards else Spec.of(run.reward, run.reward_kwargs)
        if command == "finetune.draft":
            check_differentiable(run.named_rewards())
        check_adapter_files(args.part(AdapterSettings))
        pictures, updates = _arithmetic(run, args)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    rollouts = _rollouts(place, pictures, args, arguments)
    if rollouts is not None:
        looks = max(count for count in range(1, arguments.looks + 1) if rollouts % count == 0)
        save_steps = rollouts // looks * updates
    else:
        said = changes | yaml.safe_load(Path(entry["config"]).read_text(encoding="utf-8"))
        save_steps = _save_steps(place, args.save_steps if "save_steps" in said else updates, updates)
    return Entrant(
        name, command, entry["config"], changes, spec, bound,
        str(entry.get("note", "")), pictures, updates, rollouts, save_steps, _start_of(run, args), against,
    )  # fmt: skip


def refuse_twins(entrants: Sequence[Entrant]) -> None:
    """Complain about two entrants that are one training, or would share a folder."""
    for place, one in enumerate(entrants):
        for other in entrants[:place]:
            if one.folder == other.folder:
                raise ValueError(
                    f"entrants: {other.name!r} and {one.name!r} would share the folder {one.folder}; rename one"
                )
            same = (one.command, one.config, as_text(one.changes)) == (
                other.command,
                other.config,
                as_text(other.changes),
            )
            if same:
                raise ValueError(
                    f"entrants: {other.name!r} and {one.name!r} are the same training under two names; take one away"
                )


def slug(name: str) -> str:
    """A name as a folder can be called."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _fixed(arguments: "CompareArguments") -> dict[str, Any]:
    return {
        "prompts": arguments.prompts, "eval_prompts": "", "eval_strategy": "no", "save_strategy": "steps",
        "save_total_limit": 0, "resume_from_checkpoint": "auto", "num_log_images": 0, "disable_tqdm": True,
    }  # fmt: skip


def _arithmetic(run: RewardedRunArguments, args: RewardedPolicyConfig) -> tuple[int, int]:
    """Pictures and updates of a rollout."""
    schedule = read_schedule(run.policy, args)
    plan = args.plan() if isinstance(args, DraftConfig) else args.plan(args.steps_per_rollout(schedule))
    return plan.pictures, plan.updates


def _rollouts(place: str, pictures: int, args: RewardedPolicyConfig, arguments: "CompareArguments") -> int | None:
    if arguments.budget_images is not None:
        require(
            arguments.budget_images % pictures == 0,
            f"{place}: its rollouts have {pictures} pictures, which do not divide budget_images "
            f"({arguments.budget_images}); use {near(arguments.budget_images, pictures)}",
        )
        return arguments.budget_images // pictures
    kind = str(args.lr_scheduler_type.value)
    require(
        kind.startswith("constant"),
        f"{place}: lr_scheduler_type is {kind}, but how many updates budget_seconds allows is not known beforehand; "
        "use constant_with_warmup, or budget_images",
    )
    return None


def _save_steps(place: str, said: float, updates: int) -> int:
    require(
        said >= 1 and said % updates == 0,
        f"{place}: save_steps ({said:g}) is not a multiple of the {updates} updates of a rollout, and a checkpoint "
        f"holds no half-used rollout; use {near(int(max(said, 1)), updates)}",
    )
    return int(said)


def _start_of(run: RewardedRunArguments, args: RewardedPolicyConfig) -> dict[str, Any]:
    names = ("num_inference_steps", "eta", "guidance_scale", "start_timestep", "resolution", "original_size",
             "crops_coords_top_left", "target_size", "model_dtype", "base_adapters", "init_adapter")  # fmt: skip
    start = {"policy": run.policy} | {name: getattr(args, name) for name in names}
    return start | {"sde_window": getattr(args, "sde_window", None), "bf16": args.bf16, "fp16": args.fp16}
