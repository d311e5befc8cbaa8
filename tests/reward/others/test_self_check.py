import subprocess
import sys

import pytest
import torch

from reward.feedback import Reward, RewardError
from reward.others import self_check
from reward.others.self_check import KNOWN, PICTURES, main, read_pictures
from tests.test_house import ROOT


def saying(own, other):
    """A reward that says `own` of a picture with its own prompt, `other` of one with the other's."""

    def reward(images, prompts):
        return Reward(total=torch.tensor(own if list(prompts) == list(PICTURES.values()) else other))

    return reward


def test_what_is_as_it_should_be_passes():
    known = KNOWN["pickscore"]
    assert self_check.self_check(saying([20.0, 21.0], [18.0, 17.0]), known).wrong == []
    assert self_check.self_check(saying([5.0, 5.0], [5.0, 5.0]), KNOWN["aesthetic"]).wrong == []


def test_a_wrong_scale_and_a_deaf_model_are_found():
    known = KNOWN["pickscore"]
    (scale,) = self_check.self_check(saying([0.20, 0.21], [0.18, 0.17]), known).wrong
    assert "0.2 and 0.21, are not between 12 and 30" in scale
    (deaf,) = self_check.self_check(saying([20.0, 21.0], [18.0, 21.5]), known).wrong
    assert "the other's prompt" in deaf
    with pytest.raises(RewardError, match="not replaced by a number"):
        self_check.self_check(saying([float("nan"), 1.0], [1.0, 1.0]), known)


def test_the_pictures_are_what_their_prompts_say():
    circle, star = read_pictures()
    assert circle.shape == star.shape == (3, 256, 256)
    red, white = circle[:, 128, 128], circle[:, 10, 10]
    yellow, blue = star[:, 128, 128], star[:, 10, 10]
    assert red[0] > 2 * red[1:].max()
    assert white.min() > 0.9
    assert yellow[:2].min() > 2 * yellow[2]
    assert blue[2] > 2 * blue[:2].max()


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
    assert "a red circle on a white background" in capsys.readouterr().out


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
