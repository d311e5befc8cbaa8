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
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
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
from finetune.inpaint_arguments import InpaintArguments  # noqa: E402
from finetune.inpainter import INPAINTING  # noqa: E402
from finetune.mending import Mended, as_row, check_maps, judge, mend  # noqa: E402
from finetune.pictures_to_fix import check_source, digest, each_once, read_picture  # noqa: E402
from finetune.results import SUMMARY, Results, change_table, changes  # noqa: E402
from finetune.reward_choice import RewardArguments  # noqa: E402
from reward.arguments import main_guard, parse_arguments  # noqa: E402
from reward.draw import caption, grid, heatmap_image, overlay, to_image  # noqa: E402
from reward.feedback import RewardFn  # noqa: E402
from reward.sources import Picture  # noqa: E402
from rl.adapter import AdapterSettings, check_adapter_files  # noqa: E402
from rl.pipelines import check_pipeline_folder  # noqa: E402

PARTS = ("pictures", "masks", "sheets", SUMMARY)
_FREE = (
    "output_dir", "overwrite_output_dir", "batch_size", "device", "pictures", "images", "prompts", "prompts_table",
    "split",
)  # fmt: skip
"""Settings on which no picture's result depends: each depends on its own file, name and prompt."""


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


if __name__ == "__main__":
    main_guard(main)
