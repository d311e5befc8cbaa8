"""What guidance by predicted feedback is worth to a judge it never saw, over its scale; where it breaks; what it costs.

    python benchmarks/guidance_curve.py [--scales 0.05 0.1 0.2] [--prompts 64] [--seeds N] [--quick] [--json FILE]

One picture for each held-out prompt, without guidance and with it, from the same noise and in as many steps; all other
settings are the config's, and more of `finetune.guide` may follow, but for `--seed` and `--num_generations`. Gains are
those of the judge, over no guidance and from each scale to the next, with intervals over prompts and seeds. The cost is
the processor time of a step, without what a picture costs beside its steps. Pictures that are drawn (`--work`) are not
drawn again.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from long_runs import assets_digest
from report import Row, flags, publish
from tqdm import tqdm
from use_parts import at_least_two

from finetune.fingerprints import code
from finetune.guidance import Guidance
from finetune.guide import GuideArguments, opinions, prepare
from finetune.guided_sampling import sample
from finetune.paired import paired_interval
from finetune.reward_choice import RewardArguments
from reward.arguments import parse_arguments
from reward.predict import read_prompts
from rl.keyed import keyed_generator
from tinyworld.judge import JudgeReward

TERMS = ("overall", "plausibility", "alignment", "satisfied")
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8)
_TIMED = 16  # pictures of the batch whose steps are timed


def settings(words: Sequence[str]) -> tuple[GuideArguments, RewardArguments]:
    """What `finetune.guide` is told.

    Raises:
        SystemExit: it would refuse that; or it wants several pictures of a prompt, or a seed, which are not this
            command's.
    """
    try:
        run, choice = parse_arguments([GuideArguments, RewardArguments], words)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for name, here in (("num_generations", "one picture of each prompt"), ("seed", "several seeds, by --seeds")):
        if (value := getattr(run, name)) != getattr(GuideArguments, name):
            raise SystemExit(f"error: {name} is {value}; leave it out: the curve is of {here}")
    return run, choice


class Curve:
    """One config's pictures at any scale, and what judge and reward say of them."""

    def __init__(self, run: GuideArguments, choice: RewardArguments, prompts: list[str], work: Path):
        self.run, self.prompts, self.work = run, prompts, work
        self.reward, _ = choice.make(run.device, differentiable=True)
        self.pipeline = prepare(run)
        kept = {name: value for name, value in asdict(run).items() if name not in ("output_dir", "seed", "scale")}
        what = json.dumps([kept, asdict(choice), prompts, assets_digest()], default=str)
        self.key = hashlib.sha256(what.encode()).hexdigest()[:12]

    def draw(self, places: range, seed: int, guidance: Guidance | None, steps: int | None = None) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1] for the prompts of `places`; `steps` None: in the config's."""
        return sample(
            self.pipeline,
            [self.prompts[place] for place in places],
            [keyed_generator(seed, "guide", place) for place in places],
            steps or self.run.num_inference_steps,
            self.reward,
            guidance,
            eta=self.run.eta,
            guidance_scale=self.run.guidance_scale,
            negative_prompt=self.run.negative_prompt,
            size=None if self.run.resolution is None else (self.run.resolution, self.run.resolution),
        )

    def said(self, seed: int, scale: float) -> dict[str, np.ndarray]:
        """What is said of a picture for each prompt: `reward`, and the judge's `TERMS`, each (P,); and `code`, which
        state of the toolkit's code drew them, (), left out where it was not noted."""
        file = self.work / f"{self.key}_seed{seed}_scale{scale:g}.npz"
        if not file.exists():
            guidance = replace(self.run.guidance(), scale=scale) if scale else None
            count, parts, made_by = len(self.prompts), [], code()
            for start in range(0, count, self.run.batch_size):
                places = range(start, min(start + self.run.batch_size, count))
                images = self.draw(places, seed, guidance)
                said = opinions(self.reward, {"judge": JudgeReward()}, images, self.prompts[start : places.stop])
                parts.append({"reward": said["reward"]} | {term: said[f"judge.{term}"] for term in TERMS})
            self.work.mkdir(parents=True, exist_ok=True)
            values = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
            np.savez(file.with_suffix(".part.npz"), **values, code=np.array(made_by))
            file.with_suffix(".part.npz").replace(file)
        return dict(np.load(file))

    def milliseconds(self, guidance: Guidance | None) -> float:
        """Processor time of a step and picture: the median of three differences between pictures of the config's steps
        and of twice as many, after one that starts everything. So what is done once a picture, reading the prompt and
        decoding, does not count."""
        places = range(min(_TIMED, len(self.prompts)))
        few = min(self.run.num_inference_steps, self.pipeline.scheduler.config.num_train_timesteps // 2)

        def seconds(steps: int) -> float:
            began = time.process_time()
            self.draw(places, 0, guidance, steps)
            return time.process_time() - began

        more = [seconds(2 * few) - seconds(few) for _ in range(4)]
        return 1000 * float(np.median(more[1:])) / len(places) / few


def table(found: dict[float, list[dict[str, np.ndarray]]], chosen: float) -> list[Row]:
    """Rows of each scale, then of each and the next one, which say whether there is more to gain between them; `found`
    holds, for each scale (0: without guidance), what `Curve.said` for each seed."""
    rows = [Row(f"without: {name}", float(np.mean([one[name] for one in found[0.0]]))) for name in ("reward", *TERMS)]
    broken, scales = None, sorted(scale for scale in found if scale)
    for scale in scales:
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
    for smaller, scale in pairwise(scales):
        for name in ("reward", *TERMS):
            gains = [new[name] - old[name] for old, new in zip(found[smaller], found[scale], strict=True)]
            name = f"from scale {smaller:g} to {scale:g}: {name} gain"
            rows.append(Row(name, *paired_interval(gains), n=sum(map(len, gains))))
    said = [one for runs in found.values() for one in runs]
    rows.append(Row("states of the code among the pictures", states_of_code(said), n=len(said)))
    return rows


def states_of_code(said: Sequence[Mapping[str, np.ndarray]]) -> int:
    """How many states of the code drew what is said; all that did not note theirs count as one."""
    return len({str(one.get("code")) for one in said})


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
        "--prompts",
        type=at_least_two,
        default=64,
        metavar="N",
        help="the last so many of the held-out prompts (default 64)",
    )
    options, extra = parser.parse_known_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    run, choice = settings(["--config", str(options.config), *extra])
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
