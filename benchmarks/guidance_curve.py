"""What guidance by predicted feedback is worth to a judge it never saw, over its scale; where it breaks; what it costs.

    python benchmarks/guidance_curve.py [--scales 0.05 0.1 0.2] [--prompts 64] [--seeds N] [--quick] [--json FILE]

One picture for each held-out prompt, without guidance and with it, from the same noise and in as many steps; all other
settings are the config's, and more of `finetune.guide` may follow. Gains are those of the judge, with intervals over
prompts and seeds. The cost is the processor time of a step. Pictures that are drawn (`--work`) are not drawn again.
"""

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from long_runs import assets_digest
from report import Row, flags, publish
from tqdm import tqdm

from finetune.guidance import Guidance
from finetune.guide import GuideArguments, opinions, prepare
from finetune.guided_sampling import sample
from finetune.paired import paired_interval
from finetune.reward_choice import RewardArguments
from reward.arguments import parse_arguments
from reward.predict import read_prompts
from rl.rollout import keyed_generator
from tinyworld.judge import JudgeReward

TERMS = ("overall", "plausibility", "alignment", "satisfied")
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8)
_TIMED = 16  # pictures of the batch whose steps are timed


class Curve:
    """One config's pictures at any scale, and what judge and reward say of them."""

    def __init__(self, run: GuideArguments, choice: RewardArguments, prompts: list[str], work: Path):
        self.run, self.prompts, self.work = run, prompts, work
        self.reward, _ = choice.make(run.device, differentiable=True)
        self.pipeline = prepare(run)
        kept = {name: value for name, value in asdict(run).items() if name not in ("output_dir", "seed", "scale")}
        what = json.dumps([kept, asdict(choice), prompts, assets_digest()], default=str)
        self.key = hashlib.sha256(what.encode()).hexdigest()[:12]

    def draw(self, places: range, seed: int, guidance: Guidance | None) -> torch.Tensor:
        return sample(
            self.pipeline,
            [self.prompts[place] for place in places],
            [keyed_generator(seed, "guide", place) for place in places],
            self.run.num_inference_steps,
            self.reward,
            guidance,
            eta=self.run.eta,
            guidance_scale=self.run.guidance_scale,
            negative_prompt=self.run.negative_prompt,
        )

    def said(self, seed: int, scale: float) -> dict[str, np.ndarray]:
        """What is said of a picture for each prompt: `reward`, and the judge's `TERMS`, each (P,)."""
        file = self.work / f"{self.key}_seed{seed}_scale{scale:g}.npz"
        if not file.exists():
            guidance = replace(self.run.guidance(), scale=scale) if scale else None
            count, parts = len(self.prompts), []
            for start in range(0, count, self.run.batch_size):
                places = range(start, min(start + self.run.batch_size, count))
                images = self.draw(places, seed, guidance)
                said = opinions(self.reward, {"judge": JudgeReward()}, images, self.prompts[start : places.stop])
                parts.append({"reward": said["reward"]} | {term: said[f"judge.{term}"] for term in TERMS})
            self.work.mkdir(parents=True, exist_ok=True)
            values = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
            np.savez(file.with_suffix(".part.npz"), **values)
            file.with_suffix(".part.npz").replace(file)
        return dict(np.load(file))

    def milliseconds(self, guidance: Guidance | None) -> float:
        """Processor time of a step and picture: the median of three, after one that starts everything."""
        places, times = range(min(_TIMED, len(self.prompts))), []
        for _ in range(4):
            began = time.process_time()
            self.draw(places, 0, guidance)
            times.append(time.process_time() - began)
        return 1000 * float(np.median(times[1:])) / len(places) / self.run.num_inference_steps


def table(found: dict[float, list[dict[str, np.ndarray]]], chosen: float) -> list[Row]:
    """Rows of each scale; `found` holds, for each scale (0: without guidance), what `Curve.said` for each seed."""
    rows = [Row(f"without: {name}", float(np.mean([one[name] for one in found[0.0]]))) for name in ("reward", *TERMS)]
    broken = None
    for scale in sorted(scale for scale in found if scale):
        for name in ("reward", *TERMS):
            gains = [new[name] - old[name] for old, new in zip(found[0.0], found[scale], strict=True)]
            goal = "low > 0" if (scale, name) == (chosen, "overall") else None
            rows.append(
                Row(f"scale {scale:g}: {name} gain", *paired_interval(gains), n=sum(map(len, gains)), goal=goal)
            )
            if name == "overall" and rows[-1].high < 0 and broken is None:
                broken = scale
    if broken is not None:
        rows.append(Row("smallest scale at which the judge's overall falls", broken))
    return rows


def costs(curve: Curve) -> list[Row]:
    """Processor time of a step without guidance, and how many times as long it takes with it."""
    free = curve.milliseconds(None)
    rows = [Row("ms a step and picture, without", free, n=_TIMED)]
    for name, through in (("through the network", True), ("noise estimate constant", False)):
        guidance = replace(curve.run.guidance(), scale=1e-3, first=0, last=None, recurrence=0, through_network=through)
        rows.append(Row(f"the same, guided, {name}: times as long", curve.milliseconds(guidance) / free, n=_TIMED))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/guide_tinyworld.yaml"))
    parser.add_argument("--work", type=Path, default=Path("outputs/guidance_curve"), help="folder of what is drawn")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument(
        "--prompts", type=int, default=64, metavar="N", help="the last so many of the held-out prompts (default 64)"
    )
    options, extra = parser.parse_known_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    run, choice = parse_arguments([GuideArguments, RewardArguments], ["--config", str(options.config), *extra])
    count, seeds, scales = options.prompts, options.seeds, {0.0, run.scale, *options.scales}
    if options.quick:
        count, seeds, scales = 8, 1, {0.0, run.scale}
    curve = Curve(run, choice, read_prompts(run.prompts)[-count:], options.work)  # the first ones chose the scale
    cells = [(scale, seed) for seed in range(seeds) for scale in sorted(scales)]
    said = {cell: curve.said(cell[1], cell[0]) for cell in tqdm(cells)}
    found = {scale: [said[scale, seed] for seed in range(seeds)] for scale in scales}
    publish([*table(found, run.scale), *costs(curve)], began, options.json, options.quick)


if __name__ == "__main__":
    main()
