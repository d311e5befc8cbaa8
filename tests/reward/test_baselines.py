import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from reward.baselines import map_baselines, mean_maps
from reward.feedback import HEATMAPS


@pytest.fixture
def mean():
    return torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))


def test_mean_maps():
    arrays = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8), dtype=np.uint8)
    columns = {f"{name}_map": [Image.fromarray(maps[i]) for maps in arrays] for i, name in enumerate(HEATMAPS)}
    split = Dataset.from_dict(columns, features=Features({name: ImageFeature() for name in columns}))
    expected = (arrays / 255).mean(0)
    assert mean_maps(split, (8, 8)).numpy() == pytest.approx(expected, abs=1e-6)
    assert mean_maps(split, (1, 1))[:, 0, 0].numpy() == pytest.approx(expected.mean((1, 2)), abs=1e-6)


def test_the_constant_is_the_best_constant(mean):
    constant = map_baselines(mean)["constant"]
    assert constant.shape == mean.shape
    assert constant[1].unique().item() == pytest.approx(mean[1].mean().item())


def test_the_centre_prior_is_a_bell_about_the_middle_of_the_best_height(mean):
    prior = map_baselines(mean)["centre prior"]
    torch.testing.assert_close(prior, prior.flip(1))
    torch.testing.assert_close(prior, prior.transpose(1, 2))
    assert prior[0].argmax().item() in (7 * 16 + 7, 7 * 16 + 8, 8 * 16 + 7, 8 * 16 + 8)
    across = prior[0, 7] / prior[0, 7, 7]
    assert across[11].item() == pytest.approx(np.exp(-((3.5 / 16) ** 2 - (0.5 / 16) ** 2) / (2 * 0.25**2)), abs=1e-5)
    error = [((mean - factor * prior) ** 2).sum().item() for factor in (0.98, 1.0, 1.02)]
    assert min(error) == error[1]
    assert prior.min() > 0
    assert prior.max() <= 1
