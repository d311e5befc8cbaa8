import pytest
import torch
from torch import nn

from rl.gradient_sketch import WIDTH, GradientSketch, metric, random_signs


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


def folded(vector, width):
    """The sketch by its definition, number by number."""
    return torch.zeros(width).index_add(0, torch.arange(len(vector)) % width, vector * random_signs(len(vector)))


@pytest.fixture
def sketch(network):
    made = GradientSketch(weights_of(network), width=64)
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


@pytest.mark.parametrize("columns", [400, 10], ids=["everywhere", "in a few columns"])
def test_sketches_keep_inner_products(columns):
    network = nn.Linear(1024, 300, bias=False)
    sketch = GradientSketch(weights_of(network))
    sketch.load({"scale": torch.rand(1024 * 300) + 0.5})
    small, large = [], []
    for seed in range(3):
        rows = torch.zeros(4, 1024)
        rows[:, :columns] = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)) + 0.5
        with sketch.listening() as found:
            loss = network(rows).square().mean()
            sketch.follow(loss)
            loss.backward()
        small.append(found)
        large.append(torch.cat([weight.grad.flatten() for weight in weights_of(network)]) * sketch.scale)
        network.zero_grad()
    small, large = torch.stack(small), torch.stack(large)
    exact = large @ large.T
    assert small.shape == (3, WIDTH)
    torch.testing.assert_close(small @ small.T, exact, atol=float(4 * exact.diagonal().max() / WIDTH**0.5), rtol=0)


def test_the_scale_is_made_of_mean_squares(network):
    sketch = GradientSketch(weights_of(network), width=64)
    assert not heard(sketch, network, 1).any()
    heard(sketch, network, 2)
    assert sketch.state() == {}
    length = sketch.renew(mean_over_one)
    squares = (gradient(network, 1).square() + gradient(network, 2).square()) / 2
    assert length == pytest.approx(float(squares.sum()) ** 0.5)
    torch.testing.assert_close(sketch.scale, metric(squares))
    large = squares > squares.mean()
    torch.testing.assert_close(
        (squares[large] + 0.01 * squares.mean()) * sketch.scale[large] ** 4, torch.ones(int(large.sum()))
    )
    other = GradientSketch(weights_of(network), width=64)
    other.load(sketch.state())
    assert torch.equal(heard(other, network, 3), heard(sketch, network, 3))
    sketch.renew(mean_over_one)
    torch.testing.assert_close(sketch.scale, metric(gradient(network, 3).square()))


@pytest.mark.parametrize("factor", [float("inf"), 0.0], ids=["float16 cannot hold it", "there is none"])
def test_of_some_gradients_no_scale_is_made(network, factor):
    sketch = GradientSketch(weights_of(network), width=64)
    for _ in range(2):
        with sketch.listening():
            loss = loss_of(network, 1) * factor
            sketch.follow(loss)
            loss.backward()
        before = sketch.scale
        sketch.renew(mean_over_one)
        assert sketch.scale is before
        heard(sketch, network, 1)
        sketch.renew(mean_over_one)
        assert sketch.scale.isfinite().all()


def test_a_pass_of_a_loss_that_was_not_followed_is_an_error(network, sketch):
    heard(sketch, network, 1)
    with pytest.raises(AssertionError, match="not followed"), sketch.listening():
        loss_of(network, 1).backward()
