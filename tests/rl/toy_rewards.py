"""Reward functions for tests, named on command lines as `tests.rl.toy_rewards:<name>`."""

import os
import signal

import torch

from reward.feedback import Reward


class Redness:
    """More red is better; blue is penalised where it is."""

    differentiable = True

    def __init__(self, weight: float = 1.0, nan_after: int | None = None, constant_map: bool = False):
        self.weight, self.nan_after, self.constant_map, self.calls = weight, nan_after, constant_map, 0

    def __call__(self, images, prompts):
        self.calls += 1
        red = images[:, 0].mean(dim=(-2, -1))
        if self.nan_after is not None and self.calls > self.nan_after:
            red = red * float("nan")
        blue = torch.full_like(images[:, 2], 0.1) if self.constant_map else images[:, 2]
        return Reward(
            total=self.weight * red,
            penalties={"implausibility": 0.5 * blue},
            word_penalties=[torch.linspace(0, 1, len(prompt.split())) for prompt in prompts],
            terms={"red": red},
        )


def brightness(images, prompts):
    """A reward that is a function."""
    return Reward(total=images.mean(dim=(1, 2, 3)))


class CtrlC:
    """Whoever asks for the third time, behind the trial and an evaluation or so, is stopped as by Ctrl-C."""

    differentiable = False

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return Reward(total=images.mean(dim=(1, 2, 3)))


class Viewing:
    """Takes its pictures apart as only contiguous ones can be."""

    differentiable = False

    def __call__(self, images, prompts):
        return Reward(total=images.view(len(images), -1).mean(dim=1))


class Uncallable:
    """No reward: it is missing what would make it one."""


class OfPicturesAlone:
    """No reward: it does not take prompts; and it must not be made before that is known."""

    def __init__(self):
        raise AssertionError("made too early")

    def __call__(self, images):
        return Reward(images.mean(dim=(1, 2, 3)))


class Plain:
    """A total and nothing else."""

    differentiable = False

    def __call__(self, images, prompts):
        return Reward(total=images.mean(dim=(1, 2, 3)), terms={"satisfied": (images.mean(dim=(1, 2, 3)) > 0.5).float()})


class Broken:
    """A reward whose answer cannot be trained on, in one of several ways."""

    def __init__(self, how: str):
        self.how = how

    def __call__(self, images, prompts):
        total, penalty = images.mean(dim=(1, 2, 3)), images[:, 0]
        if self.how == "column":
            total = total[:, None]
        elif self.how == "mean of all":
            total = total.mean()[None]
        elif self.how == "one map for all":
            penalty = penalty[:1]
        elif self.how == "nan":
            total = total * float("nan")
        elif self.how == "negative":
            penalty = -penalty
        elif self.how == "one map":
            penalty = penalty[0]
        return Reward(total=total, penalties={"blame": penalty})
