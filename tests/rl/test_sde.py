import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from rl.keyed import keyed_generator
from rl.sde import (
    ddim_scheduler,
    draw_steps,
    kl_map,
    log_prob_map,
    make_schedule,
    resolve_train_steps,
    slide_window,
    step_mean,
    step_weights,
)


def configured(**changes):
    return DDIMScheduler(**{"clip_sample": False, "beta_schedule": "scaled_linear", **changes})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    ],
    ids=str,
)
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_every_step_is_the_one_diffusers_takes(prediction_type, changes, eta):
    scheduler = configured(prediction_type=prediction_type, **changes)
    schedule = make_schedule(scheduler, 7, eta)
    generator = torch.Generator().manual_seed(0)
    for step, timestep in enumerate(scheduler.timesteps):
        latents, output, noise = torch.randn(3, 2, 4, 5, 6, generator=generator)
        mean, std = step_mean(output, latents, torch.full((2,), step), schedule)
        theirs = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_with_eta_of_one_every_step_but_the_last_is_ddpms(prediction_type, spacing):
    """Its variance is the posterior's ("fixed_small"), which is DDIM's at eta = 1; its last step adds none. Ten steps
    divide the 1000: where they are uneven the two end a step elsewhere."""
    settings = {"clip_sample": False, "beta_schedule": "scaled_linear", "prediction_type": prediction_type,
                "timestep_spacing": spacing}  # fmt: skip
    scheduler = DDPMScheduler(**settings)
    scheduler.set_timesteps(10)
    schedule = make_schedule(ddim_scheduler(scheduler), 10, 1.0)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        latents, output = torch.randn(2, 2, 4, 5, 6, generator=generator)
        noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(step))
        theirs = scheduler.step(output, timestep, latents, generator=torch.Generator().manual_seed(step)).prev_sample
        mean, std = step_mean(output, latents, torch.full((2,), step), schedule)
        torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule 'sigmoid', which is none of linear"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "has use_flow_sigmas"),
        (
            EulerDiscreteScheduler(timestep_type="continuous"),
            "timestep_type: continuous",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_noise_that_is_not_ddpms_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        ddim_scheduler(scheduler)


def test_betas_that_are_given_need_no_schedule():
    scheduler = DDPMScheduler(beta_schedule="sigmoid", trained_betas=[0.1, 0.2, 0.3])
    assert ddim_scheduler(scheduler).betas.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_distilled_networks_scheduler_is_warned_about(caplog):
    ddim_scheduler(LCMScheduler())
    assert "LCMScheduler is for networks that were distilled to its few steps" in caplog.text


def test_rows_of_one_batch_may_be_at_different_steps():
    schedule = make_schedule(configured(), 5, 1.0)
    latents, output = torch.randn(2, 3, 4, 2, 2)
    together, stds = step_mean(output, latents, torch.tensor([0, 2, 3]), schedule)
    for row, step in enumerate([0, 2, 3]):
        alone, std = step_mean(output[row : row + 1], latents[row : row + 1], torch.tensor([step]), schedule)
        torch.testing.assert_close(together[row], alone[0])
        assert stds[row] == std[0]


def test_log_prob_is_the_normal_distributions_averaged_over_channels():
    values, mean, std = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.rand(2, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(values).mean(dim=1)
    torch.testing.assert_close(log_prob_map(values, mean, std), expected)


def test_kl_is_the_normal_distributions():
    mean, reference, std = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.rand(2, 1, 1, 1) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).mean(dim=1)
    torch.testing.assert_close(kl_map(mean, reference, std), expected)


def test_start_timestep_cuts_the_noise_schedule_and_diffusers_agrees():
    original = configured(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    cut = ddim_scheduler(original, start_timestep=959)
    schedule = make_schedule(cut, 10, 1.0)
    assert schedule.timesteps.tolist() == [959, 863, 767, 671, 575, 479, 383, 287, 191, 95]
    assert torch.equal(schedule.alphas, original.alphas_cumprod[schedule.timesteps])
    assert torch.equal(schedule.next_alphas[:-1], schedule.alphas[1:])
    assert schedule.next_alphas[-1] == 1
    assert schedule.stds[-1] == 0


def test_other_schedulers_are_converted_and_the_log_says_so(caplog):
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    converted = ddim_scheduler(euler)
    assert isinstance(converted, DDIMScheduler)
    assert not converted.config.clip_sample  # DDIM's default would clip, Euler never did
    assert converted.config.prediction_type == "v_prediction"
    assert "EulerDiscreteScheduler is converted to DDIM" in caplog.text
    assert isinstance(ddim_scheduler(PNDMScheduler(skip_prk_steps=True)), DDIMScheduler)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "no discrete noise schedule"),
        (DDIMScheduler(thresholding=True, clip_sample=False), "thresholding"),
    ],
)
def test_what_has_no_gaussian_step_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        ddim_scheduler(scheduler)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("all", (0, 1, 2, 3)), ("1:3", (1, 2)), (["1", "2"], (1, 2)), ([3, 0], (0, 3)), (["2:"], (2, 3)), (":2", (0, 1))],
)
def test_train_steps(spec, expected):
    assert resolve_train_steps(spec, make_schedule(configured(), 5, 1.0)) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [("some", "not understood"), ([5], "0 to 4"), ([4], "deterministic"), ("3:3", "names no step")],
)
def test_wrong_train_steps_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_train_steps(spec, make_schedule(configured(), 5, 1.0))


def test_without_noise_there_is_nothing_to_train():
    with pytest.raises(ValueError, match="eta above 0"):
        resolve_train_steps("all", make_schedule(configured(), 5, 0.0))
    with pytest.raises(ValueError, match="eta is 2"):
        make_schedule(configured(), 5, 2)
    with pytest.raises(ValueError, match="num_inference_steps is 2000"):
        make_schedule(configured(), 2000, 1)
    with pytest.raises(ValueError, match="start_timestep is 1000"):
        ddim_scheduler(configured(), start_timestep=1000)


def test_outside_the_window_a_step_is_deterministic_ddim():
    scheduler = configured(timestep_spacing="trailing")
    schedule, plain, still = (
        make_schedule(scheduler, 5, eta, window) for eta, window in ((1, "1:3"), (1, None), (0, None))
    )
    assert torch.equal(schedule.stds[1:3], plain.stds[1:3])
    latents, output = torch.randn(2, 1, 4, 2, 2)
    for step in (0, 3, 4):
        mean, std = step_mean(output, latents, torch.tensor([step]), schedule)
        assert std == 0
        torch.testing.assert_close(mean, step_mean(output, latents, torch.tensor([step]), still)[0])


def test_a_window_slides_to_the_last_step_with_noise_and_stays():
    """The example of MixGRPO's algorithm, and one that does not hit the end."""
    found = [slide_window("0:3", rollout, 2, 1, steps=7, noisy=6) for rollout in range(10)]
    assert found == ["0:3", "0:3", "1:4", "1:4", "2:5", "2:5", "3:6", "3:6", "3:6", "3:6"]
    assert [slide_window("1:3", rollout, 1, 3, 10, 9) for rollout in range(4)] == ["1:3", "4:6", "7:9", "7:9"]
    with pytest.raises(ValueError, match=r"only the first 6 of the 7 steps have noise, .* end at 6 at most"):
        slide_window("4:7", 0, 1, 1, 7, 6)


@pytest.mark.parametrize("window", ["3:1", "1", "0:9", "-1:2", "a:b", "2:2"])
def test_a_window_that_is_none_is_named(window):
    with pytest.raises(ValueError, match=f"sde_window is '{window}'; write a window of the 5 steps such as `1:3`"):
        make_schedule(configured(), 5, 1.0, window)


def test_loss_weights_have_mean_one():
    schedule = make_schedule(configured(), 6, 1.0)
    assert step_weights("uniform", schedule, [1, 3]).tolist() == [1.0, 1.0]
    weights = step_weights("std", schedule, [1, 3])
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(weights[0] / weights[1], schedule.stds[1] / schedule.stds[3])


def test_a_fraction_of_the_steps_comes_up_evenly():
    drawn = [draw_steps((2, 3, 5, 7), 0.5, keyed_generator("steps", number)) for number in range(400)]
    assert {len(steps) for steps in drawn} == {2}
    counts = [sum(step in steps for steps in drawn) for step in (2, 3, 5, 7)]
    assert all(150 < count < 250 for count in counts)
    assert draw_steps((2, 3, 5), 0.01, keyed_generator("steps", 0)) in {(2,), (3,), (5,)}
    assert draw_steps((2, 3, 5), 1.0, keyed_generator("steps", 0)) == (2, 3, 5)
