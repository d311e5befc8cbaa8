import pytest
import torch
from torch import nn

from rl.gradient_sketch import GradientSketch, metric, random_signs


def mean_over_one(tensor):
    return tensor


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 40))


def weights_of(network):
    return list(network.parameters())


def loss_of(network, seed):
    rows = torch.randn(8, 60, generator=torch.Generator().manual_seed(seed))
    return network(rows).square().mean()


def gradient(network, seed):
    found = torch.autograd.grad(loss_of(network, seed), weights_of(network))
    return torch.cat([one.flatten() for one in found])


def heard(sketch, network, seed, factor=1.0):
    with sketch.listening() as found:
        loss = loss_of(network, seed)
        sketch.follow(loss)
        (loss * factor).backward()
    return found


def folded(vector, width, seed=0):
    """The sketch by its definition, number by number."""
    found = torch.zeros(width)
    return found.index_add(0, torch.arange(len(vector)) % width, vector * random_signs(len(vector), seed))


@pytest.fixture
def sketch(network):
    made = GradientSketch(weights_of(network), seed=0, width=64)
    made.load({"scale": torch.rand(sum(weight.numel() for weight in weights_of(network))) + 0.5})
    return made


@pytest.mark.parametrize("factor", [1.0, 1 / 8, 2.0**16])
def test_a_sketch_is_of_the_losss_gradient_whatever_an_engine_makes_of_the_loss(network, sketch, factor):
    expected = folded(gradient(network, 1) * sketch.scale, 64)
    torch.testing.assert_close(heard(sketch, network, 1, factor), expected, rtol=1e-4, atol=1e-6)


def test_each_pass_is_heard_by_itself_and_the_gradients_are_left_alone(network, sketch):
    first, second = heard(sketch, network, 1), heard(sketch, network, 2)
    torch.testing.assert_close(second, folded(gradient(network, 2) * sketch.scale, 64), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first, second)
    summed = torch.cat([weight.grad.flatten() for weight in weights_of(network)])
    torch.testing.assert_close(summed, gradient(network, 1) + gradient(network, 2))
    loss_of(network, 3).backward()  # nobody listens
    torch.testing.assert_close(second, folded(gradient(network, 2) * sketch.scale, 64), rtol=1e-4, atol=1e-6)


def test_sketches_keep_inner_products():
    network = nn.Linear(400, 300)
    sketch = GradientSketch(weights_of(network), seed=0)
    sketch.load({"scale": torch.rand(400 * 300 + 300)})
    small, large = [], []
    for seed in range(3):
        rows = torch.randn(4, 400, generator=torch.Generator().manual_seed(seed)) + 0.5
        with sketch.listening() as found:
            network(rows).square().mean().backward()
        small.append(found)
        large.append(torch.cat([weight.grad.flatten() for weight in weights_of(network)]) * sketch.scale)
        network.zero_grad()
    small, large = torch.stack(small), torch.stack(large)
    exact = large @ large.T
    assert small.shape == (3, 4096)
    torch.testing.assert_close(small @ small.T, exact, atol=float(4 * exact.diagonal().max() / 4096**0.5), rtol=0)


def test_the_scale_is_made_of_mean_squares(network):
    sketch = GradientSketch(weights_of(network), seed=0, width=64)
    assert not heard(sketch, network, 1).any()
    heard(sketch, network, 2)
    assert sketch.state() == {}
    sketch.measure(mean_over_one)
    squares = (gradient(network, 1).square() + gradient(network, 2).square()) / 2
    torch.testing.assert_close(sketch.scale, metric(squares))
    large = squares > squares.mean()
    torch.testing.assert_close(
        (squares[large] + 0.01 * squares.mean()) * sketch.scale[large] ** 4, torch.ones(int(large.sum()))
    )
    other = GradientSketch(weights_of(network), seed=0, width=64)
    other.load(sketch.state())
    assert torch.equal(heard(other, network, 3), heard(sketch, network, 3))


def test_what_float16_cannot_hold_makes_no_scale(network):
    sketch = GradientSketch(weights_of(network), seed=0, width=64)
    with sketch.listening():
        (loss_of(network, 1) * float("inf")).backward()
    sketch.measure(mean_over_one)
    assert sketch.scale is None
    heard(sketch, network, 1)
    sketch.measure(mean_over_one)
    assert sketch.scale.isfinite().all()
