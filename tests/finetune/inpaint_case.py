"""What tests of inpainting share: rewards, pictures, the command."""

import json

import numpy as np
import torch
from PIL import Image

from finetune.inpaint_arguments import InpaintArguments
from reward.feedback import Reward

REWARD = ["--reward", "tests.finetune.inpaint_case:Blue"]


class Blue:
    """Blue is wrong, where it is; a picture without is worth 1."""

    differentiable = True

    def __call__(self, images, prompts):
        blue = images[:, 2]
        return Reward(total=torch.ones(len(images)), penalties={"blue": blue}, terms={"blue": blue.mean((1, 2))})


class NoMaps:
    def __call__(self, images, prompts):
        return Reward(total=images.mean(dim=(1, 2, 3)))


class Redness:
    """Another opinion, of which a picture loses where it is drawn black."""

    def __call__(self, images, prompts):
        return Reward(total=images[:, 0].mean(dim=(1, 2)))


def blue_spot(size=(16, 16), rows=slice(4, 8), columns=slice(4, 8)):
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    picture[0] = 40
    picture[2, rows, columns] = 255
    return picture


def arguments(**changes):
    settings = {
        "pipeline": "none", "output_dir": "none", "images": ["a.png"], "prompts": ["a red circle"],
        "thresholds": {"blue": 0.5}, "dilate": 0.0, "feather": 0.0, "num_candidates": 3, "rounds": 2,
    }  # fmt: skip
    return InpaintArguments(**(settings | changes))


def command(families, album, out, *more, source=None):
    source = source or ["--pictures", str(album)]
    return [
        *source, "--pipeline", families["sd"], "--output_dir", str(out), *REWARD, "--thresholds", '{"blue": 0.5}',
        "--num_inference_steps", "2", "--num_candidates", "2", "--guidance_scale", "1", "--dilate", "0",
        "--feather", "0", *more,
    ]  # fmt: skip


def lines(out):
    return {row["uid"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def pixels(file):
    return np.asarray(Image.open(file))
