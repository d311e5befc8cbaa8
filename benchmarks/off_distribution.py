"""Does the predictor still rank pictures as the judge does where it never saw their like - and where is it blind?

    python benchmarks/off_distribution.py [--policies FOLDER ...] [--model FOLDER] [--quick] [--json FILE]

Rank correlation with the judge (not with raters: there is no noise to allow for), score by score, on

- the test split (compositions that are not held out), the measure of the others;
- fine-tuned policies: output folders of `run_ddpo.py` with the base's LoRAs, such as `outputs/ddpo_tinyworld`;
- the generator as no rated picture was drawn: 6 steps, eta 0.5, guidance 3;
- rendered scenes with a planted flaw each, at any strength.

Then, for every kind of flaw that the judge finds, by how much the predicted plausibility is above the judge's, before
and after fine-tuning: where the second is larger, the policy went where the predictor is blind.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from report import Row, flags, publish

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
LEAST = 30  # pictures with a kind of flaw, below which its row is left out


class Judged:
    """Pictures (N, 64, 64, 3) with their captions, the judge's verdicts, and the predictor's feedback."""

    def __init__(self, pictures: np.ndarray, captions: Sequence[str], predictor: RichFeedbackPredictor):
        self.verdicts: list[Verdict] = [judge(*both) for both in zip(pictures, captions, strict=True)]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        self.said: RichFeedback = predictor(images, captions, heatmap_size=1)

    def scores(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What the predictor says, and what is true: (N,) each."""
        return self.said.scores[name].numpy(), np.array([verdict.scores[name] for verdict in self.verdicts])

    def excess(self, kind: str) -> np.ndarray:
        """Predicted less true plausibility of the pictures with that kind of flaw."""
        said, true = self.scores("plausibility")
        return (said - true)[[kind in verdict.flaws for verdict in self.verdicts]]


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
    parser.add_argument("--model", default=str(ASSETS / "rahf"))
    parser.add_argument("--policies", nargs="+", default=[], metavar="FOLDER", help="with LoRAs of the base")
    options = parser.parse_args()
    began, count = time.perf_counter(), QUICK if options.quick else COUNT
    predictor = RichFeedbackPredictor.from_pretrained(options.model)
    base = StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None)

    rated = [row for row in read_pictures(ASSETS / "pickapic" / "test.parquet") if not is_held_out(parse(row[2]))]
    known = Judged(np.stack([picture for _, picture, _ in rated]), [caption for *_, caption in rated], predictor)
    captions = requests(count, seed=31)
    strange = {
        "another way to draw": Judged(
            sample(base, captions, seed=31, steps=6, eta=0.5, guidance=3.0), captions, predictor
        ),
        "planted flaws": Judged(*planted(count, seed=32), predictor),
    }
    drawn = {"base": Judged(sample(base, captions, seed=33), captions, predictor)}
    tuned = []
    for folder in options.policies:
        policy = StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None)
        policy.load_lora_weights(folder)
        tuned.append(Judged(sample(policy, captions, seed=33), captions, predictor))
        strange[f"fine-tuned policy {len(tuned)}"] = tuned[-1]

    table = []
    for name in SCORES:
        said, true = known.scores(name)
        within = figure(None, draws := correlation_draws(said, true, DRAWS)["srcc"], len(true))
        srcc = score_metrics(*map(torch.from_numpy, (said, true)))["srcc"]
        table.append(Row(f"SRCC {name}, test split", srcc, within.low, within.high, len(true)))
        for where, pictures in strange.items():
            theirs = pictures.scores(name)
            ratio = figure(None, correlation_draws(*theirs, DRAWS, seed=1)["srcc"] / draws, len(theirs[0]))
            value = score_metrics(*map(torch.from_numpy, theirs))["srcc"] / srcc
            row = Row(f"SRCC {name}, {where}, of the test split's", value, ratio.low, ratio.high, ratio.n, ">= 0.8")
            table.append(row)
    for kind in KINDS:
        for who, sets in (drawn | {f"fine-tuned policy {number}": one for number, one in enumerate(tuned, 1)}).items():
            excess = sets.excess(kind)
            if len(excess) >= LEAST:
                half = 1.96 * excess.std(ddof=1) / len(excess) ** 0.5
                mean = float(excess.mean())
                name = f"plausibility above the judge's, {kind}, {who}"
                table.append(Row(name, mean, mean - half, mean + half, len(excess)))
    publish(table, began, options.json, options.quick)


if __name__ == "__main__":
    main()
