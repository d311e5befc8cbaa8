"""A training of `benchmarks/rahf_heatmap_loss.py`, and how good its heatmaps and scores are.

    python benchmarks/heatmap_loss_training.py FOLDER

What it is told, and where its result goes, says `parts.Task`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import Task
from rahf_heatmap_loss import METRICS
from transformers import AutoTokenizer

from finetune.command_line import as_flags
from reward import train
from reward.data import FeedbackCollator, FeedbackDataset
from reward.feedback import HEATMAPS, SCORES
from reward.metrics import map_metrics, score_metrics
from reward.model import RahfModel


def train_once(task: Task) -> dict[str, Any]:
    """Train by the real command, and judge what came of it on the dev split."""
    steps = task.how["steps"]
    settings = {
        "data": task.how["data"], "model": task.how["model"], "output_dir": task.folder / "rahf", "seed": task.seed,
        "max_steps": steps, "warmup_steps": min(100, steps // 5), "panels": 0, "eval_strategy": "no",
        "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none", "disable_tqdm": True,
        "log_level": "error", "logging_strategy": "no", **task.how["settings"],
    }  # fmt: skip
    train.main(["--config", task.how["config"], *as_flags(settings)])
    return judge(task.folder / "rahf", train.load_data(task.how["data"])["dev"])


@torch.inference_mode()
def judge(folder: Path, dev) -> dict[str, Any]:
    """Of each heatmap each picture's value of each metric, where it has one, and the mean SRCC of the four scores."""
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
        name: {metric: [row[metric] for row in of if metric in row] for metric in METRICS} for name, of in rows.items()
    }
    said, true = torch.cat(said), torch.cat(true)
    srcc = np.mean([score_metrics(said[:, index], true[:, index])["srcc"] for index in range(len(SCORES))])
    return {"values": values, "srcc": float(srcc)}


if __name__ == "__main__":
    task = Task.read(Path(sys.argv[1]))
    task.finish(train_once)
