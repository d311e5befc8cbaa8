"""A comparison whose trainings were never run: its folder is filled with figures that are made up, so that what is made
of them can be known beforehand."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from finetune.compare.agreement import agreement_rewards
from finetune.compare.config import CompareArguments, Comparison, read_comparison
from finetune.compare.evaluate import Findings, Look, Seen
from finetune.compare.folder import AGREEMENT, base_findings, claim, run_findings, run_folder
from reward.draw import to_image
from reward.feedback import Reward
from rl.run_state import RunState
from rl.watch_limits import MONITORS

REDNESS, PLAIN = "tests.rl.toy_rewards:Redness", "tests.rl.toy_rewards:Plain"
JUDGE, STEADY = "tests.finetune.compare_case:Judge", "tests.finetune.compare_case:Steady"
TRAIN = ["a red circle", "two green star", "a blue star", "a green circle"]
HELD_OUT = ["a blue square", "a red star", "two red star", "a green square", "two blue circle", "a red square"]


class Judge:
    """Blue is better; nobody trains on it."""

    differentiable = False

    def __call__(self, images, prompts):
        blue = images[:, 2].mean(dim=(1, 2))
        return Reward(total=blue, terms={"satisfied": (blue > 0.5).float()})


class Steady(Judge):
    """Says the same whatever it is shown."""

    def __call__(self, images, prompts):
        return Reward(total=torch.zeros(len(prompts)))


class FailsAt:
    """Rewards everything, until it is asked about one prompt."""

    differentiable = False

    def __init__(self, prompt: str):
        self.prompt = prompt

    def __call__(self, images, prompts):
        if self.prompt in prompts:
            raise RuntimeError("the scorer's licence has expired")
        return Reward(total=images.mean(dim=(1, 2, 3)))


def write_config(folder: Path, pipeline: str) -> str:
    """A training of a second."""
    settings = {
        "policy": pipeline, "reward": REDNESS, "output_dir": "unused", "use_cpu": True, "num_inference_steps": 2,
        "generation_batch_size": 4, "num_generations": 2, "per_device_train_batch_size": 4, "train_steps": [0],
        "gradient_accumulation_steps": 1, "lora_rank": 2, "report_to": "none", "prompts": "unused",
        "learning_rate": 1e-2,
    }  # fmt: skip
    file = folder / "training.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return str(file)


def write_draft_config(folder: Path, pipeline: str) -> str:
    """A training of a second, by back-propagation."""
    settings = {
        "policy": pipeline, "reward": REDNESS, "output_dir": "unused", "use_cpu": True, "num_inference_steps": 2,
        "per_device_train_batch_size": 4, "num_generations": 2, "variant": "draft_k", "backprop_steps": 1,
        "lora_rank": 2, "report_to": "none", "prompts": "unused", "learning_rate": 1e-2,
    }  # fmt: skip
    file = folder / "draft.yaml"
    file.write_text(json.dumps(settings))
    return str(file)


def write_prompts(folder: Path) -> dict[str, str]:
    for name, prompts in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    return {"prompts": str(folder / "train.txt"), "held_out": str(folder / "held_out.txt")}


def settings_of(folder: Path, pipeline: str, **changes) -> dict:
    config = write_config(folder, pipeline)
    return {
        "entrants": {
            "red": {"config": config, "note": "more red"},
            "plain": {"config": config, "changes": {"reward": PLAIN}},
            "the judge": {"config": config, "changes": {"reward": JUDGE}, "upper_bound": True},
        },
        "evaluators": {
            "satisfied": {"reward": JUDGE, "term": "satisfied"}, "blue": JUDGE, "redness": REDNESS,
        },
        "output_dir": str(folder / "comparison"), "budget_images": 8, "looks": 2, "agreement_prompts": 0,
        "seeds": [0, 1, 2], "overlay": {"reward": REDNESS}, **write_prompts(folder),
    } | changes  # fmt: skip


def comparison_of(folder: Path, pipeline: str, **changes) -> Comparison:
    return read_comparison(CompareArguments(**settings_of(folder, pipeline, **changes)))


class Figures:
    """Fills a comparison's folder.

    Args:
        gains: entrant -> evaluator -> mean gain at the end; "own" is its own reward's; 0 where nothing is said.
        drawn: entrant -> edges at the end, of the base's.
        noise: standard deviation of each picture's figure around it.
    """

    def __init__(self, comparison: Comparison, gains: dict, drawn: dict | None = None, noise: float = 0.02):
        self.comparison, self.gains, self.drawn, self.noise = comparison, gains, drawn or {}, noise
        claim(comparison)

    def write(self, leave_out: set = frozenset()) -> None:
        for entrant in self.comparison.entrants:
            self._findings(base_findings(self.comparison, entrant), [(Look(None), {}, 1.0)], self.comparison.specs(), 0)
            for seed in self.comparison.arguments.seeds:
                if (entrant.name, seed) not in leave_out:
                    self._training(entrant, seed)

    def _training(self, entrant, seed: int) -> None:
        folder = run_folder(self.comparison, entrant, seed)
        gains = self.gains.get(entrant.name, {})
        by_spec = {one.spec.key: gains.get(one.name, 0.0) for one in self.comparison.evaluators if one.term is None}
        by_term = {(one.spec.key, one.term): gains.get(one.name, 0.0) for one in self.comparison.evaluators}
        if "own" in gains:
            by_term[entrant.spec.key, None] = by_spec[entrant.spec.key] = gains["own"]
        drawn, looks = self.drawn.get(entrant.name, 1.0), []
        for step in (1, 2):
            share = step / 2
            look = Look("unused", step, 4 * step, 3.0 * step)
            looks.append((look, {key: share * value for key, value in by_term.items()}, 1 + share * (drawn - 1)))
        specs = [one.spec for one in self.comparison.evaluators] + [entrant.spec]
        number = 1000 * (seed + 1) + self.comparison.entrants.index(entrant)
        self._findings(run_findings(self.comparison, entrant, seed), looks, list(dict.fromkeys(specs)), number)
        checkpoint = folder / "checkpoint-2"
        checkpoint.mkdir()
        log = [{"kl": 1e-4, "step": 1}, {"kl": 2e-4, "step": 2}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        (checkpoint / "complete.json").write_text(json.dumps({"train_seconds": 6.0, "global_step": 2, "rollouts": 2}))
        crossed = ["drawn"] if drawn < MONITORS["drawn"].limit else []
        RunState({"watch": {"over": [], "crossed": crossed}}).write(checkpoint)

    def _findings(self, file: Path, looks: list, specs: list, number: int) -> None:
        prompts, pictures = self.comparison.held_out, self.comparison.arguments.generations
        rng = np.random.default_rng(number)
        start = np.linspace(0.3, 0.6, len(prompts))[:, None]

        def values(gain: float) -> list:
            return (start + gain + rng.normal(0, self.noise, (len(prompts), pictures))).tolist()

        seen = []
        for look, gains, drawn in looks:
            terms = {spec.key: {""} | {term for key, term in gains if key == spec.key and term} for spec in specs}
            for one in self.comparison.evaluators:
                if one.term and one.spec.key in terms:
                    terms[one.spec.key].add(one.term)
            said = {
                key: {term: values(gains.get((key, term or None), 0.0)) for term in sorted(names)}
                for key, names in terms.items()
            }
            spread = np.full(len(prompts), 0.2).tolist() if pictures > 1 else []
            seen.append(Seen(look, said, spread, np.full((len(prompts), pictures), 0.1 * drawn).tolist()))
        folder = file.with_name("pictures")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(Findings(list(prompts), seen))))
        noise = torch.Generator().manual_seed(number)
        for place in range(len(prompts)):
            to_image(torch.rand(3, 16, 16, generator=noise)).save(folder / f"{place:05}.png")


def write_agreement(comparison: Comparison) -> None:
    """As `finetune.agreement` leaves it."""
    entries = agreement_rewards(comparison)
    names = list(entries)
    figure = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 24}
    table = {one: dict.fromkeys(names, figure) for one in names}
    found = {
        "raters": names, "pictures": 24, "prompts": 6, "within": table, "across": table,
        "accuracy": {names[0]: dict.fromkeys(names[1:], figure)},
        "noise": {change: dict.fromkeys(names, 0.1) for change in ("asked again", "jpeg 95", "1 pixel")},
        "defects": {"smear": dict.fromkeys(names, figure), "wrong prompt": dict.fromkeys(names, figure)},
        "milliseconds": dict.fromkeys(names, 3.0), "chosen": {}, "settings": {"rewards": entries},
    }  # fmt: skip
    file = comparison.folder / AGREEMENT
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
