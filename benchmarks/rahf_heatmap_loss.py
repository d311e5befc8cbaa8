"""What it is worth to count the marked pixels of heatmaps more, where most pixels and many whole maps are empty.

    python benchmarks/rahf_heatmap_loss.py [--data FOLDER] [--model FOLDER] [--steps N] [--jobs N] [--quick]
        [--json FILE]

Data and starting checkpoint come from `python -m tinyworld.build --stages feedback pretraining`. The predictor of
`configs/rahf_tinyworld.yaml` is trained with each choice and seed, by default for 470 updates of 64 pictures (2.1
epochs of the data's 14,000), and judged on the dev split (a setting is chosen there, the test split stays unseen):

- marked pixels count once (the paper's loss), 3 and 10 times (`heatmap_positive_weight`);
- for comparison the paper's loss with its whole term tripled, since counting marked pixels more also makes the term
  larger beside the others.

Intervals are 95%, over seeds and pictures together; "less the paper's" is paired by seed and picture. CC is over the
pictures whose true map is marked, MSE over all, MSE of empty maps over the others. The mean SRCC of the four scores
says what the choice costs them; its interval is Student's, over seeds. A training that is finished (`--work`) is never
repeated.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from long_runs import Budget, add_flags, work_folder
from parts import Part, finish
from report import Row, flags, over_seeds, publish

from finetune.paired import paired_interval
from reward import train
from reward.feedback import HEATMAPS

CONFIG = "configs/rahf_tinyworld.yaml"
PAPER = "the paper's loss"
CHOICES = {
    PAPER: {},
    "marked x 3": {"heatmap_positive_weight": 3},
    "marked x 10": {"heatmap_positive_weight": 10},
    "whole term x 3": {"heatmap_loss_weight": 60},  # the config's is 20
}
METRICS = {"cc": "CC", "mse": "MSE", "mse_empty": "MSE of empty maps"}
STEPS, QUICK_STEPS, QUICK_PICTURES = 470, 20, 200


def few_pictures(data: Path, folder: Path) -> Path:
    """The first pictures of each split that is read, as a data set of its own."""
    if not folder.exists():
        whole = train.load_data(data)
        few = {split: whole[split].select(range(min(len(whole[split]), QUICK_PICTURES))) for split in ("train", "dev")}
        beside = folder.with_name(folder.name + ".part")
        DatasetDict(few).save_to_disk(str(beside))
        beside.rename(folder)
    return folder


def trainings(data: Path, model: Path, seeds: int, steps: int) -> dict[str, list[Part]]:
    """Choice -> its training of each seed."""
    how = {"data": str(data.absolute()), "model": str(model.absolute()), "config": CONFIG, "steps": steps}
    return {
        choice: [
            Part(choice, seed, "heatmap_loss_training.py", how | {"settings": settings}, files=(CONFIG,))
            for seed in range(seeds)
        ]
        for choice, settings in CHOICES.items()
    }


def table(found: Mapping[str, Sequence[Mapping]]) -> list[Row]:
    """The rows, from what `heatmap_loss_training` says of each choice and seed."""
    rows = []
    seeds = len(found[PAPER])
    for name in HEATMAPS:
        for metric, title in METRICS.items():
            values = {choice: [np.array(run["values"][name][metric]) for run in runs] for choice, runs in found.items()}
            count = values[PAPER][0].size * seeds
            if not count:
                continue
            for choice, own in values.items():
                rows.append(Row(f"{title} {name}, {choice}", *paired_interval(own), n=count))
                if choice != PAPER:
                    less = [one - paper for one, paper in zip(own, values[PAPER], strict=True)]
                    rows.append(Row(f"{title} {name}, {choice} less the paper's", *paired_interval(less), n=count))
    for choice, runs in found.items():
        own = np.array([run["srcc"] for run in runs])
        rows.append(Row(f"mean SRCC of the scores, {choice}", *over_seeds(own), n=seeds))
        if choice != PAPER:
            less = own - np.array([run["srcc"] for run in found[PAPER]])
            rows.append(Row(f"mean SRCC of the scores, {choice} less the paper's", *over_seeds(less), n=seeds))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    add_flags(parser, "outputs/rahf_heatmap_loss")
    parser.add_argument("--data", type=Path, default=Path("build/tinyworld/feedback"), help="the small world's ratings")
    parser.add_argument("--model", type=Path, default=Path("build/tinyworld/rahf_pretrained"), help="where all start")
    parser.add_argument("--steps", type=int, help=f"updates of 64 pictures a run (default {STEPS})")
    options = parser.parse_args()
    began, work = time.perf_counter(), work_folder(options)
    steps, seeds, data = options.steps or STEPS, options.seeds, options.data
    if options.quick:
        steps, seeds, data = options.steps or QUICK_STEPS, 1, few_pictures(options.data, work / "data")
    plans = trainings(data, options.model, seeds, steps)
    by_seed = [part for seed in zip(*plans.values(), strict=True) for part in seed]
    done = finish(by_seed, work, options.jobs, Budget(options.budget_minutes))
    complete = [number for number, seed in enumerate(zip(*plans.values(), strict=True)) if done.keys() >= set(seed)]
    if not complete:
        raise SystemExit(f"no seed is complete yet, {len(done)} of {len(by_seed)} trainings are; run it again")
    found = {choice: [done[parts[number]] for number in complete] for choice, parts in plans.items()}
    publish(table(found), began, options.json, options.quick)


if __name__ == "__main__":
    main()
