"""Back-propagation through sampling against DDPO, and what the region constraint saves and costs.

    python benchmarks/draft_proof.py [--seeds N] [--jobs N] [--budget_minutes M] [--quick] [--json FILE]

Runs once a seed: DDPO's demo, back-propagation by its config and with a fifth of the demo's pictures, and
back-propagation with the region constraint. All are compared with the base on the same held-out prompts, the last 192,
and the same noise, by a judge that no training saw. Goals: DDPO's gain with at most a fifth of its pictures; with the
constraint, a third of the change outside the problem regions at most, at no less than 0.9 of the gain.

Parts are kept in `--work`, which `uses.py` shares; what is there is not done again, and seeds that are not complete
yet are left out.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import use_parts
import yaml
from demo_proof import TERMS
from long_runs import Budget, work_folder
from parts import Part, finish, with_needs
from report import Row, flags, publish
from use_drawing import PICTURES, to_images
from use_parts import (
    BASE,
    BY_DDPO,
    DRAFT_K,
    HELD_TO_REGIONS,
    REGION,
    TRAINING,
    VARIANTS,
    add_use_flags,
    by_ddpo,
    by_draft,
    drawing,
    states_of_code,
)

from finetune.paired import paired_interval, paired_ratio
from finetune.region_constraint import place_cost, problem_region
from reward.folder_lock import taken
from reward.rich import RichReward

FIFTH = ("--num_train_epochs", "16")
"""So many updates of 32 pictures see a fifth of those that DDPO's run sees."""
SHORTER = "DRaFT-K, a fifth of DDPO's pictures"


@dataclass(frozen=True)
class Found:
    """What one way of training did, S seeds.

    Attributes:
        gains: of each of the judge's terms, for each seed (P,) by prompt, tuned less base.
        changes: likewise `change_outside`.
        diversity: after, over before.
        pictures: drawn for a training.
    """

    gains: Mapping[str, Sequence[np.ndarray]]
    changes: Sequence[np.ndarray]
    diversity: float
    pictures: int


def plan(seed: int, options: Namespace) -> dict[str, Part]:
    """What the base draws, and what each way's tuned model does."""
    trainings = {
        BY_DDPO: by_ddpo(BY_DDPO, seed, options),
        SHORTER: by_draft(SHORTER, seed, options, *FIFTH),
        DRAFT_K: by_draft(DRAFT_K, seed, options, *VARIANTS[DRAFT_K]),
        HELD_TO_REGIONS: by_draft(HELD_TO_REGIONS, seed, options, config=REGION),
    }
    drawn = {name: drawing(name, seed, options, "plain", tuned) for name, tuned in trainings.items()}
    return {BASE: drawing(BASE, seed, options, "plain"), **drawn}


@torch.no_grad()
def regions(pictures: np.ndarray, captions: Sequence[str], settings: Mapping[str, Any]) -> torch.Tensor:
    """Where the base's pictures have a problem, by the settings of a run with the constraint: (N, 1, 64, 64)."""
    reward, found = RichReward(**settings["reward_kwargs"]), []
    images = to_images(pictures)
    for first in range(0, len(captions), 64):
        rows = slice(first, first + 64)
        penalties = reward(images[rows], captions[rows]).penalties
        cost = place_cost(penalties, images.shape[-2:])
        found.append(problem_region(cost, settings["region_threshold"], settings["region_dilation"]))
    return torch.cat(found)


def change_outside(before: np.ndarray, after: np.ndarray, region: torch.Tensor, generations: int) -> np.ndarray:
    """(P,) how much the pictures of a prompt change outside the problem regions: mean absolute difference there."""
    change = (to_images(after) - to_images(before)).abs().mean(dim=1, keepdim=True)
    outside = (change * (1 - region)).mean(dim=(1, 2, 3)).reshape(-1, generations).mean(dim=1)
    return (outside / (1 - region).mean().clamp(min=1e-8)).numpy()


def pictures_of(part: Part, work: Path) -> np.ndarray:
    """(N, 64, 64, 3) uint8, those of a prompt behind each other."""
    return np.load(part.folder(work) / PICTURES)["pictures"]


def found_of(name: str, plans: Sequence[Mapping[str, Part]], done: Mapping[Part, Mapping[str, Any]],
             bases: Sequence[tuple[np.ndarray, torch.Tensor]], work: Path,
             terms: Sequence[str] = TERMS) -> Found:  # fmt: skip
    """What one way came to.

    Args:
        plans: of the seeds that are complete.
        bases: for each of them the base's pictures and their problem regions.
    """
    drawn = [done[one[name]] for one in plans]
    before = [done[one[BASE]] for one in plans]

    def means(said: Mapping[str, Any], term: str) -> np.ndarray:
        return np.array(said["values"][term]).mean(axis=1)

    spreads = [np.mean([one["diversity"] for one in said]) for said in (drawn, before)]
    trained = [need for need in plans[0][name].needs if need.script == TRAINING]
    return Found(
        {term: [means(new, term) - means(old, term) for new, old in zip(drawn, before, strict=True)]
         for term in terms},
        [change_outside(pictures, pictures_of(one[name], work), region, one[name].how["generations"])
         for one, (pictures, region) in zip(plans, bases, strict=True)],
        float(spreads[0] / spreads[1]),
        sum(done[part]["pictures"] for part in trained),
    )  # fmt: skip


def rows_of(found: Mapping[str, Found]) -> list[Row]:
    """Each way by itself, then what is aimed at."""
    rows, seeds = [], len(found[BY_DDPO].changes)
    for name, one in found.items():
        for figure, gains in one.gains.items():
            rows.append(Row(f"{name}: {figure}, gain", *paired_interval(gains), n=seeds))
        rows.append(Row(f"{name}: change outside the regions", *paired_interval(one.changes), n=seeds))
        rows.append(Row(f"{name}: diversity, after / before", one.diversity))
        rows.append(Row(f"{name}: pictures drawn for training", one.pictures))
    gains = {name: one.gains["satisfied"] for name, one in found.items()}
    rows.append(Row("pictures, a fifth / ddpo", found[SHORTER].pictures / found[BY_DDPO].pictures, goal="<= 0.2"))
    rows.append(Row("gain, a fifth / ddpo", *paired_ratio(gains[SHORTER], gains[BY_DDPO]), seeds, ">= 1"))
    outside = paired_ratio(found[HELD_TO_REGIONS].changes, found[DRAFT_K].changes)
    rows.append(Row("change outside, with / without the constraint", *outside, seeds, "<= 0.3333"))
    kept = paired_ratio(gains[HELD_TO_REGIONS], gains[DRAFT_K])
    rows.append(Row("gain, with / without the constraint", *kept, seeds, ">= 0.9"))
    return rows


def make_parser() -> ArgumentParser:
    parser = flags(__doc__.splitlines()[0])
    add_use_flags(parser)
    return parser


def main() -> None:
    options = make_parser().parse_args()
    if options.quick:
        use_parts.make_quick(options)
    began, work = time.perf_counter(), work_folder(options)
    plans = [plan(seed, options) for seed in range(options.seeds)]
    parts = with_needs([part for one in plans for part in one.values()])
    failures: list[str] = []
    with taken(work):
        done = finish(parts, work, options.jobs, Budget(options.budget_minutes), failures=failures)
    plans = [one for one in plans if all(part in done for part in one.values())]
    if not plans:
        said = [f"no seed is complete yet, {len(done)} of {len(parts)} parts are; run it again, for longer", *failures]
        raise SystemExit("\n".join(said))
    settings = yaml.safe_load(Path(REGION).read_text(encoding="utf-8"))
    bases = []
    for one in plans:
        how, pictures = one[BASE].how, pictures_of(one[BASE], work)
        captions = [prompt for prompt in how["prompts"] for _ in range(how["generations"])]
        bases.append((pictures, regions(pictures, captions, settings)))
    found = {name: found_of(name, plans, done, bases, work) for name in plans[0] if name != BASE}
    satisfied = [np.array(done[one[BASE]]["values"]["satisfied"]) for one in plans]
    share = float(np.mean([region.mean() for _, region in bases]))
    rows = [Row("satisfied, base", float(np.mean(satisfied)), n=sum(one.size for one in satisfied))]
    rows.append(Row("problem regions, share of a picture", share, n=sum(len(region) for _, region in bases)))
    rows += rows_of(found)
    rows.append(Row("states of the code among the parts", states_of_code(done)))
    publish(rows, began, options.json, options.quick)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
