import json

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from rl.evaluate import Evaluation
from rl.model_card import licence_of, write_model_card

SETTINGS = {"policy": "somebody/a-pipeline", "reward": "my:Reward", "reward_kwargs": {"model": "nowhere"}, "seed": 3}
HISTORY = [{"step": 1, "reward": 0.1, "kl": 0.0, "grad_norm": 1.0, "watch/drawn": 1.0}, {"step": 2, "reward": 0.2}]


def evaluation(value):
    return Evaluation(["a", "b"], {"reward": torch.full((2, 2), value)}, torch.zeros(2))


def test_card_says_what_was_done_and_what_came_of_it(tmp_path):
    write_model_card(tmp_path, SETTINGS, HISTORY, (evaluation(0.25), evaluation(0.5)))
    card = (tmp_path / "README.md").read_text()
    assert "base_model: somebody/a-pipeline" in card.split("---")[1]
    assert "library_name: diffusers" in card.split("---")[1]
    assert "| reward | 0.2500 | 0.5000 | +0.2500 +- 0.0000 |" in card
    assert "](before_after.png)" in card
    assert "](curves.png)" in card
    assert json.loads(card.split("```json")[1].split("```")[0]) == SETTINGS
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size == (900, 500)


@pytest.mark.parametrize("name", ["reward", "kl", "grad_norm", "watch/drawn"])
def test_curves_are_of_what_was_logged(tmp_path, name):
    def drawn(history):
        write_model_card(tmp_path, SETTINGS, history)
        return (tmp_path / "curves.png").read_bytes()

    history = [{"step": step, name: 0.1 * step**2} for step in range(1, 4)]
    assert drawn(history) == drawn([{**entry, "loss": 1.0} for entry in history])
    assert drawn(history) != drawn([])
    assert drawn(history) != drawn([{**entry, name: 1 - entry[name]} for entry in history])


def test_a_run_without_evaluation_has_a_card_too(tmp_path):
    write_model_card(tmp_path, {"policy": "p", "rewards": {"a": {}}}, [])
    card = (tmp_path / "README.md").read_text()
    assert "before_after" not in card
    assert "a sum of rewards" in card


def test_card_says_the_licence_of_every_reward_and_no_base_that_the_hub_does_not_know(tmp_path):
    for name in ("base", "first"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {name}-1.0\n---\n")
    rewards = {"one": {"reward": "my:Reward", "kwargs": {"model": str(tmp_path / "first")}}, "two": "my:other"}
    write_model_card(tmp_path, {"policy": str(tmp_path / "base"), "rewards": rewards}, [])
    card = (tmp_path / "README.md").read_text()
    assert "Licences: base: base-1.0; reward one: first-1.0; reward two: see its code." in card
    assert "base_model" not in card.split("---")[1]


def test_licences_of_names_on_the_hub_are_asked_for_there(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    asked = []
    monkeypatch.setattr("rl.pipelines.hf_hub_download", lambda *what: asked.append(what) or tmp_path / "README.md")
    assert licence_of("somebody/a-pipeline") == "creativeml-openrail-m"
    assert asked == [("somebody/a-pipeline", "README.md")]

    assert licence_of("somebody/weights/a.pt") == "creativeml-openrail-m"
    assert asked[1:] == [("somebody/weights", "README.md")]

    def offline(*what):
        raise EntryNotFoundError("no README.md there")

    monkeypatch.setattr("rl.pipelines.hf_hub_download", offline)
    assert licence_of("somebody/a-pipeline") == "unknown here; see somebody/a-pipeline"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/run").mkdir(parents=True)
    (tmp_path / "outputs/run/README.md").write_text("---\nlicense: its own\n---\n")
    assert licence_of("outputs/run/gone.pt") == "unknown here; see outputs/run/gone.pt"


def used(folder, **settings):
    write_model_card(folder, {**SETTINGS, **settings}, [])
    card = (folder / "README.md").read_text()
    return card.split("---")[1], card.split("```python\n")[1].split("```")[0].splitlines()[2:]


def test_card_shows_how_to_use_what_was_trained(tmp_path):
    """Whatever was trained, on whatever base; names of the hub where it was pushed there."""
    front, lines = used(tmp_path, base_adapters=["first"], push_to_hub=True, hub_model_id="me/mine")
    assert "- lora" in front
    assert lines == [
        'pipe = DiffusionPipeline.from_pretrained("somebody/a-pipeline")', 'pipe.load_lora_weights("first")',
        "pipe.fuse_lora()", "pipe.unload_lora_weights()", 'pipe.load_lora_weights("me/mine")',
    ]  # fmt: skip
    assert "What was trained is a LoRA on the U-Net.\n" in (tmp_path / "README.md").read_text()
    used(tmp_path, train_text_encoder=True)
    assert "a LoRA on the U-Net and the text encoders." in (tmp_path / "README.md").read_text()
    front, lines = used(tmp_path, tune="full")
    assert "- lora" not in front
    assert lines[1:] == [f'pipe.unet = UNet2DConditionModel.from_pretrained("{tmp_path}", subfolder="unet")']


def test_licences_are_those_of_the_cards_that_are_there(tmp_path):
    assert licence_of(tmp_path) == f"unknown here; see {tmp_path}"
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    assert licence_of(tmp_path) == "openrail++"
    (tmp_path / "weights.pt").touch()  # nobody says that the folder's card is this file's
    assert licence_of(tmp_path / "weights.pt") == f"unknown here; see {tmp_path / 'weights.pt'}"
    for card in ("no front matter", "---\nlicense: [a\n---\n", "---\nlicense: !unheard a\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(card)
        assert "unknown" in licence_of(tmp_path), card
