"""Settings of `finetune.inpaint`."""

from dataclasses import dataclass, field

import torch

from finetune.inpainter import Inpainter
from finetune.pictures_to_fix import NamedPictures, open_pictures
from reward.predict import read_prompts
from reward.sources import Source
from rl.policy_checks import warn_of_ignored


@dataclass
class InpaintArguments:
    """Which pictures, where they are drawn again, and how. The reward is in RewardArguments: its penalty maps say
    where, its objective says which candidate is kept."""

    pipeline: str = field(
        metadata={
            "help": "Folder of a pipeline of diffusers, or the hub's name of one: Stable Diffusion 1.x, 2.x or XL, "
            "made for inpainting or not."
        }
    )
    output_dir: str = field(metadata={"help": "Folder of the results."})
    pictures: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures with a metadata.jsonl or CSV of their prompts; or a data set of one picture a "
            "row, parquet or saved to disk, or of Pick-a-Pic's two."
        },
    )
    prompts_table: str | None = field(
        default=None, metadata={"help": "CSV or JSONL of the folder's prompts, if it is not the only one in it."}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "What the column of prompts is called; default: text, prompt or caption in an image folder's "
            "metadata.jsonl or metadata.csv and in a data set, prompt in another table. Pick-a-Pic's is caption."
        },
    )
    split: str = field(
        default="train",
        metadata={"help": "Which split of a saved data set or of parquet files without a column `uid`."},
    )
    images: list[str] = field(default_factory=list, metadata={"help": "Instead of `pictures`, picture files."})
    prompts: list[str] = field(
        default_factory=list, metadata={"help": "A prompt for each of `images`, or one .txt file with a prompt a line."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Results of other settings that are there may be deleted."}
    )
    base_adapters: list[str] = field(
        default_factory=list, metadata={"help": "Folders of LoRAs that are added to the pipeline's weights."}
    )
    seed: int = field(default=0, metadata={"help": "All noise depends on it, the picture's name and the round alone."})

    thresholds: dict = field(
        default_factory=lambda: {"implausibility": 0.3},
        metadata={
            "help": "Penalty map of the reward -> the value above which a place is drawn again, in the reward's units: "
            "with RichReward, heatmap times its penalty_weight."
        },
    )
    dilate: float = field(
        default=0.05, metadata={"help": "The region reaches so far beyond those places, as a share of the height."}
    )
    feather: float = field(
        default=0.03, metadata={"help": "Behind that the new picture fades into the old one over this."}
    )
    max_area: float = field(
        default=0.75, metadata={"help": "A picture whose region is a larger share of it is kept, and that is said."}
    )
    num_candidates: int = field(default=8, metadata={"help": "How often a region is drawn again in each round."})
    rounds: int = field(default=2, metadata={"help": "At most so many times the best picture is looked at and mended."})
    min_gain: float = field(
        default=0.0, metadata={"help": "A candidate is kept only if the reward is by more than this better."}
    )

    num_inference_steps: int = field(default=50, metadata={"help": "Sampling steps of a whole picture."})
    strength: float = field(
        default=1.0,
        metadata={"help": "1: the region is drawn from pure noise; less: from the picture, noised that far."},
    )
    eta: float = field(default=0.0, metadata={"help": "Share of DDPM's noise in each step of DDIM."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Of classifier-free guidance; 1: none."})
    negative_prompt: str = field(default="", metadata={"help": "What classifier-free guidance leads away from."})
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Pictures are brought to the area of a square of this side to be drawn again, and back. Default: "
            "they are drawn at their own size, rounded to what the pipeline takes."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Candidates drawn at once."})
    device: str = field(default="cpu", metadata={"help": "Where the models run, such as cuda."})
    model_dtype: str = field(
        default="float32",
        metadata={"help": "Of the pipeline's weights.", "choices": ["float32", "bfloat16", "float16"]},
    )

    def __post_init__(self):
        self.base_adapters = self.base_adapters or []
        if bool(self.pictures) == bool(self.images):
            raise ValueError(
                "`pictures` names a folder, `images` single files: "
                f"{'both are' if self.images else 'neither is'} given; give one of them"
            )
        if self.pictures:
            warn_of_ignored(self, ("prompts",), "the folder's prompts are in its table")
        else:
            warn_of_ignored(self, ("prompts_table", "prompt_column", "split"), "`images` have their `prompts`")
        if not self.thresholds:
            raise ValueError("thresholds is empty; name a penalty map of the reward, such as {implausibility: 0.3}")
        for name, value in self.thresholds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"thresholds: that of {name!r} is {value!r}; it must be a number of at least 0")
        for name in ("num_candidates", "rounds", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dilate", "feather", "min_gain", "guidance_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("max_area", "strength"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in (0, 1]")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must lie in [0, 1]")
        if int(self.num_inference_steps * self.strength) < 1:
            raise ValueError(
                f"strength {self.strength} of {self.num_inference_steps} steps is less than one step; raise one of them"
            )
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}; it must be at least 1")
        if self.guidance_scale <= 1:  # diffusers' pipelines guide above 1 only
            warn_of_ignored(self, ("negative_prompt",), "guidance_scale is at most 1, so nothing is led away from")

    def source(self) -> Source:
        """The pictures and prompts that are named.

        Raises:
            ValueError: there are none; see `finetune.pictures_to_fix.open_pictures`.
        """
        if self.pictures:
            return open_pictures(self.pictures, self.prompt_column, self.prompts_table, self.split)
        prompts = read_prompts(self.prompts)
        if len(prompts) != len(self.images):
            raise ValueError(f"{len(self.images)} images were given with {len(prompts)} prompts; give one an image")
        return NamedPictures(self.images, prompts)

    def inpainter(self) -> Inpainter:
        """The pipeline with its `base_adapters`, loaded.

        Raises:
            ValueError: the schedule has fewer steps; or see `Inpainter.load`.
        """
        names = ("strength", "eta", "guidance_scale", "negative_prompt", "resolution", "batch_size", "base_adapters")
        found = Inpainter.load(
            self.pipeline, dtype=getattr(torch, self.model_dtype), device=self.device, steps=self.num_inference_steps,
            **{name: getattr(self, name) for name in names},
        )  # fmt: skip
        longest = found.pipeline.scheduler.config.num_train_timesteps
        if self.num_inference_steps > longest:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; the pipeline's schedule has {longest} steps"
            )
        if "eta" not in found.pipeline.prepare_extra_step_kwargs(None, self.eta):
            scheduler = type(found.pipeline.scheduler).__name__
            warn_of_ignored(self, ("eta",), f"{scheduler} has no such setting; DDIM does")
        return found
