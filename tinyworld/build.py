"""Make the small world's assets again, from nothing.

    python -m tinyworld.build [--stages ceiling] [--work build/tinyworld]

Every stage is skipped if its result is there. One that was stopped goes on: trainings of networks from their last
state, pictures with the next file; but each policy, and the RAHF checkpoints, begin anew. Times were measured on 2 CPU
cores with AVX-512, those with a star on one of them; all in all nearly four hours, without `ceiling` and `finer`.

    stage       makes                                                                      minutes
    pictures    200,000 captioned training pictures, half of them with 30% flawed ones        4*
    text        tokenizer and pretrained text encoder                                         2*
    autoencoder the VAE, and the flawed pictures' latents                                    22*
    generator   the U-Net and text encoder, with earlier states for the rated pictures       35
    pretraining the predictor's backbones, by flawless pictures and their captions           23*
    rated       11,300 generated pictures, two a caption, in Pick-a-Pic's format             12 (extrapolated)
    first       three raters' feedback on them, and a first RAHF checkpoint                  11
    policies    three policies, fine-tuned by `run_ddpo.py` to please this predictor         80*
    rated_again 4,000 pictures of theirs beside those of `rated`                              5 (extrapolated)
    feedback    three raters' feedback on all, in RichHF-18K's format, and both joined        8 (busy cores); see below
    predictor   the RAHF checkpoint, by `python -m reward.train`                             13 (extrapolated)
    finishing   the generator of the assets, finished on fewer flawed pictures               12*
    assets      everything above into `tinyworld/assets`, in half precision                   0
    ceiling     the same generator on flawless pictures only, and its figures                48 (as the generator)
    verdicts    the judge's verdicts on the pictures of the assets, which `assets` makes too       5 (busy cores)
    finer       a predictor of twice the resolution, from lessons with planted flaws         90* (a slower core)
    more        `more/feedback`: 28,000 more pictures of the kept generator behind the kept   75* (busy cores)

`verdicts`, `ceiling`, `finer` and `more` are not among the default stages. `--stages feedback` alone makes the rated
data set again from the pictures that the repository keeps, with the judge's verdicts on them: two and a half minutes.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from reward import richhf
from reward.arguments import main_guard, parse_arguments
from reward.model import RahfModel
from tinyworld import rated
from tinyworld.autoencoder import encode, train_autoencoder
from tinyworld.figures import figures_of
from tinyworld.generator import Denoiser, finish_generator, new_unet, pipeline, sample, train_generator
from tinyworld.grammar import ASSETS, draw_request, is_held_out
from tinyworld.lessons import make_lessons
from tinyworld.loop import half_precision
from tinyworld.pool import FLAWED, make_pool
from tinyworld.pretrain import STEPS, make_predictor_tokenizer, pretrain_predictor
from tinyworld.pretrain_on_lessons import pretrain_on_lessons
from tinyworld.rated import Variant
from tinyworld.text import make_tokenizer, new_text_encoder, pretrain_text_encoder

STAGES = (
    *("pictures", "text", "autoencoder", "generator", "pretraining", "rated", "first", "policies", "rated_again"),
    *("feedback", "predictor", "finishing", "assets", "verdicts", "ceiling", "finer", "more"),
)
EXTRA = ("verdicts", "ceiling", "finer", "more")
"""Stages that are run where they are named only."""

CARDS = {
    "sd": "# The small world's generator\n\nDraws captions of coloured shapes, many with flaws.",
    "rahf": "# The small world's predictor\n\nRich feedback on pictures of the small world's generator.",
}
"""Of the models that the repository keeps; they are under its own licence."""

SNAPSHOTS = {"early": 2500, "middle": 4500}
"""States of the generator's training that draw some of the rated pictures, by step."""

DEMO, PREDICTOR = "configs/ddpo_tinyworld.yaml", "configs/rahf_tinyworld.yaml"
FINER = "configs/rahf_tinyworld_finer.yaml"
_APART = ["--share_noise", "none"]  # as they were when the kept pictures were drawn
_FEW_LARGE = ["--num_train_epochs", "24", "--generation_batch_size", "768", "--gradient_accumulation_steps", "24"]
POLICIES = {
    "many_small": [*_APART, "--num_train_epochs", "70", "--seed", "0"],
    "few_large_0": [*_APART, *_FEW_LARGE, "--lr_scheduler_type", "linear", "--seed", "0"],
    "few_large_1": [*_APART, *_FEW_LARGE, "--lr_scheduler_type", "linear", "--seed", "1"],
}
"""Fine-tuned policies that draw some of the rated pictures: what each changes of `DEMO`."""

PROMPTS = {"train": 512, "held_out": 256}
_PICTURE_SEED, _FLAWLESS_SEED, _LESSON_SEED, _PROMPT_SEED, _MORE_SEED = 0, 1, 5, 7, 200


@dataclass
class BuildArguments:
    """What to make, and where."""

    work: str = field(default="build/tinyworld", metadata={"help": "folder for everything in between"})
    stages: list[str] = field(
        default_factory=lambda: [stage for stage in STAGES if stage not in EXTRA],
        metadata={"help": f"which of {', '.join(STAGES)}; all but {', '.join(EXTRA)} by default"},
    )

    pretraining_steps: int = field(
        default=STEPS, metadata={"help": "of the predictor's pretraining; fewer are for trials, not for the assets"}
    )

    def __post_init__(self):
        if unknown := sorted(set(self.stages) - set(STAGES)):
            raise ValueError(f"no such stages: {', '.join(unknown)}; there are {', '.join(STAGES)}")


class Build:
    """The stages, in order; each is a method, and reads what those before it left in `work`."""

    def __init__(self, work: Path, pretraining_steps: int = STEPS):
        self.work, self._pretraining_steps = work, pretraining_steps

    # What the generator is made of --------------------------------------------------------------------------------

    def pictures(self) -> None:
        self._pool(flawed=True)
        self._pool(flawed=False)

    def text(self) -> None:
        tokenizer = make_tokenizer(self.work / "tokenizer")
        self._whole("text_encoder", pretrain_text_encoder(tokenizer, self.work).save_pretrained)

    def autoencoder(self) -> None:
        self._whole("vae", train_autoencoder(*self._pool(flawed=True), self.work).save_pretrained)
        self._latents(flawed=True)

    def generator(self) -> None:
        self._train_generator("generator", flawed=True)

    def finishing(self) -> None:
        """Behind the rated pictures: as with Pick-a-Pic's, earlier models than the one that is tuned drew them."""
        self._finish("generator", flawed=True)

    def ceiling(self) -> None:
        denoiser = self._finish("ceiling", flawed=False)
        parts = pipeline(denoiser, self._vae(), self._tokenizer())
        prompts = (ASSETS / "prompts_held_out.txt").read_text().splitlines()
        figures = figures_of(sample(parts, prompts, seed=0), prompts)
        (ASSETS / "ceiling.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(figures)

    # What the predictor is made of --------------------------------------------------------------------------------

    def rated(self) -> None:
        self._draw(None, self.work / "pickapic_first")

    def first(self) -> None:
        self._rate(self.work / "pickapic_first", self.work / "first")
        self._train_predictor(self.work / "first" / "feedback", self.work / "first" / "rahf")

    def policies(self) -> None:
        self._save_pipeline("final", "sd_first")
        base = self.work / "sd_first"
        reward = yaml.safe_load(Path(DEMO).read_text())["reward_kwargs"] | {"model": str(self.work / "first" / "rahf")}
        for name, settings in POLICIES.items():
            if not (self.work / "policies" / name).exists():
                beside = self.work / "policies" / f"{name}.part"
                places = ["--policy", base, "--reward_kwargs", json.dumps(reward), "--output_dir", beside]
                command = ["run_ddpo.py", "--config", DEMO, *settings, *places, "--overwrite_output_dir", "true"]
                subprocess.run([sys.executable, *map(str, command)], check=True)
                beside.rename(self.work / "policies" / name)

    def rated_again(self) -> None:
        self._draw(self.work / "pickapic_first", self.work / "pickapic")

    def feedback(self) -> None:
        """From the pictures just drawn, or from those that the repository keeps, with the judge's verdicts on them."""
        drawn = self.work / "pickapic"
        if drawn.exists():
            self._rate(drawn, self.work)
        else:
            self._rate(ASSETS / "pickapic", self.work, ASSETS / "verdicts")

    def pretraining(self) -> None:
        model = pretrain_predictor(*self._pool(flawed=False), self.work, self._pretraining_steps)
        self._save_pretrained("rahf_pretrained", model)

    def predictor(self) -> None:
        self._train_predictor(self.work / "feedback", self.work / "rahf")

    def finer(self) -> None:
        lessons = make_lessons(self.work / "lessons", _LESSON_SEED)
        self._save_pretrained("rahf_finer_pretrained", pretrain_on_lessons(lessons, self.work))
        self._train_predictor(self.work / "feedback", self.work / "rahf_finer", FINER, "rahf_finer_pretrained")

    def more(self) -> None:
        """Dev and test split stay as they are."""
        folder = self.work / "more"
        for number, split in enumerate(rated.MORE):
            name = f"more_{number}"
            if not (folder / "drawn" / f"{name}.parquet").exists():
                captions = rated.draw_captions(split, seed := _MORE_SEED + number)
                pictures = rated.draw_pictures(captions, split.variants, _kept_generator, seed)
                rated.write_pictures(name, captions, pictures, folder / "part")
                (folder / "drawn").mkdir(exist_ok=True)
                (folder / "part" / f"{name}.parquet").replace(folder / "drawn" / f"{name}.parquet")
        shutil.rmtree(folder / "pickapic", ignore_errors=True)
        shutil.copytree(ASSETS / "pickapic", folder / "pickapic")
        files = [ASSETS / "pickapic" / "train.parquet", *sorted((folder / "drawn").iterdir())]
        pyarrow.parquet.write_table(
            pa.concat_tables(map(pyarrow.parquet.read_table, files)), folder / "pickapic" / "train.parquet"
        )
        self._rate(folder / "pickapic", folder, ASSETS / "verdicts")

    # What the repository keeps ------------------------------------------------------------------------------------

    def assets(self) -> None:
        self._save_pipeline("finished", "sd")
        shutil.rmtree(ASSETS / "sd", ignore_errors=True)
        shutil.copytree(self.work / "sd", ASSETS / "sd")
        shutil.rmtree(ASSETS / "pickapic", ignore_errors=True)
        shutil.copytree(self.work / "pickapic", ASSETS / "pickapic")
        self.verdicts()
        shutil.rmtree(ASSETS / "rahf", ignore_errors=True)
        keep_predictor(self.work / "rahf", ASSETS / "rahf")
        for name, what in CARDS.items():
            (ASSETS / name / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n\n{what}\n")
        for name, prompts in draw_prompts().items():
            (ASSETS / f"prompts_{name}.txt").write_text("\n".join(prompts) + "\n")

    def verdicts(self) -> None:
        """The judge's, on the pictures that the repository keeps."""
        rated.judge_all(ASSETS / "pickapic", ASSETS / "verdicts")

    # Parts --------------------------------------------------------------------------------------------------------

    def _save_pipeline(self, checkpoint: str, name: str) -> None:
        def save(folder: Path) -> None:
            parts = self._checkpoint(checkpoint).to(torch.float16)
            # transformers loads what is stored, diffusers float32: in half precision the two would not fit together.
            parts.text_encoder.to(torch.float32)
            parts.save_pretrained(folder)
            for name in ("vocab.json", "merges.txt"):  # older libraries read these
                shutil.copy(self.work / "tokenizer" / name, folder / "tokenizer" / name)
            for file in folder.glob("*/config.json"):  # where this machine had it is nobody's business
                settings = json.loads(file.read_text())
                settings.pop("_name_or_path", None)
                file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

        self._whole(name, save)

    def _draw(self, known: Path | None, folder: Path) -> None:
        """Draw pictures in Pick-a-Pic's format: by the generator's variants, or its policies' behind those `known`."""
        beside = Path(f"{folder}.part")
        for name in rated.split_names():
            if (folder / f"{name}.parquet").exists():
                continue
            rows = [] if known is None else list(rated.read_pictures(known / f"{name}.parquet"))
            captions, pictures = [caption for *_, caption in rows[::2]], [picture for _, picture, _ in rows]
            for number, split in enumerate(rated.SPLITS, start=100):
                if split.name == name and (split.variants is rated.VARIANTS) == (known is None):
                    captions += (drawn := rated.draw_captions(split, number))
                    pictures += list(rated.draw_pictures(drawn, split.variants, self._variant, number))
            rated.write_pictures(name, captions, np.stack(pictures), beside)
            folder.mkdir(exist_ok=True)
            (beside / f"{name}.parquet").replace(folder / f"{name}.parquet")

    def _rate(self, pickapic: Path, folder: Path, verdicts: Path | None = None) -> None:
        """Three raters' feedback on the pictures of `pickapic`, and both joined: `folder`/rated, `folder`/feedback."""
        rated.rate_all(pickapic, folder / "rated", verdicts)
        shutil.rmtree(folder / "feedback", ignore_errors=True)
        places = {"--tfrecords": folder / "rated", "--images": pickapic, "--out": folder / "feedback"}
        richhf.main([str(word) for place in places.items() for word in place])

    def _save_pretrained(self, name: str, model: RahfModel) -> None:
        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            make_predictor_tokenizer().save_pretrained(folder)

        self._whole(name, save)

    def _train_predictor(
        self, data: Path, output: Path, config: str = PREDICTOR, start: str = "rahf_pretrained"
    ) -> None:
        settings = ["--config", config, "--overwrite_output_dir", "true"]
        places = ["--model", self.work / start, "--data", data, "--output_dir", output]
        subprocess.run([sys.executable, "-m", "reward.train", *map(str, [*settings, *places])], check=True)

    def _whole(self, name: str, save: Callable[[Path], object]) -> None:
        """Save a folder beside its place and move it there, so that it is whole if it is there."""
        beside = self.work / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        save(beside)
        shutil.rmtree(self.work / name, ignore_errors=True)
        beside.rename(self.work / name)

    def _pool(self, flawed: bool) -> tuple[np.ndarray, list[str]]:
        if flawed:
            return make_pool(self.work / "pool", FLAWED, _PICTURE_SEED)
        return make_pool(self.work / "pool_flawless", 0.0, _FLAWLESS_SEED)

    def _latents(self, flawed: bool) -> torch.Tensor:
        """(N, 4, 16, 16) float16, scaled."""
        file = self.work / ("pool" if flawed else "pool_flawless") / "latents.safetensors"
        if not file.exists():
            pictures, _ = self._pool(flawed)
            vae = self._vae()
            with half_precision():
                chunks = [encode(vae, pictures[i : i + 1000]).half() for i in range(0, len(pictures), 1000)]
            latents = (torch.cat(chunks) * vae.config.scaling_factor).contiguous()
            save_file({"latents": latents}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return load_file(file)["latents"]

    def _vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.work / "vae").eval().requires_grad_(False)

    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.work / "tokenizer")

    def _train_generator(self, name: str, flawed: bool) -> Denoiser:
        def report(step: int, average: Denoiser) -> dict:
            for snapshot, at in SNAPSHOTS.items():
                if step == at:
                    _save_half(average, self.work / f"{name}_{snapshot}.safetensors")
            return self._figures(average)

        _, captions = self._pool(flawed)
        text_encoder = CLIPTextModel.from_pretrained(self.work / "text_encoder")
        latents, path = self._latents(flawed), self.work / f"{name}.pt"
        denoiser = train_generator(text_encoder, self._tokenizer(), latents, captions, path, report=report)
        _save_half(denoiser, self.work / f"{name}_final.safetensors")
        return denoiser

    def _finish(self, name: str, flawed: bool) -> Denoiser:
        """On half as many flawed pictures: from the two pools in equal parts. The ceiling sees none at all."""
        denoiser = self._train_generator(name, flawed)
        pools = (flawed, False) if flawed else (False,)
        latents = torch.cat([self._latents(pool) for pool in pools])
        captions = [caption for pool in pools for caption in self._pool(pool)[1]]
        path = self.work / f"{name}_finished.pt"

        def report(step: int, average: Denoiser) -> dict:
            return self._figures(average)

        denoiser = finish_generator(denoiser, self._tokenizer(), latents, captions, path, report=report)
        _save_half(denoiser, path.with_suffix(".safetensors"))
        return denoiser

    def _figures(self, denoiser: Denoiser) -> dict:
        """The judge's, of a picture for each of 128 held-out prompts."""
        prompts = draw_prompts()["held_out"][:128]
        return figures_of(sample(pipeline(denoiser.eval(), self._vae(), self._tokenizer()), prompts, seed=0), prompts)

    def _variant(self, variant: Variant) -> StableDiffusionPipeline:
        parts = self._checkpoint(variant.checkpoint)
        if variant.policy is not None:
            parts.load_lora_weights(self.work / "policies" / variant.policy)
        return parts

    def _checkpoint(self, name: str) -> StableDiffusionPipeline:
        """The pipeline with a state of the generator's training: early, middle or final."""
        tokenizer = self._tokenizer()
        denoiser = Denoiser(new_unet(), new_text_encoder(tokenizer))
        weights = load_file(self.work / f"generator_{name}.safetensors")
        denoiser.load_state_dict({key: value.float() for key, value in weights.items()})
        return pipeline(denoiser.eval(), self._vae(), tokenizer)


def draw_prompts() -> dict[str, list[str]]:
    """Prompts for fine-tuning, and held-out ones to judge it by; all different."""
    rng = np.random.default_rng(_PROMPT_SEED)
    prompts: dict[str, dict[str, None]] = {name: {} for name in PROMPTS}
    while any(len(prompts[name]) < count for name, count in PROMPTS.items()):
        request = draw_request(rng)
        name = "held_out" if is_held_out(request) else "train"
        if len(prompts[name]) < PROMPTS[name]:
            prompts[name][str(request)] = None
    return {name: list(chosen) for name, chosen in prompts.items()}


def _kept_generator(_: Variant) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None)


def keep_predictor(source: Path, target: Path) -> None:
    """Copy a RAHF checkpoint without its training state, weights in half precision."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and file.is_file() and not file.name.startswith("trainer"):
            shutil.copy(file, target / file.name)
    weights = load_file(source / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, target / "model.safetensors", {"format": "pt"})


def _save_half(module: torch.nn.Module, file: Path) -> None:
    state = {name: value.half().contiguous() for name, value in module.state_dict().items()}
    save_file(state, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    (arguments,) = parse_arguments([BuildArguments], argv)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    build = Build(work, arguments.pretraining_steps)
    for stage in STAGES:
        done = work / f"{stage}.done"
        if stage not in arguments.stages or done.exists():
            continue
        print(f"== {stage}", flush=True)
        getattr(build, stage)()
        done.touch()


if __name__ == "__main__":
    main_guard(main)
