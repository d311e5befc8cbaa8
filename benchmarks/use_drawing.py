"""Pictures of one use in `benchmarks/uses.py`, what the judge says of them, and what they cost.

    python benchmarks/use_drawing.py FOLDER

A picture's cost is the processor's time of drawing it and of whatever chooses or mends it, on one thread, once the
models are loaded.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from demo_proof import TERMS, spread_of
from diffusers import StableDiffusionPipeline
from parts import RESULT, Task
from use_training import RUN

from finetune.guide import GuideArguments, prepare
from finetune.guided_sampling import sample as guided_sample
from finetune.inpaint_arguments import InpaintArguments
from finetune.mending import mend
from finetune.reward_choice import RewardArguments
from reward.arguments import parse_arguments
from reward.rich import RichReward
from rl.scoring import score
from tinyworld.generator import sample
from tinyworld.judge import judge
from tinyworld.loop import keyed

BATCH = 64
PICTURES = "pictures.npz"
OTHER_NOISE = 1000
"""The k-th more picture of a prompt is drawn by the seed and k times this."""


def to_images(pictures: np.ndarray) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def draw(task: Task) -> dict[str, Any]:
    """Pictures for held-out prompts, two or so of each, and what the judge says of them.

    Returns:
        ms: of the processor, a picture; values: term -> (P, G); diversity: (P,).
    """
    torch.set_num_threads(1)
    how = task.how
    captions = [prompt for prompt in how["prompts"] for _ in range(how["generations"])]
    work = {"plain": plain, "best_of": best_of, "guide": guide, "inpaint": inpaint}[how["by"]](task, captions)
    next(work)  # loads the models
    began = time.process_time()
    pictures = next(work)
    milliseconds = 1000 * (time.process_time() - began) / len(captions)
    if how["by"] == "inpaint":
        milliseconds += json.loads((task.needs[0] / RESULT).read_text(encoding="utf-8"))["ms"]
    np.savez_compressed(task.folder / PICTURES, pictures=pictures)
    verdicts = [judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    shape = (len(how["prompts"]), how["generations"])
    values = {term: np.array([float(v.satisfied) if term == "satisfied" else v.scores[term] for v in verdicts])
              for term in TERMS}  # fmt: skip
    return {
        "ms": round(milliseconds, 2),
        "values": {term: found.reshape(shape).round(5).tolist() for term, found in values.items()},
        "diversity": [round(one, 5) for one in spread_of(verdicts, how["generations"])],
    }


def pipeline_of(task: Task) -> StableDiffusionPipeline:
    """The base, with the LoRA of the training that is needed, if any, loaded as any user of diffusers would."""
    return tuned(StableDiffusionPipeline.from_pretrained(task.how["policy"], safety_checker=None), task)


def tuned(pipeline: StableDiffusionPipeline, task: Task) -> StableDiffusionPipeline:
    if task.how["tuned"]:
        pipeline.load_lora_weights(str(task.needs[0] / RUN))
    return pipeline


def guidance_of(task: Task) -> float:
    """Scale of classifier-free guidance."""
    return task.how.get("guidance", 1.0)


def guidance_flags(task: Task) -> list[str]:
    """Of a config's command: its own scale, unless the part is told one."""
    return ["--guidance_scale", str(task.how["guidance"])] if "guidance" in task.how else []


def plain(task: Task, captions: list[str]) -> Iterator[np.ndarray | None]:
    pipeline = pipeline_of(task)
    yield
    yield sample(pipeline, captions, seed=task.seed, guidance=guidance_of(task), batch=BATCH)


def best_of(task: Task, captions: list[str]) -> Iterator[np.ndarray | None]:
    """Of each picture and `count` - 1 more, the one that the reward likes best."""
    pipeline, reward = pipeline_of(task), RichReward(**reward_kwargs(task.how["config"]))
    yield
    best, record = np.empty(0), torch.full((len(captions),), -torch.inf)
    for number in range(task.how["count"]):
        pictures = sample(
            pipeline, captions, seed=task.seed + OTHER_NOISE * number, guidance=guidance_of(task), batch=BATCH
        )
        with torch.no_grad():
            value = score(reward, to_images(pictures), captions, BATCH).objective
        better = (value > record).numpy()
        best = np.where(better[:, None, None, None], pictures, best) if number else pictures
        record = torch.maximum(record, value)
    yield best


def guide(task: Task, captions: list[str]) -> Iterator[np.ndarray | None]:
    """By the gradient of the reward, with a config of `finetune.guide`, whose prompts and noise are the table's."""
    flags = ["--config", task.how["config"], "--pipeline", task.how["policy"], *guidance_flags(task)]
    run, choice = parse_arguments([GuideArguments, RewardArguments], flags)
    reward, _ = choice.make(run.device, differentiable=True)
    pipeline = tuned(prepare(run), task)
    pipeline.unet.requires_grad_(False)  # a LoRA that was added too
    yield
    drawn = []
    for first in range(0, len(captions), run.batch_size):
        rows = range(first, min(first + run.batch_size, len(captions)))
        drawn.append(guided_sample(
            pipeline, [captions[row] for row in rows], [keyed(4, task.seed, row) for row in rows],
            run.num_inference_steps, reward, run.guidance(), eta=run.eta, guidance_scale=run.guidance_scale,
            negative_prompt=run.negative_prompt,
            size=None if run.resolution is None else (run.resolution, run.resolution),
        ))  # fmt: skip
    yield (torch.cat(drawn).cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()


def inpaint(task: Task, captions: list[str]) -> Iterator[np.ndarray | None]:
    """The problem regions of what is drawn already, drawn again, with a config of `finetune.inpaint`."""
    flags = ["--config", task.how["config"], "--seed", str(task.seed), *guidance_flags(task)]
    run, choice = parse_arguments([InpaintArguments, RewardArguments], flags)
    (reward, _), inpainter = choice.make(run.device), run.inpainter()
    pictures = torch.from_numpy(np.load(task.needs[0] / PICTURES)["pictures"]).permute(0, 3, 1, 2)
    yield
    mended = [mend(picture, caption, str(row), run, reward, inpainter).picture
              for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True))]  # fmt: skip
    yield torch.stack(mended).permute(0, 2, 3, 1).numpy()


def reward_kwargs(config: str) -> Mapping[str, Any]:
    """Of the reward that a config trains on."""
    return yaml.safe_load(Path(config).read_text(encoding="utf-8"))["reward_kwargs"]


if __name__ == "__main__":
    task = Task.read(Path(sys.argv[1]))
    task.finish(draw)
