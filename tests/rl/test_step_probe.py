import pytest
import torch

from rl.step_probe import StepProbe, best_steps, estimate, gain, metric, random_signs, sketch


def chunks(means, noises, count, seed=0):
    """Gradients (count, S, P) with the given means (S, P) and noise stds (S,)."""
    generator = torch.Generator().manual_seed(seed)
    return means + torch.randn(count, *means.shape, generator=generator) * torch.tensor(noises)[:, None]


def directions(signals, weights=64):
    """Means (S, P) along one direction, so that <E g_j, E g_k> = signals[j] * signals[k]."""
    return torch.tensor(signals)[:, None] * torch.ones(weights) / weights**0.5


def test_estimates_are_those_of_the_distribution():
    means, noises = directions([1.0, 0.5, 0.0]), [0.5, 0.5, 1.0]
    found = estimate(chunks(means, noises, 400))
    torch.testing.assert_close(found.signal, (means @ means.T).double(), atol=0.05, rtol=0)
    expected = torch.diag(torch.tensor([16.0, 16.0, 64.0], dtype=torch.float64))  # P times the variance of a weight
    torch.testing.assert_close(found.noise, expected, atol=1.0, rtol=0)
    assert found.snr()[0] == pytest.approx(1 / 4, abs=0.03)


def test_errors_are_the_spread_of_the_estimates():
    means, noises = directions([0.3, 0.0]), [0.5, 0.5]
    runs = [estimate(chunks(means, noises, 12, seed)) for seed in range(200)]
    spread = torch.stack([run.signal for run in runs]).std(dim=0)
    told = torch.stack([run.error for run in runs]).mean(dim=0)
    torch.testing.assert_close(told, spread, rtol=0.2, atol=0)
    bias = torch.stack([run.signal for run in runs]).mean(dim=0) - (means @ means.T).double()
    assert (bias.abs() < 3.5 * spread / 200**0.5).all()


def test_sketches_keep_inner_products():
    gradients = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    gradients[1] += gradients[0]
    scale = torch.rand(50_000)
    small = sketch(gradients, scale, random_signs(50_000, seed=0))
    assert small.shape == (3, 4096)
    exact = (gradients * scale) @ (gradients * scale).T
    lengths = exact.diagonal().sqrt()
    torch.testing.assert_close(small @ small.T, exact, atol=float(4 * lengths.max() ** 2 / 4096**0.5), rtol=0)


def test_gain_is_by_hand():
    signal = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    noise = torch.tensor([[8.0, 0.0], [0.0, 2.0]])
    assert gain([0], signal, noise, chunks=2) == pytest.approx(5 / (4 + 4) ** 0.5)
    assert gain([0, 1], signal, noise, chunks=2) == pytest.approx(7 / (7 + 5) ** 0.5)


def test_best_steps_balance_signal_and_noise():
    signal, noise = (
        torch.eye(4) * torch.tensor([1.0, 1.0, 4.0, 0.1]),
        torch.eye(4) * torch.tensor([1.0, 9.0, 64.0, 0.1]),
    )
    assert best_steps(1, signal, noise, chunks=1) == (0,)
    assert best_steps(2, signal, noise, chunks=1) == (0, 3)
    assert best_steps(1, signal, noise, chunks=1e6) == (2,)  # many chunks: noise averages out
    assert best_steps(4, signal, noise, chunks=1) == (0, 1, 2, 3)


def test_a_step_of_twice_the_gain_is_not_worth_thrice_the_time():
    signal, noise = torch.eye(3) * torch.tensor([4.0, 2.0, 1.0]), torch.eye(3) * 16.0
    assert best_steps(1, signal, noise, chunks=1) == (0,)
    assert best_steps(1, signal, noise, chunks=1, cost=lambda members: 3.0 if 0 in members else 1.0) == (1,)


@pytest.mark.parametrize(("first", "chosen"), [(1.0, (5,)), (3.0, (6,))])
def test_the_probe_asks_for_the_cost_of_the_steps_themselves(first, chosen):
    probe = StepProbe((5, 6, 7), count=1, chunks=1, weights=64, seed=0, cost=lambda steps: first if 5 in steps else 1.0)
    gradients = chunks(directions([1.0, 0.7, 0.5]), [0.1, 0.1, 0.1], 12)
    probe.scale = metric(gradients[0])
    assert probe.learn(torch.stack([probe.sketch(one) for one in gradients]))[0] == chosen


def test_many_steps_are_chosen_one_after_another(monkeypatch):
    monkeypatch.setattr("rl.step_probe.MOST_SETS", 0)
    signal, noise = (
        torch.eye(4) * torch.tensor([1.0, 1.0, 4.0, 0.1]),
        torch.eye(4) * torch.tensor([1.0, 9.0, 64.0, 0.1]),
    )
    assert best_steps(2, signal, noise, chunks=1) == (0, 3)


def test_what_is_not_known_is_drawn_to_the_mean_and_what_is_known_stays():
    vague = estimate(chunks(directions([0.0, 0.0, 0.0]), [1.0, 1.0, 1.0], 4))
    shrunk = vague.shrunk()
    assert shrunk.std() < 0.5 * vague.signal.std()
    assert (shrunk.diagonal() > -vague.error.diagonal()).all()
    clear = estimate(chunks(directions([3.0, 0.1, 0.1]), [0.1, 0.1, 0.1], 40))
    torch.testing.assert_close(clear.shrunk(), clear.signal, rtol=0.05, atol=0.02)


def test_the_probe_finds_the_steps_that_learn_and_comes_back_to_the_bit():
    means, noises = directions([0.2, 1.0, 1.0, 0.0, 0.0]), [1.0, 0.4, 0.4, 0.4, 2.0]
    probe = StepProbe(steps=(0, 1, 2, 3, 4), count=2, chunks=4, weights=64, seed=0, cost=len)
    for rollout in range(8):
        gradients = chunks(means, noises, 4, seed=rollout)
        if probe.scale is None:
            probe.scale = metric(gradients[0])
        chosen, _ = probe.learn(torch.stack([probe.sketch(one) for one in gradients]))
    assert chosen == (1, 2)
    other = StepProbe(steps=(0, 1, 2, 3, 4), count=2, chunks=4, weights=64, seed=0, cost=len)
    other.load(probe.state())
    more = torch.stack([probe.sketch(one) for one in chunks(means, noises, 4, seed=99)])
    for left, right in zip(*(one.learn(more)[1].__dict__.values() for one in (probe, other)), strict=True):
        assert torch.equal(left, right)
