"""A data card: what a person wants to see of rated pictures before training on them.

`README.md` with counts, scores, empty maps and words per prompt; `card_statistics.png`, their histograms; and
`card_examples.png`, twelve random examples with what the raters said drawn over them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from matplotlib.figure import Figure
from PIL import Image

from reward import draw
from reward.feedback import HEATMAPS, SCORES, RichFeedback
from reward.pictures import decode, to_rgb

EXAMPLES = 12
_ACROSS = 3


@dataclass(frozen=True)
class SplitStatistics:
    """What a split holds, N examples.

    Attributes:
        scores: name -> (N,) in [0, 1].
        empty: name of a map -> share of examples in which no rater marked anything; NaN without an example.
        words: (N,) tokens of each prompt.
        misaligned: share of all tokens that are marked as misaligned; NaN without a token.
    """

    scores: Mapping[str, np.ndarray]
    empty: Mapping[str, float]
    words: np.ndarray
    misaligned: float

    def __len__(self) -> int:
        return len(self.words)


def statistics(split: Dataset) -> SplitStatistics:
    """Read a split that `reward.richhf` wrote; pictures are not decoded, maps one by one."""
    scores = {name: np.asarray(split[name][:], dtype=np.float64) for name in SCORES}
    labels = split["keyword_labels"][:]
    total = sum(map(len, labels))
    empty = {}
    for name in HEATMAPS:
        column = f"{name}_map"
        maps = split.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        blank = sum(decode(row[column]["bytes"]).getextrema()[1] == 0 for row in maps)
        empty[name] = blank / len(split) if len(split) else float("nan")
    return SplitStatistics(
        scores=scores,
        empty=empty,
        words=np.array([len(row) for row in labels], dtype=np.int64),
        misaligned=sum(map(sum, labels)) / total if total else float("nan"),
    )


def write_card(data: DatasetDict, folder: Path, report: str, seed: int = 0) -> None:
    """Write the card's three files into `folder`.

    Args:
        report: what was read, joined and dropped, quoted as it is.
        seed: of the random examples, which are drawn from all splits together.
    """
    of_split = {name: statistics(split) for name, split in data.items()}
    _histograms(of_split).savefig(folder / "card_statistics.png", dpi=80)
    chosen = choose_examples({name: len(split) for name, split in data.items()}, seed)
    examples = [(name, data[name][row]) for name, row in chosen]
    example_sheet([(f"{name} {row['uid']}", row) for name, row in examples]).save(folder / "card_examples.png")
    (folder / "README.md").write_text(markdown(of_split, report), encoding="utf-8")


def markdown(of_split: Mapping[str, SplitStatistics], report: str) -> str:
    """The card's text; `of_split` in the order of its tables."""
    parts = of_split.values()
    rows = {
        "examples": [str(len(part)) for part in parts],
        **{f"{name}, mean ± std": [_mean_std(part.scores[name]) for part in parts] for name in SCORES},
        **{f"empty {name} maps": [_share(part.empty[name]) for part in parts] for name in HEATMAPS},
        "words per prompt, median": [_or_dash(np.median, part.words) for part in parts],
        "words per prompt, longest": [_or_dash(np.max, part.words) for part in parts],
        "misaligned words": [_share(part.misaligned) for part in parts],
    }
    table = [["", *of_split], ["---", *["---:"] * len(of_split)], *([name, *cells] for name, cells in rows.items())]
    return "\n".join(
        [
            "# Pictures with rich human feedback",
            "",
            "A `datasets.DatasetDict`: `load_from_disk` reads it. Scores are in [0, 1], higher is better; of keyword"
            " labels, 1 is a misaligned word; maps are 0..255, higher is worse, and stretched to their picture.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            "![score histograms, empty maps, words per prompt](card_statistics.png)",
            "",
            "Random examples: picture, marks of implausibility, marks of misalignment; wrong words are struck out.",
            "",
            "![random examples](card_examples.png)",
            "",
            "What became of the records:",
            "",
            *(f"    {line}" for line in report.splitlines()),
            "",
        ]
    )


def choose_examples(sizes: Mapping[str, int], seed: int) -> list[tuple[str, int]]:
    """Up to `EXAMPLES` different (split, row), each row of all splits as likely as any other."""
    everything = [(name, row) for name, size in sizes.items() for row in range(size)]
    chosen = np.random.default_rng(seed).permutation(len(everything))[:EXAMPLES]
    return [everything[index] for index in sorted(chosen)]


def example_sheet(examples: list[tuple[str, Mapping]]) -> Image.Image:
    """Titled rows of a data set as one RGB image, `_ACROSS` panels a row."""
    panels = []
    for title, row in examples:
        feedback = RichFeedback(
            scores={name: torch.tensor([row[name]]) for name in SCORES},
            heatmaps={name: _tensor(row[f"{name}_map"].convert("L"))[None] for name in HEATMAPS},
            tokens=[row["tokens"]],
            misaligned=[torch.tensor(row["keyword_labels"], dtype=torch.float32)],
        )
        panel = draw.feedback_panel(_tensor(to_rgb(row["image"])).permute(2, 0, 1), feedback, 0)
        panels.append(draw.grid([[draw.caption(title, panel.width)], [panel]]))
    return draw.grid([panels[begin : begin + _ACROSS] for begin in range(0, len(panels), _ACROSS)])


def _histograms(of_split: Mapping[str, SplitStatistics]) -> Figure:
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    filled = {name: part for name, part in of_split.items() if len(part)}

    def histogram(panel, title: str, values: Mapping[str, np.ndarray], bins) -> None:
        for name, of_one in values.items():  # shares, as the splits' sizes differ
            panel.hist(of_one, bins, weights=np.full(len(of_one), 1 / len(of_one)), histtype="step", label=name)
        panel.set(title=title, ylabel="share of examples")
        panel.legend()

    for panel, score in zip(panels, SCORES, strict=False):
        histogram(panel, score, {name: part.scores[score] for name, part in filled.items()}, np.linspace(0, 1, 21))
    longest = max((int(part.words.max()) for part in filled.values()), default=1)
    words = {name: part.words for name, part in filled.items()}
    histogram(panels[4], "words per prompt", words, np.linspace(0.5, longest + 0.5, min(longest, 40) + 1))
    width = 0.8 / max(len(filled), 1)
    for index, (name, part) in enumerate(filled.items()):
        places = [place + width * index for place in range(len(HEATMAPS))]
        panels[5].bar(places, [part.empty[heatmap] for heatmap in HEATMAPS], width, label=name)
    panels[5].set(title="share of empty maps", ylim=(0, 1))
    panels[5].set_xticks([place + 0.4 - width / 2 for place in range(len(HEATMAPS))], HEATMAPS)
    panels[5].legend()
    return figure


def _tensor(image: Image.Image) -> torch.Tensor:
    """An 8-bit image as float32 in [0, 1], (H, W) or (H, W, 3)."""
    return torch.from_numpy(np.array(image)).float() / 255


def _mean_std(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) else "-"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _or_dash(function, values: np.ndarray) -> str:
    return f"{function(values):g}" if len(values) else "-"
