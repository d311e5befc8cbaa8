import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from finetune.sft_loss import min_snr_weights, noised, offset_noise, sft_loss, target
from rl.sde import predicted_x0_and_noise

TIMESTEPS = torch.tensor([1, 250, 600, 990])


@pytest.fixture
def scheduler():
    return DDIMScheduler(beta_schedule="scaled_linear")


@pytest.fixture
def clean_and_noise():
    source = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 4, 3, 3, generator=source).unbind()


def test_noise_and_targets_are_diffusers_own(scheduler, clean_and_noise):
    clean, noise = clean_and_noise
    alphas = scheduler.alphas_cumprod[TIMESTEPS]
    torch.testing.assert_close(noised(clean, noise, alphas), scheduler.add_noise(clean, noise, TIMESTEPS))
    velocity = scheduler.get_velocity(clean, noise, TIMESTEPS)
    torch.testing.assert_close(target(clean, noise, alphas, "v_prediction"), velocity)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_network_that_says_the_target_finds_the_clean_latent(kind, scheduler, clean_and_noise):
    clean, noise = clean_and_noise
    alphas = scheduler.alphas_cumprod[TIMESTEPS]
    said = target(clean, noise, alphas, kind)
    x0, eps = predicted_x0_and_noise(said, noised(clean, noise, alphas), alphas.view(-1, 1, 1, 1), kind)
    torch.testing.assert_close(x0, clean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(eps, noise, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_makes_all_parametrisations_weigh_errors_of_x0_alike(kind, scheduler, clean_and_noise):
    """An error of x_0 of the same size costs min(SNR, gamma) times its square, whatever the network predicts."""
    clean, noise = clean_and_noise
    alphas = scheduler.alphas_cumprod[TIMESTEPS]
    noisy, wide = noised(clean, noise, alphas), alphas.view(-1, 1, 1, 1)
    wrong = clean + 0.1
    matching = (noisy - wide.sqrt() * wrong) / (1 - wide).sqrt()  # the noise that goes with it
    errors = ((target(wrong, matching, alphas, kind) - target(clean, noise, alphas, kind)) ** 2).mean(dim=(1, 2, 3))
    wanted = compute_snr(scheduler, TIMESTEPS).clamp(max=5.0) * 0.01
    torch.testing.assert_close(min_snr_weights(alphas, 5.0, kind) * errors, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_min_snr_where_there_is_no_signal(kind, weight):
    assert min_snr_weights(torch.zeros(1), 5.0, kind).tolist() == [weight]


def test_offset_noise_moves_whole_channels():
    noise, shift = torch.zeros(2, 3, 4, 4), torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 0.0]])
    moved = offset_noise(noise, shift, 0.1)
    torch.testing.assert_close(moved.mean(dim=(2, 3)), 0.1 * shift)
    assert float(moved.var(dim=(2, 3)).max()) == 0


def test_the_loss_divides_by_the_number_of_pictures():
    output, wanted = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    wanted[0], wanted[1] = 1.0, 2.0  # errors 1 and 4
    loss, error = sft_loss(output, wanted, torch.tensor([0.5, 1.5]))
    assert (float(loss), float(error)) == (0.5 * (0.5 * 1 + 1.5 * 4), 2.5)
