import numpy as np
import pytest
import torch
from gradient_snr import OBJECTIVE, gain, jackknife, objective_credit, signal_to_noise, table

from rl.advantages import group_advantages
from rl.sde import log_prob_map


def test_the_ratio_is_that_of_the_gradients_drawn():
    """Chunks g = s + noise, |s| = 3, noise of variance 1 in each of 400 directions: 3 / 20, within the interval."""
    rng = np.random.default_rng(0)
    signal = np.zeros(400)
    signal[0] = 3.0
    found = []
    for _ in range(60):
        chunks = signal + rng.normal(size=(16, 400))
        gram = chunks @ chunks.T
        value, low, high = jackknife(lambda who, gram=gram: signal_to_noise(gram[np.ix_(who, who)]), len(gram))
        found.append((value, low <= 0.15 <= high))
    values, covered = zip(*found, strict=True)
    assert np.mean(values) == pytest.approx(0.15, abs=0.01)
    assert np.mean(covered) > 0.85


def test_without_signal_the_ratio_is_about_zero_and_of_either_sign():
    rng = np.random.default_rng(1)
    values = [signal_to_noise(chunks @ chunks.T) for chunks in rng.normal(size=(60, 16, 400))]
    assert abs(np.mean(values)) < 0.03
    assert 0.2 < np.mean(np.array(values) < 0) < 0.8


def test_gain_is_by_hand():
    """g = (3, 4) and f = (1, 0) in both chunks: <g, f> = 3, |g| = 5, and the diagonal plays no part."""
    assert gain(np.array([[99.0, 3.0], [3.0, -99.0]]), np.array([25.0, 25.0])) == pytest.approx(600)


def test_a_kind_of_credit_without_noise_gains_more():
    rng = np.random.default_rng(2)
    signal, noise = np.ones((1, 1, 50)), rng.normal(size=(24, 1, 50))
    objective = signal + noise
    kinds = {"image": signal + 3 * noise, "calm": signal + 0.1 * noise, OBJECTIVE: objective}
    rows = {row.name: row for row in table([4], kinds)}
    assert not any(OBJECTIVE in name for name in rows)
    assert rows["step 4, calm: signal to noise"].value > 5 * rows["step 4, image: signal to noise"].value
    assert rows["step 4, calm: gain less image's"].low > 0
    assert "step 4, image: gain less image's" not in rows


def test_gains_are_in_the_rewards_own_units():
    """One Gaussian step x ~ N(m, std^2), reward k <a, x> with |a| = 1: a step of length 1 along -E g adds k |cos|."""
    shape, std, slope = (2, 4, 4), torch.tensor(0.5), 0.2
    generator = torch.Generator().manual_seed(0)
    towards = torch.randn(shape, generator=generator)
    towards = towards / towards.norm()
    chunks = {"image": [], OBJECTIVE: []}
    for _ in range(300):
        latents = std * torch.randn(64, *shape, generator=generator)
        reward = slope * (towards * latents).sum(dim=(1, 2, 3))
        advantages = group_advantages(reward, 8, std_floor=1e-3)[:, None, None].expand(-1, 4, 4)
        for name, credit in (("image", advantages), (OBJECTIVE, objective_credit(reward, 8, latents))):
            mean = torch.zeros(shape, requires_grad=True)
            loss = -(credit * log_prob_map(latents, mean.expand_as(latents), std)).mean()
            chunks[name].append(torch.autograd.grad(loss, mean)[0].flatten().numpy())
    gradients = {name: np.stack(of) for name, of in chunks.items()}
    # The mean of the objective's gradient is the true one, -k a.
    own = gradients[OBJECTIVE].mean(axis=0) @ (-slope * towards.flatten().numpy())
    assert own == pytest.approx(slope**2, rel=0.05)
    (row,) = [
        row for row in table([1], {name: of[:, None] for name, of in gradients.items()}) if row.name.endswith("gain")
    ]
    length = np.sqrt((gradients["image"] ** 2).sum(axis=1).mean())
    true = -(gradients["image"] @ (slope * towards.flatten().numpy())).mean() / length
    assert row.value == pytest.approx(1e3 * true, rel=0.05)
