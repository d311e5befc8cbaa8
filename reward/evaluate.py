"""The paper's tables for a checkpoint: scores, both heatmaps, words; beside published figures, ceiling and baselines.

    python -m reward.evaluate --model DIR --data DIR --split test [--out DIR] [--raters DIR] [--group-by COLUMN]

prints the tables as Markdown and writes them to the folder `--out`, with all figures as `report.json`, and with
`report.png`: predicted against true scores, and the best and the worst heatmaps. `--group_by COLUMN` also gives the
figures for each value of a column of the data; `--group_prompts` (a prompt a line) for the pictures of those prompts,
such as compositions held out from training. `--raters` adds the ceiling (see `reward.fresh_raters`) and the predictor's
share of it. What baselines learn, they learn from the data's train split; where there is none, or it is what is
evaluated, only those are given that learn nothing.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Value
from rich.console import Console
from rich.progress import Progress

from reward import keywords
from reward.arguments import main_guard, parse_arguments, read_prompt_file
from reward.baselines import map_baselines, mean_maps
from reward.checks import check_labels, check_place
from reward.data import FeedbackDataset, describe_unread, encode_prompts, load_data, resize, resize_maps, unread_words
from reward.feedback import HEATMAPS, SCORES, RichFeedback
from reward.fresh_raters import FreshRaters, load_fresh_raters
from reward.metrics import map_metrics
from reward.predict import RichFeedbackPredictor, check_finite, choose_device
from reward.report_figure import MapExample, extremes, report_figure, save_png
from reward.tables import (
    Row,
    Said,
    Truth,
    estimates_of,
    figures_of,
    markdown,
    metric_columns,
    notes,
    published_rows,
    row_of,
    share_row,
)
from reward.whole_files import whole_file, write_whole

logger = logging.getLogger(__name__)

MOST_GROUPS = 50


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "folder of a RAHF checkpoint"})
    data: str = field(metadata={"help": "folder written by `python -m reward.richhf`"})
    split: str = field(default="test", metadata={"help": "train, dev or test"})
    out: str | None = field(
        default=None,
        metadata={"help": "folder for tables.md, report.json, report.png; unset: outputs/evaluate/<model>_<split>"},
    )
    json: str | None = field(default=None, metadata={"help": "also write the figures to this file"})
    raters: str | None = field(default=None, metadata={"help": "folder of other raters' records of the same pictures"})
    group_prompts: str | None = field(default=None, metadata={"help": "file of prompts to report apart, one a line"})
    group_by: str | None = field(
        default=None,
        metadata={"help": "column of the data whose values are reported apart, such as one of richhf's --keep_columns"},
    )
    draws: int = field(default=1000, metadata={"help": "of the bootstrap; 0: no intervals"})
    map_size: int | None = field(
        default=None, metadata={"help": "side of the compared maps; unset: the true maps' own"}
    )
    batch_size: int = field(
        default=8, metadata={"help": "pictures the model sees at once; memory and speed depend on it, figures do not"}
    )
    device: str | None = field(
        default=None, metadata={"help": "where the model runs, such as cpu; unset: cuda where there is one"}
    )

    def __post_init__(self):
        for name, least in (("draws", 0), ("map_size", 1), ("batch_size", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return Path(self.out or Path("outputs") / "evaluate" / f"{Path(self.model).resolve().name}_{self.split}")


def compare(
    split: Dataset,
    predictor: RichFeedbackPredictor,
    baselines: Mapping[str, torch.Tensor],
    raters: FreshRaters | None = None,
    map_size: int | None = None,
    batch_size: int = 64,
) -> tuple[dict[str, Said], Truth]:
    """What the predictor, fresh raters and baselines say of every picture of `split`, against its labels.

    Args:
        baselines: name -> (2, h, h), what is said of every picture (see `reward.baselines`); "constant", whether it
            has maps there or not, also gives every picture the same scores, and calls every word misaligned.
        raters: their rows in the order of `split`.
        map_size: side to which all maps are brought; None leaves the true ones as they are (RichHF-18K's: 512).

    Returns:
        "predictor", "ceiling" (with `raters`), each baseline and "constant" -> what it says; and the labels.
    """
    config = predictor.model.config
    dataset = FeedbackDataset(split, config)
    map_rows = defaultdict(lambda: {name: [] for name in HEATMAPS})
    scores, words, true_scores, true_words = [], [], [], []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for start in bar.track(range(0, len(dataset), batch_size), description="pictures"):
            examples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            feedback = predict_examples(predictor, examples)
            scores.append(torch.stack([feedback.scores[name] for name in SCORES], dim=1).cpu().double().numpy())
            words += [(wrong > predictor.word_threshold).int().tolist() for wrong in feedback.misaligned]
            for index, example in enumerate(examples):
                true = example["maps"]
                said = {"predictor": torch.stack([feedback.heatmaps[name][index].cpu() for name in HEATMAPS])}
                if raters is not None:
                    said["ceiling"] = raters.maps(start + index)
                for who, maps in (said | dict(baselines)).items():
                    for name, found in _compare_maps(maps, true, map_size).items():
                        map_rows[who][name].append(found)
                true_scores.append(example["scores"].double().numpy())
                true_words.append(example["labels"])
    read = _read_words(split, predictor)
    true_words, words = (_only(of, read) for of in (true_words, words))
    truth = Truth(np.stack(true_scores), true_words)
    given = {"predictor": (np.concatenate(scores), words if config.words != "none" else None)}
    if raters is not None:
        given["ceiling"] = raters.scores(), _only(raters.words(), read)
    given["constant"] = np.full_like(truth.scores, 0.5), [[1] * len(labels) for labels in true_words]
    maps = {who: {name: metric_columns(rows[name]) for name in HEATMAPS} for who, rows in map_rows.items()}
    return {who: Said(maps.get(who, {}), *given.get(who, (None, None))) for who in maps | given}, truth


def _read_words(split: Dataset, predictor: RichFeedbackPredictor) -> list[list[bool]]:
    """Of each picture, which words of its prompt the predictor sees; the others have no label, as in training. They
    are named in the log."""
    limit = predictor.model.config.max_text_length
    tokens = list(split["tokens"])
    positions = encode_prompts(predictor.tokenizer, tokens, limit)["word_positions"]
    if message := describe_unread(unread_words(tokens, positions), limit):
        logger.warning("%s; they are not counted", message)
    return [[place >= 0 for place in row[: len(words)]] for row, words in zip(positions.tolist(), tokens, strict=True)]


def _only(rows: Sequence[Sequence[int]], read: Sequence[Sequence[bool]]) -> list[list[int]]:
    return [list(compress(words, seen)) for words, seen in zip(rows, read, strict=True)]


def predict_examples(predictor: RichFeedbackPredictor, examples: Sequence[Mapping]) -> RichFeedback:
    """Feedback of examples of `FeedbackDataset`, whose pictures may differ in size, with heatmaps as the model makes
    them (`heatmap_size`).

    Raises:
        ValueError: the model says something that is not finite.
    """
    config = predictor.model.config
    images = torch.cat([resize(example["image"][None], config.input_size) for example in examples])
    prompts = [keywords.join(example["tokens"]) for example in examples]
    with torch.no_grad():
        feedback = predictor(images, prompts, batch_size=len(examples), heatmap_size=config.map_size)
    check_finite(feedback, [f"picture {example['uid']}" for example in examples])
    return feedback


def rows_of(
    said: Mapping[str, Said], truth: Truth, groups: Mapping[str, Sequence[int]], draws: int = 1000
) -> list[Row]:
    """The tables' rows: published figures, the predictor, it on each group, the ceiling and the predictor's share of
    it likewise, the baselines."""
    rows = published_rows()
    found = {
        who: {group: estimates_of(said[who], truth, places, draws) for group, places in groups.items()}
        for who in ("predictor", "ceiling")
        if who in said
    }
    for who, of_groups in found.items():
        rows += [row_of(one, _of_group(who, group), who, group) for group, one in of_groups.items()]
    for group, top in found.get("ceiling", {}).items():
        rows.append(share_row(found["predictor"][group], top, _of_group("of ceiling", group), group))
    for who in said:
        if who not in ("predictor", "ceiling"):
            rows.append(figures_of(said[who], truth, groups["all"], who, "baseline", "all", draws))
    return rows


def groups(split: Dataset, arguments: EvaluateArguments) -> dict[str, list[int]]:
    """Name of a group of pictures -> their places in `split`; always has `all`."""
    found = defaultdict(list, {"all": list(range(len(split)))})
    if arguments.group_prompts is not None:
        listed = {_normal(prompt) for prompt in read_prompt_file(Path(arguments.group_prompts))}
        for index, prompt in enumerate(split["prompt"]):
            found["listed prompts" if _normal(prompt) in listed else "other prompts"].append(index)
        if "listed prompts" not in found:
            raise ValueError(f"no picture of the split has a prompt that is in {arguments.group_prompts}")
    if (column := arguments.group_by) is not None:
        simple = [name for name, kind in split.features.items() if isinstance(kind, Value)]
        if column not in simple:
            why = "is no column of plain values" if column in split.column_names else "is no column of the data"
            raise ValueError(f"cannot group by {column!r}, it {why}; these are: {', '.join(simple)}")
        values = list(split[column])
        if len(set(values)) > MOST_GROUPS:
            raise ValueError(
                f"{column!r} has {len(set(values))} different values; group by a column of at most {MOST_GROUPS}"
            )
        for index, value in enumerate(values):
            found[f"{column} = {value}"].append(index)
    return dict(found)


def map_examples(
    split: Dataset, predictor: RichFeedbackPredictor, said: Said, count: int = 3
) -> dict[str, tuple[list[MapExample], list[MapExample]]]:
    """Name of a heatmap -> the `count` pictures of best and of worst CC, for the report's picture."""
    dataset = FeedbackDataset(split, predictor.model.config)

    def example(place: int, index: int, cc: float) -> MapExample:
        row = dataset[place]
        predicted = predict_examples(predictor, [row]).heatmaps[HEATMAPS[index]][0].cpu()
        return MapExample(row["image"], row["maps"][index], predicted, f"CC {cc:.2f}: {keywords.join(row['tokens'])}")

    return {
        name: tuple(
            [example(place, index, said.maps[name]["cc"][place]) for place in places]
            for places in extremes(said.maps[name]["cc"], count)
        )
        for index, name in enumerate(HEATMAPS)
    }


def _compare_maps(said: torch.Tensor, true: torch.Tensor, size: int | None) -> dict[str, dict[str, float]]:
    """Maps (2, ., .) -> name of the heatmap -> metrics of `said` against `true`."""
    shape = tuple(true.shape[-2:]) if size is None else (size, size)
    said, true = (resize_maps(maps[None].float(), shape)[0].numpy() for maps in (said, true))
    return {name: map_metrics(said[index], true[index]) for index, name in enumerate(HEATMAPS)}


def _of_group(who: str, group: str) -> str:
    return who if group == "all" else f"{who}, {group}"


def _normal(prompt: str) -> str:
    return keywords.join(keywords.tokenize(prompt))


def main(argv: Sequence[str] | None = None) -> dict:
    """The command; prints the tables, writes the report's three files and returns what is in `report.json`."""
    (arguments,) = parse_arguments([EvaluateArguments], argv)
    device = choose_device(arguments.device)
    check_place(arguments.folder, "--out")
    if arguments.json is not None:
        check_place(Path(arguments.json), "--json", folder=False)
    data = load_data(arguments.data)
    if arguments.split not in data:
        raise ValueError(f"{arguments.data} has no split {arguments.split!r}; it has {', '.join(data)}")
    split = data[arguments.split]
    if not len(split):
        raise ValueError(
            f"split {arguments.split!r} of {arguments.data} holds no picture; there is nothing to evaluate"
        )
    check_labels(split, f"{arguments.data}, {arguments.split}")
    members = groups(split, arguments)
    raters = load_fresh_raters(arguments.raters, data, arguments.split) if arguments.raters is not None else None
    predictor = RichFeedbackPredictor.from_pretrained(arguments.model, device)
    learned_from = "train" if arguments.split != "train" and len(data.get("train", ())) else None
    size = predictor.model.config.map_size if arguments.map_size is None else (arguments.map_size,) * 2
    if learned_from is None:
        baselines = {"all zero": torch.zeros(2, *size)}
        why = "that is what is evaluated" if arguments.split == "train" else f"{arguments.data} has no row of one"
        logger.warning("the mean map and other baselines learned from the train split are left out: %s", why)
    else:
        baselines = map_baselines(mean_maps(data[learned_from], size))
    said, truth = compare(split, predictor, baselines, raters, arguments.map_size, arguments.batch_size)
    rows = rows_of(said, truth, members, arguments.draws)
    report = {
        "model": str(arguments.model),
        "data": str(arguments.data),
        "split": arguments.split,
        "raters": arguments.raters,
        "map_size": arguments.map_size,
        "word_threshold": predictor.word_threshold,
        "raters_word_threshold": None if raters is None else raters.threshold,
        "draws": arguments.draws,
        "baselines_learned_from": learned_from,
        "notes": notes(raters is not None, learned_from is not None),
        "rows": [row.as_json() for row in rows],
    }
    text = markdown(rows) + "\n\n" + "".join(f"- {line}\n" for line in report["notes"])
    figures = json.dumps(report, indent=1) + "\n"
    sheet = report_figure(said["predictor"].scores, truth.scores, map_examples(split, predictor, said["predictor"]))
    print(text)
    for path in (arguments.folder / "report.json", *([Path(arguments.json)] if arguments.json is not None else [])):
        write_whole(path, figures.encode())
    write_whole(arguments.folder / "tables.md", text.encode())
    with whole_file(arguments.folder / "report.png") as file:
        save_png(sheet, file)
    print(f"{arguments.folder}: tables.md, report.json, report.png")
    return report


if __name__ == "__main__":
    main_guard(main)
