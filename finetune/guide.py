"""Pictures guided by predicted feedback while they are sampled, beside the same pictures without guidance.

    python -m finetune.guide --config configs/guide_tinyworld.yaml [--any_setting value]

Writes to `output_dir`: the pictures in `without/` and `with/`, `results.jsonl` (a line a picture: prompt, what the
rewards say of both, seconds a step), `sheet.png` and `summary.json`. The same command goes on where it was stopped.

A YAML names code (`reward: package.module:Attribute`): run only those you trust.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from rich.console import Console
from tqdm.auto import tqdm

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.fingerprints import weights_of  # noqa: E402
from finetune.guidance import NORMS, SCHEDULERS, SCHEDULES, Guidance, make_scheduler  # noqa: E402
from finetune.guided_sampling import guided_path, sample  # noqa: E402
from finetune.results import SUMMARY, Results, change_table, changes  # noqa: E402
from finetune.reward_choice import RewardArguments  # noqa: E402
from reward.arguments import main_guard, parse_arguments  # noqa: E402
from reward.data import to_tensor  # noqa: E402
from reward.draw import to_image  # noqa: E402
from reward.feedback import RewardFn  # noqa: E402
from reward.pictures import decode as decode_picture  # noqa: E402
from reward.predict import read_prompts  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.experience import Samples  # noqa: E402
from rl.keyed import keyed_generator  # noqa: E402
from rl.lora import fuse_base_adapters  # noqa: E402
from rl.pictures import before_after_sheet  # noqa: E402
from rl.pipelines import check_pipeline_folder, load_pipeline, load_scheduler  # noqa: E402
from rl.policy_checks import warn_of_ignored  # noqa: E402
from rl.scoring import score  # noqa: E402
from rl.timing import now  # noqa: E402

SHEET = "sheet.png"
PARTS = ("without", "with", SHEET, SUMMARY)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GuideArguments:
    """What is drawn, and how it is guided. The reward is in RewardArguments."""

    pipeline: str = field(
        metadata={
            "help": "Folder of a Stable Diffusion pipeline (1.x, 2.x or XL) of diffusers, or the hub's name of one."
        }
    )
    prompts: list[str] = field(metadata={"help": "Prompts, or one .txt file with a prompt a line."})
    output_dir: str = field(metadata={"help": "Folder of the results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Results of other settings that are there may be deleted."}
    )
    base_adapters: list[str] = field(
        default_factory=list, metadata={"help": "Folders of LoRAs that are added to the pipeline's weights."}
    )
    num_generations: int = field(default=1, metadata={"help": "Pictures of each prompt."})
    num_sheet: int = field(default=8, metadata={"help": "Pictures in sheet.png."})
    seed: int = field(default=0, metadata={"help": "All noise depends on it, the picture's number and the step alone."})

    scale: float = field(
        default=0.05, metadata={"help": "How strongly the gradient pushes; what it means, `norm` says."}
    )
    norm: str = field(
        default="unit",
        metadata={
            "help": "unit: each picture's gradient is brought to root mean square 1, so that `scale` is the size of "
            "the push on a noise estimate whose own is 1. raw: classifier guidance as it is written.",
            "choices": list(NORMS),
        },
    )
    max_norm: float | None = field(
        default=None, metadata={"help": "The push's root mean square is never larger. Default: no limit."}
    )
    schedule: str = field(
        default="constant",
        metadata={"help": "How the scale goes over the guided steps.", "choices": list(SCHEDULES)},
    )
    guided_steps: str = field(
        default=":", metadata={"help": "Window of the steps that are guided: `2:8` is steps 2 to 7, `:` all."}
    )
    recurrence: int = field(
        default=0, metadata={"help": "How often each guided step is taken again, noised back to its start."}
    )
    through_network: bool = field(
        default=True,
        metadata={
            "help": "Gradient through the network; false: its noise estimate counts as constant, which saves its "
            "backward pass and its memory."
        },
    )

    scheduler: str | None = field(
        default=None,
        metadata={
            "help": "Default: the pipeline's own; else its noise schedule is sampled by this one.",
            "choices": list(SCHEDULERS),
        },
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Sampling steps."})
    eta: float = field(default=0.0, metadata={"help": "Share of DDPM's noise in each step of DDIM."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Of classifier-free guidance; 1: none."})
    negative_prompt: str = field(default="", metadata={"help": "What classifier-free guidance leads away from."})
    resolution: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; default: what the pipeline was trained at."}
    )
    batch_size: int = field(default=4, metadata={"help": "Pictures drawn at once."})
    device: str = field(default="cpu", metadata={"help": "Where the models run, such as cuda."})
    model_dtype: str = field(
        default="float32", metadata={"help": "Of the pipeline's weights.", "choices": list(_DTYPES)}
    )
    activation_checkpointing: bool = field(
        default=False,
        metadata={"help": "Save the memory of the network's and the VAE's graph, for a forward pass more."},
    )

    def __post_init__(self):
        self.base_adapters = self.base_adapters or []
        if not self.prompts:
            raise ValueError("prompts is empty; give at least one, or one .txt file with a prompt a line")
        for name in ("num_generations", "num_sheet", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must lie in [0, 1]")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must not be negative")
        if self.guidance_scale == 1:
            warn_of_ignored(self, ("negative_prompt",), "guidance_scale is 1, so nothing is led away from")
        self.guidance().scales(self.num_inference_steps)

    def guidance(self) -> Guidance:
        """The settings of guidance.

        Raises:
            ValueError: one of them is out of its range.
        """
        first, colon, last = self.guided_steps.partition(":")
        if not colon or not all(part.strip().isdigit() for part in (first, last) if part.strip()):
            raise ValueError(
                f"guided_steps is {self.guided_steps!r}; write a window of the {self.num_inference_steps} steps such "
                "as `2:8`, which is steps 2 to 7, or `:`"
            )
        names = ("scale", "norm", "max_norm", "schedule", "recurrence", "through_network")
        window = {"first": int(first or 0), "last": int(last) if last.strip() else None}
        return Guidance(**{name: getattr(self, name) for name in names}, **window)


_FREE = ("output_dir", "overwrite_output_dir", "batch_size", "device", "num_sheet")
"""Settings on which no picture depends."""


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run, choice = parse_arguments([GuideArguments, RewardArguments], argv)
    console = Console(highlight=False)

    # Whatever can be wrong with the input is found out before the models are loaded.
    prompts = [prompt for prompt in read_prompts(run.prompts) for _ in range(run.num_generations)]
    choice.check(differentiable=True)
    check_pipeline_folder(run.pipeline)
    check_adapter_files(AdapterSettings(base_adapters=run.base_adapters))
    check_path(run, load_scheduler(run.pipeline))
    results = Results(run.output_dir, _settings(run, choice, prompts), PARTS, run.overwrite_output_dir)
    wanted = [place for place in range(len(prompts)) if _uid(place) not in results.rows]
    shown = prompts[: run.num_sheet]
    if not wanted and (results.folder / SHEET).is_file() and results.are_summed_up(summarise(results, len(shown))):
        console.print(f"nothing to do: {run.output_dir} holds all {len(prompts)} pictures")
        return

    reward, others = choice.make(run.device, differentiable=True)
    pipeline = prepare(run) if wanted else None  # without any, sheet and summary alone are missing
    with results.begun():
        with tqdm(total=len(wanted), dynamic_ncols=True) as bar:
            for start in range(0, len(wanted), run.batch_size):
                batch = wanted[start : start + run.batch_size]
                _draw_both(run, pipeline, reward, others, batch, [prompts[place] for place in batch], results)
                bar.update(len(batch))

        sides = [_look(results, side, shown, reward, run.device) for side in ("without", "with")]
        summary = summarise(results, len(shown))
        results.write({SHEET: before_after_sheet(*sides), SUMMARY: summary})
    print_changes(console, summary, others)
    console.print(f"pictures, sheet.png, results.jsonl, summary.json: {run.output_dir}", soft_wrap=True, markup=False)


def check_path(run: GuideArguments, own) -> None:
    """Complain about a scheduler that cannot be guided, or not in these steps."""
    scheduler = make_scheduler(own, run.scheduler)
    if run.num_inference_steps > scheduler.config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {run.num_inference_steps}; the pipeline's schedule has "
            f"{scheduler.config.num_train_timesteps} steps"
        )
    scheduler.set_timesteps(run.num_inference_steps)
    guided_path(scheduler, run.guidance())


def prepare(run: GuideArguments) -> DiffusionPipeline:
    """The pipeline with its `base_adapters`, frozen, with the scheduler that is wanted."""
    pipeline = load_pipeline(run.pipeline, getattr(torch, run.model_dtype))
    fuse_base_adapters(pipeline, run.base_adapters)
    own = pipeline.scheduler
    check_path(run, own)
    pipeline.scheduler = make_scheduler(own, run.scheduler)
    if "eta" not in pipeline.prepare_extra_step_kwargs(None, run.eta):
        warn_of_ignored(run, ("eta",), f"{type(pipeline.scheduler).__name__} has no such setting; DDIM does")
    pipeline.to(run.device)
    for part in (pipeline.unet, pipeline.vae):
        part.requires_grad_(False)
        if run.activation_checkpointing:
            part.enable_gradient_checkpointing()
    halvings = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    multiple = pipeline.vae_scale_factor * halvings
    if run.resolution is not None and (run.resolution < multiple or run.resolution % multiple):
        raise ValueError(f"resolution is {run.resolution}; this pipeline needs a multiple of {multiple}")
    return pipeline


def _draw_both(
    run: GuideArguments,
    pipeline: DiffusionPipeline,
    reward: RewardFn,
    others: dict[str, RewardFn],
    places: Sequence[int],
    prompts: Sequence[str],
    results: Results,
) -> None:
    """Draw, score and write one batch with and without guidance; `places` are the pictures' numbers."""
    rows: list[dict] = [{"prompt": prompt, "seconds_a_step": {}} for prompt in prompts]
    files: list[dict] = [{} for _ in prompts]
    for side, guidance in (("without", None), ("with", run.guidance())):
        began = now(pipeline.device)
        images = sample(
            pipeline,
            prompts,
            [keyed_generator(run.seed, "guide", place) for place in places],
            run.num_inference_steps,
            reward,
            guidance,
            eta=run.eta,
            guidance_scale=run.guidance_scale,
            negative_prompt=run.negative_prompt,
            size=None if run.resolution is None else (run.resolution, run.resolution),
        )
        images = (images * 255).round() / 255  # as the files hold them
        seconds = (now(pipeline.device) - began) / run.num_inference_steps / len(places)
        check_finite(images, prompts, side)
        said = opinions(reward, others, images, prompts)
        for index, place in enumerate(places):
            name = f"{side}/{_uid(place)}.png"
            rows[index][side] = {"file": name} | {key: float(value[index]) for key, value in said.items()}
            rows[index]["seconds_a_step"][side] = seconds
            files[index][name] = to_image(images[index])
    for index, place in enumerate(places):
        results.add(_uid(place), rows[index], files[index])


def check_finite(images: torch.Tensor, prompts: Sequence[str], side: str) -> None:
    """Look whether images (B, 3, H, W), drawn `side` ("with", "without") guidance, are finite.

    Raises:
        ValueError: they are not; a prompt is named.
    """
    broken = ~images.isfinite().flatten(1).all(dim=1)
    if broken.any():
        remedy = "with model_dtype float16, try bfloat16"
        if side == "with":
            remedy = f"lower `scale`, or set `max_norm`; {remedy}"
        raise ValueError(
            f"the picture {side} guidance of {prompts[int(broken.nonzero()[0])]!r} is not finite "
            f"({int(broken.sum())} of {len(images)} pictures); {remedy}"
        )


def opinions(
    reward: RewardFn, others: dict[str, RewardFn], images: torch.Tensor, prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """What rewards say of images (B, 3, H, W): `reward`, its objective, its terms, and `<other>.<term>`, each (B,)."""
    said = score(reward, images, prompts)
    values = {"reward": said.objective, **said.terms}
    for name, other in others.items():
        said = score(other, images, prompts)
        values |= {f"{name}.total": said.objective} | {f"{name}.{term}": value for term, value in said.terms.items()}
    return values


def summarise(results: Results, in_sheet: int) -> dict[str, Any]:
    """What changed over all pictures of a folder (`finetune.results.changes`), and the time of a step.

    Args:
        in_sheet: pictures in sheet.png; a sheet of another number is made anew.
    """
    rows = list(results.rows.values())
    seconds = {side: sum(row["seconds_a_step"][side] for row in rows) / len(rows) for side in ("without", "with")}
    return {
        "n": len(rows),
        "prompts": len({row["prompt"] for row in rows}),
        "in_sheet": in_sheet,
        "figures": changes(rows, "without", "with"),
        "seconds_a_step_and_picture": seconds,
    }


def print_changes(console: Console, summary: Mapping[str, Any], others: Collection[str]) -> None:
    """Print what `summarise` found; `others` are the names of the rewards that looked on."""
    title = f"{summary['n']} pictures of {summary['prompts']} prompts, the same noise without and with guidance"
    table = change_table(title, summary["figures"], "without", "with")
    seconds = summary["seconds_a_step_and_picture"]
    ratio = seconds["with"] / seconds["without"]
    table.add_row("seconds a step", f"{seconds['without']:.4f}", f"{seconds['with']:.4f}", f"x {ratio:.2f}", "")
    console.print(table)
    honest = f"what {', '.join(others)} say does" if others else "name others in eval_rewards"
    told = "`reward` and its terms guided: their rise is no evidence of better pictures"
    console.print(f"{told}; {honest}", soft_wrap=True)


def _look(results: Results, side: str, prompts: Sequence[str], reward: RewardFn, device: str) -> Samples:
    """The first pictures again, from their files, with what the reward holds against them."""
    files = [results.folder / results.rows[_uid(place)][side]["file"] for place in range(len(prompts))]
    images = torch.stack([to_tensor(decode_picture(file.read_bytes())).float() / 255 for file in files])
    said = score(reward, images.to(device), prompts)
    return Samples.of(images, prompts, said, len(prompts))


def _uid(place: int) -> str:
    return f"{place:05d}"


def _settings(run: GuideArguments, choice: RewardArguments, prompts: Sequence[str]) -> dict:
    """All that the pictures and their figures depend on."""
    settings = {name: value for name, value in (asdict(run) | asdict(choice)).items() if name not in _FREE}
    settings["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    settings["base_adapters"] = run.base_adapters or None  # as in results from before there was this setting
    return settings | weights_of(run.pipeline, run.base_adapters, asdict(choice))


if __name__ == "__main__":
    main_guard(main)
