"""What a rollout tells the watch, from the reward to the curves, against sums by hand."""

import statistics

import pytest
import torch

from reward.feedback import Reward
from rl.monitors import file_size

# Two groups of four pictures; all numbers are exact in float32.
MEANS = [0.125, 0.25, 0.375, 0.5] * 2  # of a penalty map
OBJECTIVES = [0.125, 0.25, 0.375, 0.5] + [0.375] * 4  # the second group's are all alike; its totals are not
TOTALS = [objective + mean for objective, mean in zip(OBJECTIVES, MEANS, strict=True)]
SURE = [0.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5]  # between 0 and 1: two at an end
SHARP = [10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # between -10 and 10: one
OTHER_MEANS = [0.5, 0.625, 0.75, 0.875] + [0.25] * 4
OTHER_TOTALS = [1.0] * 4 + [0.0, 1.0, 0.0, 1.0]
OTHER_OBJECTIVES = [0.5, 0.375, 0.25, 0.125, -0.25, 0.75, -0.25, 0.75]  # the first group the other way round
SEEN = torch.tensor([[0.0, 0.0], [3.0, 4.0]] * 2 + [[9.0, 9.0]] * 4)


def drawn(numbers):
    """Pictures whose red tells their number; those of the second group have stripes in green."""
    images = torch.zeros(len(numbers), 3, 16, 16)
    images[:, 0] = torch.tensor(numbers)[:, None, None] / 16
    images[:, 1, :, ::2] = (torch.tensor(numbers) >= 4).float()[:, None, None]
    return images


def numbers(images):
    return (16 * images[:, 0, 0, 0]).round().long()


def of(values, images):
    return torch.as_tensor(values)[numbers(images)]


class Told:
    """The reward of the tables above. Its map lies in two of four places, the second group's in one."""

    differentiable = False

    def __init__(self):
        self.ranges = {"sure": (0.0, 1.0), "sharp": (-10.0, 10.0), "absent": (0.0, 1.0)}

    def __call__(self, images, prompts):
        maps = torch.zeros(len(images), 2, 2)
        mean, second = of(MEANS, images), numbers(images) >= 4
        maps[:, 0, 0] = torch.where(second, 4 * mean, 2 * mean)
        maps[:, 0, 1] = torch.where(second, 0 * mean, 2 * mean)
        terms = {"sure": of(SURE, images), "sharp": of(SHARP, images), "free": torch.ones(len(images))}
        return Reward(of(TOTALS, images), {"implausibility": maps, "misalignment": torch.zeros_like(maps)}, terms=terms)


class Seeing(Told):
    def features(self, images):
        return of(SEEN, images)


def other(images, prompts):
    return Reward(of(OTHER_TOTALS, images), {"implausibility": of(OTHER_MEANS, images)[:, None, None].expand(-1, 4, 4)})


def rolled(trainer):
    """The trainer, behind one rollout of the pictures 0 to 7 and its update."""
    left = list(range(8))

    def decode(latents):
        mine, left[:] = left[: len(latents)], left[len(latents) :]
        return drawn(mine)

    trainer.policy.decode = decode
    trainer.train()
    assert not left
    return trainer


def one_rollout(make_trainer, reward, **changes):
    return rolled(make_trainer(reward, num_train_epochs=1, save_strategy="no", reward_batch_size=2, **changes))


def test_what_is_measured_of_a_rollout_is_what_the_reward_said(make_trainer):
    measures = one_rollout(make_trainer, Seeing(), held_out=other).experience.measures
    expected = {
        "reward": sum(OBJECTIVES) / 8,
        "reward_spread": statistics.stdev(OBJECTIVES),
        "reward_error": statistics.stdev([0.3125, 0.375]) / 2**0.5,  # the groups' means
        "held_out": sum(OTHER_OBJECTIVES) / 8,
        "held_out_spread": statistics.stdev(OTHER_OBJECTIVES),
        "held_out_error": statistics.stdev([0.3125, 0.25]) / 2**0.5,
        "agreement": -0.5,  # -1, and 0 where the reward sees no difference
        "agreement_error": statistics.stdev([-1, 0]) / 2**0.5,
        "saturation": (1 + 0.5) / 8,  # both terms of the first picture, one of the fourth's
        "map_entropy": ((0.5 + 1) / 2 + (0 + 1) / 2) / 2,  # an empty map is even
        "dead_groups": 0.5,
        "diversity": 4 / 6 * 5 / 2**0.5 / 2,  # four of six pairs of the first group are 5 apart
        "drawn": 1 / 3 / 2,  # a change of 1 from column to column, in one channel of three, of half the pictures
        "file_size": float(file_size(drawn(range(8))).mean()),
    }
    assert {name: measures[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_without_features_diversity_is_that_of_the_pictures(make_trainer):
    """Red differs by a sixteenth from picture to picture, which counts as one channel of three."""
    measures = one_rollout(make_trainer, Told()).experience.measures
    assert measures["diversity"] == pytest.approx(statistics.mean([1, 1, 1, 2, 2, 3]) / 16 / 3**0.5, rel=1e-4)
    assert not {"held_out", "agreement"} & set(measures)


def test_scalar_credit_is_watched_by_the_totals_that_it_compares(make_trainer):
    measures = one_rollout(make_trainer, Seeing(), held_out=other, credit="scalar").experience.measures
    assert measures["reward"] == pytest.approx(sum(TOTALS) / 8)
    assert measures["reward_spread"] == pytest.approx(statistics.stdev(TOTALS))
    assert measures["dead_groups"] == 0
    assert measures["held_out"] == pytest.approx(sum(OTHER_OBJECTIVES) / 8), "what is held out has its maps still"


def test_the_watch_is_given_what_was_measured_and_its_curves_are_logged(make_trainer):
    trainer = make_trainer(
        Seeing(), held_out=other, num_train_epochs=1, save_strategy="no", watch_limits={"saturation": 0.1}
    )
    shown, observe = [], trainer.watch.observe
    trainer.watch.observe = lambda measured, *how: shown.append(dict(measured)) or observe(measured, *how)
    rolled(trainer)
    assert shown[0] == trainer.experience.measures
    curves = {"saturation": 0.1875, "dead_groups": 0.5, "map_entropy": 1.0, "diversity": 1.0, "agreement": -0.5}
    entry = next(entry for entry in trainer.state.log_history if "watch/saturation" in entry)
    assert {name: entry[f"watch/{name}"] for name in curves} == pytest.approx(curves)  # ratios are to the start
    assert trainer.watch.judged["saturation"] == pytest.approx(0.1875)
    assert "saturation" in trainer.watch.over


def test_metrics_are_the_means_of_what_the_reward_said(make_trainer):
    metrics = one_rollout(make_trainer, Seeing(), held_out=other).experience.metrics
    expected = {
        "objective": sum(OBJECTIVES) / 8,
        "total": sum(TOTALS) / 8,
        "term/sure": 0.5,
        "term/sharp": 1.25,
        "penalty/implausibility": sum(MEANS) / 8,
        "penalty/misalignment": 0.0,
        "group_std": statistics.pstdev(OBJECTIVES[:4]) / 2,
        "groups_skipped": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
