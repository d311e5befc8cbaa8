"""The problem region drawn again: choice, bookkeeping, pipelines, bad input, the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from finetune import inpaint
from finetune.inpaint_arguments import InpaintArguments
from finetune.inpainter import Inpainter
from finetune.mending import FIXED, NO_BETTER, NOTHING, TOO_LARGE, mend
from finetune.paired import paired_interval
from finetune.pictures_to_fix import check_source, each_once
from reward.arguments import ArgumentsError
from reward.feedback import Reward
from reward.folder_lock import FolderInUseError, taken
from reward.sources import Picture
from rl.checkpoints import RUN_CONFIG
from rl.rollout import keyed_generator
from tests.finetune.conftest import write_lora
from tests.rl.conftest import make_pipeline, make_unet, make_xl_pipeline

REWARD = ["--reward", "tests.finetune.test_inpaint:Blue"]


class Blue:
    """Blue is wrong, where it is; a picture without is worth 1."""

    differentiable = True

    def __call__(self, images, prompts):
        blue = images[:, 2]
        return Reward(total=torch.ones(len(images)), penalties={"blue": blue}, terms={"blue": blue.mean((1, 2))})


class NoMaps:
    def __call__(self, images, prompts):
        return Reward(total=images.mean(dim=(1, 2, 3)))


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


class Painter:
    """Draws candidates of one grey after another, those of each call by its number."""

    def __init__(self, *calls):
        self.calls, self.shares, self.seeds = list(calls), [], []

    def __call__(self, picture, share, prompt, generators):
        self.shares.append(share)
        self.seeds.append([one.initial_seed() for one in generators])
        return torch.stack([torch.full_like(picture, value) for value in self.calls.pop(0)])


# ---- Which candidate is kept ----


def test_the_best_candidate_is_kept_and_mended_again():
    painter = Painter([0.9, 0.6, 0.8], [0.3, 0.2, 0.4])
    picture = blue_spot()
    mended = mend(picture, "a red circle", "one", arguments(), Blue(), painter)
    assert mended.status == FIXED
    assert [one.kept for one in mended.rounds] == [1, 1]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert (mended.picture[:, inside] == 51).all()
    assert torch.equal(mended.picture[:, ~inside], picture[:, ~inside])
    assert torch.equal(mended.share, inside.float())
    assert float(mended.before.objective) == pytest.approx(1 - 1 / 16)
    assert float(mended.after.objective) == pytest.approx(1 - 0.2 / 16, abs=1e-4)
    assert len({seed for call in painter.seeds for seed in call}) == 6


def test_a_picture_is_never_kept_that_is_not_better():
    picture = blue_spot()
    picture[2, 4:8, 4:8] = 200
    mended = mend(picture, "a", "one", arguments(), Blue(), Painter([1.0, 0.9, 1.0]))
    assert mended.status == NO_BETTER
    assert torch.equal(mended.picture, picture)
    assert torch.equal(mended.after.objective, mended.before.objective)
    assert [one.kept for one in mended.rounds] == [None]
    assert mended.share.sum() == 16  # what was tried


class RoundsByBatch(Blue):
    """A reward that a picture gets more of, or less, in larger company, as rounding may have it."""

    def __init__(self, sign):
        self.sign, self.asked = sign, []

    def __call__(self, images, prompts):
        self.asked.append(images)
        said = super().__call__(images, prompts)
        return replace(said, total=said.total + self.sign * 1e-4 * len(images))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [6]), (6, [6]), (5, [4, 4]), (3, [3, 3, 3]), (1, [2] * 5)])
def test_other_company_alone_makes_no_candidate_better(sign, batch_size, sizes):
    """Candidates are compared in questions of one size, each of which holds the picture."""
    picture, reward = blue_spot(), RoundsByBatch(sign)
    run = arguments(num_candidates=5, batch_size=batch_size)
    drawn = mend(picture, "a", "one", run, reward, lambda picture, *_: torch.stack([picture] * 5))
    assert drawn.status == NO_BETTER
    assert drawn.rounds[0].scores == (float(drawn.before.objective),) * 5
    assert [len(images) for images in reward.asked[1:]] == sizes  # the first one asks where it is wrong
    assert all(torch.equal(images[0], picture / 255) for images in reward.asked)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 8])
@pytest.mark.parametrize("best", [0, 2, 4])
def test_the_best_is_found_in_whichever_question_it_was(batch_size, best):
    shades = [0.9] * 5
    shades[best] = 0.2
    run = arguments(num_candidates=5, batch_size=batch_size, rounds=1)
    mended = mend(blue_spot(), "a", "one", run, Blue(), Painter(shades))
    assert mended.rounds[0].kept == best
    assert mended.rounds[0].scores == pytest.approx([1 - shade / 16 for shade in shades], abs=1e-3)
    assert (mended.picture[2, 4:8, 4:8] == 51).all()
    assert float(mended.after.objective) == mended.rounds[0].scores[best]
    assert float(mended.before.objective) == pytest.approx(1 - 1 / 16)


def test_min_gain_and_a_second_round_that_is_no_better():
    gain = 0.5 / 16  # from full to half blue
    kept = mend(blue_spot(), "a", "one", arguments(min_gain=gain - 0.01), Blue(), Painter([0.9, 0.5, 1.0], [0.9] * 3))
    assert kept.status == FIXED
    assert [one.kept for one in kept.rounds] == [1, None]
    assert (kept.picture[2, 4:8, 4:8] == 128).all()
    left = mend(blue_spot(), "a", "one", arguments(min_gain=gain + 0.01), Blue(), Painter([0.9, 0.5, 1.0]))
    assert left.status == NO_BETTER


def test_an_empty_region_and_one_that_is_too_large_keep_the_picture():
    red = blue_spot(rows=slice(0, 0))
    nothing = mend(red, "a", "one", arguments(), Blue(), Painter())
    assert nothing.status == NOTHING
    assert torch.equal(nothing.picture, red)
    assert nothing.share.sum() == 0
    full = blue_spot(rows=slice(0, 16), columns=slice(0, 16))
    kept = mend(full, "a", "one", arguments(), Blue(), Painter())
    assert kept.status == TOO_LARGE
    assert torch.equal(kept.picture, full)
    allowed = mend(full, "a", "one", arguments(max_area=1.0), Blue(), Painter([0.1] * 3))
    assert allowed.status == FIXED
    assert (allowed.picture == 26).all()


def test_thresholds_of_maps_that_the_reward_has_not():
    with pytest.raises(ValueError, match="thresholds names blue, but the reward's penalty maps are none"):
        mend(blue_spot(), "a", "one", arguments(), NoMaps(), Painter())
    with pytest.raises(ValueError, match="thresholds names implausibility, but the reward's penalty maps are blue"):
        mend(blue_spot(), "a", "one", arguments(thresholds={"implausibility": 0.1}), Blue(), Painter())


# ---- Pipelines ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
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


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["sd", "sd9", "xl", "xl9"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_family_draws_by_its_noise_alone(folders, family, guidance_scale):
    draw = Inpainter.load(
        folders[family], dtype=torch.float32, device="cpu", steps=2, guidance_scale=guidance_scale, batch_size=2
    )
    picture = blue_spot((20, 37)).float() / 255  # of no multiple of anything
    share = torch.zeros(20, 37)
    share[3:9, 5:20] = 1
    sources = [[keyed_generator(0, one) for one in order] for order in ((0, 1, 2), (0, 1), (5, 6))]
    three, two, others = (draw(picture, share, "a red circle", source) for source in sources)
    for draw.batch_size in (1, 3):
        again = draw(picture, share, "a red circle", [keyed_generator(0, one) for one in range(3)])
        assert torch.allclose(again, three, atol=1e-5)
    assert three.shape == (3, 3, 20, 37)
    assert 0 <= three.min() <= three.max() <= 1
    assert torch.allclose(three[:2], two, atol=1e-5)
    assert not torch.allclose(two, others, atol=1e-3)
    assert not torch.allclose(two[0], two[1], atol=1e-3)
    elsewhere = picture.clone()
    elsewhere[0, 12:] = 0.9
    assert not torch.allclose(draw(elsewhere, share, "a red circle", sources[1])[:, :, 3:9, 5:20], two[:, :, 3:9, 5:20],
                              atol=1e-4), "what is drawn fits the rest of the picture"  # fmt: skip


def test_latents_outside_the_mask_are_the_pictures_own(folders):
    """With a text-to-image network the blended latent decodes, far from the mask, to what the picture's own does."""
    draw = Inpainter.load(folders["sd"], dtype=torch.float32, device="cpu", steps=3)
    with torch.no_grad():  # encodings without spread, as those of real pipelines
        draw.pipeline.vae.quant_conv.weight[4:] = 0
        draw.pipeline.vae.quant_conv.bias[4:] = -30
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    share = torch.zeros(64, 64)
    share[:8, :8] = 1
    first, second = draw(picture, share, "a red circle", [keyed_generator(0, 0), keyed_generator(0, 1)])
    changed = (first - second).abs().amax(dim=0)
    assert changed[:8, :8].max() > 20 * changed[40:, 40:].max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["sd", "sd9", "xl", "xl9"])
def test_a_lora_of_the_text_to_image_pipeline_is_added(folders, tmp_path, family):
    trained_on = folders[family.removesuffix("9")]
    lora = write_lora(trained_on, tmp_path / "lora")
    tuned = DiffusionPipeline.from_pretrained(trained_on)
    before = {name: weight.clone() for name, weight in tuned.unet.state_dict().items()}
    tuned.load_lora_weights(lora)
    tuned.fuse_lora()
    tuned.unload_lora_weights()
    added = {name: weight - before[name] for name, weight in tuned.unet.state_dict().items()}
    assert sum(bool(change.any()) for change in added.values()) > 8

    how = {"dtype": torch.float32, "device": "cpu", "steps": 2}
    folder = shutil.copytree(folders[family], tmp_path / "pipeline")
    DDIMScheduler(clip_sample=True, steps_offset=1).save_pretrained(folder / "scheduler")  # text to image unsets it
    plain, ours = (Inpainter.load(str(folder), base_adapters=ones, **how).pipeline for ones in ([], [lora]))
    for name, weight in plain.unet.state_dict().items():
        change = ours.unet.state_dict()[name] - weight
        expected = added[name] if added[name].shape == weight.shape else torch.zeros_like(weight)  # but conv_in
        assert torch.allclose(change, expected, atol=1e-6), name
    assert ours.scheduler.config == plain.scheduler.config
    assert type(ours) is type(plain)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": []}, "neither is given"),
        ({"pictures": "somewhere"}, "both are given"),
        ({"thresholds": {}}, "thresholds is empty"),
        ({"thresholds": {"blue": "high"}}, "that of 'blue' is 'high'"),
        ({"thresholds": {"blue": -0.1}}, "that of 'blue' is -0.1"),
        ({"thresholds": {"blue": float("nan")}}, "that of 'blue' is nan"),
        ({"num_candidates": 0}, "num_candidates is 0; it must be at least 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"strength": 0.0}, r"strength is 0.0; it must lie in \(0, 1\]"),
        ({"strength": 0.01}, "strength 0.01 of 50 steps is less than one step"),
        ({"max_area": 1.5}, "max_area is 1.5"),
        ({"feather": -0.1}, "feather is -0.1; it must not be negative"),
        ({"eta": 2.0}, "eta is 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        arguments(**changes)


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


def test_a_tree_of_pictures_is_named_by_its_places(album):
    """As `finetune.select` writes it: the column is `text`, and names are those of other folders' pictures too."""
    for folder in ("x", "y"):
        (album / folder).mkdir()
        shutil.copy(album / "spot.png", album / folder / "1.png")
    for name in ("spot", "clean", "wide"):
        (album / f"{name}.png").unlink()
    rows = [json.dumps({"file_name": f"{place}/1.png", "text": "a red circle"}) for place in ("x", "./y")]
    (album / "metadata.jsonl").write_text("\n".join(rows))
    source = InpaintArguments(pipeline="unused", output_dir="unused", pictures=str(album)).source()
    assert list(check_source(source)) == ["x/1", "y/1"]


def test_a_scheduler_without_eta_says_so(folders, tmp_path, caplog):
    how = {"output_dir": str(tmp_path), "images": ["a.png"], "prompts": ["a"], "eta": 1.0}
    InpaintArguments(pipeline=folders["sd"], **how).inpainter()
    assert "is ignored" not in caplog.text
    shutil.copytree(folders["sd"], tmp_path / "euler")
    EulerDiscreteScheduler(steps_offset=1).save_pretrained(tmp_path / "euler" / "scheduler")
    index = tmp_path / "euler" / "model_index.json"
    named = json.loads(index.read_text()) | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index.write_text(json.dumps(named))
    InpaintArguments(pipeline=str(tmp_path / "euler"), **how).inpainter()
    assert "eta=1.0 is ignored: EulerDiscreteScheduler has no such setting" in caplog.text


def command(folders, album, out, *more, source=None):
    source = source or ["--pictures", str(album)]
    return [
        *source, "--pipeline", folders["sd"], "--output_dir", str(out), *REWARD, "--thresholds", '{"blue": 0.5}',
        "--num_inference_steps", "2", "--num_candidates", "2", "--guidance_scale", "1", "--dilate", "0",
        "--feather", "0", *more,
    ]  # fmt: skip


def test_pictures_without_prompts_are_named(folders, album, tmp_path):
    (album / "metadata.jsonl").write_text(json.dumps({"file_name": "spot.png", "prompt": "a red circle"}))
    with pytest.raises(ValueError, match="have no prompts; give them a line in metadata"):
        inpaint.main(command(folders, album, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    images = ["--images", str(album / "spot.png"), str(album / "wide.png"), "--prompts", "a red circle"]
    with pytest.raises(ValueError, match="2 images were given with 1 prompts"):
        inpaint.main(command(folders, album, tmp_path / "out", source=images))


def test_a_table_whose_columns_do_not_fit_says_what_can_be_done(folders, album, tmp_path):
    (album / "metadata.jsonl").unlink()
    (album / "prompts.csv").write_text("file_name,words\nspot.png,a red circle\nclean.png,a\nwide.png,a\n")
    complaint = r"has the columns file_name, words; it needs file_name .* --prompt_column"
    with pytest.raises(ValueError, match=complaint) as refused:
        inpaint.main(command(folders, album, tmp_path / "out"))
    assert "--uid_column" not in str(refused.value)
    inpaint.main(command(folders, album, tmp_path / "out", "--prompt_column", "words"))
    assert lines(tmp_path / "out")["spot"]["prompt"] == "a red circle"


def test_an_unreadable_picture_is_named(folders, album, tmp_path):
    (album / "clean.png").write_bytes((album / "clean.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="the picture clean cannot be used"):
        inpaint.main(command(folders, album, tmp_path / "out"))
    nowhere = ["--images", str(album / "nowhere.png"), "--prompts", "a red circle"]
    with pytest.raises(ValueError, match="there is no picture file for nowhere"):
        inpaint.main(command(folders, album, tmp_path / "out", source=nowhere))


class Rows:
    """A source of these pictures: (uid, file, prompt)."""

    def __init__(self, *rows):
        self.rows = rows

    def pictures(self, wanted):
        return (Picture(uid, Path(file).read_bytes(), prompt) for uid, file, prompt in self.rows if uid in wanted)


@pytest.mark.parametrize("uid", ["../stolen", "a/../../stolen", "/stolen", "", "nul\0"])
def test_a_name_that_leads_out_of_the_results_is_refused(album, uid):
    """A data set from elsewhere says what its pictures are called, and results are written to files of these names."""
    with pytest.raises(ValueError, match="is no file's in their folder"):
        check_source(Rows((uid, album / "spot.png", "a red circle")))
    assert list(check_source(Rows(("a/b..c", album / "spot.png", "a red circle")))) == ["a/b..c"]


def test_a_picture_of_two_pairs_is_mended_once_and_another_of_its_name_is_refused(album):
    """As Pick-a-Pic has them."""
    first, second = ("one", album / "spot.png", "a red circle"), ("two", album / "wide.png", "a red circle")
    source = Rows(first, second, first)
    assert list(check_source(source)) == ["one", "two"]
    assert [picture.uid for picture in each_once(source, {"one"})] == ["one"]
    with pytest.raises(ValueError, match="two pictures are called one"):
        check_source(Rows(first, ("one", album / "wide.png", "a red circle")))


def test_more_steps_than_the_schedule_has_delete_nothing(folders, album, tmp_path):
    out = tmp_path / "out"
    inpaint.main(command(folders, album, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    wrong = ["--num_inference_steps", "5000", "--overwrite_output_dir", "true"]
    with pytest.raises(ValueError, match="num_inference_steps is 5000; the pipeline's schedule has 1000 steps"):
        inpaint.main(command(folders, album, out, *wrong))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_unsupported_family_is_named_with_those_that_work(folders, album, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders["sd"], other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"is a FluxPipeline; what works here is StableDiffusionPipeline .*XLInpaint"):
        inpaint.main(command(folders, album, tmp_path / "out", "--pipeline", str(other)))


def test_a_lora_that_is_not_there_is_refused_before_a_model_is_loaded(folders, album, tmp_path, monkeypatch):
    monkeypatch.setattr(InpaintArguments, "inpainter", lambda run: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="there is no LoRA folder nowhere"):
        inpaint.main(command(folders, album, tmp_path / "out", "--base_adapters", "nowhere"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_setting_and_missing_maps_are_refused(folders, album, tmp_path):
    with pytest.raises(ArgumentsError, match=r"`--treshold` .nearest valid name: `thresholds`"):
        inpaint.main(command(folders, album, tmp_path / "out", "--treshold", "1"))
    with pytest.raises(ValueError, match="the reward's penalty maps are none"):
        inpaint.main(command(folders, album, tmp_path / "out", "--reward", "tests.finetune.test_inpaint:NoMaps"))
    assert not (tmp_path / "out").exists()


# ---- The command ----


def lines(out):
    return {row["uid"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def pixels(file):
    return np.asarray(Image.open(file))


def test_the_command_mends_a_folder_and_goes_on_where_it_was_stopped(folders, album, tmp_path, capsys):
    out = tmp_path / "out"
    argv = command(folders, album, out, "--eval_rewards", '{"other": "tests.finetune.test_inpaint:NoMaps"}')
    inpaint.main(argv)
    rows = lines(out)
    assert set(rows) == {"spot", "clean", "wide"}
    assert rows["clean"]["status"] == NOTHING
    for uid, row in rows.items():
        assert row["after"]["reward"] >= row["before"]["reward"]
        old, new, mask = pixels(album / f"{uid}.png"), *(pixels(out / row["files"][one]) for one in ("picture", "mask"))
        assert np.array_equal(new[mask == 0], old[mask == 0])
        assert (row["status"] == FIXED) == (not np.array_equal(new, old))
        assert row["after"]["other.total"] == pytest.approx(new.mean() / 255, abs=1e-3)
        assert (out / row["files"]["sheet"]).is_file()
    assert rows["spot"]["status"] == rows["wide"]["status"] == FIXED
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["n"], summary["status"][FIXED]) == (3, 2)

    whole = (out / "results.jsonl").read_text()
    kept = whole.splitlines(keepends=True)
    (out / "results.jsonl").write_text(kept[0] + kept[1][:30])  # killed while it wrote the second line
    pictures = {uid: (out / row["files"]["picture"]).read_bytes() for uid, row in rows.items()}
    inpaint.main(argv)
    assert lines(out) == rows
    assert {uid: (out / row["files"]["picture"]).read_bytes() for uid, row in rows.items()} == pictures
    capsys.readouterr()
    inpaint.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    with taken(out), pytest.raises(FolderInUseError, match="in use by another run"):
        inpaint.main(argv)

    lines_of_table = (album / "metadata.jsonl").read_text()
    (album / "metadata.jsonl").write_text(lines_of_table.replace("red", "green"))
    with pytest.raises(ValueError, match=r"results of another picture or prompt called \w+ \(3 such pictures\)"):
        inpaint.main(argv)
    (album / "metadata.jsonl").write_text(lines_of_table)
    with pytest.raises(ValueError, match=r"holds results of other settings .*seed: 0 -> 1"):
        inpaint.main([*argv, "--seed", "1"])
    inpaint.main([*argv, "--seed", "1", "--overwrite_output_dir", "true"])
    assert lines(out)["spot"]["rounds"] != rows["spot"]["rounds"]


def test_a_summary_that_is_missing_or_of_fewer_pictures_is_written(folders, album, tmp_path, monkeypatch):
    out = tmp_path / "out"
    inpaint.main(command(folders, album, out))
    whole, rows = (out / "summary.json").read_text(), lines(out)
    monkeypatch.setattr(InpaintArguments, "inpainter", lambda run: pytest.fail("a model was loaded"))
    (out / "summary.json").unlink()  # killed between the last picture and the summary
    inpaint.main(command(folders, album, out))
    assert (out / "summary.json").read_text() == whole
    (out / "summary.json").write_text(whole.replace('"n": 3', '"n": 2'))  # the same, after pictures were added
    inpaint.main(command(folders, album, out))
    assert (out / "summary.json").read_text() == whole
    assert lines(out) == rows


def test_results_that_would_be_mended_or_delete_the_pictures_are_refused(folders, album, tmp_path, monkeypatch):
    monkeypatch.setattr(InpaintArguments, "inpainter", lambda run: pytest.fail("a model was loaded"))
    for out in (album, album / "fixed", tmp_path / "album" / ".." / "album" / "fixed"):
        with pytest.raises(ValueError, match=r"lies in the folder of the pictures.*give an --output_dir outside it"):
            inpaint.main(command(folders, album, out, "--overwrite_output_dir", "true"))
    shutil.copytree(album, tmp_path / "out" / "pictures")
    single = ["--images", str(tmp_path / "out" / "pictures" / "spot.png"), "--prompts", "a red circle"]
    for source in (["--pictures", str(tmp_path / "out" / "pictures")], single):
        with pytest.raises(ValueError, match="lies where the results are written"):
            inpaint.main(command(folders, album, tmp_path / "out", "--overwrite_output_dir", "true", source=source))
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == len(list(album.iterdir())) == 4


def test_results_of_a_pipeline_that_was_trained_anew_are_not_gone_on_with(folders, album, tmp_path):
    pipeline = shutil.copytree(folders["sd"], tmp_path / "pipeline")
    argv = command({"sd": str(pipeline)}, album, tmp_path / "out")
    inpaint.main(argv)
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=rf"holds results of other settings \(weights of {pipeline}: "):
        inpaint.main(argv)


def test_single_pictures_are_mended_as_in_a_folder(folders, album, tmp_path):
    inpaint.main(command(folders, album, tmp_path / "folder"))
    single = ["--images", str(album / "spot.png"), "--prompts", "a red circle"]
    inpaint.main(command(folders, album, tmp_path / "single", source=single))
    file = Path("pictures/spot.png")
    assert (tmp_path / "single" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes()


def test_results_of_another_lora_are_not_gone_on_with(folders, album, tmp_path):
    lora = write_lora(folders["sd"], tmp_path / "lora")
    argv = command(folders, album, tmp_path / "out")
    inpaint.main(argv)
    with pytest.raises(ValueError, match=r"holds results of other settings \(base_adapters: None -> \['.*lora'\]"):
        inpaint.main([*argv, "--base_adapters", lora])
    inpaint.main(command(folders, album, tmp_path / "tuned", "--base_adapters", lora))
    drawn = [pixels(tmp_path / out / "pictures/spot.png") for out in ("out", "tuned")]
    assert not np.array_equal(*drawn)
    write_lora(folders["sd"], tmp_path / "lora", seed=1)
    with pytest.raises(ValueError, match=rf"holds results of other settings \(weights of {lora}: "):
        inpaint.main(command(folders, album, tmp_path / "tuned", "--base_adapters", lora))
    config = tmp_path / "out" / RUN_CONFIG  # of a version without this setting
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "base_adapters"}))
    inpaint.main(argv)


class Redness:
    """Another opinion, of which a picture loses where it is drawn black."""

    def __call__(self, images, prompts):
        return Reward(total=images[:, 0].mean(dim=(1, 2)))


def test_what_got_worse_by_a_reward_that_looks_on_is_told(folders, album, tmp_path, monkeypatch, capsys):
    def black(run):
        return lambda picture, share, prompt, generators: torch.zeros(len(generators), *picture.shape)

    monkeypatch.setattr(InpaintArguments, "inpainter", black)
    looking_on = ["--eval_rewards", '{"redness": "tests.finetune.test_inpaint:Redness"}']
    (album / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{name}.png", "prompt": name}) for name in ("spot", "clean", "wide"))
    )
    inpaint.main(command(folders, album, tmp_path, *looking_on))
    said = capsys.readouterr().out
    rows = lines(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, sign, worse in (("reward", 1, 0), ("redness.total", -1, 2 / 3)):
        changes = np.array([row["after"][name] - row["before"][name] for row in rows.values()])
        figure = summary["figures"][name]
        assert sign * figure["change"] > 0
        assert figure["change"] == pytest.approx(changes.mean())
        assert figure["interval"] == pytest.approx(paired_interval([changes])[1:])
        assert figure["worse"] == pytest.approx(worse)
    assert "redness.total" in said
    assert "66.7%" in said
    assert "2 fixed" in said
    assert "it cannot fall, and its rise is no evidence of better pictures; what redness say does" in said


# ---- Data sets ----


def data_set(album, **columns):
    """The album as a `datasets` data set without uids, and `columns` of three values beside."""
    names = ("spot", "clean", "wide")
    rows = {
        "picture": [{"bytes": (album / f"{name}.png").read_bytes(), "path": None} for name in names],
        "text": ["a red circle", "a blue circle", "a green circle"],
    }
    return datasets.Dataset.from_dict(rows | columns).cast_column("picture", datasets.Image())


@pytest.mark.parametrize("kind", ["parquet", "saved", "splits"])
def test_a_data_set_without_uids_is_mended_row_by_row(folders, album, tmp_path, kind):
    rows, place, more = data_set(album), tmp_path / "data", []
    if kind == "parquet":
        place.mkdir()
        rows.to_parquet(str(place / "train-00000-of-00001.parquet"))
    elif kind == "saved":
        rows.save_to_disk(str(place))
    else:
        datasets.DatasetDict({"dev": rows}).save_to_disk(str(place))
        with pytest.raises(ValueError, match="no split 'train'; it has dev"):
            inpaint.main(command(folders, place, tmp_path / "out"))
        more = ["--split", "dev"]
    inpaint.main(command(folders, place, tmp_path / "out", *more))
    found = lines(tmp_path / "out")
    assert [(uid, row["prompt"]) for uid, row in found.items()] == [
        ("00000000", "a red circle"), ("00000001", "a blue circle"), ("00000002", "a green circle"),
    ]  # fmt: skip
    assert [row["status"] for row in found.values()] == [FIXED, NOTHING, FIXED]
    assert pixels(tmp_path / "out/pictures/00000002.png").shape == (16, 24, 3)


def test_what_a_data_set_lacks_is_named_with_options_that_there_are(folders, album, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    data_set(album).rename_column("text", "words").to_parquet(str(data / "0.parquet"))
    for place, complaint in (
        (data, "no column text or prompt or caption, only picture, words; name the column by --prompt_column"),
        (data / "0.parquet", r"has no columns uid and image \(it has picture, words\).*name the folder that it is in"),
    ):
        with pytest.raises(ValueError, match=complaint) as refused:
            inpaint.main(command(folders, place, tmp_path / "out"))
        assert "--uid_column" not in str(refused.value)
    inpaint.main(command(folders, data, tmp_path / "out", "--prompt_column", "words"))
    assert len(lines(tmp_path / "out")) == 3


def test_a_data_set_with_uids_goes_by_them_whatever_its_prompts_are_called(folders, album, tmp_path, caplog):
    data = tmp_path / "data"
    data_set(album, uid=["s", "c", "w"]).rename_column("picture", "image").save_to_disk(str(data))
    inpaint.main(command(folders, data, tmp_path / "out", "--split", "test"))
    assert {uid: row["prompt"] for uid, row in lines(tmp_path / "out").items()} == {
        "s": "a red circle", "c": "a blue circle", "w": "a green circle",
    }  # fmt: skip
    assert "split='test' is ignored" in caplog.text
    with pytest.raises(ValueError, match=r"has no column of prompts words; it has .*; name it by --prompt_column"):
        inpaint.main(command(folders, data, tmp_path / "other", "--prompt_column", "words"))


def test_pick_a_pics_prompts_are_in_its_own_column_and_that_is_said(album, tmp_path, caplog):
    file = tmp_path / "pairs.parquet"
    spot = (album / "spot.png").read_bytes()
    pairs = {"image_0_uid": ["a"], "image_1_uid": ["b"], "jpg_0": [spot], "jpg_1": [spot], "caption": ["a red circle"]}
    datasets.Dataset.from_dict(pairs).to_parquet(str(file))
    how = {"pictures": str(file), "images": [], "prompts": []}
    assert list(check_source(arguments(**how).source())) == ["a", "b"]
    assert "is ignored" not in caplog.text
    arguments(**how, prompt_column="words").source()
    assert "prompt_column='words' is ignored: Pick-a-Pic's prompts are in caption" in caplog.text


# ---- Options ----


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--strength", "0.5"], {"strength": 0.5}),
        (["--eta", "0.5"], {"eta": 0.5}),
        (["--num_inference_steps", "4"], {"num_inference_steps": 4}),
        (["--guidance_scale", "3"], {"guidance_scale": 3.0}),
        (
            ["--guidance_scale", "3", "--negative_prompt", "a cat"],
            {"guidance_scale": 3.0, "negative_prompt": ["a cat"] * 4},
        ),
        (["--resolution", "32"], {"height": 32, "width": 32, "image": (4, 3, 32, 32), "mask_image": (1, 1, 32, 32)}),
        (["--batch_size", "2"], {"drawn": [2, 2], "prompt": ["a red circle"] * 2, "image": (2, 3, 16, 16)}),
        (["--num_candidates", "2"], {"drawn": [2], "prompt": ["a red circle"] * 2, "image": (2, 3, 16, 16)}),
    ],
)
def test_an_option_reaches_the_pipeline_and_changes_nothing_else(folders, album, tmp_path, monkeypatch, more, changed):
    def what_reaches_it(name, *more):
        reached, drawn = {}, []

        def call(pipeline, prompt, *, generator, **settings):
            drawn.append(len(generator))
            shapes = {name: tuple(settings.pop(name).shape) for name in ("image", "mask_image")}
            reached.update(settings, **shapes, prompt=prompt, drawn=drawn)
            return SimpleNamespace(images=torch.rand(len(prompt), 3, settings["height"], settings["width"]))

        monkeypatch.setattr(StableDiffusionInpaintPipeline, "__call__", call)
        single = ["--images", str(album / "spot.png"), "--prompts", "a red circle"]
        inpaint.main(
            command(folders, album, tmp_path / name, "--num_candidates", "4", "--rounds", "1", *more, source=single)
        )
        return reached

    assert what_reaches_it("changed", *more) == what_reaches_it("plain") | changed
