import pytest
import torch
from learned_maps import LearnedMaps, centred, explained, learn, seen_by, unseen_share

from reward.rich import RichReward

GROUP = 4
PROMPTS = ["a red square"] * GROUP + ["two blue circles"] * GROUP


def test_what_is_a_sum_over_places_is_found():
    """Totals that are a token channel's mean, and an offset of each prompt that must not be learned."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4000, 3, 2, 2, generator=generator)
    tokens[:, 2] *= 1e-3  # a channel of another size
    offset = torch.randn(1000, generator=generator).repeat_interleave(GROUP)
    totals = 2.0 * tokens[:, 0].mean(dim=(1, 2)) + 500 * tokens[:, 2].mean(dim=(1, 2)) + offset
    weights = learn(tokens, totals, GROUP)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.0, 500.0]), rtol=0.06, atol=0.06)
    maps = explained(tokens, weights)
    assert maps.shape == (4000, 2, 2)
    torch.testing.assert_close(centred(maps.mean(dim=(1, 2)), GROUP), centred(totals, GROUP), rtol=0.1, atol=0.1)
    noisy = totals + maps.mean(dim=(1, 2)).std() * torch.randn(4000, generator=generator)
    assert unseen_share(tokens.chunk(4), noisy.chunk(4), GROUP) == pytest.approx(0.5, abs=0.05)


@pytest.fixture
def reward():
    return RichReward("tinyworld/assets/rahf", {"plausibility": 0.5, "alignment": 0.5}, {"implausibility": 4.0}, 0.5)


def test_the_objective_stays_and_the_score_gets_a_place(reward):
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, tokens = seen_by(reward, images, PROMPTS)
    assert tokens.shape == (8, 128, 8, 8)
    weights = torch.randn(128, generator=torch.Generator().manual_seed(2)) / 100
    placed = LearnedMaps(reward, weights)(images, PROMPTS)
    torch.testing.assert_close(placed.objective, plain.objective, rtol=1e-4, atol=1e-4)
    assert set(placed.penalties) == {"implausibility", "learned"}
    assert float(placed.penalties["learned"].min()) == 0
    said = -placed.penalties["learned"].mean(dim=(1, 2))
    expected = explained(tokens, weights).mean(dim=(1, 2))
    torch.testing.assert_close(centred(said, GROUP), centred(expected, GROUP), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(centred(placed.total, GROUP), centred(plain.total, GROUP), atol=1e-4)
    assert not reward.predictor.model.score_heads["plausibility"]._forward_pre_hooks
