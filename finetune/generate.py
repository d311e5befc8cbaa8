"""A pool of pictures, drawn by a pipeline: N for each prompt of a file.

Pictures come in batches of a fixed place: which pictures are drawn together depends on the settings only, never on how
many processes there are or where an earlier run stopped. All noise is keyed by (seed, picture). So the same command
draws the same bits, in one process or in many, interrupted or not.
"""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console
from tqdm.auto import tqdm

from finetune.files import holds_files
from finetune.fingerprints import weights_of, with_weights
from reward.draw import to_image
from reward.whole_files import write_whole
from rl.adapter import AdapterSettings, check_adapter_files, require
from rl.checkpoints import differing_keys
from rl.experience import rollout_noise
from rl.memory import MemorySettings
from rl.pipelines import load_scheduler
from rl.policy import PictureSize, StableDiffusionPolicy
from rl.policy_checks import warn_of_ignored
from rl.rollout import check_pictures, sample
from rl.sde import Schedule, ddim_scheduler, make_schedule

logger = logging.getLogger(__name__)

SETTINGS, TABLE = "pool.json", "metadata.jsonl"


@dataclass
class GenerationArguments:
    """How pictures are drawn, where they are not there already."""

    policy: str | None = field(
        default=None,
        metadata={
            "help": "Draw the pictures with this Stable Diffusion pipeline (1.x, 2.x or XL), a folder of diffusers or "
            "the hub's name of one. None: they are in `pictures` already."
        },
    )
    prompts: str | None = field(default=None, metadata={"help": "What to draw: a UTF-8 text file, one prompt a line."})
    num_generations: int = field(default=8, metadata={"help": "Pictures of each prompt."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    base_adapters: list[str] = field(
        default_factory=list, metadata={"help": "Folders of LoRAs that are added to the pipeline's weights."}
    )
    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps."})
    eta: float = field(default=1.0, metadata={"help": "Noise of a step: 1 as DDPM's, 0 none."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is none and costs half."})
    start_timestep: int | None = field(
        default=None, metadata={"help": "Start sampling at this timestep instead of the noise schedule's end."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Height and width of the pictures; default: what the pipeline was trained at."}
    )
    generation_batch_size: int = field(
        default=64, metadata={"help": "Pictures drawn at once. Another number may change their last bits."}
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the pipeline's weights."}
    )
    vae_slicing: bool = field(default=False, metadata={"help": "Decode pictures one by one; the same pictures."})
    vae_tiling: bool = field(default=False, metadata={"help": "Decode large pictures in overlapping tiles."})

    def __post_init__(self):
        self.base_adapters = self.base_adapters or []
        if self.policy is None:
            names = [setting.name for setting in fields(self) if setting.name != "policy"]
            warn_of_ignored(self, names, "there is no policy, so nothing is drawn")
            return
        require(self.prompts is not None, "policy draws pictures, but of what? give `prompts`, a file of prompts")
        for name in ("num_generations", "generation_batch_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(self.resolution is None or self.resolution >= 1, f"resolution is {self.resolution}; it is in pixels")
        require(self.guidance_scale >= 0, f"guidance_scale is {self.guidance_scale}; it must not be negative")

    def schedule(self, scheduler) -> Schedule:
        """The sampling steps, from a pipeline's scheduler.

        Raises:
            ValueError: see `rl.sde.ddim_scheduler` and `rl.sde.make_schedule`.
        """
        return make_schedule(ddim_scheduler(scheduler, self.start_timestep), self.num_inference_steps, self.eta)

    def check(self) -> None:
        """Look at the pipeline's folder, before its models are loaded.

        Raises:
            ValueError: it is none that can be used (the message names those that can), or settings do not fit it.
        """
        self.schedule(load_scheduler(self.policy))
        check_adapter_files(AdapterSettings(base_adapters=self.base_adapters))

    def load(self) -> StableDiffusionPolicy:
        return StableDiffusionPolicy.load(
            self.policy,
            dtype=getattr(torch, self.model_dtype),
            size=PictureSize(self.resolution),
            memory=MemorySettings(vae_slicing=self.vae_slicing, vae_tiling=self.vae_tiling),
            base_adapters=self.base_adapters,
        )

    def that_matter(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Whatever other pictures would come of, as JSON can hold it."""
        spared = ("prompts", "vae_slicing")
        settings = {name.name: getattr(self, name.name) for name in fields(self) if name.name not in spared}
        return {**settings, "prompts": list(prompts), **weights_of(self.policy, self.base_adapters)}


class Generation:
    """A pool that is being drawn.

    Args:
        folder: where its pictures go, with their table behind them.
        settings: with a `policy`.
        prompts: of the file, in order; one that stands there twice gets twice as many pictures.

    Raises:
        ValueError: `folder` holds another pool, drawn with other settings (they are listed), or other files.
    """

    def __init__(self, folder: str | Path, settings: GenerationArguments, prompts: Sequence[str]):
        self.folder, self.settings = Path(folder), settings
        self.prompts = [prompt for prompt in prompts for _ in range(settings.num_generations)]
        self._facts = settings.that_matter(prompts)
        self._check_folder()

    def __len__(self) -> int:
        return len(self.prompts)

    def name(self, picture: int) -> str:
        """The file of picture k of the p-th prompt: `000012_03.png` is the fourth of the thirteenth."""
        prompt, generation = divmod(picture, self.settings.num_generations)
        return f"{prompt:06d}_{generation:02d}.png"

    def claim(self) -> None:
        """Note in the folder whose it is; for one process, before any draws."""
        if not (self.folder / SETTINGS).is_file():
            write_whole(self.folder / SETTINGS, _as_json(self._facts).encode())

    def missing(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """The batches of pictures that are not all there; of every `world_size` batches the one of `rank`."""
        size = self.settings.generation_batch_size
        starts = range(rank * size, len(self), world_size * size)
        batches = [range(start, min(start + size, len(self))) for start in starts]
        return [batch for batch in batches if not all((self.folder / self.name(one)).is_file() for one in batch)]

    @torch.no_grad()
    def draw(
        self,
        batches: Sequence[range],
        policy: StableDiffusionPolicy,
        on_picture: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Draw and write `batches`; calls `on_picture` with the number of pictures that are done.

        Raises:
            DivergedError: what is drawn is not finite.
            OSError: a picture could not be written; what was written before is kept.
        """
        settings, schedule = self.settings, self.settings.schedule(policy.scheduler)
        for batch in batches:
            prompts = [self.prompts[picture] for picture in batch]
            noise = rollout_noise(policy, schedule, settings.seed, "pool", batch)
            with policy.reference():  # without the LoRA that a policy comes with
                trajectory = sample(
                    policy, policy.network, prompts, noise, schedule, guidance_scale=settings.guidance_scale
                )
            images = policy.decode(trajectory.final_latents)
            check_pictures(trajectory.final_latents, images, prompts, "the pool")
            for picture, image in zip(batch, images, strict=True):
                buffer = io.BytesIO()
                to_image(image).save(buffer, format="PNG")
                write_whole(self.folder / self.name(picture), buffer.getvalue())
            on_picture(len(batch))

    def finish(self) -> None:
        """Write the table, with which the folder becomes a pool; for one process, when all have drawn."""
        lines = [
            json.dumps({"file_name": self.name(picture), "text": prompt}, ensure_ascii=False)
            for picture, prompt in enumerate(self.prompts)
        ]
        write_whole(self.folder / TABLE, ("\n".join(lines) + "\n").encode())

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"pictures {self.folder} is a file; name a folder")
        if (self.folder / SETTINGS).is_file():
            now = json.loads(_as_json(self._facts))
            known = with_weights(json.loads((self.folder / SETTINGS).read_text(encoding="utf-8")), now)
            if changed := differing_keys(known, now):
                shown = "; ".join(text if len(text) < 120 else text[:117] + "..." for text in changed)
                raise ValueError(
                    f"pictures {self.folder} holds a pool drawn with other settings ({shown}); give another folder, or "
                    "leave out `policy` to choose from what is there"
                )
        elif self.folder.is_dir() and holds_files(self.folder):
            raise ValueError(
                f"pictures {self.folder} holds other files, and `policy` would draw into it; give another folder, or "
                "leave out `policy` to choose from what is there"
            )


def draw_missing(drawing: Generation, state: PartialState, console: Console) -> None:
    """Draw what is not there yet, shared among the processes."""
    batches = drawing.missing(state.process_index, state.num_processes)
    policy = drawing.settings.load().to(state.device) if batches else None  # one that does not load claims no folder
    with state.main_process_first():  # whose the folder is stands there before anyone draws
        if state.is_main_process:
            drawing.claim()
    if batches:
        console.print(f"[bold]drawing[/] {len(drawing)} pictures")
        with shared_bar(sum(map(len, batches)), state) as bar:
            drawing.draw(batches, policy, bar.update)
    state.wait_for_everyone()
    if state.is_main_process and not (drawing.folder / TABLE).is_file():
        drawing.finish()
    state.wait_for_everyone()


def shared_bar(total: int, state: PartialState) -> tqdm:
    """Of this process's share; the main process's is shown."""
    return tqdm(total=total, disable=not state.is_main_process, dynamic_ncols=True, unit="picture")


def _as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
