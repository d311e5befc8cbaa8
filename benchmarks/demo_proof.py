"""Does the demo's run make the pictures better, to a judge it never saw - and could one have had that for free?

    python benchmarks/demo_proof.py [--quick] [--json FILE] [--seeds N]
    python benchmarks/demo_proof.py --config configs/ddpo_tinyworld_long.yaml --no_controls

Runs the config once a seed and compares before and after on the same held-out prompts and noise. Controls, on the same
prompts: the base at other guidance scales and at 50 steps; the base trained on for as many updates as the run took, as
it was trained last (`tinyworld.generator.finish_generator`), at several rates; and the best of N base pictures by the
trained reward, N such that as many pictures are drawn as the run drew. Runs and pictures that are there already
(`--work`) are not made again; other settings, or another generator or predictor, have other names there.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import StableDiffusionPipeline
from long_runs import assets_digest, digest
from report import Row, flags, publish

from finetune.paired import paired_interval
from reward.arguments import read_prompt_file
from reward.rich import RichReward
from tinyworld.autoencoder import encode
from tinyworld.generator import BATCH, Denoiser, finish_generator, pipeline, sample
from tinyworld.grammar import ASSETS
from tinyworld.judge import KINDS, Verdict, diversity, judge
from tinyworld.pool import FLAWED, make_pool

TERMS = ("satisfied", "overall", "plausibility", "alignment")
GUIDANCE_SCALES = (1.5, 2.0, 3.0, 5.0)
TRAINED_ON_RATES = (1e-5, 1e-4, 1e-3)
GENERATIONS = 2
AIMS = {"ddpo_tinyworld_long": ">= 0.5"}
"""By config: the share of the way to the ceiling that its `satisfied` is to gain."""
UNSEEN = ("--eval_prompts", "", "--eval_rewards", "{}")
"""Flags of a run that does not look at itself before and after."""
SHORT = ("--num_train_epochs", "2", "--save_strategy", "no", *UNSEEN)
"""Flags of a run that proves nothing."""
POOL = 50 * BATCH
"""Pictures that the base is trained on with, each drawn about once in as many updates as the presets have."""


class Proof:
    """One config's runs, and what the judge says of them and of the controls.

    Args:
        prompts: how many of the held-out ones; None: all.
        extra: more flags of the runs.
        command: what runs the config, behind `python`.
    """

    def __init__(
        self,
        config: Path,
        work: Path,
        prompts: int | None,
        extra: Sequence[str] = (),
        command: Sequence[str] = ("run_ddpo.py",),
    ):
        self.config, self.work, self.extra, self.command = config, work, extra, command
        self.settings = yaml.safe_load(config.read_text())
        self.prompts = read_prompt_file(self.settings["eval_prompts"])[:prompts]
        self.captions = [prompt for prompt in self.prompts for _ in range(GENERATIONS)]
        self.base = StableDiffusionPipeline.from_pretrained(self.settings["policy"], safety_checker=None)
        self.steps = int(self.settings.get("num_inference_steps", 10))
        self.key = digest(self.settings, self.prompts, list(extra), list(command), assets_digest())
        self.base_key = digest(self.settings["policy"], self.prompts, self.steps, assets_digest())

    def run(self, seed: int) -> Path:
        """The folder of one seed's run; `finished.json` is written last."""
        folder = self.work / f"seed{seed}-{self.key}"
        if not (folder / "finished.json").exists():
            command = [sys.executable, *self.command, "--config", self.config, "--seed", seed, "--output_dir", folder]
            begun = any(folder.glob("checkpoint-*"))
            command += ["--resume_from_checkpoint", "auto"] if begun else ["--overwrite_output_dir", "true"]
            subprocess.run([*map(str, command), *self.extra], check=True)
        return folder

    def pictures(self, name: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """Two pictures a prompt, (N, 64, 64, 3) uint8, kept in `work` under `name`.

        Args:
            name: "base..." is drawn without the run: it is the same whatever the run's settings.
        """
        file = self.work / f"{name}-{self.base_key if name.startswith('base') else self.key}.npz"
        if not file.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(file.with_suffix(".part.npz"), pictures=draw())
            file.with_suffix(".part.npz").replace(file)
        return np.load(file)["pictures"]

    def verdicts(self, name: str, draw: Callable[[], np.ndarray]) -> list[Verdict]:
        """The judge on these pictures."""
        pictures = self.pictures(name, draw)
        return [judge(picture, caption) for picture, caption in zip(pictures, self.captions, strict=True)]

    def draw(self, pipeline: StableDiffusionPipeline, **how) -> np.ndarray:
        return sample(pipeline, self.captions, seed=1, **({"steps": self.steps} | how))

    def tuned(self, folder: Path) -> StableDiffusionPipeline:
        """The base with a run's LoRA, loaded as any user of diffusers would."""
        pipeline = StableDiffusionPipeline.from_pretrained(self.settings["policy"], safety_checker=None)
        pipeline.load_lora_weights(str(folder))
        return pipeline

    def trained_on(self, updates: int, rate: float) -> StableDiffusionPipeline:
        """The base after `updates` more steps of its own last training, at a rate that falls from `rate` to zero, on
        other pictures of the same kind: half as many flawed ones as it began with."""
        parts = StableDiffusionPipeline.from_pretrained(self.settings["policy"], safety_checker=None)
        pictures, captions = make_pool(self.work / "pool_trained_on", FLAWED / 2, seed=99, count=POOL)
        latents = encode(parts.vae, pictures) * parts.vae.config.scaling_factor
        denoiser = Denoiser(parts.unet, parts.text_encoder)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.pt"
            how = {"steps": updates, "rate": rate, "warmup": 3, "averaging": 0.0}  # warm-up as the run's
            trained = finish_generator(denoiser, parts.tokenizer, latents, captions, state, **how)
        return pipeline(trained, parts.vae, parts.tokenizer)

    def best_of(self, count: int) -> np.ndarray:
        """For each picture wanted, the best by the trained reward of `count` that the base draws."""
        reward = RichReward(**self.settings["reward_kwargs"])
        best, record = None, torch.full((len(self.captions),), -torch.inf)
        for draw in range(count):
            pictures = sample(self.base, self.captions, seed=1000 + draw, steps=self.steps)
            best = pictures.copy() if best is None else best
            for start in range(0, len(pictures), 64):
                rows = slice(start, start + 64)
                images = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float() / 255
                with torch.no_grad():
                    value = reward(images, self.captions[rows]).objective
                better = value > record[rows]
                best[rows][better.numpy()] = pictures[rows][better.numpy()]
                record[rows] = torch.where(better, value, record[rows])
        return best


def term(verdicts: list[Verdict], name: str) -> np.ndarray:
    """(P,) one figure a prompt: the mean over its pictures."""
    values = [float(v.satisfied) if name == "satisfied" else v.scores[name] for v in verdicts]
    return np.array(values).reshape(-1, GENERATIONS).mean(axis=1)


def flawed(verdicts: list[Verdict], kind: str) -> float:
    """The share of pictures with that kind of flaw."""
    return float(np.mean([kind in verdict.flaws for verdict in verdicts]))


def spread_of(verdicts: list[Verdict], generations: int) -> list[float]:
    """For each prompt the judge's `diversity` of its pictures: places and sizes."""
    groups = [verdicts[start : start + generations] for start in range(0, len(verdicts), generations)]
    return [diversity(group) for group in groups]


def spread(verdicts: list[Verdict]) -> float:
    """Mean over prompts of `spread_of`."""
    return float(np.mean(spread_of(verdicts, GENERATIONS)))


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo_tinyworld.yaml"))
    parser.add_argument("--work", type=Path, help="folder of the runs (default outputs/proof/<config>)")
    parser.add_argument("--no_controls", action="store_true", help="compare before and after only")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds = range(1 if options.quick else options.seeds)
    work = options.work or Path("outputs/proof") / (options.config.stem + ("_quick" if options.quick else ""))
    proof = Proof(options.config, work, 32 if options.quick else None, SHORT if options.quick else [])

    base = proof.verdicts("base", lambda: proof.draw(proof.base))
    runs = [proof.run(seed) for seed in seeds]
    after = [
        proof.verdicts(f"after{seed}", lambda folder=folder: proof.draw(proof.tuned(folder)))
        for seed, folder in zip(seeds, runs, strict=True)
    ]
    rows = []
    for name in TERMS:
        rows.append(Row(f"{name}, base", float(term(base, name).mean()), n=len(base)))
        rows.append(Row(f"{name}, after", float(np.mean([term(one, name) for one in after])), n=len(base)))
        gains = [term(one, name) - term(base, name) for one in after]
        goal = "low > 0" if name in ("satisfied", "overall") else None
        rows.append(Row(f"{name}, gain", *paired_interval(gains), n=len(gains), goal=goal))
    gain, low, high = paired_interval([term(one, "satisfied") - term(base, "satisfied") for one in after])
    missing = json.loads((ASSETS / "ceiling.json").read_text())["satisfied"] - float(term(base, "satisfied").mean())
    name = "satisfied, gain as a share of the way to the ceiling"
    rows.append(Row(name, gain / missing, low / missing, high / missing, len(after), AIMS.get(options.config.stem)))
    for kind in KINDS:
        rows.append(Row(f"pictures with a flaw, {kind}, base", flawed(base, kind), n=len(base), goal=">= 0.03"))
        rows.append(Row(f"pictures with a flaw, {kind}, after", float(np.mean([flawed(one, kind) for one in after])),
                        n=len(base)))  # fmt: skip
    ratio = float(np.mean([spread(one) for one in after])) / spread(base)
    rows.append(Row("diversity of layouts, after / before", ratio, n=len(after), goal=">= 0.8"))

    summary = json.loads((runs[0] / "summary.json").read_text())
    drawn = summary["rollouts"] * summary["pictures_per_rollout"]
    scales = GUIDANCE_SCALES[:1] if options.quick else GUIDANCE_SCALES
    controls = {
        f"base, guidance {scale:g}": lambda scale=scale: proof.draw(proof.base, guidance=scale) for scale in scales
    }
    controls["base, 50 steps"] = lambda: proof.draw(proof.base, steps=50)
    updates = summary["updates"]
    for rate in TRAINED_ON_RATES[:1] if options.quick else TRAINED_ON_RATES:
        name = f"base, trained on for {updates} updates at {rate:g}"
        controls[name] = lambda rate=rate: proof.draw(proof.trained_on(updates, rate))
    count = 2 if options.quick else max(2, round(drawn / len(proof.captions)))
    controls[f"best of {count} by the trained reward (as many pictures as the run drew)"] = lambda: proof.best_of(count)
    for name, draw in ({} if options.no_controls else controls).items():
        verdicts = proof.verdicts(name.replace(",", "").replace(" ", "_").split("_(")[0], draw)
        for figure in ("satisfied", "overall"):
            rows.append(Row(f"{figure}, {name}", float(term(verdicts, figure).mean()), n=len(verdicts)))
        rows.append(Row(f"diversity, {name}", spread(verdicts) / spread(base), n=len(verdicts)))
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
