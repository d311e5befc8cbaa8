"""`python -m finetune.guide`: what it writes, how it goes on, and what it refuses before it loads a model."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import guide
from reward.arguments import ArgumentsError
from reward.feedback import Reward
from rl.checkpoints import RUN_CONFIG
from rl.folder_lock import FolderInUseError, taken
from rl.rollout import keyed_generator
from tests.rl.conftest import make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


class Claims:
    """Says that it is differentiable, as far as its class goes, and is not."""

    def __init__(self):
        self.differentiable = False

    def __call__(self, images, prompts):
        return Reward(total=images.mean(dim=(1, 2, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("guide"))


def command(folder, out, *more):
    return [
        "--pipeline", folder, "--output_dir", str(out), "--reward", "tests.rl.toy_rewards:Redness",
        "--prompts", "a red circle", "a blue square", "a green star", "--num_inference_steps", "3", "--batch_size", "2",
        "--guidance_scale", "1", "--scale", "0.2", *more,
    ]  # fmt: skip


def lines(out):
    return {row["uid"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def pixels(file):
    return np.asarray(Image.open(file)).astype(float)


def test_the_command_draws_pairs_and_goes_on_where_it_was_stopped(folder, tmp_path, capsys):
    out = tmp_path / "out"
    argv = command(folder, out, "--eval_rewards", '{"bright": "tests.rl.toy_rewards:brightness"}')
    guide.main(argv)
    rows = lines(out)
    assert [row["prompt"] for row in rows.values()] == ["a red circle", "a blue square", "a green star"]
    for row in rows.values():
        old, new = (pixels(out / row[side]["file"]) for side in ("without", "with"))
        assert row["with"]["reward"] > row["without"]["reward"]
        assert row["with"]["red"] == pytest.approx(new[..., 0].mean() / 255, abs=1e-5)
        assert row["without"]["bright.total"] == pytest.approx(old.mean() / 255, abs=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == 3
    assert summary["figures"]["reward"]["change"] > 0
    assert all(seconds > 0 for seconds in summary["seconds_a_step_and_picture"].values())
    assert (out / "sheet.png").is_file()

    kept = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(kept[0] + kept[1][:50])  # killed while it wrote the second line
    guide.main(argv)
    again = lines(out)
    assert list(again) == list(rows)
    for uid, row in rows.items():  # other batches, so other roundings
        assert row["with"] == pytest.approx(again[uid]["with"], abs=2e-3)
    capsys.readouterr()
    guide.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    for name in ("summary.json", "sheet.png"):  # killed between the last picture and these
        (out / name).unlink()
        guide.main(argv)
        assert json.loads((out / "summary.json").read_text())["n"] == 3
        assert (out / "sheet.png").is_file()
    assert lines(out) == again
    with taken(out), pytest.raises(FolderInUseError, match="in use by another run"):
        guide.main(argv)
    with pytest.raises(ValueError, match=r"holds results of other settings \(scale: 0.2 -> 0.1\)"):
        guide.main([*argv, "--scale", "0.1"])


def test_pictures_without_guidance_are_the_pipelines_own(folder, tmp_path):
    guide.main(command(folder, tmp_path, "--eta", "1", "--guidance_scale", "3"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        ["a blue square"], num_inference_steps=3, guidance_scale=3.0, eta=1.0, output_type="pt",
        generator=[keyed_generator(0, "guide", 1)],
    ).images[0]  # fmt: skip
    ours = pixels(tmp_path / "without" / "00001.png")
    assert np.abs(ours - (theirs * 255).round().permute(1, 2, 0).numpy()).max() <= 1


def test_a_pipeline_whose_own_scheduler_cannot_be_guided(folder, tmp_path):
    other = tmp_path / "pndm"
    shutil.copytree(folder, other)
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, prediction_type="v_prediction")
    scheduler.save_pretrained(other / "scheduler")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    with pytest.raises(ValueError, match="PNDMScheduler cannot be guided; set `scheduler` to one of ddim"):
        guide.main(command(str(other), tmp_path / "out"))
    guide.main(command(str(other), tmp_path / "out", "--scheduler", "dpmpp", "--prompts", "a red circle"))
    assert len(lines(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--reward", "tests.rl.toy_rewards:Plain"], "Plain is not differentiable, so its gradient cannot guide"),
        (["--reward", "tests.rl.toy_rewards:brightness"], "brightness is not differentiable"),
        (["--reward", "tests.finetune.test_guide:Claims"], "Claims is not differentiable"),
        (["--scale", "-1"], "scale is -1.0; it must not be negative"),
        (["--guided_steps", "1:9"], "1:9, does not lie within the 3 steps 0:3"),
        (["--guided_steps", "2"], "guided_steps is '2'; write a window of the 3 steps"),
        (["--guided_steps", "a:b"], "guided_steps is 'a:b'"),
        (["--num_inference_steps", "5000"], "num_inference_steps is 5000; the pipeline's schedule has 1000 steps"),
        (["--resolution", "30"], "resolution is 30; this pipeline needs a multiple of 4"),
        (["--recurrence", "-1"], "recurrence is -1"),
        (["--pipeline", "nowhere"], "no pipeline folder nowhere"),
    ],
)
def test_bad_input_is_refused(folder, tmp_path, more, complaint, monkeypatch):
    if more[0] != "--resolution":  # which the network's own config decides
        monkeypatch.setattr(guide, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=complaint):
        guide.main(command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family_and_an_unknown_setting_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"is a FluxPipeline; what works here is StableDiffusionPipeline .*XLPipeline"):
        guide.main(command(str(other), tmp_path / "out"))
    with pytest.raises(ArgumentsError, match=r"`--guided_step` .nearest valid name: `guided_steps`"):
        guide.main(command(folder, tmp_path / "out", "--guided_step", "1:2"))


def test_activation_checkpointing_changes_nothing_but_what_is_computed_twice(folder, tmp_path, monkeypatch):
    prepare, calls = guide.prepare, []

    def counted(run):
        pipeline = prepare(run)
        for block in (pipeline.unet.down_blocks[0].resnets[0], pipeline.vae.decoder.mid_block):
            block.register_forward_pre_hook(lambda block, inputs: calls.append(type(block).__name__))
        return pipeline

    monkeypatch.setattr(guide, "prepare", counted)
    counts = {}
    for name in ("plain", "saved"):
        guide.main(command(folder, tmp_path / name, "--activation_checkpointing", str(name == "saved")))
        counts[name] = Counter(calls)
        calls.clear()
    guided = 3 * 2  # steps, batches
    assert counts["saved"] - counts["plain"] == {"ResnetBlock2D": guided, "UNetMidBlock2D": guided}
    plain, saved = (torch.tensor(pixels(tmp_path / name / "with" / "00000.png")) for name in ("plain", "saved"))
    assert (plain - saved).abs().max() <= 1


def test_a_scheduler_without_eta_says_so(folder, tmp_path, caplog):
    argv = command(folder, tmp_path, "--eta", "1", "--scheduler", "dpmpp", "--prompts", "a red circle")
    guide.main(argv)
    assert "eta=1.0 is ignored: DPMSolverMultistepScheduler has no such setting" in caplog.text
    caplog.clear()
    guide.prepare(guide.GuideArguments(folder, ["a"], str(tmp_path), eta=1.0))
    assert "is ignored" not in caplog.text


def test_results_of_a_pipeline_that_was_trained_anew_are_not_gone_on_with(folder, tmp_path):
    pipeline = shutil.copytree(folder, tmp_path / "pipeline")
    argv = command(str(pipeline), tmp_path / "out", "--prompts", "a red circle")
    guide.main(argv)
    file = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 0.1 for name, weight in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=rf"holds results of other settings \(weights of {pipeline}: "):
        guide.main(argv)
    config = json.loads((tmp_path / "out" / RUN_CONFIG).read_text())
    before = {name: value for name, value in config.items() if "weights of" not in name}  # as before they were noted
    (tmp_path / "out" / RUN_CONFIG).write_text(json.dumps(before))
    guide.main(argv)
