"""What the repository keeps of the small world: genuine parts, whole, and true to what is said of them."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from reward.feedback import HEATMAPS, SCORES
from reward.predict import RichFeedbackPredictor
from rl.model_card import licence_of
from tinyworld.autoencoder import decode, encode
from tinyworld.build import CARDS, draw_prompts
from tinyworld.eye import disagreements, labelled_pictures
from tinyworld.generator import sample
from tinyworld.grammar import ASSETS, COLOURS, draw_held_out, draw_request, held_out_compositions, is_held_out, parse
from tinyworld.judge import judge
from tinyworld.rated import read_pictures
from tinyworld.scenes import Thing, applicable, lay_out, plant, render


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(ASSETS / "sd", safety_checker=None)  # as any user would


def test_the_pipeline_is_made_of_genuine_parts(pipeline):
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert json.loads((ASSETS / "sd" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    for name in ("vocab.json", "merges.txt"):
        assert (ASSETS / "sd" / "tokenizer" / name).is_file()


@pytest.mark.parametrize("name", ["sd", "rahf"])
def test_its_models_say_their_licence(name):
    assert licence_of(ASSETS / name) == "apache-2.0"
    assert CARDS[name] in (ASSETS / name / "README.md").read_text()


def test_it_draws_the_same_pictures_whatever_the_batch(pipeline):
    captions = ["a red circle", "a blue square above a green star", "two pink triangles"]
    together = sample(pipeline, captions, seed=3)
    apart = sample(pipeline, captions, seed=3, batch=1)
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(together.astype(int) - apart).max() <= 2
    assert together.std() > 10  # something is drawn


def test_the_judge_sees_the_same_through_the_autoencoder(pipeline):
    rng, pictures, captions = np.random.default_rng(11), [], []
    for number in range(200):
        scene = lay_out(draw_request(rng), rng)
        if number % 10 < 3:
            flaw = str(rng.choice(applicable(scene)))
            pictures.append(plant(scene, flaw, float(rng.uniform(0.3, 1)), rng).picture)
        else:
            pictures.append(render(scene.things))
        captions.append(str(scene.request))
    pictures = np.stack(pictures)
    returned = decode(pipeline.vae, encode(pipeline.vae, pictures))
    before, after = ([judge(*pair) for pair in zip(some, captions, strict=True)] for some in (pictures, returned))
    pairs = list(zip(before, after, strict=True))
    assert np.mean([one.satisfied == other.satisfied for one, other in pairs]) >= 0.97
    assert np.mean([one.words == other.words for one, other in pairs]) >= 0.97
    assert np.mean([one.flaws == other.flaws for one, other in pairs]) >= 0.97
    for name in SCORES:
        assert np.median([abs(one.scores[name] - other.scores[name]) for one, other in pairs]) <= 0.02


def test_no_colour_lies_halfway_between_two_others_in_the_latents(pipeline):
    squares = np.stack([render((Thing(colour, "square", 32, 32, 17),)) for colour in COLOURS] + [render(())])
    colours = encode(pipeline.vae, squares)[:, :, 6:10, 6:10].mean((2, 3))  # (7, 4), the last is the ground
    for (a, one), (b, other) in combinations(enumerate(colours), 2):
        others = torch.stack([colour for c, colour in enumerate(colours) if c not in (a, b)])
        nearest = (others - (one + other) / 2).norm(dim=1).min()
        assert nearest > 0.4 * (one - other).norm() / 2


def test_the_judge_agrees_with_viewers_no_less_than_when_it_was_measured():
    labelled = labelled_pictures()
    assert len(labelled) == 100
    assert 20 < sum(one.satisfied for one in labelled) < 80  # or agreement would say little
    assert len(disagreements(labelled)) <= 8


def test_prompts_are_as_drawn_and_held_out_ones_apart():
    for name, prompts in draw_prompts().items():
        kept = (ASSETS / f"prompts_{name}.txt").read_text().splitlines()
        assert kept == prompts
    assert held_out_compositions() == frozenset(draw_held_out(0.2, seed=0))


def test_rated_pictures_for_training_show_no_held_out_composition():
    for name in ("train", "dev"):
        rows = list(read_pictures(ASSETS / "pickapic" / f"{name}.parquet"))
        assert not any(is_held_out(parse(caption)) for _, _, caption in rows)
        assert len({uid for uid, _, _ in rows}) == len(rows)
        assert len(rows) >= {"train": 4000, "dev": 500}[name]


def test_the_predictor_tells_a_good_picture_from_a_bad_one():
    predictor = RichFeedbackPredictor.from_pretrained(ASSETS / "rahf")
    good = render((Thing("red", "circle", 32, 32, 14),))
    bad = render((Thing("red", "circle", 32, 32, 14, (0.28, 3, 0.0)),))
    images = torch.from_numpy(np.stack([good, good, bad])).permute(0, 3, 1, 2).float() / 255
    said = predictor(images, ["a red circle", "a blue circle", "a red circle"])
    assert set(said.scores) == set(SCORES)
    assert set(said.heatmaps) == set(HEATMAPS)
    assert said.scores["alignment"][0] > said.scores["alignment"][1]
    assert said.misaligned[1][1] > 0.5 > said.misaligned[0][1]
    assert said.scores["plausibility"][0] > said.scores["plausibility"][2]
