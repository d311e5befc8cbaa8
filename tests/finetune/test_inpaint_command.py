"""The problem region drawn again: the command, its results and its options."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
)

from finetune import inpaint
from finetune.inpaint_arguments import InpaintArguments
from finetune.mending import FIXED, NOTHING
from finetune.paired import paired_interval
from reward.folder_lock import FolderInUseError, taken
from rl.checkpoints import RUN_CONFIG
from tests.finetune.conftest import write_lora
from tests.finetune.inpaint_case import command, lines, pixels


def test_the_command_mends_a_folder_and_goes_on_where_it_was_stopped(families, album, tmp_path, capsys):
    out = tmp_path / "out"
    argv = command(families, album, out, "--eval_rewards", '{"other": "tests.finetune.inpaint_case:NoMaps"}')
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


def test_a_summary_that_is_missing_or_of_fewer_pictures_is_written(families, album, tmp_path, monkeypatch):
    out = tmp_path / "out"
    inpaint.main(command(families, album, out))
    whole, rows = (out / "summary.json").read_text(), lines(out)
    monkeypatch.setattr(InpaintArguments, "inpainter", lambda run: pytest.fail("a model was loaded"))
    (out / "summary.json").unlink()  # killed between the last picture and the summary
    inpaint.main(command(families, album, out))
    assert (out / "summary.json").read_text() == whole
    (out / "summary.json").write_text(whole.replace('"n": 3', '"n": 2'))  # the same, after pictures were added
    inpaint.main(command(families, album, out))
    assert (out / "summary.json").read_text() == whole
    assert lines(out) == rows


def test_results_that_would_be_mended_or_delete_the_pictures_are_refused(families, album, tmp_path, monkeypatch):
    monkeypatch.setattr(InpaintArguments, "inpainter", lambda run: pytest.fail("a model was loaded"))
    for out in (album, album / "fixed", tmp_path / "album" / ".." / "album" / "fixed"):
        with pytest.raises(ValueError, match=r"lies in the folder of the pictures.*give an --output_dir outside it"):
            inpaint.main(command(families, album, out, "--overwrite_output_dir", "true"))
    shutil.copytree(album, tmp_path / "out" / "pictures")
    single = ["--images", str(tmp_path / "out" / "pictures" / "spot.png"), "--prompts", "a red circle"]
    for source in (["--pictures", str(tmp_path / "out" / "pictures")], single):
        with pytest.raises(ValueError, match="lies where the results are written"):
            inpaint.main(command(families, album, tmp_path / "out", "--overwrite_output_dir", "true", source=source))
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == len(list(album.iterdir())) == 4


def test_results_of_a_pipeline_that_was_trained_anew_are_not_gone_on_with(families, album, tmp_path):
    pipeline = shutil.copytree(families["sd"], tmp_path / "pipeline")
    argv = command({"sd": str(pipeline)}, album, tmp_path / "out")
    inpaint.main(argv)
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=rf"holds results of other settings \(weights of {pipeline}: "):
        inpaint.main(argv)


def test_single_pictures_are_mended_as_in_a_folder(families, album, tmp_path):
    inpaint.main(command(families, album, tmp_path / "folder"))
    single = ["--images", str(album / "spot.png"), "--prompts", "a red circle"]
    inpaint.main(command(families, album, tmp_path / "single", source=single))
    file = Path("pictures/spot.png")
    assert (tmp_path / "single" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes()


def test_results_of_another_lora_are_not_gone_on_with(families, album, tmp_path):
    lora = write_lora(families["sd"], tmp_path / "lora")
    argv = command(families, album, tmp_path / "out")
    inpaint.main(argv)
    with pytest.raises(ValueError, match=r"holds results of other settings \(base_adapters: None -> \['.*lora'\]"):
        inpaint.main([*argv, "--base_adapters", lora])
    inpaint.main(command(families, album, tmp_path / "tuned", "--base_adapters", lora))
    drawn = [pixels(tmp_path / out / "pictures/spot.png") for out in ("out", "tuned")]
    assert not np.array_equal(*drawn)
    write_lora(families["sd"], tmp_path / "lora", seed=1)
    with pytest.raises(ValueError, match=rf"holds results of other settings \(weights of {lora}: "):
        inpaint.main(command(families, album, tmp_path / "tuned", "--base_adapters", lora))
    config = tmp_path / "out" / RUN_CONFIG  # of a version without this setting
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "base_adapters"}))
    inpaint.main(argv)


def test_what_got_worse_by_a_reward_that_looks_on_is_told(families, album, tmp_path, monkeypatch, capsys):
    def black(run):
        return lambda picture, share, prompt, generators: torch.zeros(len(generators), *picture.shape)

    monkeypatch.setattr(InpaintArguments, "inpainter", black)
    looking_on = ["--eval_rewards", '{"redness": "tests.finetune.inpaint_case:Redness"}']
    (album / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{name}.png", "prompt": name}) for name in ("spot", "clean", "wide"))
    )
    inpaint.main(command(families, album, tmp_path, *looking_on))
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
def test_an_option_reaches_the_pipeline_and_changes_nothing_else(families, album, tmp_path, monkeypatch, more, changed):
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
            command(
                families,
                album,
                tmp_path / name,
                "--num_candidates",
                "4",
                "--rounds",
                "1",
                *more,
                source=single,
            )
        )
        return reached

    assert what_reaches_it("changed", *more) == what_reaches_it("plain") | changed
