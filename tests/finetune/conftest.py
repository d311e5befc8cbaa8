"""A pool of a few pictures, a predictor of a few kilobytes, and predictions made by hand."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image

from finetune.predictions import MAP_SIDE, Predictions
from reward.feedback import HEATMAPS, SCORES, tokenize
from rl.policy import StableDiffusionPolicy
from tests.finetune.inpaint_case import blue_spot
from tests.reward.conftest import make_config, model, model_folder, predictor, tokenizer  # noqa: F401
from tests.rl.conftest import make_pipeline, make_unet, make_xl_pipeline

PROMPTS = ["a red circle", "a blue square", "a red square"]


def write_lora(pipeline_folder, folder, seed=0):
    """A LoRA for a pipeline that shows in its pictures; its folder."""
    policy = StableDiffusionPolicy.load(pipeline_folder, lora_rank=2, lora_alpha=8.0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    policy.save_adapter(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture
def write_pictures():
    """Picture files with a table, of random pixels; `sizes` are heights and widths."""

    def write(folder, count=6, sizes=((16, 16), (16, 24)), prompts=PROMPTS, **columns):
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True)
        lines = []
        for index in range(count):
            height, width = sizes[index % len(sizes)]
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            more = {name: values[index] for name, values in columns.items()}
            lines.append(json.dumps({"file_name": f"{index}.png", "text": prompts[index % len(prompts)], **more}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return write


@pytest.fixture
def make_predictions():
    """Predictions in which every value is 0.5 and no word is misaligned, but for what is given: (N,) each, or `maps`,
    `features`, `misaligned`."""

    def make(count, prompts=None, **given):
        prompts = prompts or ["a red circle"] * count
        values = {name: np.full(count, 0.5, dtype=np.float32) for name in (*SCORES, *HEATMAPS, "misaligned_words")}
        values |= {name: np.array(given[name], dtype=np.float32) for name in values.keys() & given.keys()}
        tokens = [tokenize(prompt) for prompt in prompts]
        maps = {name: np.zeros((count, MAP_SIDE, MAP_SIDE), dtype=np.uint8) for name in HEATMAPS}
        features = torch.randn(count, 8, generator=torch.Generator().manual_seed(0)).numpy()
        return Predictions(
            names=[f"{index}.png" for index in range(count)],
            prompts=prompts,
            values=values,
            tokens=tokens,
            misaligned=given.get("misaligned", [np.zeros(len(words), dtype=np.float32) for words in tokens]),
            maps=maps | given.get("maps", {}),
            features=np.array(given.get("features", features), dtype=np.float16),
            word_threshold=0.4,
        )

    return make


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Every family that works, with 4 channels and with 9."""
    root = tmp_path_factory.mktemp("inpaint")
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    folders = {"sd": make_pipeline(root / "sd", scheduler), "xl": make_xl_pipeline(root / "xl")}
    for name, kind, changes in (
        ("sd", StableDiffusionInpaintPipeline, {"requires_safety_checker": False, "safety_checker": None}),
        ("xl", StableDiffusionXLInpaintPipeline, {"add_watermarker": False}),
    ):
        pipeline = kind.from_pretrained(folders[name], **changes)
        pipeline.unet = make_unet(**dict(pipeline.unet.config) | {"in_channels": 9})
        pipeline.save_pretrained(root / f"{name}9")
        folders[f"{name}9"] = str(root / f"{name}9")
    return folders


@pytest.fixture
def album(tmp_path):
    """Three pictures with prompts: two with a blue spot, one without."""
    folder = tmp_path / "album"
    folder.mkdir()
    pictures = {"spot": blue_spot(), "clean": blue_spot(rows=slice(0, 0)), "wide": blue_spot((16, 24))}
    for name, picture in pictures.items():
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    rows = [json.dumps({"file_name": f"{name}.png", "prompt": "a red circle"}) for name in pictures]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def given(write_pictures, model_folder, tmp_path):  # noqa: F811 - `model_folder` is a fixture, imported above
    """Settings of a selection from a folder."""
    return {
        "pictures": write_pictures(tmp_path / "pictures"), "model": model_folder, "output_dir": tmp_path / "chosen",
        "rules": {"some": {"random": 3}}, "use_cpu": True,
    }  # fmt: skip


@pytest.fixture
def drawn(pipeline_folder, model_folder, prompt_file, tmp_path):  # noqa: F811 - `model_folder` is a fixture, imported above
    """Settings of a selection from pictures that are drawn: 6 of them, in batches of 4."""
    return {
        "pictures": tmp_path / "pool", "policy": pipeline_folder, "prompts": prompt_file, "model": model_folder,
        "num_generations": 2, "num_inference_steps": 2, "generation_batch_size": 4, "use_cpu": True,
        "output_dir": tmp_path / "chosen", "rules": {"best": {"best_of": "overall"}},
    }  # fmt: skip
