import shutil

import pytest
import torch
from safetensors.torch import save_file

from finetune import fingerprints
from finetune.fingerprints import fingerprint, weights_of, with_weights
from rl.adapter import LORA_WEIGHTS


def test_models_are_found_wherever_settings_name_them(pipeline_folder, model_folder, tmp_path):
    lora = tmp_path / "run"
    lora.mkdir()
    save_file({"a": torch.zeros(2)}, lora / LORA_WEIGHTS)
    settings = {"kwargs": {"model": str(model_folder), "weights": {"overall": 1.0}}, "name": "package.module:Name"}
    found = weights_of(pipeline_folder, [str(lora), str(lora / LORA_WEIGHTS)], settings, "owner/name", None, 3, ".")
    assert list(found) == [
        f"weights of {place}" for place in (pipeline_folder, lora, lora / LORA_WEIGHTS, model_folder)
    ]
    assert found[f"weights of {model_folder}"] == fingerprint(model_folder)
    (lora / "trainer_state.json").write_text("{}")  # a run writes more than the weights
    assert weights_of(str(lora)) == {f"weights of {lora}": found[f"weights of {lora}"]}
    save_file({"a": torch.ones(2)}, lora / LORA_WEIGHTS)
    assert weights_of(str(lora)) != {f"weights of {lora}": found[f"weights of {lora}"]}


def test_every_part_of_a_pipeline_counts(pipeline_folder, tmp_path):
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    seen = {fingerprint(pipeline_folder), fingerprint(copy)}
    assert len(seen) == 1
    for file in ("scheduler/scheduler_config.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"):
        with (copy / file).open("ab") as opened:
            opened.write(b" ")
        seen.add(fingerprint(copy))
    assert len(seen) == 4
    (copy / "samples").mkdir()
    (copy / "samples" / "notes.json").write_text("{}")
    assert fingerprint(copy) in seen


@pytest.mark.parametrize("name", ["ImageReward.pt", "sac+logos+ava1-l14-linearMSE.pth", "HPS_v2.bin"])
def test_a_single_file_of_weights_counts_and_so_does_its_folder(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"these")
    settings = [{"kwargs": {"model": str(file)}}, str(tmp_path)]
    before = weights_of(settings)
    assert list(before) == [f"weights of {file}", f"weights of {tmp_path}"]
    assert weights_of(settings) == before
    file.write_bytes(b"other")
    after = weights_of(settings)
    assert after.keys() == before.keys()
    assert all(after[place] != before[place] for place in before)


def test_what_a_trainer_goes_on_from_does_not_count(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin"):
        (tmp_path / name).write_bytes(b"of this run")
    assert fingerprint(tmp_path) == before


def test_a_folder_without_pickles_keeps_the_digits_that_results_hold(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "spiece.model").write_bytes(b"words")
    (tmp_path / "README.md").write_bytes(b"not counted")
    assert fingerprint(tmp_path) == "f275c853289d"


def test_settings_that_say_nothing_of_weights_are_taken_for_those_of_now():
    now = {"seed": 0, "weights of a": "1"}
    assert with_weights({"seed": 1}, now) == {"seed": 1, "weights of a": "1"}
    assert with_weights({"seed": 1, "weights of a": "2"}, now) == {"seed": 1, "weights of a": "2"}


def test_a_model_that_is_named_often_is_read_once(model_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(fingerprints, "fingerprint", lambda path: asked.append(path) or "digits")
    assert weights_of([{"model": str(model_folder)}] * 8) == {f"weights of {model_folder}": "digits"}
    assert len(asked) == 1
