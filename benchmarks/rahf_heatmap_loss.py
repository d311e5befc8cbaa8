"""What it is worth to count the marked pixels of heatmaps more, where most pixels and many whole maps are empty.

    python benchmarks/rahf_heatmap_loss.py [--data FOLDER] [--model FOLDER] [--steps N] [--quick] [--json FILE]

Data and starting checkpoint come from `python -m tinyworld.build --stages feedback pretraining`. The predictor of
`configs/rahf_tinyworld.yaml` is trained for three epochs with each choice and seed, and judged on the dev split (a
setting is chosen there, the test split stays unseen):

- marked pixels count once (the paper's loss), 3 and 10 times (`heatmap_positive_weight`);
- for comparison the paper's loss with its whole term tripled, since counting marked pixels more also makes the term
  larger beside the others.

Intervals are 95%, over seeds and pictures together; "less the paper's" is paired by seed and picture. CC is over the
pictures whose true map is marked, MSE over all, MSE of empty maps over the others.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from report import Row, flags, publish
from transformers import AutoTokenizer

from finetune.paired import paired_interval
from reward import train
from reward.data import FeedbackCollator, FeedbackDataset
from reward.feedback import HEATMAPS, SCORES
from reward.metrics import map_metrics, score_metrics
from reward.model import RahfModel

ROOT = Path(__file__).parents[1]
PAPER = "the paper's loss"
CHOICES = {
    PAPER: {},
    "marked x 3": {"heatmap_positive_weight": 3},
    "marked x 10": {"heatmap_positive_weight": 10},
    "whole term x 3": {"heatmap_loss_weight": 60},  # the config's is 20
}
METRICS = {"cc": "CC", "mse": "MSE", "mse_empty": "MSE of empty maps"}


def train_once(data: Path, model: str, folder: Path, seed: int, steps: int, settings: dict[str, float]) -> Path:
    """One short training by the real command; returns the folder of its model."""
    settings = {
        "data": data, "model": model, "output_dir": folder, "seed": seed, "max_steps": steps, "panels": 0,
        "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none",
        "warmup_steps": min(100, steps // 5), "disable_tqdm": True, "log_level": "error", "logging_strategy": "no",
        **settings,
    }  # fmt: skip
    config = str(ROOT / "configs" / "rahf_tinyworld.yaml")
    train.main(["--config", config, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return folder


@torch.inference_mode()
def judge(folder: Path, dev) -> tuple[dict[tuple[str, str], np.ndarray], float]:
    """Each picture's value of each metric, keyed (heatmap, metric), and the mean SRCC of the four scores."""
    model = RahfModel.from_pretrained(folder).eval()
    collate = FeedbackCollator(AutoTokenizer.from_pretrained(folder), model.config)
    examples = FeedbackDataset(dev, model.config)
    rows, said, true = {name: [] for name in HEATMAPS}, [], []
    for start in range(0, len(examples), 64):
        batch = collate([examples[index] for index in range(start, min(start + 64, len(examples)))])
        out = model(**batch)
        said.append(out.scores)
        true.append(batch["scores"])
        for index, name in enumerate(HEATMAPS):
            rows[name] += map(map_metrics, out.heatmaps[:, index], batch["heatmaps"][:, index])
    values = {
        (name, metric): np.array([row[metric] for row in rows[name] if metric in row])
        for name in HEATMAPS
        for metric in METRICS
    }
    said, true = torch.cat(said), torch.cat(true)
    return values, float(np.mean([score_metrics(said[:, i], true[:, i])["srcc"] for i in range(len(SCORES))]))


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--data", default="build/tinyworld/feedback", help="rated pictures of the small world")
    parser.add_argument("--model", default="build/tinyworld/rahf_pretrained", help="where every run starts")
    parser.add_argument("--steps", type=int, help="updates of 64 pictures a run (default 470, three epochs)")
    options = parser.parse_args()
    began = time.perf_counter()
    data = train.load_data(options.data)
    steps = options.steps or (20 if options.quick else 470)
    seeds = 1 if options.quick else options.seeds
    found = {choice: [] for choice in CHOICES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.data)
        if options.quick:
            folder = Path(scratch) / "data"
            data = DatasetDict(
                {split: data[split].select(range(min(len(data[split]), 200))) for split in ("train", "dev")}
            )
            data.save_to_disk(str(folder))
        for seed in range(seeds):
            for number, (choice, settings) in enumerate(CHOICES.items()):
                out = train_once(folder, options.model, Path(scratch) / f"{number}-{seed}", seed, steps, settings)
                found[choice].append(judge(out, data["dev"]))
                print(f"seed {seed}, {choice}: {time.perf_counter() - began:.0f} s", flush=True)
    publish(table(found, seeds), began, options.json, options.quick)


def table(found: dict[str, list[tuple[dict[tuple[str, str], np.ndarray], float]]], seeds: int) -> list[Row]:
    """The rows, from what `judge` said of each choice and seed."""
    rows = []
    for name in HEATMAPS:
        for metric, title in METRICS.items():
            for choice, runs in found.items():
                values = [run[0][name, metric] for run in runs]
                if not values[0].size:
                    continue
                rows.append(Row(f"{title} {name}, {choice}", *paired_interval(values), n=values[0].size * seeds))
                if choice != PAPER:
                    less = [one - paper[0][name, metric] for one, paper in zip(values, found[PAPER], strict=True)]
                    title_ = f"{title} {name}, {choice} less the paper's"
                    rows.append(Row(title_, *paired_interval(less), n=values[0].size * seeds))
    for choice, runs in found.items():
        rows.append(Row(f"mean SRCC of the scores, {choice}", float(np.mean([run[1] for run in runs])), n=seeds))
    return rows


if __name__ == "__main__":
    main()
