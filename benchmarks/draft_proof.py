"""Back-propagation through sampling against DDPO, and what the region constraint saves and costs.

    python benchmarks/draft_proof.py [--quick] [--json FILE] [--seeds N]

Runs once a seed: DDPO's demo, back-propagation by its config and with a fifth of the demo's pictures, and
back-propagation with the region constraint. All are compared with the base on the same held-out prompts and noise, by a
judge that no training saw. Goals: DDPO's gain with at most a fifth of its pictures; with the constraint, a third of the
change outside the problem regions at most, at no less than 0.9 of the gain. Runs that are there already (`--work`,
`--ddpo_work`) are not repeated.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_proof import SHORT, TERMS, UNSEEN, Proof, spread, term
from report import Row, flags, publish
from use_training import pictures_of

from finetune.paired import paired_interval, paired_ratio
from finetune.region_constraint import problem_region
from reward.rich import RichReward

DDPO = Path("configs/ddpo_tinyworld.yaml")
FREE = Path("configs/draft_tinyworld.yaml")
HELD = Path("configs/draft_tinyworld_region.yaml")
COMMAND = ("-m", "finetune.draft")
FIFTH = ["--num_train_epochs", "16"]
"""So many updates of 32 pictures see a fifth of those that DDPO's run sees."""


BY_DDPO, SHORTER, UNHELD, HOLDING = "ddpo", "draft, a fifth of the pictures", "draft", "draft, region"


@dataclass(frozen=True)
class Found:
    """What one way of training did, S seeds.

    Attributes:
        gains: of each of the judge's terms, for each seed (P,) by prompt, tuned less base.
        changes: likewise `change_outside`.
        diversity: after, over before.
        pictures: that a training saw.
    """

    gains: Mapping[str, Sequence[np.ndarray]]
    changes: Sequence[np.ndarray]
    diversity: float
    pictures: int


def to_images(pictures: np.ndarray) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def regions(pictures: np.ndarray, captions: list[str], settings: dict) -> torch.Tensor:
    """Where the base's pictures have a problem, by the settings of a run with the constraint: (N, 1, 64, 64)."""
    reward, found = RichReward(**settings["reward_kwargs"]), []
    images = to_images(pictures)
    for first in range(0, len(captions), 64):
        rows = slice(first, first + 64)
        penalties = reward(images[rows], captions[rows]).penalties
        size = images.shape[-2:]
        found.append(problem_region(penalties, size, settings["region_threshold"], settings["region_dilation"]))
    return torch.cat(found)


def change_outside(before: np.ndarray, after: np.ndarray, region: torch.Tensor, generations: int) -> np.ndarray:
    """(P,) how much the pictures of a prompt change outside the problem regions: mean absolute difference there."""
    change = (to_images(after) - to_images(before)).abs().mean(dim=1, keepdim=True)
    outside = (change * (1 - region)).mean(dim=(1, 2, 3)).reshape(-1, generations).mean(dim=1)
    return (outside / (1 - region).mean().clamp(min=1e-8)).numpy()


def rows_of(found: Mapping[str, Found]) -> list[Row]:
    """Each way by itself, then what is aimed at."""
    rows, seeds = [], len(found[BY_DDPO].changes)
    for name, one in found.items():
        for figure, gains in one.gains.items():
            rows.append(Row(f"{name}: {figure}, gain", *paired_interval(gains), n=seeds))
        rows.append(Row(f"{name}: change outside the regions", *paired_interval(one.changes), n=seeds))
        rows.append(Row(f"{name}: diversity, after / before", one.diversity))
        rows.append(Row(f"{name}: pictures trained on", one.pictures))
    gains = {name: one.gains["satisfied"] for name, one in found.items()}
    rows.append(Row("pictures, a fifth / ddpo", found[SHORTER].pictures / found[BY_DDPO].pictures, goal="<= 0.2"))
    rows.append(Row("gain, a fifth / ddpo", *paired_ratio(gains[SHORTER], gains[BY_DDPO]), seeds, ">= 1"))
    outside = paired_ratio(found[HOLDING].changes, found[UNHELD].changes)
    rows.append(Row("change outside, with / without the constraint", *outside, seeds, "<= 0.3333"))
    kept = paired_ratio(gains[HOLDING], gains[UNHELD])
    rows.append(Row("gain, with / without the constraint", *kept, seeds, ">= 0.9"))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/proof"), help="folder of the runs")
    parser.add_argument("--ddpo_work", type=Path, help="folder of demo_proof's runs (default WORK/ddpo_tinyworld)")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds = range(1 if options.quick else options.seeds)
    suffix, prompts = ("_quick", 32) if options.quick else ("", None)

    def proof(config: Path, command: tuple[str, ...], work: Path | None = None, extra: Sequence[str] = ()) -> Proof:
        work = work or options.work / (config.stem + suffix)
        # Its own looks would draw more pictures than a fifth of DDPO's, and nobody reads them here.
        quiet = UNSEEN if command == COMMAND else ()
        return Proof(config, work, prompts, SHORT if options.quick else [*extra, *quiet], command)

    ddpo = proof(DDPO, ("run_ddpo.py",), options.ddpo_work)
    proofs = {
        BY_DDPO: ddpo,
        SHORTER: proof(FREE, COMMAND, extra=FIFTH),
        UNHELD: proof(FREE, COMMAND),
        HOLDING: proof(HELD, COMMAND),
    }

    base = ddpo.verdicts("base", lambda: ddpo.draw(ddpo.base))
    pictures = ddpo.pictures("base", lambda: ddpo.draw(ddpo.base))
    region = regions(pictures, ddpo.captions, proofs[HOLDING].settings)
    generations = len(ddpo.captions) // len(ddpo.prompts)
    found = {}
    for name, one in proofs.items():
        folders = [one.run(seed) for seed in seeds]
        after = {seed: lambda one=one, folder=folder: one.draw(one.tuned(folder))
                 for seed, folder in zip(seeds, folders, strict=True)}  # fmt: skip
        verdicts = [one.verdicts(f"after{seed}", draw) for seed, draw in after.items()]
        new = [one.pictures(f"after{seed}", draw) for seed, draw in after.items()]
        found[name] = Found(
            {figure: [term(told, figure) - term(base, figure) for told in verdicts] for figure in TERMS},
            [change_outside(pictures, picture, region, generations) for picture in new],
            float(np.mean([*map(spread, verdicts)])) / spread(base),
            pictures_of(folders[0]),
        )
    rows = [Row("satisfied, base", float(term(base, "satisfied").mean()), n=len(base))]
    rows.append(Row("problem regions, share of a picture", float(region.mean()), n=len(region)))
    rows += rows_of(found)
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
