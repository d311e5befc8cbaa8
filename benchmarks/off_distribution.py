"""Does the predictor still rank pictures as the judge does where it never saw their like - and where is it blind?

    python benchmarks/off_distribution.py [--policies FOLDER ...] [--models FOLDER ...] [--quick] [--json FILE]

Rank correlation with the judge (not with raters: there is no noise to allow for), score by score, on

- the test split (compositions that are not held out), the measure of the others;
- fine-tuned policies: output folders of `run_ddpo.py` with the base's LoRAs, such as `outputs/ddpo_tinyworld`;
- the generator as no rated picture was drawn: 6 steps, eta 0.5, guidance 3;
- rendered scenes with a planted flaw each, at any strength.

Then, for every kind of flaw that the judge finds, by how much the predicted plausibility is above the judge's, before
and after fine-tuning: where the second is larger, the policy went where the predictor is blind.

Intervals are over pictures where one checkpoint is asked. Of several, trained with other seeds, each figure is their
mean, its interval Student's over them.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from report import Row, flags, over_seeds, publish

from reward.feedback import SCORES, RichFeedback
from reward.intervals import correlation_draws, figure
from reward.metrics import score_metrics
from reward.predict import RichFeedbackPredictor
from tinyworld.generator import sample
from tinyworld.grammar import ASSETS, draw_request, is_held_out, parse
from tinyworld.judge import KINDS, Verdict, judge
from tinyworld.rated import read_pictures
from tinyworld.scenes import draw_scene

COUNT, QUICK = 1000, 100
DRAWS = 1000
LEAST_SHARE = ">= 0.8"
LEAST = 30  # pictures with a kind of flaw, below which its row is left out


class Judged:
    """Pictures (N, 64, 64, 3) with their captions, the judge's verdicts, and each predictor's feedback."""

    def __init__(self, pictures: np.ndarray, captions: Sequence[str], predictors: Sequence[RichFeedbackPredictor]):
        self.verdicts: list[Verdict] = [judge(*both) for both in zip(pictures, captions, strict=True)]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        self.said: list[RichFeedback] = [predictor(images, captions, heatmap_size=1) for predictor in predictors]

    def scores(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each predictor what it says, and what is true: (N,) each."""
        true = np.array([verdict.scores[name] for verdict in self.verdicts])
        return [(said.scores[name].numpy(), true) for said in self.said]

    def excess(self, kind: str) -> list[np.ndarray]:
        """For each predictor, predicted less true plausibility of the pictures with that kind of flaw."""
        flawed = [kind in verdict.flaws for verdict in self.verdicts]
        return [(said - true)[flawed] for said, true in self.scores("plausibility")]


def correlation(both: tuple[np.ndarray, np.ndarray]) -> float:
    """Spearman's, of two (N,) arrays."""
    return score_metrics(*map(torch.from_numpy, both))["srcc"]


def score_rows(name: str, known: Judged, strange: Mapping[str, Judged]) -> list[Row]:
    """The correlation of one score on the test split, and what share of it each of `strange` has."""
    own, draws = known.scores(name), None
    within = [correlation(both) for both in own]
    if len(own) == 1:
        draws = correlation_draws(*own[0], DRAWS)["srcc"]
        interval = figure(None, draws, len(own[0][0]))
        table = [Row(f"SRCC {name}, test split", within[0], interval.low, interval.high, interval.n)]
    else:
        table = [Row(f"SRCC {name}, test split", *over_seeds(within), len(own))]
    for where, pictures in strange.items():
        theirs, title = pictures.scores(name), f"SRCC {name}, {where}, of the test split's"
        shares = [correlation(both) / base for both, base in zip(theirs, within, strict=True)]
        if draws is not None:
            ratio = figure(None, correlation_draws(*theirs[0], DRAWS, seed=1)["srcc"] / draws, len(theirs[0][0]))
            table.append(Row(title, shares[0], ratio.low, ratio.high, ratio.n, LEAST_SHARE))
        else:
            table.append(Row(title, *over_seeds(shares), len(shares), LEAST_SHARE))
    return table


def excess_rows(kind: str, drawn: Mapping[str, Judged]) -> list[Row]:
    """By how much the predictors' plausibility is above the judge's where there is a flaw of that kind."""
    table = []
    for who, pictures in drawn.items():
        excess, title = pictures.excess(kind), f"plausibility above the judge's, {kind}, {who}"
        if len(excess[0]) < LEAST:
            continue
        if len(excess) == 1:
            mean, half = float(excess[0].mean()), 1.96 * excess[0].std(ddof=1) / len(excess[0]) ** 0.5
            table.append(Row(title, mean, mean - half, mean + half, len(excess[0])))
        else:
            table.append(Row(title, *over_seeds([float(one.mean()) for one in excess]), len(excess)))
    return table


def requests(count: int, seed: int) -> list[str]:
    """Captions of compositions that are not held out."""
    rng, captions = np.random.default_rng(seed), []
    while len(captions) < count:
        if not is_held_out(request := draw_request(rng)):
            captions.append(str(request))
    return captions


def planted(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Rendered scenes with one flaw each."""
    rng = np.random.default_rng(seed)
    drawn = [draw_scene(rng, flawed=1.0) for _ in range(count)]
    return np.stack([picture for _, picture in drawn]), [str(request) for request, _ in drawn]


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--models", nargs="+", default=[str(ASSETS / "rahf")], metavar="FOLDER")
    parser.add_argument("--policies", nargs="+", default=[], metavar="FOLDER", help="with LoRAs of the base")
    options = parser.parse_args()
    began, count = time.perf_counter(), QUICK if options.quick else COUNT
    predictors = [RichFeedbackPredictor.from_pretrained(folder) for folder in options.models]
    base = StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None)

    rated = [row for row in read_pictures(ASSETS / "pickapic" / "test.parquet") if not is_held_out(parse(row[2]))]
    known = Judged(np.stack([picture for _, picture, _ in rated]), [caption for *_, caption in rated], predictors)
    captions = requests(count, seed=31)
    strange = {
        "another way to draw": Judged(
            sample(base, captions, seed=31, steps=6, eta=0.5, guidance=3.0), captions, predictors
        ),
        "planted flaws": Judged(*planted(count, seed=32), predictors),
    }
    drawn = {"base": Judged(sample(base, captions, seed=33), captions, predictors)}
    for number, folder in enumerate(options.policies, 1):
        policy = StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None)
        policy.load_lora_weights(folder)
        name = f"fine-tuned policy {number}"
        drawn[name] = strange[name] = Judged(sample(policy, captions, seed=33), captions, predictors)

    table = [row for name in SCORES for row in score_rows(name, known, strange)]
    table += [row for kind in KINDS for row in excess_rows(kind, drawn)]
    publish(table, began, options.json, options.quick)


if __name__ == "__main__":
    main()
