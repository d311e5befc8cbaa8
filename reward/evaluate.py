"""The paper's tables for a checkpoint: scores, both heatmaps, words, beside baselines that look at nothing.

    python -m reward.evaluate --model DIR --data DIR --split test [--json FILE] [--group_prompts FILE]

prints Markdown. `--group_prompts` (a prompt a line) reports the pictures of those prompts apart from the rest, such as
compositions held out from training; `--group_by COLUMN` does the same for the values of a column of the data.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from reward import keywords
from reward.arguments import main_guard, parse_arguments, read_prompt_file
from reward.data import FeedbackCollator, FeedbackDataset, resize_maps
from reward.feedback import HEATMAPS, SCORES
from reward.metrics import average_map_metrics, map_metrics, score_metrics, word_metrics
from reward.predict import RichFeedbackPredictor
from reward.train import load_data

_MAP_METRICS = ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd")
_HEADINGS = ("MSE all", "MSE GT=0", "CC", "KLD", "SIM", "NSS", "AUC-Judd")


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "folder of a RAHF checkpoint"})
    data: str = field(metadata={"help": "folder written by `python -m reward.richhf`"})
    split: str = field(default="test", metadata={"help": "train, dev or test"})
    json: str | None = field(default=None, metadata={"help": "also write the figures to this file"})
    group_prompts: str | None = field(default=None, metadata={"help": "file of prompts to report apart, one a line"})
    group_by: str | None = field(default=None, metadata={"help": "column of the data whose values are reported apart"})
    map_size: int | None = field(
        default=None, metadata={"help": "side of the compared maps; unset: the true maps' own"}
    )
    batch_size: int = field(default=64, metadata={"help": "pictures the model sees at once"})
    device: str = field(default="cpu", metadata={"help": "where the model runs, such as cuda"})


@dataclass(frozen=True)
class Judged:
    """One picture's prediction beside the truth.

    Attributes:
        scores: predicted and true, each (4,).
        maps: name of a heatmap -> what `map_metrics` says of it.
        words: predicted and true labels, 1 = misaligned, of the words that the model saw; other words are predicted 0.
        baselines: name of a baseline map ("all zero", "mean map") -> name of a heatmap -> `map_metrics`.
    """

    scores: tuple[np.ndarray, np.ndarray]
    maps: Mapping[str, dict[str, float]]
    words: tuple[list[int], list[int]]
    baselines: Mapping[str, Mapping[str, dict[str, float]]]


def judge(
    predictor: RichFeedbackPredictor,
    split: Dataset,
    mean_maps: torch.Tensor,
    map_size: int | None = None,
    batch_size: int = 64,
) -> list[Judged]:
    """Predict every picture of `split` and compare it with its ratings, map by map.

    Args:
        mean_maps: (2, h, h), the baseline that predicts the same for every picture.
        map_size: side to which predicted and true maps are brought; None leaves the true ones as they are.
    """
    config = predictor.model.config
    dataset, collate = FeedbackDataset(split, config), FeedbackCollator(predictor.tokenizer, config)
    judged = []
    for start in range(0, len(dataset), batch_size):
        examples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: value.to(predictor.device) for name, value in collate(examples).items()}
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "word_positions")}
        with torch.no_grad():
            out = predictor.model(**inputs)
        wrong = _wrong_words(out.word_logits, batch["word_positions"], predictor.word_threshold)
        for index, example in enumerate(examples):
            maps, baselines = _compare_maps(out.heatmaps[index].float().cpu(), example["maps"], mean_maps, map_size)
            words = wrong[index].tolist()[: len(example["labels"])]
            scores = (out.scores[index].float().cpu().numpy(), example["scores"].numpy())
            judged.append(Judged(scores, maps, (words, example["labels"]), baselines))
    return judged


def summarise(judged: Sequence[Judged]) -> dict:
    """The paper's metrics over pictures: `n`, `scores`, `heatmaps`, `words`."""
    predicted, true = (np.stack([picture.scores[side] for picture in judged]) for side in (0, 1))
    return {
        "n": len(judged),
        "scores": {name: score_metrics(predicted[:, i], true[:, i]) for i, name in enumerate(SCORES)},
        "heatmaps": {name: average_map_metrics([picture.maps[name] for picture in judged]) for name in HEATMAPS},
        "words": word_metrics([picture.words[0] for picture in judged], [picture.words[1] for picture in judged]),
    }


def summarise_baselines(judged: Sequence[Judged]) -> dict:
    """What one gets without looking: maps that are all zero or the mean map; every word called misaligned."""
    heatmaps = {
        baseline: {
            name: average_map_metrics([picture.baselines[baseline][name] for picture in judged]) for name in HEATMAPS
        }
        for baseline in judged[0].baselines
    }
    true = [picture.words[1] for picture in judged]
    return {"heatmaps": heatmaps, "words": {"every word": word_metrics([[1] * len(labels) for labels in true], true)}}


def mean_maps(split: Dataset, size: int) -> torch.Tensor:
    """(2, size, size), the mean heatmaps of a split, in the order of `HEATMAPS`."""
    columns = split.select_columns([f"{name}_map" for name in HEATMAPS])
    total = torch.zeros(2, size, size, dtype=torch.float64)
    for row in columns:
        maps = [torch.from_numpy(np.array(row[f"{name}_map"].convert("L"))).float() / 255 for name in HEATMAPS]
        total += torch.stack([resize_maps(heatmap[None, None], size)[0, 0] for heatmap in maps])
    return (total / max(len(columns), 1)).float()


def groups(split: Dataset, arguments: EvaluateArguments) -> dict[str, list[int]]:
    """Name of a group of pictures -> their places in `split`; always has `all`."""
    found = defaultdict(list, {"all": list(range(len(split)))})
    if arguments.group_prompts is not None:
        listed = {_normal(prompt) for prompt in read_prompt_file(Path(arguments.group_prompts))}
        for index, prompt in enumerate(split["prompt"]):
            found["listed prompts" if _normal(prompt) in listed else "other prompts"].append(index)
        if "listed prompts" not in found:
            raise ValueError(f"no picture of the split has a prompt that is in {arguments.group_prompts}")
    if arguments.group_by is not None:
        if arguments.group_by not in split.column_names:
            raise ValueError(f"the data have no column {arguments.group_by!r}; they have {split.column_names}")
        for index, value in enumerate(split[arguments.group_by]):
            found[f"{arguments.group_by} = {value}"].append(index)
    return dict(found)


def markdown(report: Mapping) -> str:
    """The report of `main` as tables."""
    lines = ["| scores, PLCC / SRCC | n | " + " | ".join(SCORES) + " |", "|---" * (2 + len(SCORES)) + "|"]
    for group, found in report["groups"].items():
        cells = [f"{found['scores'][name]['plcc']:.3f} / {found['scores'][name]['srcc']:.3f}" for name in SCORES]
        lines.append(f"| {group} | {found['n']} | " + " | ".join(cells) + " |")
    lines.append("| any constant | | " + " | ".join(["0 / 0"] * len(SCORES)) + " |")
    for name in HEATMAPS:
        rows = {group: found["heatmaps"][name] for group, found in report["groups"].items()}
        rows |= {baseline: found[name] for baseline, found in report["baselines"]["heatmaps"].items()}
        lines += ["", f"| {name} heatmap | " + " | ".join(_HEADINGS) + " |", "|---" * (1 + len(_HEADINGS)) + "|"]
        for group, found in rows.items():
            digits = [f"{found[metric]:.{5 if metric.startswith('mse') else 3}f}" for metric in _MAP_METRICS]
            lines.append(f"| {group} | " + " | ".join(digits) + " |")
    rows = {group: found["words"] for group, found in report["groups"].items()} | report["baselines"]["words"]
    lines += ["", "| misaligned words | precision | recall | F1 |", "|---|---|---|---|"]
    for group, found in rows.items():
        lines.append(
            f"| {group} | " + " | ".join(f"{100 * found[m]:.1f}" for m in ("precision", "recall", "f1")) + " |"
        )
    return "\n".join(lines)


def _wrong_words(logits: torch.Tensor | None, positions: torch.Tensor, threshold: float) -> torch.Tensor:
    """(B, T) int64, 1 where a word that the model saw is called misaligned."""
    if logits is None:
        return torch.zeros_like(positions)
    return ((logits.float().sigmoid() > threshold) & (positions >= 0)).long().cpu()


def _compare_maps(predicted: torch.Tensor, true: torch.Tensor, mean: torch.Tensor, size: int | None):
    """Maps (2, ., .) -> metrics of the prediction, and of each baseline, by the heatmap's name."""
    size = size or max(true.shape[-2:])
    predicted, true, mean = (resize_maps(maps[None], size)[0].numpy() for maps in (predicted, true, mean))
    baselines = {"all zero": np.zeros_like(mean), "mean map": mean}
    return {name: map_metrics(predicted[i], true[i]) for i, name in enumerate(HEATMAPS)}, {
        baseline: {name: map_metrics(maps[i], true[i]) for i, name in enumerate(HEATMAPS)}
        for baseline, maps in baselines.items()
    }


def _normal(prompt: str) -> str:
    return keywords.join(keywords.tokenize(prompt))


def main(argv: Sequence[str] | None = None) -> dict:
    """The command; prints the tables and returns the report."""
    (arguments,) = parse_arguments([EvaluateArguments], argv)
    data = load_data(arguments.data)
    if arguments.split not in data:
        raise ValueError(f"{arguments.data} has no split {arguments.split!r}; it has {', '.join(data)}")
    split = data[arguments.split]
    members = groups(split, arguments)
    predictor = RichFeedbackPredictor.from_pretrained(arguments.model, arguments.device)
    size = arguments.map_size or predictor.model.config.heatmap_size
    mean = mean_maps(data.get("train", split), size)
    judged = judge(predictor, split, mean, arguments.map_size, arguments.batch_size)
    report = {
        "model": str(arguments.model),
        "split": arguments.split,
        "map_size": arguments.map_size,
        "word_threshold": predictor.word_threshold,
        "groups": {name: summarise([judged[index] for index in places]) for name, places in members.items()},
        "baselines": summarise_baselines(judged),
    }
    print(markdown(report))
    if arguments.json is not None:
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(json.dumps(report, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    return report


if __name__ == "__main__":
    main_guard(main)
