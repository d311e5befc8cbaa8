"""`python -m finetune.guide`: what it writes, how it goes on, and what it refuses before it loads a model."""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import guide
from finetune.paired import paired_interval
from reward.arguments import ArgumentsError
from reward.feedback import Reward
from reward.folder_lock import FolderInUseError, taken
from rl.checkpoints import RUN_CONFIG
from rl.keyed import keyed_generator
from tests.finetune.conftest import write_lora
from tests.rl.conftest import make_pipeline

ROOT = Path(__file__).parents[2]

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
        (["--base_adapters", "nowhere"], "there is no LoRA folder nowhere"),
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
    unknown = ("weights of", "base_adapters")  # in earlier versions
    before = {name: value for name, value in config.items() if not name.startswith(unknown)}
    (tmp_path / "out" / RUN_CONFIG).write_text(json.dumps(before))
    guide.main(argv)


def test_intervals_are_over_prompts_and_not_over_their_pictures(folder, tmp_path, capsys):
    argv = command(folder, tmp_path / "out", "--num_generations", "3")
    guide.main(argv)
    changes = [row["with"]["red"] - row["without"]["red"] for row in lines(tmp_path / "out").values()]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["n"], summary["prompts"]) == (9, 3)
    assert summary["figures"]["red"]["interval"] == pytest.approx(
        paired_interval([np.array(changes).reshape(3, 3).mean(axis=1)])[1:]
    )
    assert "their rise is no evidence of better pictures; name others in eval_rewards" in capsys.readouterr().out
    guide.main(command(folder, tmp_path / "one", "--prompts", "a red circle", "--num_generations", "2"))
    assert "no intervals: they are over prompts, and there is one" in capsys.readouterr().out


def test_another_number_of_pictures_in_the_sheet_makes_it_anew(folder, tmp_path, capsys, monkeypatch):
    guide.main(command(folder, tmp_path))
    three, rows = pixels(tmp_path / "sheet.png").shape[1], lines(tmp_path)
    monkeypatch.setattr(guide, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    guide.main(command(folder, tmp_path, "--num_sheet", "1"))
    assert pixels(tmp_path / "sheet.png").shape[1] < three / 2
    assert lines(tmp_path) == rows
    capsys.readouterr()
    guide.main(command(folder, tmp_path, "--num_sheet", "1"))
    assert "nothing to do" in capsys.readouterr().out


def test_no_prompts_are_refused_before_anything_is_begun(folder, tmp_path):
    config = tmp_path / "none.yaml"
    config.write_text("prompts: []\n")
    argv = command(folder, tmp_path / "out")
    place = argv.index("--prompts")
    with pytest.raises(ValueError, match="prompts is empty; give at least one"):
        guide.main(["--config", str(config), *argv[:place], *argv[place + 4 :]])
    assert not (tmp_path / "out").exists()


def test_a_tuned_policy_is_guided(folder, tmp_path):
    lora = write_lora(folder, tmp_path / "lora")
    argv = command(folder, tmp_path / "out", "--base_adapters", lora, "--prompts", "a red circle")
    guide.main(argv)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = [keyed_generator(0, "guide", 0)]
    how = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    plain = pipeline(["a red circle"], generator=generator, **how).images[0]
    pipeline.load_lora_weights(lora)
    tuned = pipeline(["a red circle"], generator=[keyed_generator(0, "guide", 0)], **how).images[0]
    ours = pixels(tmp_path / "out" / "without" / "00000.png")
    off = [np.abs(ours - (one * 255).permute(1, 2, 0).numpy()).max() for one in (tuned, plain)]
    assert off[0] <= 1 < 5 < off[1]

    with pytest.raises(ValueError, match=r"holds results of other settings \(base_adapters: \['.*lora'\] -> None"):
        guide.main(command(folder, tmp_path / "out", "--prompts", "a red circle"))
    write_lora(folder, tmp_path / "lora", seed=1)
    with pytest.raises(ValueError, match=rf"holds results of other settings \(weights of {lora}: "):
        guide.main(argv)


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--scale", "0.7"], {"scale": 0.7}),
        (["--norm", "raw"], {"norm": "raw"}),
        (["--max_norm", "0.5"], {"max_norm": 0.5}),
        (["--schedule", "falling"], {"schedule": "falling"}),
        (["--guided_steps", "1:2"], {"first": 1, "last": 2}),
        (["--recurrence", "2"], {"recurrence": 2}),
        (["--through_network", "false"], {"through_network": False}),
        (["--eta", "0.5"], {"eta": 0.5}),
        (["--num_inference_steps", "4"], {"steps": 4}),
        (["--resolution", "32"], {"size": (32, 32)}),
        (["--guidance_scale", "3"], {"guidance_scale": 3.0}),
        (["--guidance_scale", "3", "--negative_prompt", "a cat"], {"guidance_scale": 3.0, "negative_prompt": "a cat"}),
        (["--num_generations", "2"], {"prompts": ["a", "a", "b", "b"], "distinct": 4}),
    ],
)
def test_an_option_reaches_the_sampler_and_changes_nothing_else(folder, tmp_path, monkeypatch, more, changed):
    def what_reaches_it(name, *more):
        reached = {}

        def sample(pipeline, prompts, generators, steps, reward, guidance, **settings):
            if guidance:
                distinct = len({one.initial_seed() for one in generators})
                reached.update(settings, **asdict(guidance), steps=steps, prompts=prompts, distinct=distinct)
            return torch.rand(len(prompts), 3, 16, 16)

        monkeypatch.setattr(guide, "sample", sample)
        guide.main(command(folder, tmp_path / name, "--batch_size", "4", "--prompts", "a", "b", *more))
        return reached

    assert what_reaches_it("changed", *more) == what_reaches_it("plain") | changed


def test_rich_feedback_guides(tmp_path):
    """Scores, a heatmap and words, by the predictor of the small world; other rewards here are toys."""
    settings = {
        "model": str(ROOT / "tinyworld/assets/rahf"), "score_weights": {"plausibility": 0.5, "alignment": 1.0},
        "penalty_weights": {"implausibility": 1.0}, "word_weight": 1.0,
    }  # fmt: skip
    guide.main([
        "--pipeline", str(ROOT / "tinyworld/assets/sd"), "--output_dir", str(tmp_path), "--scale", "0.1",
        "--reward", "reward.rich:RichReward", "--reward_kwargs", json.dumps(settings), "--num_inference_steps", "4",
        "--guidance_scale", "1", "--prompts", "a red circle above a blue square", "a green triangle",
    ])  # fmt: skip
    for row in lines(tmp_path).values():
        assert not np.array_equal(*(pixels(tmp_path / row[side]["file"]) for side in ("without", "with")))
        assert row["with"]["reward"] > row["without"]["reward"] + 0.01
