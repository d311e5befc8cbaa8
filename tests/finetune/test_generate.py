"""Drawing a pool of pictures."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from finetune import generate
from tests.finetune.select_case import command, files_of, flags


def test_interrupted_drawing_goes_on_to_the_same_bits_and_so_do_many_processes(drawn, tmp_path, monkeypatch):
    settings = generate.GenerationArguments(
        **{name: drawn[name] for name in ("policy", "num_generations", "num_inference_steps")},
        prompts=str(drawn["prompts"]), generation_batch_size=4,
    )  # fmt: skip
    prompts = ["a red circle", "a blue square", "a red square", "two green star", "a red circle"]  # one twice
    policy = settings.load()

    def draw(folder, ranks, order=None):
        pool = generate.Generation(tmp_path / folder, settings, prompts)
        pool.claim()
        for rank in order or range(ranks):
            pool.draw(pool.missing(rank, ranks), policy)
        pool.finish()
        return pool

    draw("one", 1)
    draw("three", 3, order=[2, 0, 1])
    written, write = [], generate.write_whole

    def stop_at_the_sixth(file, data):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(file)
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_whole", stop_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            draw("stopped", 1)
    assert not (tmp_path / "stopped" / "metadata.jsonl").exists()
    resumed = generate.Generation(tmp_path / "stopped", settings, prompts)
    assert resumed.missing() == [range(4, 8), range(8, 10)]  # the table of settings and pictures 0-4 are there
    draw("stopped", 1)
    whole = files_of(tmp_path / "one")
    assert len(whole) == 12
    assert files_of(tmp_path / "three") == whole
    assert files_of(tmp_path / "stopped") == whole
    assert whole["000000_00.png"] != whole["000004_00.png"]  # the same prompt, other noise


def test_a_resolution_that_does_not_fit_claims_no_folder(drawn, capsys):
    assert command(*flags(**drawn, resolution=0)) == 2
    assert "resolution is 0; it is in pixels" in capsys.readouterr().err
    assert command(*flags(**drawn, resolution=102)) == 2
    assert "resolution is 102; this pipeline needs a multiple of" in capsys.readouterr().err
    assert command(*flags(**drawn)) == 0


def test_a_pool_of_other_settings_is_left_alone(drawn, capsys):
    assert command(*flags(**drawn)) == 0
    before = files_of(drawn["pictures"])
    drawn |= {"overwrite_output_dir": True}
    assert command(*flags(**drawn, seed=5)) == 2
    assert "drawn with other settings (seed: 0 -> 5)" in capsys.readouterr().err
    assert files_of(drawn["pictures"]) == before
    assert command(*flags(**{**drawn, "pictures": drawn["model"]})) == 2
    assert "holds other files, and `policy` would draw into it" in capsys.readouterr().err


def test_pictures_of_a_policy_that_was_trained_anew_are_not_taken_for_its_own(drawn, tmp_path, capsys):
    policy = shutil.copytree(drawn["policy"], tmp_path / "policy")
    drawn |= {"policy": policy, "overwrite_output_dir": True}
    assert command(*flags(**drawn)) == 0
    train_anew(policy / "unet" / "diffusion_pytorch_model.safetensors")
    assert command(*flags(**drawn)) == 2
    assert f"holds a pool drawn with other settings (weights of {policy}: " in capsys.readouterr().err
    noted = drawn["pictures"] / "pool.json"
    settings = {name: value for name, value in json.loads(noted.read_text()).items() if "weights" not in name}
    noted.write_text(json.dumps(settings))  # as before weights were noted
    assert command(*flags(**drawn)) == 0


def train_anew(file):
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file)
