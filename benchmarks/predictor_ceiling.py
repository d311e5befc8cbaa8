"""How near the small world's predictor comes to the most that its raters' noise allows.

    python benchmarks/predictor_ceiling.py [--model tinyworld/assets/rahf] [--quick] [--json FILE]

On the test split's pictures, those of held-out compositions apart: each metric for the predictor, for the mean of 64
fresh raters (the ceiling), and their ratio. Intervals are over pictures: one checkpoint is asked.
"""

import time

import numpy as np
import torch
from report import Row, flags, publish

from reward.feedback import SCORES
from reward.intervals import correlation_draws
from reward.metrics import heatmap_metrics, score_metrics, word_metrics
from reward.predict import RichFeedbackPredictor
from tinyworld.grammar import ASSETS, is_held_out, parse
from tinyworld.judge import judge
from tinyworld.rated import RATERS, read_pictures
from tinyworld.raters import ceiling, consolidate, rate
from tinyworld.scenes import SIZE

DRAWS = 300
MAP = "implausibility"


def srcc(said: np.ndarray, true: np.ndarray) -> float:
    """Spearman correlation of two (N,) arrays."""
    return score_metrics(torch.from_numpy(said), torch.from_numpy(true))["srcc"]


def interval(said: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the SRCC over pictures."""
    return tuple(np.quantile(correlation_draws(said, true, DRAWS)["srcc"], [0.025, 0.975]))


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--model", default=str(ASSETS / "rahf"))
    options = parser.parse_args()
    began = time.perf_counter()
    rows = list(read_pictures(ASSETS / "pickapic" / "test.parquet"))
    rows = rows[:: 4 if options.quick else 1]
    verdicts = [judge(picture, caption) for _, picture, caption in rows]
    counts = [len(caption.split()) for _, _, caption in rows]
    keyed = [(verdict, words, uid) for verdict, words, (uid, _, _) in zip(verdicts, counts, rows, strict=True)]
    true = [consolidate([rate(*key, rater) for rater in range(RATERS)], SIZE) for key in keyed]
    best = [ceiling(*key, SIZE) for key in keyed]

    predictor = RichFeedbackPredictor.from_pretrained(options.model)
    images = torch.from_numpy(np.stack([picture for _, picture, _ in rows])).permute(0, 3, 1, 2).float() / 255
    captions = [caption for _, _, caption in rows]
    said = predictor(images, captions)
    held_out = np.array([is_held_out(parse(caption)) for caption in captions])

    table = []
    for part, chosen in (("", ~held_out), (", held-out compositions", held_out)):
        places = np.flatnonzero(chosen)
        for name in SCORES:
            truth = np.array([true[place].scores[name] for place in places])
            guess = said.scores[name].numpy()[places]
            top = srcc(np.array([best[place].scores[name] for place in places]), truth)
            low, high = interval(guess, truth)
            table.append(Row(f"SRCC {name}{part}", srcc(guess, truth), low, high, len(places)))
            table.append(Row(f"SRCC {name}{part}, ceiling", top, n=len(places)))
            goal = None if part else ">= 0.75"
            table.append(Row(f"SRCC {name}{part}, of the ceiling", srcc(guess, truth) / top, n=len(places), goal=goal))
        for heatmap in ("implausibility", "misalignment"):
            maps = torch.stack([torch.from_numpy(true[place].maps[heatmap]) for place in places])
            top_maps = torch.stack([torch.from_numpy(best[place].maps[heatmap]) for place in places])
            cc = heatmap_metrics(said.heatmaps[heatmap][places], maps)["cc"]
            top = heatmap_metrics(top_maps, maps)["cc"]
            goal = ">= 0.6" if heatmap == MAP and not part else None
            table.append(Row(f"CC {heatmap}{part}", cc, n=len(places)))
            table.append(Row(f"CC {heatmap}{part}, of the ceiling", cc / top, n=len(places), goal=goal))
        marked = [(said.misaligned[place] > predictor.word_threshold).int().tolist() for place in places]
        f1 = word_metrics(marked, [list(true[place].labels) for place in places])["f1"]
        table.append(Row(f"F1 words{part}", f1, n=len(places)))

    predictor(images[:64], captions[:64])  # warm
    times = []
    for _ in range(5):
        start = time.perf_counter()
        predictor(images[:64], captions[:64])
        times.append(time.perf_counter() - start)
    table.append(Row("seconds for 64 pictures, median of 5", float(np.median(times)), n=64, goal="<= 1.5"))
    publish(table, began, options.json, options.quick)


if __name__ == "__main__":
    main()
