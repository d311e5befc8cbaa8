import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from reward import others
from reward.feedback import Reward, RewardError
from reward.others import AestheticScore, HPSv2, PickScore
from reward.others.linear_head import LinearHead
from reward.others.self_check import KNOWN, PICTURES, main, make_noise, read_pictures, self_check
from reward.others.showing import read_showing
from tests.reward.others.conftest import make_clip, make_image_processor
from tests.test_house import ROOT

PROMPTS = list(PICTURES.values())
RIGHT = 18 + 3 * torch.eye(5, 4)
"""What a PickScore may say of four drawings and noise, for each drawing's prompt."""


def saying(scores):
    """A reward that says what a column of `scores` (5, 4) holds for its prompt."""
    return lambda images, prompts: Reward(total=scores[:, PROMPTS.index(prompts[0])])


def wrong_with(scores, name="pickscore"):
    return self_check(saying(torch.as_tensor(scores)), KNOWN[name]).wrong


# ---- What is said of five pictures ----


def test_what_is_as_it_should_be_passes():
    verdict = self_check(saying(RIGHT), KNOWN["pickscore"])
    assert verdict.wrong == []
    assert torch.equal(verdict.scores, RIGHT)
    assert wrong_with(torch.linspace(4, 6, 5)[:, None].expand(5, 4), "aesthetic") == []


def test_a_wrong_scale_is_found():
    (scale,) = wrong_with(RIGHT / 100)
    assert "0.21, 0.21, 0.21, 0.21, are not all between 12 and 30" in scale
    (unsure,) = wrong_with(0.4 * torch.eye(5, 4), "vqascore")
    assert "0.4, are not all between 0.5 and 1" in unsure
    assert wrong_with(0.6 * torch.eye(5, 4), "vqascore") == []


def test_a_drawing_that_is_not_told_from_others_is_named():
    prompts, pictures = RIGHT.clone(), RIGHT.clone()
    prompts[1, 3] = prompts[3, 3] = 22.0  # the star is liked better for the heart's prompt
    first, second = wrong_with(prompts)
    assert "no better for their own prompt than for another's: star (heart);" in first
    assert "no better than another, or noise: heart (star);" in second
    pictures[4, 2] = 21.0  # as much as the chessboard for its own prompt
    (noise,) = wrong_with(pictures)
    assert "no better than another, or noise: chessboard (noise);" in noise


@pytest.mark.parametrize("sees", ["prompts", "pictures"])
def test_the_deaf_and_the_blind_are_found(sees):
    said = 20 + torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    alike = said[:1].expand(5, 4) if sees == "prompts" else said[:, :1].expand(5, 4)
    assert len(wrong_with(alike)) == 2


def test_scores_at_random_pass_once_in_1600_times():
    """Of five by four numbers, how often are the four own ones the greatest of their rows and columns?"""
    said = torch.rand(100_000, 5, 4, generator=torch.Generator().manual_seed(0))
    own = said[:, :4].diagonal(dim1=1, dim2=2)
    others = said.masked_fill(torch.eye(5, 4, dtype=torch.bool), -math.inf)
    passed = (own > others[:, :4].amax(dim=2)).all(dim=1) & (own > others.amax(dim=1)).all(dim=1)
    assert passed.float().mean().item() == pytest.approx(1 / 1600, rel=0.25)
    right, wrong = said[passed][:20], said[~passed][:200]
    assert not any(wrong_with(20 + one) for one in right)
    assert all(wrong_with(20 + one) for one in wrong)


def test_what_reads_no_prompt_must_see_and_know_noise_where_that_is_known():
    (blind,) = wrong_with(torch.full((5, 4), 5.0), "aesthetic")
    assert "differ by less than 0.05" in blind
    sizes = torch.tensor([6.0, 8.0, 12.0, 7.0, 12.0])[:, None].expand(5, 4)
    (more,) = wrong_with(sizes, "jpeg_incompressibility")
    (less,) = wrong_with(-sizes, "jpeg_compressibility")
    assert "noise gets 12, where it should get more" in more
    assert "noise gets -12, where it should get less" in less


def test_no_number_is_an_error():
    with pytest.raises(RewardError, match="not replaced by a number"):
        wrong_with(torch.full((5, 4), math.nan))


def test_the_pictures_are_what_their_prompts_say():
    images = read_pictures()
    assert images.shape == (4, 3, 256, 256)
    circle, star, chessboard, heart = images
    red, white = circle[:, 128, 128], circle[:, 10, 10]
    yellow, blue = star[:, 128, 128], star[:, 10, 10]
    assert red[0] > 2 * red[1:].max()
    assert white.min() > 0.9
    assert yellow[:2].min() > 2 * yellow[2]
    assert blue[2] > 2 * blue[:2].max()
    fields = chessboard[:, 16::32, 16::32].mean(dim=0)
    is_black = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).bool()
    assert fields[is_black].max() < 0.1
    assert fields[~is_black].min() > 0.9
    purple, green = heart[:, 128, 128], heart[:, 10, 10]
    assert purple[[0, 2]].min() > 2 * purple[1]
    assert green[1] > green[[0, 2]].max()
    assert make_noise().std() > 0.2
    assert torch.equal(make_noise(), make_noise())


# ---- Small models that know the drawings, whole and broken ----


@pytest.fixture(scope="module")
def knowing(clip_tokenizer, tmp_path_factory):
    """Folder of a CLIP of a few kilobytes that has learned the drawings' prompts."""
    folder = tmp_path_factory.mktemp("knowing")
    clip = make_clip(clip_tokenizer, length=64)
    clip_tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    images = read_showing(folder)(torch.cat([read_pictures(), make_noise()[None]]))
    text = clip_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    optimizer, own = torch.optim.Adam(clip.parameters(), lr=3e-3), torch.arange(4)
    for _ in range(40):
        seen, read = clip.get_image_features(images).pooler_output, clip.get_text_features(**text).pooler_output
        cosines = 10 * F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
        loss = F.cross_entropy(cosines[:4], own) + F.cross_entropy(cosines.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip.save_pretrained(folder)
    return folder


@pytest.fixture
def known(knowing):
    """Of this CLIP as a PickScore; no scale, so that it is the order which finds what is wrong."""
    return replace(KNOWN["pickscore"], low=-1000, high=1000, shown=read_showing(knowing))


def test_a_whole_model_passes(knowing, known):
    assert self_check(PickScore(knowing), known).wrong == []


HALVES = {
    "picture": lambda place, name: name.startswith("vis"),
    "text": lambda place, name: name.startswith("text"),
    "every second weight": lambda place, name: place % 2,
}


def broken_ones(folder, is_lost, seeds=10):
    """The CLIP of `folder` as a PickScore, some of its weights as they were initialised, otherwise for each seed."""
    reward = PickScore(folder)
    weights = {name: value.clone() for name, value in reward.model.state_dict().items()}
    for seed in range(seeds):
        torch.manual_seed(seed)
        untrained = CLIPModel(reward.model.config).state_dict()
        lost = {name: untrained[name] for place, name in enumerate(weights) if is_lost(place, name)}
        reward.model.load_state_dict(weights | lost)
        yield reward, len(lost) / len(weights)


@pytest.mark.parametrize("half", HALVES)
def test_a_model_whose_half_is_as_it_was_initialised_is_found(knowing, known, half):
    for reward, share in broken_ones(knowing, HALVES[half]):
        assert 0.3 < share < 0.7
        assert any("the weights are not whole" in said for said in self_check(reward, known).wrong)


def test_small_damage_is_not_always_found(knowing, known):
    damaged = broken_ones(knowing, lambda place, name: torch.rand(()) < 0.05)
    assert any(not self_check(reward, known).wrong for reward, _ in damaged)


def test_a_preprocessing_without_normalisation_is_found(knowing, known, tmp_path):
    other = shutil.copytree(knowing, tmp_path / "other")
    file = other / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    file.write_text(json.dumps(settings))
    said = self_check(PickScore(other), known).wrong
    assert "mean 0.000 0.000 0.000, std 1.000 1.000 1.000; that of the published model is 32 x 32" in said[-1]


def test_a_picture_that_is_cropped_where_it_should_be_padded_is_found(knowing, known):
    said = self_check(HPSv2(knowing), known).wrong
    assert "its preprocessing is 32 x 32 by pad, bicubic" in said[-1]
    assert "is 32 x 32 by crop of 32, bicubic" in said[-1]


def test_an_aesthetic_score_with_an_untrained_head_or_blind_is_found(knowing, tmp_path):
    known = replace(KNOWN["aesthetic"], shown=read_showing(knowing))
    torch.manual_seed(0)
    untrained = LinearHead(8).state_dict()
    torch.save(untrained, tmp_path / "untrained.pth")
    trained = {name: 2 * value if name.endswith("weight") else value for name, value in untrained.items()}
    torch.save(trained | {"layers.7.bias": torch.tensor([5.0])}, tmp_path / "trained.pth")
    assert self_check(AestheticScore(tmp_path / "trained.pth", clip=knowing), known).wrong == []
    scale, *_ = self_check(AestheticScore(tmp_path / "untrained.pth", clip=knowing), known).wrong
    assert "are not all between 1 and 9" in scale
    blind = AestheticScore(tmp_path / "trained.pth", clip=knowing)
    blind.model["eye"].encoder.visual_projection.weight.zero_()
    (same,) = self_check(blind, known).wrong
    assert "it does not see them" in same


# ---- What is written about scales ----


def test_readme_and_docstrings_give_the_known_scales():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| `reward.others:` |")[1].split("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    written = {name: row[3].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    written["JpegCompressibility"] = f"minus {written['JpegCompressibility']}"
    assert written == {known.attribute: known.scale for known in KNOWN.values()}
    assert {known.attribute for known in KNOWN.values()} == set(others.__all__)
    for known in KNOWN.values():
        told = " ".join(inspect.getdoc(getattr(others, known.attribute)).split())
        assert known.scale in told, f"{known.attribute}'s docstring does not say {known.scale!r}"


# ---- The command line ----


def test_the_command_line_itself():
    run = [sys.executable, "-m", "reward.others", "--self_check", "--reward", "jpeg_compressibility"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("as it should be")


def test_a_model_that_fails_ends_with_a_message(clip_folder, capsys):
    flags = ["--self_check", "--reward", "pickscore", "--model", str(clip_folder)]  # random weights, and 16 tokens
    with (
        pytest.warns(UserWarning, match="longer than the 16 tokens"),
        pytest.raises(ValueError, match="pickscore is not as it should be: its scores"),
    ):
        main(flags)
    said = capsys.readouterr().out
    assert "circle: a red circle on a white background" in said
    assert "noise" in said


def test_without_the_flag_the_rewards_are_listed(capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in KNOWN)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--self_check", "--reward", "pikscore"], "nearest: 'pickscore'"),
        (["--self_check"], "it must be one of"),
        (["--reward", "pickscore"], "are for --self_check"),
        (["--self_check", "--reward", "pickscore"], "missing a required argument: 'model'"),
        (["--self_check", "--reward", "pickscore", "--model", "./nowhere"], "there is no folder"),
        (["--self_check", "--reward", "pickscore", "--model", "x", "--device", "gpu"], "write cpu, cuda"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        main(flags)
