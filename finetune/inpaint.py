"""Fix the problem region: what a predictor marks in a picture is drawn again, and the best of several is kept.

    python -m finetune.inpaint --config configs/inpaint_tinyworld.yaml [--any_setting value]

"Rich Human Feedback for Text-to-Image Generation" (Liang et al. 2023, arXiv 2312.10240), section 5: the predicted
heatmap, thresholded and dilated, is a mask; the region is inpainted several times, and the picture that the predictor
scores best is kept. Here that is done again on the picture kept, and the original is one of those to choose from.

Writes to `output_dir`, for each picture, `pictures/`, `masks/`, a sheet in `sheets/`, and a line of `results.jsonl`;
and `summary.json`. The same command goes on where it was stopped.

A YAML names code (`reward: package.module:Attribute`): run only those you trust.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from rich.console import Console
from tqdm.auto import tqdm

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.files import is_within  # noqa: E402
from finetune.fingerprints import weights_of  # noqa: E402
from finetune.inpainter import INPAINTING, Inpainter  # noqa: E402
from finetune.pictures_to_fix import (  # noqa: E402
    NamedPictures,
    check_source,
    digest,
    each_once,
    open_pictures,
    read_picture,
)
from finetune.region import put_in, region  # noqa: E402
from finetune.results import SUMMARY, Results, change_table, changes  # noqa: E402
from finetune.reward_choice import RewardArguments  # noqa: E402
from reward.arguments import main_guard, parse_arguments  # noqa: E402
from reward.draw import caption, grid, heatmap_image, overlay, to_image  # noqa: E402
from reward.feedback import Reward, RewardFn  # noqa: E402
from reward.predict import read_prompts  # noqa: E402
from reward.sources import Picture, Source  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.pipelines import check_pipeline_folder  # noqa: E402
from rl.policy_checks import warn_of_ignored  # noqa: E402
from rl.rollout import keyed_generator  # noqa: E402
from rl.scoring import score  # noqa: E402

PARTS = ("pictures", "masks", "sheets", SUMMARY)
FIXED, NOTHING, TOO_LARGE, NO_BETTER = "fixed", "nothing found", "region too large", "no candidate better"
"""What became of a picture; it is kept as it was but for the first."""


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


_FREE = (
    "output_dir", "overwrite_output_dir", "batch_size", "device", "pictures", "images", "prompts", "prompts_table",
    "split",
)  # fmt: skip
"""Settings on which no picture's result depends: each depends on its own file, name and prompt."""


@dataclass(frozen=True)
class Round:
    """One look at a picture.

    Attributes:
        share: (H, W) in [0, 1], the region; see `finetune.region.region`.
        scores: of the candidates; none where nothing was drawn.
        kept: which candidate was kept; None: the picture as it was.
    """

    share: torch.Tensor
    scores: tuple[float, ...] = ()
    kept: int | None = None


@dataclass(frozen=True)
class Mended:
    """What became of a picture.

    Attributes:
        picture: (3, H, W) uint8.
        status: `FIXED`, or why it is the original.
        before, after: the reward of the original and of `picture`.
        rounds: in order; at least one.
    """

    picture: torch.Tensor
    status: str
    before: Reward
    after: Reward
    rounds: tuple[Round, ...]

    @property
    def share(self) -> torch.Tensor:
        """(H, W) in [0, 1]: all that was drawn again, or, if nothing was kept, what was looked at first."""
        shares = [one.share for one in self.rounds if one.kept is not None] or [self.rounds[0].share]
        return torch.stack(shares).amax(dim=0)


def mend(picture: torch.Tensor, prompt: str, uid: str, run: InpaintArguments, reward: RewardFn, draw) -> Mended:
    """Draw the problem region of one picture (3, H, W) uint8 again; see the head of the file.

    Args:
        uid: the noise is keyed by (`run.seed`, uid, round, candidate).
        draw: an `Inpainter`, or what is called like one.

    Raises:
        ValueError: the reward has no such penalty maps as the thresholds name.
        RewardError: what the reward says cannot be compared.
    """
    before = said = judge(reward, picture[None], prompt, run)
    check_maps(said, run.thresholds)
    rounds: list[Round] = []
    size = tuple(picture.shape[-2:])
    for number in range(run.rounds):
        maps = {name: said.penalties[name][0] for name in run.thresholds}
        share = region(maps, run.thresholds, size, run.dilate, run.feather)
        area = float((share > 0).float().mean())
        if area == 0 or area > run.max_area:
            why = NOTHING if area == 0 else TOO_LARGE
            rounds.append(Round(share))
            break
        sources = [keyed_generator(run.seed, "inpaint", uid, number, one) for one in range(run.num_candidates)]
        candidates = put_in(picture, draw(picture.float() / 255, share, prompt, sources), share)
        pairs = judge_beside(reward, picture, candidates, prompt, run)
        gains = [float(new.objective) - float(old.objective) for old, new in pairs]
        best = max(range(len(gains)), key=gains.__getitem__)
        better = gains[best] > run.min_gain
        rounds.append(Round(share, tuple(float(new.objective) for _, new in pairs), best if better else None))
        old, new = pairs[best]
        if number == 0:
            before = said = old
        if not better:
            why = NO_BETTER
            break
        picture, said = candidates[best], new
    fixed = any(one.kept is not None for one in rounds)
    return Mended(picture, FIXED if fixed else why, before, said, tuple(rounds))


def judge_beside(
    reward: RewardFn, picture: torch.Tensor, candidates: torch.Tensor, prompt: str, run: InpaintArguments
) -> list[tuple[Reward, Reward]]:
    """What a reward says of `picture` (3, H, W) uint8 and of N candidates (N, 3, H, W), on the CPU.

    It is asked about `run.batch_size` pictures at most, but at least 2, in questions of one size that hold the picture
    each: what was judged in batches of different sizes could differ by rounding alone. With 3 candidates and a
    batch_size of 3: [picture, 0, 1], [picture, 2, 2].

    Returns:
        for each candidate the picture's reward and the candidate's, of one question.
    """
    count = math.ceil(len(candidates) / max(run.batch_size - 1, 1))
    each = math.ceil(len(candidates) / count)
    pairs = []
    for start in range(0, len(candidates), each):
        part = candidates[start : start + each]
        filled = torch.cat([picture[None], part, part[-1:].expand(each - len(part), -1, -1, -1)])
        said = judge(reward, filled, prompt, run)
        pairs += [(_only(said, 0), _only(said, 1 + place)) for place in range(len(part))]
    return pairs


def judge(reward: RewardFn, pictures: torch.Tensor, prompt: str, run: InpaintArguments) -> Reward:
    """The reward of pictures (N, 3, H, W) uint8 of one prompt, asked for at once, on the CPU."""
    images = (pictures.float() / 255).to(run.device)
    said = score(reward, images, [prompt] * len(pictures))
    return Reward(
        total=said.total.cpu(),
        penalties={name: maps.cpu() for name, maps in said.penalties.items()},
        terms={name: value.cpu() for name, value in said.terms.items()},
    )


def check_maps(said: Reward, thresholds: Mapping[str, float]) -> None:
    """Complain about thresholds of maps that a reward does not have.

    Raises:
        ValueError: with those that it has.
    """
    if unknown := sorted(set(thresholds) - set(said.penalties)):
        raise ValueError(
            f"thresholds names {', '.join(unknown)}, but the reward's penalty maps are "
            f"{', '.join(sorted(said.penalties)) or 'none'}; RichReward has those that its penalty_weights name"
        )


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run, choice = parse_arguments([InpaintArguments, RewardArguments], argv)
    console = Console(highlight=False)

    # Whatever can be wrong with the input is found out before the models are loaded.
    choice.check()
    check_pipeline_folder(run.pipeline, INPAINTING)
    check_adapter_files(AdapterSettings(base_adapters=run.base_adapters))
    check_apart(run)
    settings = {name: value for name, value in (asdict(run) | asdict(choice)).items() if name not in _FREE}
    settings["base_adapters"] = run.base_adapters or None  # as in results from before there was this setting
    settings |= weights_of(run.pipeline, run.base_adapters, asdict(choice))
    results = Results(run.output_dir, settings, PARTS, run.overwrite_output_dir)
    source = run.source()
    found = check_source(source)
    check_same(results, found)
    wanted = {uid for uid in found if uid not in results.rows}
    if not wanted and results.are_summed_up(summarise(list(results.rows.values()))):
        console.print(f"nothing to do: {run.output_dir} holds all {len(found)} pictures")
        return

    if wanted:  # else the summary alone is missing
        reward, others = choice.make(run.device)
        first = next(iter(source.pictures(wanted)))
        check_maps(judge(reward, read_picture(first)[None], first.prompt, run), run.thresholds)
        draw = run.inpainter()
    with results.begun():
        for item in tqdm(each_once(source, wanted), total=len(wanted), dynamic_ncols=True):
            picture = read_picture(item)
            mended = mend(picture, item.prompt, item.uid, run, reward, draw)
            _keep(results, item, picture, mended, run, others)
        summary = summarise(list(results.rows.values()))
        results.write({SUMMARY: summary})
    print_changes(console, summary, choice.eval_rewards)
    console.print(f"pictures, masks, sheets, results.jsonl: {run.output_dir}", soft_wrap=True, markup=False)


def _keep(
    results: Results,
    item: Picture,
    picture: torch.Tensor,
    mended: Mended,
    run: InpaintArguments,
    others: Mapping[str, RewardFn],
) -> None:
    """Write one picture's line and files; `others` judge it before and after."""
    row = {"prompt": item.prompt, "sha256": digest(item), **as_row(mended)}
    for side, one in (("before", picture), ("after", mended.picture)):
        for name, other in others.items():
            said = judge(other, one[None], item.prompt, run)
            row[side] |= {f"{name}.total": float(said.objective[0])}
            row[side] |= {f"{name}.{term}": float(value[0]) for term, value in said.terms.items()}
    files = {"picture": f"pictures/{item.uid}.png", "mask": f"masks/{item.uid}.png", "sheet": f"sheets/{item.uid}.png"}
    images = (to_image(mended.picture / 255), heatmap_image(mended.share), sheet(picture, item.prompt, mended))
    results.add(item.uid, {**row, "files": files}, dict(zip(files.values(), images, strict=True)))


def check_apart(run: InpaintArguments) -> None:
    """Complain about pictures and results in one place: results would be mended in their turn, or pictures deleted.

    Raises:
        ValueError: `output_dir` lies in the folder of the pictures, or pictures lie where results are written.
    """
    if run.pictures and is_within(run.output_dir, run.pictures):
        raise ValueError(
            f"output_dir {run.output_dir} lies in the folder of the pictures, {run.pictures}, whose pictures are "
            "mended, those of the results too; give an --output_dir outside it"
        )
    for place in (run.pictures,) if run.pictures else run.images:
        if any(is_within(place, Path(run.output_dir) / part) for part in PARTS):
            raise ValueError(
                f"{place} lies where the results are written, in output_dir {run.output_dir}; give another --output_dir"
            )


def check_same(results: Results, found: Mapping[str, str]) -> None:
    """Complain if a picture that is done is not the one of that name now.

    Raises:
        ValueError: names the first.
    """
    changed = [uid for uid, sha256 in found.items() if uid in results.rows and results.rows[uid]["sha256"] != sha256]
    if changed:
        raise ValueError(
            f"output_dir {results.folder} holds the results of another picture or prompt called {changed[0]} "
            f"({len(changed)} such pictures); give another --output_dir, or --overwrite_output_dir true"
        )


def as_row(mended: Mended) -> dict:
    """A line of `results.jsonl`, but for the files: what became of the picture, and the reward before and after."""
    return {
        "status": mended.status,
        "area": float((mended.share > 0).float().mean()),
        "rounds": [{"scores": list(one.scores), "kept": one.kept} for one in mended.rounds],
        **{
            side: {"reward": float(said.objective[0]), **{name: float(value[0]) for name, value in said.terms.items()}}
            for side, said in (("before", mended.before), ("after", mended.after))
        },
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many pictures met with which fate, and what changed over all of them (`finetune.results.changes`)."""
    return {
        "n": len(rows),
        "prompts": len({row["prompt"] for row in rows}),
        "status": dict(Counter(row["status"] for row in rows)),
        "figures": changes(rows, "before", "after"),
    }


def print_changes(console: Console, summary: Mapping[str, Any], others: Collection[str]) -> None:
    """Print what `summarise` found; `others` are the names of the rewards that looked on."""
    counts = ", ".join(f"{count} {status}" for status, count in summary["status"].items())
    title = f"{summary['n']} pictures of {summary['prompts']} prompts: {counts}"
    console.print(change_table(title, summary["figures"], "before", "after"))
    honest = f"what {', '.join(others)} say does" if others else "name others in eval_rewards"
    told = "`reward` chose what is kept: it cannot fall, and its rise is no evidence of better pictures"
    console.print(f"{told}; {honest}", soft_wrap=True)


def sheet(picture: torch.Tensor, prompt: str, mended: Mended, height: int = 192) -> Image.Image:
    """One picture (3, H, W) uint8 before, with what was marked, and after; prompt and rewards below."""
    scale = max(float(maps.max()) for maps in mended.before.penalties.values()) or 1.0
    row = [to_image(picture / 255, height)]
    for name, maps in mended.before.penalties.items():
        row.append(overlay(picture / 255, maps[0] / scale, name, height))
    row.append(overlay(picture / 255, mended.share, height=height))
    row.append(to_image(mended.picture / 255, height))
    width = sum(one.width for one in row)
    words = f"{mended.status}: {float(mended.before.objective[0]):.3f} -> {float(mended.after.objective[0]):.3f}"
    return grid([row, [caption(prompt, width)], [caption(words, width)]])


def _only(said: Reward, index: int) -> Reward:
    """The reward of one picture of several."""
    one = slice(index, index + 1)
    return Reward(
        total=said.total[one],
        penalties={name: maps[one] for name, maps in said.penalties.items()},
        terms={name: value[one] for name, value in said.terms.items()},
    )


if __name__ == "__main__":
    main_guard(main)
