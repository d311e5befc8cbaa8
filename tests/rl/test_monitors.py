"""What a watch measures, against calculations by hand, by scipy and by simulation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from rl.monitors import (
    agreement,
    dead_groups,
    diversity,
    file_size,
    map_entropy,
    paired_fall,
    saturation,
    standard_error,
)
from rl.scoring import RewardError, features
from rl.watch_limits import MONITORS
from tests.rl.toy_rewards import Plain


def test_file_size_is_the_jpegs_without_what_an_empty_one_has():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (32, 48, 3), generator=generator, dtype=torch.uint8)
    sizes = []
    for array in (noise, torch.full_like(noise, 128)):
        buffer = io.BytesIO()
        Image.fromarray(array.numpy()).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    pictures = torch.stack([noise.permute(2, 0, 1) / 255, torch.full((3, 32, 48), 0.5), torch.zeros(3, 32, 48)])
    found = file_size(pictures).tolist()
    assert found[0] == sizes[0] - sizes[1] > 1000
    assert max(found[1:]) < 10


def test_entropy_is_one_where_a_map_is_even_and_zero_where_it_is_a_point():
    maps = torch.zeros(5, 2, 2)
    maps[1] = 0.3
    maps[2, 0, 1] = 7.0
    maps[3, 0] = 2.0  # two of four places: log 2 / log 4
    maps[4] = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # entropy of (1/4, 1/4, 1/2), 1.5 bit of 2
    assert map_entropy(maps).tolist() == pytest.approx([1, 1, 0, 0.5, 0.75])
    assert map_entropy(torch.rand(2, 1, 1)).tolist() == [1, 1]


def test_saturation_is_the_share_of_terms_at_an_end_of_their_range():
    terms = {
        "a": torch.tensor([0.995, 0.5, 0.0]),
        "b": torch.tensor([9.75, 9.85, -10.0]),
        "unranged": torch.tensor([1.0, 1.0, 1.0]),
    }
    ranges = {"a": (0.0, 1.0), "b": (-10.0, 10.0), "absent": (0.0, 1.0)}
    assert saturation(terms, ranges).tolist() == [0.5, 0.5, 1.0]  # 1% of the length of 20 is 0.2


def test_group_figures_by_hand():
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.02, 3.0, 5.0])
    assert dead_groups(values, 2, std_floor=0.05) == 0.75
    assert dead_groups(values, 2, std_floor=0.005) == 0.5
    # group means 1, 1, 1.01, 4
    assert standard_error(values, 2) == pytest.approx(torch.tensor([1.0, 1.0, 1.01, 4.0]).std().item() / 2)
    assert standard_error(values, 8) == pytest.approx(values.std().item() / 8**0.5)  # one group: its pictures


def test_agreement_is_the_mean_of_scipys_correlations_whatever_the_prompts():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 5, generator=generator)
    each = [stats.pearsonr(*pair).statistic for pair in zip(first, second, strict=True)]
    wanted = np.mean(each)
    found, error = agreement(first.flatten(), second.flatten(), 5)
    assert found == pytest.approx(wanted)
    assert error == pytest.approx(max(0.5, np.std(each, ddof=1)) / 6**0.5)
    easy = torch.randn(6, 1, generator=generator) * 50  # what a prompt adds to its pictures, and how much it stretches
    assert agreement((first * 3 + easy).flatten(), (second - easy).flatten(), 5)[0] == pytest.approx(wanted, abs=1e-5)


def test_who_sees_no_difference_neither_agrees_nor_disagrees():
    second = torch.tensor([1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
    assert agreement(torch.tensor([0.7, 0.7, 0.7, 0.1, 0.2, 0.3]), second, 3)[0] == pytest.approx(-0.5)
    assert agreement(second, torch.full((6,), 0.1), 3)[0] == 0


@pytest.mark.parametrize("opinion", [0.0, 0.9], ids=["chance", "prompts differ"])
def test_the_error_of_agreement_is_what_chance_and_the_choice_of_prompts_make_of_it(opinion):
    """Of every second prompt the two agree as much as they disagree of the others."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(1000):
        first, own = torch.randn(2, 32, 4, generator=generator)
        sign = torch.randint(0, 2, (32, 1), generator=generator) * 2 - 1
        second = opinion * sign * first + (1 - opinion**2) ** 0.5 * own
        found.append(agreement(first.flatten(), second.flatten(), 4))
    values, errors = torch.tensor(found).T
    assert values.std().item() == pytest.approx(errors.mean().item(), rel=0.06)
    assert (errors.mean() > 1.3 * 96**-0.5) == (opinion > 0)


def test_a_paired_fall_is_as_seldom_as_scipys_t():
    before, after = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).tolist()
    for old, new in ((before, after), (after, before)):
        test = stats.ttest_rel(new, old, alternative="less")
        assert paired_fall(old, new) == pytest.approx(stats.norm.ppf(test.pvalue))
    assert paired_fall(before, before) == 0
    assert paired_fall([1.0, 1.0], [0.0, 0.0]) < -6  # all alike: as sure as two can be
    assert paired_fall([0.0] * 99, [1.0] * 99) > 30
    assert paired_fall(before, after[1:]) is paired_fall([0.0], [1.0]) is None


@pytest.mark.parametrize("prompts", [2, 4, 96])
def test_of_evaluations_in_which_nothing_happens_few_fall(prompts):
    """One in 740, with 20,000 of them; also of two prompts."""
    differences = np.random.default_rng(0).normal(size=(20000, prompts))
    falls = sum(paired_fall([0.0] * prompts, row) < MONITORS["evaluated"].limit for row in differences)
    assert 15 <= falls <= 42


def test_diversity_of_features():
    seen = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert diversity(seen, 2).tolist() == pytest.approx([5 / 2**0.5, 0])


def test_features_are_the_rewards_own_or_none():
    class Sees(Plain):
        def features(self, images):
            return images.mean((2, 3))

    images = torch.rand(5, 3, 4, 4)
    assert features(Plain(), images) is None
    assert torch.equal(features(Sees(), images, batch_size=2), images.mean((2, 3)))
    for wrong in (lambda images: images, lambda images: images.mean((2, 3)) * float("nan")):
        reward = Plain()
        reward.features = wrong
        with pytest.raises(RewardError, match=r"features are to be finite, \(5, D\)"):
            features(reward, images)


def test_rounding_is_no_preference():
    """Rewards that are equal but for float32's last bits prefer none."""
    equal = torch.tensor([0.5, 0.6, 0.7, 0.8]) - torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert equal.unique().numel() > 1
    value, _ = agreement(equal, torch.arange(1.0, 5.0), 4)
    assert value == 0
    small = 1000 + torch.tensor([0.01, 0.02, 0.03, 0.04])
    assert agreement(small, torch.arange(1.0, 5.0), 4)[0] == pytest.approx(1, abs=1e-3)
